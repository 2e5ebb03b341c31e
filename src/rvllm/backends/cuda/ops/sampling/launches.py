"""From logits to drawn tokens: their launches.

FAMILY: what the registry knows of them.
"""

from __future__ import annotations

import ctypes

from rvllm.backends.cuda.device.launches import ints
from rvllm.backends.cuda.layout.fusion import Stage
from rvllm.backends.cuda.layout.metadata import BEST_ONLY, HOST_TOKENS, NUM_SAMPLES
from rvllm.backends.cuda.ops.family import Family, Lowering
from rvllm.backends.cuda.ops.sampling.slots import CHUNK, PICK_THREADS, SCAN_WARPS
from rvllm.kernels.encoder.specs import HIDDEN_TOKENS
from rvllm.program.ops.dense import HideTokens, Sample


def _hide_tokens(to: Lowering, stage: Stage) -> None:
    (op,) = stage.ops
    assert isinstance(op, HideTokens)
    for first in range(0, len(op.tokens), HIDDEN_TOKENS):
        ids = op.tokens[first : first + HIDDEN_TOKENS]
        to.plan(
            stage.name,
            "sm80_hide_tokens",
            lambda c: (c.samples, 1, 1),
            128,
            to.at.logits,
            to.meta(NUM_SAMPLES),
            *ints(to.shape.logits_stride, len(ids)),
            (ctypes.c_int * HIDDEN_TOKENS)(*ids),
        )


def _sample(to: Lowering, stage: Stage) -> None:
    chunks = -(-to.shape.vocab // CHUNK)
    rows = (to.meta(to.layout.sample_slots), to.meta(NUM_SAMPLES))
    vocab, stride = ctypes.c_int(to.shape.vocab), ctypes.c_int(to.shape.logits_stride)
    history = ctypes.c_int(to.shape.history_stride)
    best_only = to.meta(BEST_ONLY) if to.leaves_best else 0
    to.plan(
        stage.name,
        "sm80_sample_scan",
        lambda c: (-(-chunks // SCAN_WARPS), c.samples, 1),
        32 * SCAN_WARPS,
        to.at.logits,
        to.at.scaled,
        to.at.bests,
        to.at.parameters,
        *rows,
        to.at.histories,
        to.at.bias_ids,
        to.at.biases,
        to.at.stops,
        to.at.masks,
        to.meta(to.layout.mask_rows),
        best_only,
        vocab,
        stride,
        history,
        ctypes.c_int(to.shape.mask_words),
    )
    to.plan(
        stage.name,
        "sm80_sample_pick",
        lambda c: (c.samples, 1, 1),
        PICK_THREADS,
        to.at.tokens,
        to.at.last_tokens,
        to.at.scaled,
        to.at.bests,
        to.at.parameters,
        *rows,
        to.at.histories,
        to.at.logits,
        best_only,
        to.meta(HOST_TOKENS),
        vocab,
        stride,
        history,
        ctypes.c_int(chunks),
    )


FAMILY = Family(emitters={HideTokens: _hide_tokens, Sample: _sample})

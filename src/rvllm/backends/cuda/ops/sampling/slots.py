"""Host images of what the sampling kernels keep per slot, and how starting sequences are packed for them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from rvllm.backends.base import MAX_BIASES, MAX_STOPS, SamplingSpec, SlotStart
from rvllm.errors import UsageError
from rvllm.kernels.constants import constants

_SIZES = constants("sampling/sampling.cuh")
_SLOT = constants("common/slot.cuh")
FIND_BEST, DRAW = _SLOT["FIND_BEST"], _SLOT["DRAW"]  # what a head may leave instead of logits
MAX_TOP = _SIZES["MAX_TOP"]  # most likely tokens reported with logprobs
CHUNK = _SIZES["CHUNK"]  # logits a warp of sample_scan looks at
SCAN_WARPS = _SIZES["SCAN_WARPS"]  # warps of its blocks
START_WORDS = constants("sampling/sample.cu")["START_WORDS"]  # int32 words that describe one starting slot
PICK_THREADS = _SIZES["PICK_THREADS"]
GREEDY = 1e-5  # temperatures below it draw the largest logit; common/slot.cuh says so too
HISTORY = 1  # flag: the slot's tokens are counted

# `struct Slot` of kernels/common/slot.cuh, 64 bytes.
SLOT = np.dtype(
    [("temperature", "<f4"), ("noise", "<u4", (2,)), ("top_k", "<i4"), ("top_p", "<f4"), ("min_p", "<f4"),
     ("repetition", "<f4"), ("presence", "<f4"), ("frequency", "<f4"), ("min_tokens", "<i4"),
     ("seed", "<u8"), ("generated", "<i4"), ("flags", "<u4"), ("biases", "<i4"), ("stops", "<i4")]
)  # fmt: skip


def counts_tokens(spec: SamplingSpec) -> bool:
    """Whether the slot needs its tokens counted: any penalty is on."""
    return spec.repetition_penalty != 1.0 or spec.presence_penalty != 0.0 or spec.frequency_penalty != 0.0


_FIELDS: dict[str, Callable[[SamplingSpec], float]] = {
    "temperature": lambda spec: spec.temperature,
    "top_k": lambda spec: spec.top_k,
    "top_p": lambda spec: spec.top_p,
    "min_p": lambda spec: spec.min_p,
    "repetition": lambda spec: spec.repetition_penalty,
    "presence": lambda spec: spec.presence_penalty,
    "frequency": lambda spec: spec.frequency_penalty,
    "min_tokens": lambda spec: spec.min_tokens,
    "seed": lambda spec: spec.seed & (2**64 - 1),
}  # of SLOT, where it is what a request says


MAX_DRAWN = (
    16  # rows whose noise the head adds; of more rows its tiles wait for it, and the sampler is quicker
)


def unfiltered(spec: SamplingSpec, vocab: int) -> bool:
    """Whether nothing but the temperature says what is drawn; the kernels' function of this name."""
    return not 0 < spec.top_k < vocab and spec.top_p >= 1.0 and spec.min_p <= 0.0


def left_by_head(spec: SamplingSpec, vocab: int) -> int:
    """What the slot needs of the head: FIND_BEST, DRAW, or 0 for logits, as more is asked of them."""
    changed = counts_tokens(spec) or spec.logit_bias or (spec.min_tokens > 0 and spec.stop_token_ids)
    if changed or spec.logprobs is not None:
        return 0
    if spec.temperature < GREEDY:
        return FIND_BEST
    return DRAW if unfiltered(spec, vocab) else 0


@dataclass(frozen=True)
class StateSizes:
    """Bytes of the sampler's device arrays for `slots` slots and a vocabulary.

    history_stride: u16 elements from one slot's token counts to the next.
    """

    slots: int
    vocab: int

    @property
    def history_stride(self) -> int:
        """Elements; a multiple of 8, so that every slot's counts start on 16 bytes."""
        return -(-self.vocab // 8) * 8

    @property
    def histories(self) -> int:
        """u16 [slots, history_stride]."""
        return 2 * self.slots * self.history_stride

    @property
    def parameters(self) -> int:
        """`Slot` [slots]."""
        return SLOT.itemsize * self.slots

    @property
    def biases(self) -> int:
        """Bias ids, and as much again for the biases: [slots, MAX_BIASES] of 4 bytes."""
        return 4 * self.slots * MAX_BIASES

    @property
    def stops(self) -> int:
        """int32 [slots, MAX_STOPS]."""
        return 4 * self.slots * MAX_STOPS

    def chunks(self) -> int:
        """Chunks a row has; `bests` takes 8 bytes for each, per row."""
        return -(-self.vocab // CHUNK)


def pack_starts(started: Sequence[SlotStart], vocab: int) -> tuple[NDArray[np.int32], NDArray[np.int32]]:
    """What `slot_start` reads: int32 [n, START_WORDS] entries and the int32 words they point into.

    Raises UsageError for a logit_bias or a list of stop tokens longer than a slot holds.
    """
    entries = np.zeros((len(started), START_WORDS), dtype=np.int32)
    words: list[NDArray[np.int32]] = []
    used = 0

    def put(values: NDArray[np.int32]) -> int:
        nonlocal used
        words.append(values)
        used += len(values)
        return used - len(values)

    slots = np.zeros(len(started), dtype=SLOT)
    for name, of in _FIELDS.items():
        slots[name] = [of(start.sampling) for start in started]
    slots["generated"] = [len(start.tokens) - start.prompt_len for start in started]
    for number, (entry, start) in enumerate(zip(entries, started, strict=True)):
        spec = start.sampling
        entry[0] = start.slot
        if not (counts_tokens(spec) or spec.logit_bias or spec.min_tokens):
            continue
        bias = [(i, b) for i, b in spec.logit_bias if 0 <= i < vocab]
        stops = [i for i in spec.stop_token_ids if 0 <= i < vocab] if spec.min_tokens > 0 else []
        if len(bias) > MAX_BIASES:
            raise UsageError(f"logit_bias has {len(bias)} entries; at most {MAX_BIASES} fit a request")
        if len(stops) > MAX_STOPS:
            raise UsageError(f"min_tokens with {len(stops)} stop tokens; at most {MAX_STOPS} fit a request")
        counted = counts_tokens(spec)
        entry[1:4] = (
            (put(start.tokens.astype(np.int32)), len(start.tokens), start.prompt_len) if counted else 0
        )
        entry[4] = put(np.array([i for i, _ in bias], dtype=np.int32))
        put(np.array([b for _, b in bias], dtype=np.float32).view(np.int32))
        entry[5] = put(np.array(stops, dtype=np.int32))
        slots["flags"][number] = HISTORY if counted else 0
        slots["biases"][number], slots["stops"][number] = len(bias), len(stops)
    entries[:, 8:] = slots.view(np.int32).reshape(len(started), SLOT.itemsize // 4)
    return entries, np.concatenate(words) if words else np.zeros(0, dtype=np.int32)

"""Where everything a launch needs lies on the device, and the capacities it was laid out for."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from rvllm.backends.cuda.layout.packed import WeightLayout
from rvllm.program.rope import Rope


@dataclass(frozen=True)
class Addresses:
    """Where everything lies on the device; all zero where only the plan itself is wanted.

    logits, scaled: float32 [rows, logits_stride]. tables: int32 [slots, table_stride]. The rest: see
    `sampling.StateSizes` and the kernels.
    """

    weights: Mapping[tuple[str, WeightLayout], int]
    buffers: Mapping[str, int]
    caches: Mapping[str, tuple[int, int]]
    ropes: Mapping[Rope, tuple[int, int]]
    metadata: int
    tables: int
    partial: int
    arrivals: int
    logits: int
    scaled: int
    bests: int
    tokens: int
    last_tokens: int
    parameters: int
    histories: int
    bias_ids: int
    biases: int
    stops: int
    masks: int
    scores: int  # what the logprobs kernel is asked and answers: `sampling.LogprobArrays`
    starts: int  # slot starts are sent here: entries, then the words they point into
    gemm_workspace: int
    scratch: Mapping[str, int]  # of families of ops, by name
    states: Mapping[str, int]  # of recurrent layers: float32 [slots, elements] each


@dataclass(frozen=True)
class Shape:
    """Capacities the addresses were laid out for, and strides that follow from the model."""

    tokens: int
    samples: int
    seqs: int
    vocab: int
    logits_stride: int
    table_stride: int
    history_stride: int
    mask_words: int
    kv_blocks: int

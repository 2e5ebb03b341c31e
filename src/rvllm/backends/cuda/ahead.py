"""Weights that idle blocks of a launch bring to L2 for the products behind it."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from rvllm.backends.cuda.fuse import Stage
from rvllm.backends.cuda.placement import Form
from rvllm.program.ops import (
    Attention,
    BlockSparseAttention,
    Experts,
    LatentAttention,
    Linear,
    Logits,
    Op,
    Route,
)

Weights = Mapping[tuple[str, Form], int]

ATTENTION_AHEAD = 0  # bytes asked for beside attention; 0: none; `scripts/gpu/marginal.py` times others
FEW_SEQS = 8  # the largest decode step with memory to spare beside attention
PIECE = 4096  # bytes a thread asks for, see `ahead.cuh`
# Behind these, other launches ask for weights, or nobody knows which ones.
UNKNOWN = (Attention, BlockSparseAttention, LatentAttention, Route, Experts)


@dataclass(frozen=True)
class Ahead:
    """Up to two stretches of weights: (device address, bytes), in the order in which they are read."""

    stretches: tuple[tuple[int, int], ...] = ()

    def grid(self, workers: int, threads: int, sm_count: int) -> int:
        """Blocks of a launch where `workers` share the work and others, in the same wave, ask for this."""
        more = -(-sum(size for _, size in self.stretches) // (threads * PIECE))
        return max(workers, min(workers + more, sm_count))

    def parameters(self) -> list[object]:
        """What kernels take: both addresses, then both sizes."""
        (first, first_bytes), (second, second_bytes), *_ = (*self.stretches, (0, 0), (0, 0))
        return [first, second, ctypes.c_uint(first_bytes), ctypes.c_uint(second_bytes)]


def stretch_of(weights: Weights, product: Linear | Logits, most: int) -> tuple[int, int] | None:
    """Address and size of up to the first `most` bytes of a product's packed weights; None if it has none."""
    for form in ("packed", "gated"):
        address = weights.get((product.weight.name, form))
        if address is not None:
            return address, min(most, 2 * product.weight.elements) // 16 * 16
    return None


def behind_attention(weights: Weights, stages: Sequence[Stage], stage: Stage, most: int) -> Ahead:
    """Up to `most` bytes of the two products behind an attention's stage, as far as they are known."""
    found: list[tuple[int, int]] = []
    for product in _products(stages, stage):
        stretch = stretch_of(weights, product, most - sum(size for _, size in found))
        if stretch is None or not stretch[1] or len(found) == 2:
            break
        found.append(stretch)
    return Ahead(tuple(found))


def _products(stages: Sequence[Stage], stage: Stage) -> Iterator[Linear | Logits]:
    """The products behind a stage, up to what must be computed before anybody knows the next."""
    at = next((i for i, other in enumerate(stages) if other is stage), len(stages))
    ops: Iterator[Op] = (op for later in stages[at + 1 :] for op in later.ops)
    for op in ops:
        if isinstance(op, UNKNOWN):
            return
        if isinstance(op, Linear | Logits):
            yield op

"""One token's products, one or several a launch: see `kernels/decode/`; structs mirror `step.cuh`."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass, replace
from enum import IntEnum
from typing import Any

from rvllm.backends.cuda.ops.gemm.common import Kind, ceil_div
from rvllm.errors import MissingKernelError
from rvllm.kernels.decode.specs import MAX_STEPS, ROWS, SLOTS, WARPS, ring_bytes, static_smem
from rvllm.kernels.gemm.tiles import TILE


class Type(IntEnum):
    """What a step computes."""

    PRODUCT = 0
    ROUTE = 1
    UP = 2
    DOWN = 3


@dataclass(frozen=True)
class NormFront:
    """A norm of x [width] in front of a product, by float32 parameters; `normed` gets its result too."""

    x: int
    weight: int
    bias: int
    normed: int
    width: int
    eps: float
    layer: bool


@dataclass(frozen=True)
class Mixture:
    """What steps of a mixture take besides: see `Router` in `moe/router.cu`, `one_up` in `moe/one_token.cu`.

    entries: experts of a token, `always` of which every token has.
    """

    experts: int
    entries: int
    always: int
    groups: int = 0
    kept: int = 0
    flags: int = 0
    act: int = 0
    gated: bool = False
    share_scale: float = 1.0


@dataclass(frozen=True)
class Step:
    """One step of a launch; addresses are the device's, 0 for none.

    rows: packed rows of W that exist; k: columns; segments: into which K is cut. pitch: of out, in elements.
    kind, scale, soft_cap: of the epilogue, see `gemm/gemm.cuh`.
    """

    weights: int
    x: int
    out: int
    rows: int
    k: int
    segments: int
    pitch: int
    bias: int = 0
    residual: int = 0
    kind: Kind = Kind.STORE
    scale: float = 1.0
    soft_cap: float = 0.0
    type: Type = Type.PRODUCT
    norm: NormFront | None = None
    mixture: Mixture | None = None

    @property
    def blocks(self) -> int:
        """Of 64 columns."""
        return ceil_div(self.k, TILE)

    @property
    def x_bytes(self) -> int:
        """Shared memory of its input: of DOWN a row for each expert; UP has that of the step before."""
        rows = self.mixture.entries if self.mixture and self.type == Type.DOWN else 1
        return rows * self.blocks * TILE * 2

    def units(self, grid: int) -> int:
        """The most sums that a block keeps for its warps' units."""
        slices, each = ceil_div(self.rows, ROWS), self.segments
        if self.mixture and self.type == Type.UP:
            slices *= self.mixture.entries
        if self.mixture and self.type == Type.DOWN:
            each *= self.mixture.entries
        return ceil_div(slices, grid) * each

    def normed(self, norm: NormFront) -> Step:
        """The same step, which computes the norm of its input itself."""
        return replace(self, norm=norm)

    def words(self) -> _StepWords:
        """As the kernel reads it."""
        norm, m = self.norm, self.mixture or Mixture(0, 0, 0)
        return _StepWords(
            self.weights, norm.x if norm else self.x, self.out, self.bias, self.residual,
            norm.weight if norm else 0, norm.bias if norm else 0, norm.normed if norm else 0,
            int(self.type), int(self.kind), self.rows, self.pitch, self.k, self.blocks, self.segments,
            int(norm.layer) if norm else 0, self.scale, self.soft_cap, norm.eps if norm else 0.0,
            m.experts, m.entries, m.always, m.groups, m.kept, m.flags, m.act, int(m.gated), m.share_scale,
        )  # fmt: skip


class _StepWords(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_void_p) for name in (
            "weights", "x", "out", "bias", "residual", "norm_weight", "norm_bias", "normed",
        )),
        *((name, ctypes.c_int) for name in (
            "type", "kind", "rows", "pitch", "k", "blocks", "segments", "layer",
        )),
        *((name, ctypes.c_float) for name in ("scale", "soft_cap", "eps")),
        *((name, ctypes.c_int) for name in (
            "experts", "entries", "always", "groups", "kept", "flags", "act", "gated",
        )),
        ("share_scale", ctypes.c_float),
    ]  # fmt: skip


class _ChainWords(ctypes.Structure):
    _fields_ = [("steps", _StepWords * MAX_STEPS), ("count", ctypes.c_int), ("x_bytes", ctypes.c_int)]


@dataclass(frozen=True)
class ChainPlan:
    """How a chain of steps is launched: on `grid` blocks, with `smem` bytes of shared memory each."""

    kernel: str
    steps: Sequence[Step]
    grid: int
    block: int
    smem: int
    x_bytes: int

    def arguments(self, arrivals: int) -> list[Any]:
        """The kernel's parameters. arrivals: a uint64 on the device, zero before the first launch."""
        steps = (_StepWords * MAX_STEPS)(*(step.words() for step in self.steps))
        return [_ChainWords(steps, len(self.steps), self.x_bytes), arrivals]


def plan_chain(steps: Sequence[Step], tag: str, sm_count: int, smem_per_block: int) -> ChainPlan:
    """The launch of these steps, one behind the other, with as many loads in flight as there is room for.

    Raises MissingKernelError where there is no room.
    """
    assert 0 < len(steps) <= MAX_STEPS
    suffix = "_moe" if any(step.mixture for step in steps) else ""
    x_bytes = max(step.x_bytes for step in steps)
    units = max(step.units(sm_count) for step in steps)
    for slots in SLOTS:
        smem = ring_bytes(slots) + x_bytes + units * ROWS * 4
        if smem <= smem_per_block - static_smem(suffix):
            name = f"sm80_{tag}_chain{suffix}_s{slots}"
            return ChainPlan(name, steps, sm_count, 32 * WARPS, smem, x_bytes)
    widest = max(step.k for step in steps)
    raise MissingKernelError(f"no room in shared memory for one token's product over {widest} columns")

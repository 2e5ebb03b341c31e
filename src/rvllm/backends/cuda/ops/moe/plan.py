"""How a mixture's routing and experts are launched: arithmetic on shapes, and addresses passed on.

A step of one token takes two launches behind the router's: the up matrices of its experts, then the down
matrices with the weighted sum. Up to eight tokens take three, one more for the sum. More are sorted by expert
on the device first. All of them give a token the same bits, and none asks the host anything. The kernels are
in `kernels/moe/router.cu` and `kernels/experts_*.cu`.
"""

from __future__ import annotations

import ctypes
from dataclasses import dataclass

from rvllm.backends.cuda.device.info import DeviceInfo
from rvllm.backends.cuda.device.launches import Planned, fixed
from rvllm.backends.cuda.ops.gemm.plan import gated_rows
from rvllm.errors import MissingKernelError
from rvllm.kernels.moe.specs import (
    BLOCKS,
    FEW_STAGES,
    FEW_TOKENS,
    MAX_CHOSEN,
    MAX_CLUSTER,
    MAX_EXPERTS,
    MAX_GROUPS,
    MAX_SEGMENTS,
    ONE_STAGES,
    ROUTE_LANES,
    ROUTES,
    SORT_WARPS,
    Block,
    few_smem,
    one_smem,
    sort_smem,
)
from rvllm.kernels.rowwise.specs import ACTIVATIONS
from rvllm.program.ops.dense import Experts, Norm, Route

SLICE, TILE = 16, 64  # rows a warp takes in `few`; rows and columns of a packed tile
WIDE_ROUTE = 16  # tokens from which on a block of the router's kernel takes several
SORT_WIDE = 1024  # entries from which on the sort takes a full block
COMBINE_THREADS = 128
SIGMOID, GROUP_TOP2, RENORMALISE = 1, 2, 4  # flags of `route`


@dataclass(frozen=True)
class RouteAt:
    """Device addresses of a Route; logits float32 [T, E] and arrivals int32 [T], zeros, are scratch.

    raw, norm_weight: where x is the RMS norm of raw by these float32 weights, and is still to be computed.
    """

    x: int
    ids: int
    shares: int
    weight: int
    bias: int
    logits: int
    arrivals: int
    num_tokens: int
    raw: int = 0
    norm_weight: int = 0


@dataclass(frozen=True)
class ExpertsAt:
    """Device addresses of an Experts. Scratch, for E entries (see `moe/moe.cuh`):

    inner [E, width] and parts [E, N] of the 16-bit type, order int32 [E], tiles int32 [most, 4] (see
    `most_tiles`), num_tiles int32. residual: what the sum is added to, 0 for nothing.
    """

    x: int
    ids: int
    shares: int
    out: int
    residual: int
    up: int
    down: int
    inner: int
    parts: int
    order: int
    tiles: int
    num_tiles: int
    num_tokens: int


def segments_of(k: int) -> int:
    """Into how many segments an expert's sums over K are cut, whatever kernel sums them."""
    return max(1, min(MAX_SEGMENTS, -(-k // TILE) // 2))


def most_tiles(entries: int, experts: int, tile: int) -> int:
    """The most tiles of up to `tile` entries that `entries` of them, each with an expert, can fall into."""
    hit = min(entries, experts)
    return hit + (entries - hit) // tile


def plan_route(
    op: Route, tokens: int, tag: str, at: RouteAt, norm: Norm | None = None, capability: int = 80
) -> Planned:
    """The launch that scores and chooses experts for up to `tokens` tokens, after a norm if there is one.

    Raises MissingKernelError for what the kernel has no room for.
    """
    experts, k = op.weight.shape
    chosen = op.top_k + op.always
    if experts > MAX_EXPERTS or chosen > MAX_CHOSEN or op.groups > MAX_GROUPS or k % 8:
        raise MissingKernelError(
            f"no routing kernel for {chosen} of {experts} experts in {op.groups} groups of rows of {k}; "
            f"there is one for up to {MAX_CHOSEN} of {MAX_EXPERTS} in {MAX_GROUPS}, and rows of 8, 16, ..."
        )
    suffix = _route_kernel(experts, tokens, norm is not None, capability)
    shape = ROUTES[suffix]
    flags = SIGMOID * (op.scores == "sigmoid") + RENORMALISE * op.renormalise
    flags += GROUP_TOP2 * (op.group_score == "top2")
    blocks = -(-experts // (shape.warps * shape.experts))
    numbers = (k, experts, op.top_k, op.always, op.groups, op.kept_groups, flags)
    lanes = next(32 * n for n in ROUTE_LANES if experts <= 32 * n)
    return Planned(
        op.name if norm is None else f"{norm.name} + {op.name}",
        f"sm{90 if shape.cluster else 80}_{tag}_route{suffix}_e{lanes}",
        fixed(blocks, -(-tokens // shape.tokens)),
        32 * shape.warps,
        (
            at.ids, at.shares, at.x, at.weight, at.bias, at.logits, at.arrivals, at.num_tokens, at.raw,
            at.norm_weight, *map(ctypes.c_int, numbers), ctypes.c_float(op.scale),
            ctypes.c_float(norm.eps if norm is not None else 0.0),
        ),
        cluster=blocks if shape.cluster else 1,
    )  # fmt: skip


def _route_kernel(experts: int, tokens: int, norm: bool, capability: int) -> str:
    """Which of ROUTES: a token's blocks as a cluster where they are few enough."""
    if not norm:
        return "_wide" if tokens >= WIDE_ROUTE else ""
    fits = (
        name
        for name, shape in ROUTES.items()
        if shape.cluster and experts <= MAX_CLUSTER * shape.warps * shape.experts
    )
    return next(fits, "_norm") if capability >= 90 else "_norm"


class ExpertsPlan:
    """The launches of one Experts op for steps of up to `tokens` tokens.

    scale: of the sum, where it is added to a residual. block: what more than FEW_TOKENS tokens are cut into;
    any gives the same bits.
    """

    def __init__(
        self,
        op: Experts,
        name: str,
        tokens: int,
        tag: str,
        chip: DeviceInfo,
        at: ExpertsAt,
        scale: float = 1.0,
    ) -> None:
        self.experts, self.n, self.width = op.down.shape
        if op.x.width % 8 or self.width % 8 or self.n % 8:
            raise MissingKernelError(
                f"no kernel for experts of {op.x.width} x {self.width} x {self.n}: sizes must be 8, 16, ..."
            )
        if self.experts - op.always > MAX_EXPERTS or op.ids.width > MAX_CHOSEN:
            raise MissingKernelError(
                f"no kernel for {op.ids.width} of {self.experts} experts; there is one for up to "
                f"{MAX_CHOSEN} of {MAX_EXPERTS}"
            )
        self.op, self.name, self.tokens, self.tag, self.chip, self.at = op, name, tokens, tag, chip, at
        self.top_k, self.scale = op.ids.width, ctypes.c_float(scale)
        self.entries = tokens * self.top_k
        self.up_rows = gated_rows(self.width) if op.gated else self.width
        self.block = self._block()

    def launches(self) -> list[Planned]:
        """In order."""
        if self.tokens == 1:
            return [self._few("up"), self._one()]
        if self.tokens <= FEW_TOKENS:
            return [self._few("up"), self._few("down"), self._combine()]
        return [self._sort(), self._many("up"), self._many("down"), self._combine()]

    def _planned(
        self, kernel: str, grid: tuple[int, ...], block: int, smem: int, why: str, *given: object
    ) -> Planned:
        name = f"sm80_{self.tag}_experts_{kernel}"
        return Planned(self.name, name, fixed(*grid), block, given, smem, why=why)

    def _sides(self, which: str) -> tuple[int, int, int, int, int, int, int, int]:
        """out, x, weights, by_token, K, rows, pitch and activation of the up or the down product."""
        at, op = self.at, self.op
        if which == "up":
            act = ACTIVATIONS.index(op.activation)
            return at.inner, at.x, at.up, 1, op.x.width, self.up_rows, self.width, act
        return at.parts, at.inner, at.down, 0, self.width, self.n, self.n, -1

    def _few(self, which: str) -> Planned:
        out, x, weights, by_token, k, rows, pitch, act = self._sides(which)
        blocks, segments = -(-k // TILE), segments_of(k)
        grid = -(-rows // SLICE), self.entries
        each, few = -(-blocks // segments), 1 if self.tokens == 1 else FEW_TOKENS
        slots = min(FEW_STAGES, each)
        gated = which == "up" and self.op.gated
        always, first = self.op.always, self.experts - self.op.always
        numbers = (self.top_k, always, first, by_token, k, blocks, rows, pitch, act, int(gated), slots)
        return self._planned(
            f"few{few}", grid, 32 * segments, few_smem(segments, slots, few),
            f"{which}, streams hit experts",
            out, x, weights, self.at.ids, self.at.num_tokens, *map(ctypes.c_int, numbers),
        )  # fmt: skip

    def _one(self) -> Planned:
        blocks, segments = -(-self.width // TILE), segments_of(self.width)
        grid, each = -(-self.n // SLICE), self.top_k * -(-blocks // segments)
        # Blocks that are no more than the multiprocessors get one each, by asking for more than half of its
        # shared memory: all have as much to do, and two in one place would be the last. What is left of it
        # takes a block of the next product.
        half = self.chip.smem_per_block // 2
        alone = half + 1024 if grid <= self.chip.sm_count else 0
        room = alone or half - 4096
        stages = next((s for s in ONE_STAGES if one_smem(segments, s, self.top_k) <= room), ONE_STAGES[-1])
        slots = min(stages, each)
        smem = max(alone, one_smem(segments, slots, self.top_k))
        numbers = (self.experts, self.top_k, self.width, blocks, self.n, slots)
        at = self.at
        return self._planned(
            f"one_s{stages}", (grid,), 32 * segments, smem, "down and sum",
            at.out, at.inner, at.down, at.ids, at.shares, at.residual, *map(ctypes.c_int, numbers),
            self.scale,
        )  # fmt: skip

    def _combine(self) -> Planned:
        grid = -(-self.n // 8 // COMBINE_THREADS), self.tokens
        at = self.at
        return self._planned(
            "combine", grid, COMBINE_THREADS, 0, "weighted sum",
            at.out, at.parts, at.shares, at.residual, at.num_tokens, ctypes.c_int(self.top_k),
            ctypes.c_int(self.n), self.scale,
        )  # fmt: skip

    def _block(self) -> Block:
        """Tiles about as tall as a chosen expert has entries, if they were spread evenly."""
        always = self.op.always
        each = self.tokens * (self.top_k - always) / (self.experts - always)
        fit = [b for b in BLOCKS if b.smem <= self.chip.smem_per_block]
        return next((b for b in fit if each <= 1.5 * b.tokens), fit[-1])

    def _sort(self) -> Planned:
        warps = SORT_WARPS[self.entries >= SORT_WIDE]
        numbers = (self.top_k, self.experts, max(1, (self.experts - 1).bit_length()), self.block.tokens)
        at = self.at
        return Planned(
            self.name, "sm80_experts_sort", fixed(1), 32 * warps,
            (at.order, at.tiles, at.num_tiles, at.ids, at.num_tokens, *map(ctypes.c_int, numbers)),
            sort_smem(warps, self.experts), why="entries by expert",
        )  # fmt: skip

    def _many(self, which: str) -> Planned:
        block = self.block
        out, x, weights, by_token, k, rows, pitch, act = self._sides(which)
        group, gated = 1024 // block.rows, which == "up" and self.op.gated
        most = most_tiles(self.entries, self.experts, block.tokens)
        row_tiles = -(-rows // block.rows)
        grid = -(-row_tiles // group) * group * most
        numbers = (
            self.top_k,
            by_token,
            k,
            -(-k // TILE),
            segments_of(k),
            rows,
            pitch,
            act,
            int(gated),
            group,
        )
        at = self.at
        return self._planned(
            block.name, (grid,), block.threads, block.smem, f"{which}, grouped by expert",
            out, x, weights, at.order, at.tiles, at.num_tiles, *map(ctypes.c_int, numbers),
        )  # fmt: skip

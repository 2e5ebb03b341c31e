"""How a mixture's experts are launched: arithmetic on shapes, and addresses passed on.

A step of one token takes two launches behind the router (`few.py`): the up matrices of its experts, then the
down matrices with the weighted sum. On Hopper more tokens take three, one for the sum: products grouped by
expert, which list few entries for themselves and have many sorted by a launch before. Other GPUs sort always.
All of them give a token the same bits, and none asks the host anything. Weights that keep a quantised format
have kernels of their own (`quantised.py`). The kernels are in `kernels/moe/`.
"""

from __future__ import annotations

import ctypes
from dataclasses import dataclass
from typing import Literal

from rvllm.backends.cuda.device.info import DeviceInfo
from rvllm.backends.cuda.device.launches import MatrixMap, Planned, fixed, ints
from rvllm.backends.cuda.ops.gemm import integer
from rvllm.backends.cuda.ops.gemm.common import Kind
from rvllm.backends.cuda.ops.gemm.plan import gated_rows
from rvllm.backends.cuda.ops.moe import choose, few
from rvllm.backends.cuda.ops.moe.quantised import reordered_width, stack_product
from rvllm.errors import MissingKernelError
from rvllm.kernels.gemm.tiles import TILE
from rvllm.kernels.moe.specs import (
    BLOCKS,
    GROUPED_THREADS,
    MAX_CHOSEN,
    MAX_EXPERTS,
    MAX_LISTED,
    QUANTISED_THREADS,
    QUANTISED_WIDE,
    SORT_WARPS,
    WIDE,
    WIDE_BOX,
    grouped_smem,
    segments_of,
    sort_smem,
    wide_smem,
)
from rvllm.kernels.rowwise.specs import ACTIVATIONS
from rvllm.program.formats import IntegerFormat
from rvllm.program.ops.dense import Experts

REORDER_THREADS = 128
SORT_WIDE = 1024  # entries of a block from which on the sort takes a full one
SORT_CLUSTER = 8  # its blocks on Hopper
COMBINE_THREADS = 128
UNSORTED = 2  # tokens up to which `quantised` takes entries as they come
GROUP = 16  # row pairs that pass over all entries together
STRIP_GROUP = 1024  # rows of W that pass over all entries together
Path = Literal["one", "many", "grouped", "quantised"]


@dataclass(frozen=True)
class ExpertsAt:
    """Device addresses of an Experts. Scratch, for E entries (see `moe/moe.cuh`):

    inner [E, width] and parts [E, max(N, K)] of the 16-bit type, order and places int32 [E], tiles int32
    [most, 4] (see `most_tiles`), num_tiles int32. reordered [E, columns of a packed row], where a stack has
    orders of columns. residual: what the sum is added to, 0 for nothing.
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
    places: int
    tiles: int
    num_tiles: int
    num_tokens: int
    reordered: int = 0


@dataclass(frozen=True)
class NormAfter:
    """An RMS norm of x once the experts' sum was added to it: device addresses, and its epsilon.

    weight: float32 [N]; out and x [tokens, N].
    """

    out: int
    x: int
    weight: int
    eps: float


def most_tiles(entries: int, experts: int, tile: int) -> int:
    """The most tiles of up to `tile` entries that `entries` of them, each with an expert, can fall into."""
    hit = min(entries, experts)
    return hit + (entries - hit) // tile


class ExpertsPlan:
    """The launches of one Experts op for steps of up to `tokens` tokens.

    scale: of the sum, where it is added to a residual. path, block, tile: which kernels, what `many` cuts
    entries into, and entries of a work tile of `grouped`; all give the same bits. norm: what the weighted
    sum ends in, unless `path` is one.
    """

    norm: NormAfter | None = None

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
        self.path: Path = (
            "one" if few.fit(self)
            else "quantised" if op.up.format or op.down.format
            else "grouped" if chip.capability == 90
            else "many"
        )  # fmt: skip
        spread = choose.spread(tokens, self.experts, self.top_k, op.always)
        self.block = choose.block_of(spread, chip)
        self.tile = choose.tile_of(spread, self.entries, self.up_rows)
        if op.up.format or op.down.format:
            self.set_tile(choose.quantised_tile_of(spread, chip.capability))

    def set_tile(self, tile: int) -> None:
        """Entries of a work tile of `quantised`; a stack in 16 bits beside a quantised one has the same."""
        self.tile, self.block = tile, next((b for b in BLOCKS if b.tokens == tile), self.block)

    def launches(self) -> list[Planned]:
        if self.path == "quantised":
            return self._quantised_launches()
        if self.path == "one":
            return few.launches(self)
        if self.path == "many":
            return [self._sort(self.block.tokens, 0), self._many("up"), self._many("down"), self._combine(0)]
        places = self.at.places
        products = [self._grouped("up"), self._grouped("down"), self._combine(places)]
        if self._listed():
            return products
        if self.tile == WIDE:
            products = self._wide_launches()
        return [self._sort(self.tile, places), *products]

    def _quantised_launches(self) -> list[Planned]:
        if self.tile == QUANTISED_WIDE:
            return [self._sort(self.tile, self.at.places), *self._wide_launches()]
        stacks = (("up", self.op.up), ("down", self.op.down))
        launches = [self._sort(self.tile, 0)] if self._sorted() else []
        for which, of in stacks:
            launches += self._reorder(which, by_place=which == "down")
            launches.append(self._quantised(which) if of.format else self._many(which))
        return [*launches, self._combine(0)]

    def _wide_launches(self) -> list[Planned]:
        up = self._reorder("up", by_place=True) or [self._gather()]
        down = self._reorder("down", by_place=True)
        return [*up, self._wide("up"), *down, self._wide("down"), self._combine(self.at.places)]

    def planned(
        self, kernel: str, grid: tuple[int, ...], block: int, smem: int, why: str, *given: object
    ) -> Planned:
        """A launch of a kernel of the experts that every GPU has."""
        name = f"sm80_{self.tag}_experts_{kernel}"
        return Planned(self.name, name, fixed(*grid), block, given, smem, why=why)

    def _sides(self, which: str) -> tuple[int, int, int, int, int, int, int, int]:
        """out, x, weights, by_token, K, rows, pitch and activation of the up or the down product."""
        at, op = self.at, self.op
        if which == "up":
            act = ACTIVATIONS.index(op.activation)
            return at.inner, at.x, at.up, 1, op.x.width, self.up_rows, self.width, act
        return at.parts, at.inner, at.down, 0, self.width, self.n, self.n, -1

    def _reordered(self, which: str) -> int:
        """Columns of the rows that wait in `reordered` for a product; 0 for none."""
        if which == "up":
            return reordered_width(self.op.up.format, self.op.x.width)
        return reordered_width(self.op.down.format, self.width)

    def _reorder(self, which: str, by_place: bool) -> list[Planned]:
        """Rows for a product whose experts have columns in orders of their own; nothing for others.

        by_place: whether they lie by expert, else by entry.
        """
        columns = self._reordered(which)
        if not columns:
            return []
        _, x, weights, by_token, k, rows, _, _ = self._sides(which)
        kept = (self.op.up if which == "up" else self.op.down).format
        assert isinstance(kept, IntegerFormat)
        stride, at = stack_product(kept, rows, k).stride, self.at
        orders = weights + stride - integer.order_bytes(kept, k)
        numbers = (self.top_k, self.experts, by_token, int(by_place), columns, k)
        grid = (self.entries, -(-columns // (8 * REORDER_THREADS)))
        return [
            Planned(
                self.name, "sm80_moe_reorder_rows", fixed(*grid), REORDER_THREADS,
                (at.reordered, x, orders, at.order, at.ids, at.num_tokens, ctypes.c_uint64(stride),
                 *ints(*numbers)),
                why=f"{which}, rows in the order of each expert's columns",
            )
        ]  # fmt: skip

    def _combine(self, places: int) -> Planned:
        at, norm = self.at, self.norm
        parts, numbers = (
            (at.parts, at.shares),
            (places, ctypes.c_int(self.top_k), ctypes.c_int(self.n), self.scale),
        )
        if norm is not None:
            return self.planned(
                "combine_norm", (self.tokens,), -(-self.n // 256) * 32, 0, "weighted sum and norm",
                norm.out, norm.x, *parts, norm.weight, at.num_tokens, *numbers, ctypes.c_float(norm.eps),
            )  # fmt: skip
        return self.planned(
            "combine", (-(-self.n // 8 // COMBINE_THREADS), self.tokens), COMBINE_THREADS, 0, "weighted sum",
            at.out, *parts, at.residual, at.num_tokens, *numbers,
        )  # fmt: skip

    def _listed(self) -> bool:
        """Whether blocks of `grouped` list the entries themselves."""
        return self.entries <= MAX_LISTED and self.tile <= 64

    def _sort(self, tile: int, places: int) -> Planned:
        cluster = SORT_CLUSTER if self.chip.capability == 90 else 1
        warps = SORT_WARPS[self.entries >= SORT_WIDE * cluster]
        numbers = (self.top_k, self.experts, max(1, (self.experts - 1).bit_length()), tile)
        at = self.at
        return Planned(
            self.name, f"sm{90 if cluster > 1 else 80}_experts_sort", fixed(cluster), 32 * warps,
            (at.order, at.tiles, at.num_tiles, at.ids, at.num_tokens, *ints(*numbers), places),
            sort_smem(warps, self.experts), cluster, "entries by expert",
        )  # fmt: skip

    def _gather(self) -> Planned:
        at, vectors = self.at, self.op.x.width // 8
        numbers = map(ctypes.c_int, (self.top_k, vectors))
        return Planned(
            self.name, "sm90_moe_gather_rows", fixed(self.tokens), 256,
            (at.parts, at.x, at.places, at.num_tokens, *numbers), why="rows of x by expert",
        )  # fmt: skip

    def _wide(self, which: str) -> Planned:
        out, _, weights, after_sort, k, rows, pitch, _ = self._sides(which)
        kept, at = (self.op.up if which == "up" else self.op.down).format, self.at
        # The rows of x wait where the down product's results will be.
        source = at.parts if which == "up" else at.inner
        if columns := self._reordered(which):
            source = at.reordered
        numbers = (rows, pitch, self._kind(which), GROUP)
        if kept is None:
            name, smem, box = f"sm90_{self.tag}_moe_grouped_n{WIDE}", wide_smem(), WIDE_BOX
            told: tuple[object, ...] = ints(after_sort, -(-k // TILE), segments_of(k), *numbers)
            why = f"{which}, grouped by expert, up to {WIDE} entries a tile"
        else:
            product = stack_product(kept, rows, k)
            name, smem, box = product.kernel(self.tag, self.tile), product.smem(self.tile), QUANTISED_WIDE
            shape = (product.scales, after_sort, product.chunks, product.segments)
            told = (ctypes.c_uint64(product.stride), *ints(*shape, *numbers))
            why = f"{which}, {kept.label}, {self.tile} entries of an expert a tile"
        x = MatrixMap(source, self.entries, columns or k, box, TILE, self.tag == "bf16")
        return Planned(
            self.name, name, fixed(self.chip.sm_count), GROUPED_THREADS,
            (x, out, weights, at.tiles, at.num_tiles, *told), smem, why=why,
        )  # fmt: skip

    def _kind(self, which: str) -> Kind:
        if which == "down":
            return Kind.STORE
        name = self.op.activation.upper()
        return Kind[f"GATED_{name}" if self.op.gated else f"ACT_{name}"]

    def _grouped(self, which: str) -> Planned:
        out, x, weights, by_token, k, rows, pitch, _ = self._sides(which)
        kind, at = self._kind(which), self.at
        sorted_by = (0, 0, 0) if self._listed() else (at.order, at.tiles, at.num_tiles)
        numbers = (
            self.top_k, self.experts, by_token, k, -(-k // TILE), segments_of(k), rows, pitch, kind, GROUP,
            -(-self.entries // 32) | 1,
        )  # fmt: skip
        return Planned(
            self.name, f"sm90_{self.tag}_moe_grouped_n{self.tile}", fixed(self.chip.sm_count),
            GROUPED_THREADS,
            (out, x, weights, at.ids, at.num_tokens, at.places, *sorted_by, *ints(*numbers)),
            grouped_smem(self.tile), why=f"{which}, grouped by expert, {self.tile} entries a tile",
        )  # fmt: skip

    def _many(self, which: str) -> Planned:
        block = self.block
        out, x, weights, by_token, k, rows, pitch, act = self._sides(which)
        group, gated = STRIP_GROUP // block.rows, which == "up" and self.op.gated
        most = most_tiles(self.entries, self.experts, block.tokens)
        row_tiles = -(-rows // block.rows)
        grid = -(-row_tiles // group) * group * most
        shape = (-(-k // TILE), segments_of(k), rows, pitch)
        numbers = (self.top_k, by_token, k, *shape, act, int(gated), group)
        at = self.at
        return self.planned(
            block.name, (grid,), block.threads, block.smem, f"{which}, grouped by expert",
            out, x, weights, at.order, at.tiles, at.num_tiles, *ints(*numbers),
        )  # fmt: skip

    def _sorted(self) -> bool:
        """Whether `quantised` is told of entries by expert. A few are each on their own: they share few."""
        reordered = self._reordered("up") or self._reordered("down")
        return self.tokens > UNSORTED or not (self.op.up.format and self.op.down.format) or bool(reordered)

    def _quantised(self, which: str) -> Planned:
        out, x, weights, by_token, k, rows, pitch, act = self._sides(which)
        kept = (self.op.up if which == "up" else self.op.down).format
        assert kept is not None
        product, group, top_k = stack_product(kept, rows, k), STRIP_GROUP // TILE, self.top_k
        if columns := self._reordered(which):
            x, k = self.at.reordered, columns
            top_k = 1  # of the up product, for which the rows lie by entry
        most, row_tiles = most_tiles(self.entries, self.experts, self.tile), -(-rows // TILE)
        if not self._sorted():
            most = self.entries
        grid = -(-row_tiles // group) * group * most
        numbers = (
            product.scales, top_k, self.experts, by_token, k, product.chunks, product.segments, rows,
            pitch, act, int(which == "up" and self.op.gated), group,
        )  # fmt: skip
        at = self.at
        sorted_by = (at.order, at.tiles, at.num_tiles) if self._sorted() else (0, 0, 0)
        return Planned(
            self.name, product.kernel(self.tag, self.tile), fixed(grid), QUANTISED_THREADS,
            (out, x, weights, *sorted_by, at.ids, at.num_tokens, ctypes.c_uint64(product.stride),
             *ints(*numbers)),
            product.smem(self.tile), why=f"{which}, {kept.label}, grouped by expert",
        )  # fmt: skip

"""Mixtures of experts: routing and grouped products: their kernels.

The sizes here are those of the sources in this folder, which say what they mean;
`backends/cuda/ops/moe/plan.py` chooses among the kernels.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from rvllm.kernels.constants import constants
from rvllm.kernels.gemm.integer.specs import CHUNK, LAYOUTS
from rvllm.kernels.gemm.tiles import BARRIERS, SMEM_LIMIT, TILE
from rvllm.kernels.gemm.tiles import TILE_BYTES as E4M3_CHUNK
from rvllm.kernels.spec import Folder, KernelSpec

DTYPES = ("bf16", "f16")
MAX_EXPERTS = 512  # a router's
MAX_CHOSEN = 32  # experts of a token
MAX_GROUPS = 32
MAX_SEGMENTS = 8  # of K, the warps of a block of `one_up`, `one_down` and `route`


# Instantiations of `route`: whether it normalises and whether a cluster of blocks chooses.
ROUTES = {
    "": (False, False),
    "_norm": (True, False),
    "_cluster": (False, True),
    "_cluster_norm": (True, True),
}
MAX_CLUSTER = 8
ROUTE_SLICE = 16  # experts of a block of `route`
ROUTE_TOKENS = (8, 4, 2, 1)  # of a block of `route`, at most
ROUTE_MANY = 32  # tokens of a block of `route_many`
ROUTE_MANY_SMEM = 4 * (128 + ROUTE_MANY) * 128
ROUTE_NORM_WIDTH = 4096  # of a row that `route` can normalise too
COMBINE_NORM_WIDTH = 8192  # of a row that `combine_norm` can normalise
ROUTE_LANES = (4, 16)  # experts that a lane compares
ONE_UP_STAGES = (4, 2)  # of a warp's pipeline
ONE_UP_BLOCKS = 6  # of `one_up` with the shorter one, of a multiprocessor
ONE_DOWN_STAGES = (8, 6, 4)
SORT_WARPS = (4, 32)
_SLICE = constants("moe/moe.cuh")["SLICE"] * TILE * 2  # bytes of the rows of a packed tile that a warp takes


@dataclass(frozen=True)
class Block:
    """An instantiation of `many`: rows of W by entries of an expert."""

    rows: int
    tokens: int
    row_warps: int
    token_warps: int

    @property
    def name(self) -> str:
        """As in kernel names."""
        return f"r{self.rows}_n{self.tokens}"

    @property
    def threads(self) -> int:
        """Threads of a block."""
        return 32 * self.row_warps * self.token_warps

    @property
    def smem(self) -> int:
        """Dynamic shared memory in bytes; mirrors Shape in moe/grouped_gemm.cu."""
        large = self.rows * self.tokens // self.threads >= 32
        return (3 if large else 4) * (
            self.rows + self.tokens
        ) * TILE * 2 + 4 * self.rows * self.tokens * large


GROUPED_TOKENS = (8, 16, 32, 64)  # entries of a work tile of `grouped`
GROUPED_THREADS = 384
MAX_LISTED = constants("moe/entries.cuh")["MAX_LISTED"]  # entries that a block of `grouped` lists for itself
_LIST_BYTES, _STAGING_PITCH = 7440, 144


def grouped_smem(tokens: int) -> int:
    """Dynamic shared memory of `grouped` in bytes; mirrors Layout in moe/grouped_gemm_sm90.cu."""
    stage = (2 * 64 + tokens) * TILE * 2
    rest = 2 * tokens * _STAGING_PITCH + BARRIERS + _LIST_BYTES
    return min(12, (SMEM_LIMIT - rest) // stage) * stage + rest


WIDE = 192  # entries of a work tile of `grouped_wide`
WIDE_BOX = 64  # of a load of x
_WIDE_STAGED = WIDE * TILE * 2  # bytes in which a warpgroup leaves its outputs


def wide_smem() -> int:
    """Dynamic shared memory of `grouped_wide` in bytes; mirrors Wide in moe/grouped_wide_sm90.cu."""
    stage, rest = (2 * 64 + WIDE) * TILE * 2, 2 * _WIDE_STAGED + BARRIERS
    return (SMEM_LIMIT - rest) // stage * stage + rest


BLOCKS = (Block(64, 16, 4, 1), Block(64, 64, 4, 1), Block(128, 128, 4, 2))


QUANTISED_TOKENS = (16, 64)  # entries of a work tile of `quantised`
QUANTISED_THREADS = 128
# What a weight's chunks of 64 rows x 128 columns are read as: the C++ type and the bytes of one.
QUANTISED = {
    "e4m3": ("rvllm::experts::E4m3", E4M3_CHUNK),
    **{
        name: (f"rvllm::gemm::{layout.symbol}", layout.chunk_bytes)
        for name, layout in LAYOUTS.items()
        if name not in ("int8g64", "int8g32")  # in which nobody publishes mixtures
    },
}


def quantised_smem(name: str, tokens: int) -> int:
    """Dynamic shared memory of `quantised` in bytes; mirrors STAGE in moe/quantised_gemm.cu."""
    return 3 * (QUANTISED[name][1] + tokens * CHUNK * 2)


QUANTISED_ONE_WARPS = (4, 8)  # of a block of `quantised_one_up` and `quantised_one_down`
QUANTISED_UP_STAGES = 3  # of a warp's ring
QUANTISED_DOWN_STAGES = (8, 4)
_BESIDE = 2 * CHUNK + 16  # bytes of x and of scales beside a slice of weights


def quantised_runs(name: str) -> int:
    """Sums of a chunk that are scaled each for itself; 0 where a whole segment is one sum."""
    if name == "e4m3":
        return 1
    layout = LAYOUTS[name]
    return CHUNK // layout.group if layout.integers else 0


def quantised_one_smem(name: str, warps: int, slots: int, sums: int) -> int:
    """Dynamic shared memory of `quantised_one_up` and `quantised_one_down` in bytes.

    sums: of a row that a block keeps, each with its scale, see `quantised_runs`.
    """
    return warps * slots * (QUANTISED[name][1] // 4 + _BESIDE) + 8 * 16 * sums


QUANTISED_WIDE = 96  # entries of a work tile of `quantised_wide`


def quantised_wide_smem(name: str) -> int:
    """Dynamic shared memory of `quantised_wide` in bytes; mirrors QuantisedWide in its source."""
    staging = 2 * QUANTISED_WIDE * TILE * 2
    stage, rest = 2 * QUANTISED[name][1] + QUANTISED_WIDE * CHUNK * 2, staging + BARRIERS
    return min(8, (SMEM_LIMIT - rest) // stage) * stage + rest


def segments_of(k: int) -> int:
    """Into how many segments an expert's sums over K are cut, whatever kernel sums them."""
    return max(1, min(MAX_SEGMENTS, -(-k // TILE) // 2))


def route_smem(segments: int, blocks: int, tokens: int) -> int:
    """Dynamic shared memory of `route` in bytes, for `tokens` tokens of a block."""
    return blocks * tokens * TILE * 2 + segments * 4 * _SLICE


def one_up_smem(segments: int, slots: int) -> int:
    """Dynamic shared memory of `one_up` in bytes."""
    return segments * slots * (_SLICE + TILE * 2)


def one_down_smem(segments: int, slots: int, top_k: int) -> int:
    """Dynamic shared memory of `one_down` in bytes."""
    return segments * slots * (_SLICE + TILE * 2) + top_k * segments * 64


def sort_smem(warps: int, experts: int) -> int:
    """Dynamic shared memory of `sort` in bytes."""
    return 4 * (warps + 4) * (-(-experts // 4) * 4)


_kernel = Folder("moe", "rvllm::experts::").kernel


def _sorting() -> Iterator[KernelSpec]:
    """Entries by expert, and rows of x in their order."""
    most = sort_smem(SORT_WARPS[-1], MAX_EXPERTS + MAX_CHOSEN)
    yield _kernel("sm80_experts_sort", "sort", "sort<false>", most, unit="80")
    yield _kernel("sm90_experts_sort", "sort", "sort<true>", most, unit="90")
    yield _kernel("sm90_moe_gather_rows", "sort", "gather_rows", unit="90")
    yield _kernel("sm80_moe_reorder_rows", "sort", "reorder_rows", unit="80")


def _routers(dtype: str) -> Iterator[KernelSpec]:
    """Which experts a token takes."""
    router = Folder("moe").kernel
    for lanes in ROUTE_LANES:
        static = 4 * 8 * 32 * lanes
        for suffix, (norm, cluster) in ROUTES.items():
            if cluster and 32 * lanes > ROUTE_SLICE * MAX_CLUSTER:
                continue
            arch, smem = 90 if cluster else 80, SMEM_LIMIT - static - 5120
            name, unit = f"sm{arch}_{dtype}_route{suffix}_e{32 * lanes}", f"{dtype}_{arch}"
            symbol = f"route<{dtype}, {lanes}, {norm:d}, {cluster:d}>"
            yield router(name, "router", symbol, smem, static + 5120 + 4096 * cluster, unit)
        name, symbol = f"sm80_{dtype}_route_many_e{32 * lanes}", f"route_many<{dtype}, {lanes}>"
        yield router(name, "router", symbol, ROUTE_MANY_SMEM, static, f"{dtype}_80")


def _one_token(dtype: str) -> Iterator[KernelSpec]:
    """A few tokens without sorting, and the weighted sum of experts."""
    stages = [("one_down", s) for s in ONE_DOWN_STAGES] + [("one_up", s) for s in ONE_UP_STAGES]
    for kind, s in stages:
        name, symbol = f"sm80_{dtype}_experts_{kind}_s{s}", f"{kind}<rvllm::{dtype}, {s}>"
        yield _kernel(name, "one_token", symbol, SMEM_LIMIT - 16384, 2048, dtype)
    for kind, source in (("combine", "one_token"), ("combine_norm", "combine_norm")):
        yield _kernel(f"sm80_{dtype}_experts_{kind}", source, f"{kind}<rvllm::{dtype}>", unit=dtype)


def _many(dtype: str) -> Iterator[KernelSpec]:
    """Products by mma.sync, on every GPU."""
    for block in BLOCKS:
        sizes = f"{block.rows}, {block.tokens}, {block.row_warps}, {block.token_warps}"
        name, symbol = f"sm80_{dtype}_experts_{block.name}", f"many<rvllm::{dtype}, {sizes}>"
        yield _kernel(name, "grouped_gemm", symbol, block.smem, unit=dtype)


def _quantised(dtype: str) -> Iterator[KernelSpec]:
    """Products with experts that stay in their format."""
    for name, (of, _) in QUANTISED.items():
        t, unit, experts = f"rvllm::{dtype}", f"{dtype}_{name}", f"sm80_{dtype}_experts_{name}"
        wide, smem = f"sm90_{dtype}_moe_{name}_n{QUANTISED_WIDE}", quantised_wide_smem(name)
        yield _kernel(wide, "quantised_wide_sm90", f"quantised_wide<{t}, {of}>", smem, unit=unit)
        for n in QUANTISED_TOKENS:
            symbol, smem = f"quantised<{t}, {n}, {of}>", quantised_smem(name, n)
            yield _kernel(f"{experts}_n{n}", "quantised_gemm", symbol, smem, unit=unit)
        kinds = {f"one_down_s{s}": ("one_down", s) for s in QUANTISED_DOWN_STAGES}
        kinds["one_up"] = ("one_up", QUANTISED_UP_STAGES)
        for kind, (kernel, stages) in kinds.items():
            symbol = f"quantised_{kernel}<{t}, {of}, {stages}>"
            yield _kernel(f"{experts}_{kind}", "quantised_one", symbol, SMEM_LIMIT - 16384, 2048, unit)


def _grouped(dtype: str) -> Iterator[KernelSpec]:
    """Products by wgmma."""
    name, symbol = f"sm90_{dtype}_moe_grouped_n", f"<rvllm::{dtype}"
    yield _kernel(f"{name}{WIDE}", "grouped_wide_sm90", f"grouped_wide{symbol}>", wide_smem(), unit=dtype)
    for n in GROUPED_TOKENS:
        unit, smem = f"{dtype}_{'few' if n <= 32 else n}", grouped_smem(n)
        yield _kernel(f"{name}{n}", "grouped_gemm_sm90", f"grouped{symbol}, {n}>", smem, unit=unit)


SPECS: list[KernelSpec] = [
    *_sorting(),
    *(
        spec
        for dtype in DTYPES
        for family in (_routers, _one_token, _many, _quantised, _grouped)
        for spec in family(dtype)
    ),
]

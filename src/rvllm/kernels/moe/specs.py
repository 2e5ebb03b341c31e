"""Mixtures of experts: routing and grouped products: their kernels.

The sizes here are those of `router.cu`, `sort.cu`, `few_tokens.cu` and `grouped_gemm.cu`, which say what they
mean; `backends/cuda/ops/moe/plan.py` chooses among the kernels.
"""

from __future__ import annotations

from dataclasses import dataclass

from rvllm.kernels.spec import KernelSpec

DTYPES = ("bf16", "f16")
MAX_EXPERTS = 512  # a router's
MAX_CHOSEN = 32  # experts of a token
MAX_GROUPS = 32
MAX_SEGMENTS = 8  # of K, the warps of a block of `few`
FEW_TOKENS = 8  # of a step, for `few`


@dataclass(frozen=True)
class RouteShape:
    """An instantiation of `route`: warps and tokens of a block, experts of a warp."""

    warps: int
    tokens: int
    experts: int
    norm: bool = False
    cluster: bool = False  # the blocks of a token; for up to MAX_CLUSTER of them, on Hopper


ROUTES = {
    "": RouteShape(4, 1, 1),
    "_norm": RouteShape(4, 1, 1, norm=True),
    "_wide": RouteShape(4, 8, 4),
    "_cluster1": RouteShape(8, 1, 1, norm=True, cluster=True),
    "_cluster2": RouteShape(8, 1, 2, norm=True, cluster=True),
}
MAX_CLUSTER = 8
ROUTE_NORM_WIDTH = 4096  # of a row that `route` can normalise too
ROUTE_LANES = (4, 16)  # experts that a lane compares
FEW_STAGES = {1: 4, FEW_TOKENS: 3}  # of a warp's pipeline, by the step's tokens; few enough for 99 KB
ONE_STAGES = (8, 6, 4)
SORT_WARPS = (4, 32)
_SLICE, _TILE = 2048, 64  # bytes of 16 rows of a packed tile; its columns
_SMEM = 232448  # bytes of shared memory that a kernel may be launched with on any GPU


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
        ) * _TILE * 2 + 4 * self.rows * self.tokens * large


GROUPED_TOKENS = (8, 16, 32, 64, 128)  # entries of a work tile of `grouped`
GROUPED_THREADS = 384
MAX_LISTED = 512  # entries that a block of `grouped` lists for itself, in tiles of up to 64
_LIST_BYTES, _STAGING_PITCH, _BARRIERS, _LIMIT = 5136, 144, 256, 232448


def grouped_smem(tokens: int) -> int:
    """Dynamic shared memory of `grouped` in bytes; mirrors Layout in moe/grouped_gemm_sm90.cu."""
    stage = (2 * 64 + tokens) * _TILE * 2
    rest = 2 * min(tokens, 64) * _STAGING_PITCH + _BARRIERS + _LIST_BYTES * (tokens <= 64)
    return min(12, (_LIMIT - rest) // stage) * stage + rest


BLOCKS = (Block(64, 16, 4, 1), Block(64, 64, 4, 1), Block(128, 128, 4, 2))


def few_smem(segments: int, slots: int, tokens: int) -> int:
    """Dynamic shared memory of `few` in bytes, for 1 or FEW_TOKENS tokens."""
    return segments * slots * (_SLICE + tokens * _TILE * 2)


def one_smem(segments: int, slots: int, top_k: int) -> int:
    """Dynamic shared memory of `one` in bytes."""
    return segments * slots * (_SLICE + _TILE * 2) + top_k * segments * 64


def sort_smem(warps: int, experts: int) -> int:
    """Dynamic shared memory of `sort` in bytes."""
    return 4 * (warps + 3) * experts


def _specs() -> list[KernelSpec]:
    specs = [
        KernelSpec("sm80_experts_sort", "moe/sort.cu", "rvllm::experts::sort",
                   smem=sort_smem(SORT_WARPS[-1], MAX_EXPERTS + MAX_CHOSEN))
    ]  # fmt: skip
    for dtype in DTYPES:
        for suffix, shape in ROUTES.items():
            for lanes in ROUTE_LANES[:1] if shape.cluster else ROUTE_LANES:
                arch = 90 if shape.cluster else 80
                name = f"sm{arch}_{dtype}_route{suffix}_e{32 * lanes}"
                sizes = f"{shape.warps}, {shape.tokens}, {shape.experts}, {lanes}"
                symbol = f"route<{dtype}, {sizes}, {shape.norm:d}, {shape.cluster:d}>"
                specs.append(KernelSpec(name, "moe/router.cu", symbol, arch, unit=f"{dtype}_{arch}"))
        kinds = {f"one_s{s}": f"one<rvllm::{dtype}, {s}>" for s in ONE_STAGES}
        for tokens in (1, FEW_TOKENS):
            kinds[f"few{tokens}"] = f"few<rvllm::{dtype}, {FEW_STAGES[tokens]}, {tokens}>"
        for name, symbol in kinds.items():
            specs.append(
                KernelSpec(
                    name=f"sm80_{dtype}_experts_{name}",
                    source="moe/few_tokens.cu",
                    symbol=f"rvllm::experts::{symbol}",
                    smem=_SMEM - 16384,
                    static_smem=5120 if name == f"few{FEW_TOKENS}" else 2048,
                    unit=dtype,
                )
            )
        specs.append(
            KernelSpec(
                name=f"sm80_{dtype}_experts_combine",
                source="moe/few_tokens.cu",
                symbol=f"rvllm::experts::combine<rvllm::{dtype}>",
                unit=dtype,
            )
        )
        for block in BLOCKS:
            sizes = f"{block.rows}, {block.tokens}, {block.row_warps}, {block.token_warps}"
            specs.append(
                KernelSpec(
                    name=f"sm80_{dtype}_experts_{block.name}",
                    source="moe/grouped_gemm.cu",
                    symbol=f"rvllm::experts::many<rvllm::{dtype}, {sizes}>",
                    smem=block.smem,
                    unit=dtype,
                )
            )
        for tokens in GROUPED_TOKENS:
            specs.append(
                KernelSpec(
                    name=f"sm90_{dtype}_moe_grouped_n{tokens}",
                    source="moe/grouped_gemm_sm90.cu",
                    symbol=f"rvllm::experts::grouped<rvllm::{dtype}, {tokens}>",
                    arch=90,
                    exact=True,
                    smem=grouped_smem(tokens),
                    unit=f"{dtype}_{'few' if tokens <= 32 else tokens}",
                )
            )
    return specs


SPECS: list[KernelSpec] = _specs()

"""The kernels for integer weights: their layouts in memory, names and instantiations.

`sm90_bf16_integer_q4_walk_n16` is the wgmma kernel for the layout `q4` that walks over tiles with 16 tokens
at a time. Layouts and modes are described in gemm/integer/formats.cuh and gemm/integer/gemm_sm90.cu.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from rvllm.kernels.gemm.tiles import (
    BARRIERS,
    DTYPES,
    PARTIAL_PITCH,
    SM80_TOKENS,
    SMEM_LIMIT,
    SOURCES,
    TILE,
    staging_bytes,
)
from rvllm.kernels.spec import Folder, KernelSpec

CHUNK = 128  # columns of a chunk
SPLIT_TOKENS = (8, 16, 32, 64, 128)  # token tiles of the sm_90a modes
WALK_TOKENS = (8, 16, 32, 64, 96, 128, 192)
_MAX_STAGES = 16


@dataclass(frozen=True)
class IntegerLayout:
    """How levels and scales of a matrix lie in chunks of 64 rows x 128 columns.

    bits: of a level. group: columns that share a scale. integers: whether scales multiply sums (else the
    levels, before they are rounded). pairs: whether a word of scales has two groups' scales and no minimum.
    table: whether levels are places in a table. symbol: the C++ type.
    """

    name: str
    symbol: str
    bits: int
    group: int
    integers: bool = False
    pairs: bool = False
    table: bool = False

    @property
    def run(self) -> int:
        """Columns that a word of scales is for."""
        return 2 * self.group if self.pairs else self.group

    @property
    def runs(self) -> int:
        """Words of scales a row has in a chunk."""
        return CHUNK // self.run

    @property
    def planes(self) -> tuple[int, ...]:
        """Bits of each plane of a unit of 64 columns."""
        return {2: (2,), 3: (2, 1), 4: (4,), 5: (4, 1), 6: (4, 2), 8: (8,)}[self.bits]

    @property
    def chunk_bytes(self) -> int:
        return self.runs * TILE * 4 + TILE * CHUNK * self.bits // 8

    def nbytes(self, rows: int, columns: int) -> int:
        """Bytes of a matrix, padded to whole chunks."""
        return -(-rows // TILE) * -(-columns // CHUNK) * self.chunk_bytes


def _integers(bits: int, group: int) -> IntegerLayout:
    name, end = f"int{bits}", "" if group == CHUNK else f"g{group}"
    return IntegerLayout(name + end, f"Int{bits}{end.upper()}", bits, group, integers=True)


LAYOUTS: dict[str, IntegerLayout] = {
    layout.name: layout
    for layout in (
        *(_integers(bits, group) for bits in (4, 8) for group in (128, 64, 32)),
        IntegerLayout("q2", "Q2", 2, 16),
        IntegerLayout("q3", "Q3", 3, 16, pairs=True),
        IntegerLayout("q4", "Q4", 4, 32),
        IntegerLayout("q5", "Q5", 5, 32),
        IntegerLayout("q6", "Q6", 6, 16, pairs=True),
        IntegerLayout("q8", "Q8", 8, 32),
        IntegerLayout("nl4", "NL4", 4, 32, table=True),
        IntegerLayout("mx4", "MX4", 4, 32, table=True),
    )
}
# What a stored block format becomes.
GGUF_LAYOUTS = {
    "Q4_0": "q4", "Q4_1": "q4", "Q4_K": "q4", "Q5_0": "q5", "Q5_1": "q5", "Q5_K": "q5", "Q8_0": "q8",
    "Q6_K": "q6", "Q2_K": "q2", "Q3_K": "q3", "IQ4_NL": "nl4", "IQ4_XS": "nl4", "MXFP4": "mx4",
}  # fmt: skip


def depth(tokens: int) -> int:
    """Chunks of a stage; mirrors Layout in gemm/integer/gemm_sm90.cu, like the next two."""
    return 2 if tokens <= 32 else 1


def threads(tokens: int) -> int:
    """Threads of a block: two warpgroups and a producer warp, or warpgroup where registers are short."""
    return 384 if tokens >= 96 else 288


def smem(layout: IntegerLayout, mode: str, tokens: int, parts: int, limit: int = SMEM_LIMIT) -> int:
    """Dynamic shared memory in bytes: as many stages as fit below `limit`, at least two.

    parts: segments that a block sums.
    """
    totals = tokens * 2 * TILE * 4 if parts > 1 else 0
    partial = tokens * PARTIAL_PITCH
    behind = ((parts - 1) * partial if mode == "split" else max(totals, staging_bytes(tokens))) + BARRIERS
    weights = -(-2 * depth(tokens) * layout.chunk_bytes // 1024) * 1024
    stage = weights + depth(tokens) * tokens * CHUNK * 2
    least = max(2, -(-partial // stage)) if mode == "split" else 2
    stages = max(least, min(_MAX_STAGES, (limit - behind) // stage))
    return stages * stage + behind


def sm80_smem(layout: IntegerLayout, tokens: int) -> int:
    """Dynamic shared memory in bytes; mirrors STAGES in gemm/integer/gemm_sm80.cu."""
    return 3 * (layout.chunk_bytes + tokens * CHUNK * 2)


_kernel = Folder("gemm/integer", "rvllm::gemm::").kernel


def _gemms(dtype: str, layout: IntegerLayout) -> Iterator[KernelSpec]:
    name, of = f"{dtype}_integer_{layout.name}", f"rvllm::gemm::{layout.symbol}"
    for mode, sizes in (("split", SPLIT_TOKENS), ("walk", WALK_TOKENS)):
        for tokens in sizes:
            symbol = f"gemm<rvllm::{dtype}, {tokens}, {of}, rvllm::gemm::{mode.upper()}>"
            unit = f"{dtype}_{layout.name}_{'few' if tokens <= 32 else 'many'}"
            yield _kernel(f"sm90_{name}_{mode}_n{tokens}", "gemm_sm90", symbol, SMEM_LIMIT, unit=unit)
    for tokens in SM80_TOKENS:
        symbol, smem = f"gemm<rvllm::{dtype}, {tokens}, {of}>", sm80_smem(layout, tokens)
        yield _kernel(f"sm80_{name}_n{tokens}", "gemm_sm80", symbol, smem, unit=f"{dtype}_{layout.name}")


def _loading() -> Iterator[KernelSpec]:
    for kind, name in GGUF_LAYOUTS.items():
        symbol = f"pack_blocks<rvllm::gguf::{kind}, rvllm::gemm::{LAYOUTS[name].symbol}>"
        yield _kernel(f"sm80_integer_pack_{kind.lower()}", "pack_blocks", symbol, unit=kind)
    for dtype in DTYPES:
        for layout in (layout for layout in LAYOUTS.values() if layout.integers):
            symbol = f"pack_words<rvllm::{dtype}, {layout.bits}, {layout.group}>"
            name = f"sm80_{dtype}_integer_pack_{layout.name}"
            yield _kernel(name, "pack_words", symbol, unit=f"{dtype}_{layout.name}")
        yield _kernel(f"sm80_{dtype}_integer_fill", "pack_words", f"fill<rvllm::{dtype}>")
    for source, stored in SOURCES.items():
        yield _kernel(f"sm80_integer_quantise_{source}", "quantise", f"quantise<{stored}>")
    yield _kernel("sm80_integer_reorder", "quantise", "reorder")


SPECS: list[KernelSpec] = [
    *(spec for dtype in DTYPES for layout in LAYOUTS.values() for spec in _gemms(dtype, layout)),
    *_loading(),
]

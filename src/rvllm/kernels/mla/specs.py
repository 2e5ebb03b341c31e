"""MLA: latents in the cache and the products that absorb its projections: their kernels."""

from __future__ import annotations

from rvllm.kernels.attention.specs import SIZES
from rvllm.kernels.constants import constants
from rvllm.kernels.spec import KernelSpec

TAGS = ("bf16", "f16")
TILE, PAD = SIZES["TILE"], SIZES["PAD"]  # positions of a tile of keys; elements after each row of it
_SPLITS = constants("mla/mla.cuh")
SHORT_SPLITS = _SPLITS["SHORT_SPLITS"]  # of SHORT positions, then those of LONG
SHORT, LONG = _SPLITS["SHORT"] * TILE, _SPLITS["LONG"] * TILE
MAX_RANK = 512
MAX_WIDTH = 576  # rank and rotated elements
MAX_INNER = 512  # K of a head's matrix
EIGHTS = (1, 8)  # groups of eight tokens a block of a head's product takes
SEGMENT = constants("mla/head_gemm.cuh")["SEGMENT"]  # of K, one a warp
DECODE = {"": (2, 2048), "_small": (1, 512)}  # buffers, and sequences a launch can list
PREFILL = {"": (4, 2, 2), "_small": (8, 1, 1)}  # warps a group of 16 rows, groups, buffers
PREFILL_SM90_SHAPE = (512, 64)  # rank and rotated elements of latent_prefill_sm90
PREFILL_SM90_ROWS, PREFILL_SM90_THREADS, PREFILL_SM90_BLOCKS = 64, 384, 132  # of a block; blocks at most
PREFILL_SM90_SMEM = 3 * 64 * 2 * MAX_WIDTH + 2048 + 32 * 9 + 24  # queries, two tiles, weights' sums, barriers
EXCHANGE = 2 * 16 * (TILE + PAD) + 2 * 4 * 16 * 8  # bytes a group of 16 rows exchanges about a tile
STATIC = 1280  # bytes of shared memory a block may declare besides


def splits_of(tokens: int) -> int:
    """Splits that a context of so many tokens is cut into."""
    short = SHORT_SPLITS * SHORT
    return -(-tokens // SHORT) if tokens <= short else SHORT_SPLITS + -(-(tokens - short) // LONG)


def tiles_smem(width: int, rows: int, buffers: int) -> int:
    """Dynamic shared memory of latent_prefill in bytes: exchange, `rows` queries and tiles of keys."""
    return rows // 16 * EXCHANGE + 2 * (rows + buffers * TILE) * (width + PAD)


def prefill_sm90_totals() -> int:
    """Bytes of latent_prefill_sm90's totals of all blocks."""
    return 4 * PREFILL_SM90_BLOCKS * PREFILL_SM90_ROWS * PREFILL_SM90_SHAPE[0]


def decode_smem(width: int, buffers: int, max_seqs: int) -> int:
    """Dynamic shared memory of latent_decode: queries, tiles, and a word a sequence."""
    return tiles_smem(width, 16, buffers) + 4 * (-(-max_seqs // 32) * 32)


def product_smem(inner: int, eights: int) -> int:
    """Dynamic shared memory of the products, whose K is `inner`: weights or sums, then the tokens."""
    front = max(2 * 4 * 16 * (SEGMENT + PAD), 4 * 4 * eights * 8 * 20)
    return front + 2 * eights * 8 * (-(-inner // 16) * 16 + PAD)


def product_chunks(rows: int, inner: int) -> int:
    """Blocks that share the `rows` rows of a head's matrix."""
    return -(-rows // (16 * (4 // -(-inner // SEGMENT))))


def _specs(tag: str) -> list[KernelSpec]:
    def spec(name: str, source: str, symbol: str, smem: int, unit: str = "") -> KernelSpec:
        return KernelSpec(
            f"sm80_{tag}_{name}", source, symbol, smem=smem, static_smem=STATIC, unit=unit or tag
        )

    specs = []
    for suffix, (buffers, seqs) in DECODE.items():
        symbol, smem = f"latent_decode<{tag}, {buffers}>", decode_smem(MAX_WIDTH, buffers, seqs)
        specs.append(spec(f"latent_decode{suffix}", "mla/attention.cu", symbol, smem))
    for suffix, (warps, groups, buffers) in PREFILL.items():
        symbol = f"latent_prefill<{tag}, {warps}, {groups}, {buffers}>"
        smem = tiles_smem(MAX_WIDTH, 16 * groups, buffers)
        specs.append(spec(f"latent_prefill{suffix}", "mla/attention.cu", symbol, smem))
    specs.append(
        KernelSpec(
            f"sm90_{tag}_latent_prefill",
            "mla/prefill_sm90.cu",
            f"latent_prefill_sm90<{tag}>",
            arch=90,
            exact=True,
            smem=PREFILL_SM90_SMEM,
            static_smem=0,
            unit=tag,
        )
    )
    specs.append(spec("latent_merge", "mla/head_gemm.cu", f"latent_merge<{tag}>", 0))
    one = product_smem(MAX_INNER, 1)
    specs.append(spec("latent_values_n8", "mla/head_gemm.cu", f"latent_values<{tag}, 1>", one))
    for n in EIGHTS:
        smem = product_smem(MAX_INNER, n)
        specs.append(spec(f"head_linear_n{8 * n}", "mla/head_gemm.cu", f"head_linear<{tag}, {n}>", smem))
        for suffix, interleaved in (("", "false"), ("_interleaved", "true")):
            symbol = f"latent_prepare<{tag}, {interleaved}, {n}>"
            specs.append(spec(f"latent_prepare{suffix}_n{8 * n}", "mla/prepare.cu", symbol, smem))
    return specs


SPECS: list[KernelSpec] = [spec for tag in TAGS for spec in _specs(tag)]

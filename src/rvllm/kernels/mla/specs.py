"""MLA: latents in the cache and the products that absorb its projections: their kernels."""

from __future__ import annotations

from collections.abc import Iterator

from rvllm.kernels.attention.specs import SIZES
from rvllm.kernels.constants import constants
from rvllm.kernels.spec import Folder, KernelSpec

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


def _specs(tag: str) -> Iterator[KernelSpec]:
    kernel, short = Folder("mla").kernel, f"sm80_{tag}"
    for suffix, (buffers, seqs) in DECODE.items():
        name, symbol = f"{short}_latent_decode{suffix}", f"latent_decode<{tag}, {buffers}>"
        yield kernel(name, "attention", symbol, decode_smem(MAX_WIDTH, buffers, seqs), STATIC, tag)
    for suffix, (warps, groups, buffers) in PREFILL.items():
        name, smem = f"{short}_latent_prefill{suffix}", tiles_smem(MAX_WIDTH, 16 * groups, buffers)
        symbol = f"latent_prefill<{tag}, {warps}, {groups}, {buffers}>"
        yield kernel(name, "attention", symbol, smem, STATIC, tag)
    name, symbol = f"sm90_{tag}_latent_prefill", f"latent_prefill_sm90<{tag}>"
    yield kernel(name, "prefill_sm90", symbol, PREFILL_SM90_SMEM, 0, tag)
    yield kernel(f"{short}_latent_merge", "head_gemm", f"latent_merge<{tag}>", 0, STATIC, tag)
    name, symbol = f"{short}_latent_values_n8", f"latent_values<{tag}, 1>"
    yield kernel(name, "head_gemm", symbol, product_smem(MAX_INNER, 1), STATIC, tag)
    for n in EIGHTS:
        smem = product_smem(MAX_INNER, n)
        name, symbol = f"{short}_head_linear_n{8 * n}", f"head_linear<{tag}, {n}>"
        yield kernel(name, "head_gemm", symbol, smem, STATIC, tag)
        for suffix, interleaved in (("", "false"), ("_interleaved", "true")):
            name = f"{short}_latent_prepare{suffix}_n{8 * n}"
            symbol = f"latent_prepare<{tag}, {interleaved}, {n}>"
            yield kernel(name, "prepare", symbol, smem, STATIC, tag)


SPECS: list[KernelSpec] = [spec for tag in TAGS for spec in _specs(tag)]

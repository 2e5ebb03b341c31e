"""Attention over the paged cache: decode and prefill kernels, and the shared memory each may ask for."""

from __future__ import annotations

from rvllm.errors import MissingKernelError
from rvllm.kernels.constants import constants
from rvllm.kernels.spec import KernelSpec
from rvllm.kernels.types import SHORT, TYPES

HEAD_DIMS = (32, 64, 80, 96, 128, 160, 256)
DECODE_SEQS = 2048  # sequences a launch of attn_decode can list
DECODE_RING_SLOTS = {128: 24}  # half tiles of a block of attn_decode_ring, by head size
DECODE_RING_WARPS = (4, 8)  # of a block
DECODE_RING_FP8_SLOTS = 3  # tiles of a warp of attn_decode_ring_fp8
PREFILL_SM90_DIMS = (64, 96, 128)  # head sizes of attn_prefill_sm90
PREFILL_SM90_ROWS, PREFILL_SM90_THREADS = 128, 384
SIZES = constants("attention/attention.cuh")
_PAD, _TILE, _BLOCK = SIZES["PAD"], SIZES["TILE"], constants("attention/kv_block.cuh")["KV_BLOCK"]
_OF = {False: "", True: "_fp8"}  # what names of kernels say of their cache


def piece_bytes(head_dim: int) -> int:
    """Bytes of a block of one head's keys or values in E4M3; mirrors attention/fp8_cache.cuh."""
    return _BLOCK * (head_dim + 1)


def decode_smem(head_dim: int, separate: bool, max_seqs: int = DECODE_SEQS, fp8: bool = False) -> int:
    """Dynamic shared memory of attn_decode in bytes: four tiles, the queries, and a word a sequence.

    separate: four more tiles, so that keys and values do not take turns. fp8: of a cache in E4M3.
    """
    tiles = (1 if fp8 else 2) * 4 * _TILE * (head_dim + _PAD)
    return tiles * (2 if separate else 1) + 2 * 16 * (head_dim + _PAD) + 4 * (-(-max_seqs // 32) * 32)


def decode_ring_smem(head_dim: int, fp8: bool = False) -> int:
    """Dynamic shared memory of attn_decode_ring in bytes: rings, a barrier a slot, and to align them.

    fp8: of attn_decode_ring_fp8, whose slots are whole tiles of a cache in E4M3.
    """
    if fp8:
        return 1024 + 4 * DECODE_RING_FP8_SLOTS * (4 * piece_bytes(head_dim) + 8)
    return 1024 + DECODE_RING_SLOTS[head_dim] * (_TILE * head_dim + 8)


def decode_ring_state(head_dim: int, group: int) -> int:
    """Floats of an unfinished split of up to 16 heads in attn_decode_ring's workspace, as its Stored."""
    return min(group, 8) * (1 if group <= 8 else 2) * (head_dim + 8)


def decode_ring_kernel(
    dtype: str, head_dim: int, group: int, smem_per_block: int, fp8: bool = False
) -> str | None:
    """The decode attention kernel with rings of tiles, where one has this head size and fits.

    Only what has been compared bit for bit on a GPU is chosen: heads of 128 in groups of up to eight. Heads
    of 64 and larger groups have been compared in the emulator alone, whose lanes copy for the copy engine.
    """
    if head_dim not in DECODE_RING_SLOTS or group > 8:
        return None
    name = f"sm90_{SHORT[dtype]}_attn_decode{_OF[fp8]}_d{head_dim}{'' if group <= 8 else '_wide'}"
    return name if name in _BY_NAME and _BY_NAME[name].smem + 4096 <= smem_per_block else None


def decode_rope_kernel(ring: str) -> str | None:
    """The kernel that rotates besides what the kernel with rings `ring` does, where there is one."""
    name = ring.replace("_attn_decode_", "_attn_decode_rope_")
    return name if name in _BY_NAME else None


def prefill_rows(head_dim: int, small: bool) -> int:
    """Query rows a block of attn_prefill has."""
    return (128 if head_dim <= 128 else 64) // (2 if small else 1)


def prefill_smem(head_dim: int, rows: int, fp8: bool = False) -> int:
    """Dynamic shared memory of attn_prefill in bytes. fp8: of a cache in E4M3."""
    fetched = 4 * piece_bytes(head_dim) if fp8 else 0
    return 2 * (rows + 2 * _TILE) * (head_dim + _PAD) + 4 * rows * head_dim + fetched


def prefill_sm90_smem(head_dim: int, fp8: bool = False) -> int:
    """Dynamic shared memory of attn_prefill_sm90 in bytes, as its Layout. fp8: of a cache in E4M3."""
    halves, barriers, limit = -(-head_dim // 64), 512 if fp8 else 256, 232448
    stage, rows = halves * _TILE * 128, PREFILL_SM90_ROWS * (halves * 128 + 4 * head_dim)
    fixed = rows + barriers + (16 * piece_bytes(head_dim) if fp8 else 0)
    stages = min(6, (limit - fixed) // (2 * stage))
    return 2 * stages * stage + fixed


def prefill_sm90_kernel(dtype: str, head_dim: int, fp8: bool = False) -> str | None:
    """The prefill attention kernel for Hopper with heads of that size, where there is one."""
    name = f"sm90_{SHORT[dtype]}_attn_prefill{_OF[fp8]}_d{head_dim}"
    return name if name in _BY_NAME else None


def decode_kernel(dtype: str, head_dim: int, smem_per_block: int, fp8: bool = False) -> str:
    """The decode attention kernel that fits; raises MissingKernelError when none does."""
    return _fitting("decode", dtype, head_dim, smem_per_block, fp8)


def prefill_kernel(dtype: str, head_dim: int, smem_per_block: int, fp8: bool = False) -> str:
    """The prefill attention kernel that fits; raises MissingKernelError when none does."""
    return _fitting("prefill", dtype, head_dim, smem_per_block, fp8)


def _fitting(phase: str, dtype: str, head_dim: int, smem_per_block: int, fp8: bool) -> str:
    base = f"sm80_{SHORT[dtype]}_attn_{phase}{_OF[fp8]}_d{head_dim}"
    static = 1024 if phase == "decode" else 0  # what the kernel declares besides
    for name in (base, f"{base}_small"):
        if name in _BY_NAME and _BY_NAME[name].smem + static <= smem_per_block:
            return name
    raise MissingKernelError(
        f"no {phase} attention kernel for {dtype}, head size {head_dim} "
        f"and {smem_per_block // 1024} KB of shared memory; head sizes are {', '.join(map(str, HEAD_DIMS))}"
    )


def _attention(dtype: str, dim: int, fp8: bool) -> list[KernelSpec]:
    t, short, of = TYPES[dtype], SHORT[dtype], _OF[fp8]
    sizes = str(dim) if fp8 else f"{dim}, {dim}"
    specs = []
    for small in (False, True) if dim <= 160 else (False,):
        suffix, rows = "_small" if small else "", prefill_rows(dim, small)
        if dim <= 128 or not small:
            specs.append(
                KernelSpec(
                    name=f"sm80_{short}_attn_decode{of}_d{dim}{suffix}",
                    source="attention/decode.cu",
                    symbol=f"attn_decode{of}<{t}, {sizes}>",
                    smem=decode_smem(dim, separate=not small and dim <= 128, fp8=fp8),
                    unit=f"{short}{of}_d{dim}{suffix}",
                )
            )
        specs.append(
            KernelSpec(
                name=f"sm80_{short}_attn_prefill{of}_d{dim}{suffix}",
                source="attention/prefill.cu",
                symbol=f"attn_prefill{of}<{t}, {sizes}, {rows // 16}>",
                smem=prefill_smem(dim, rows, fp8),
                static_smem=0,
                unit=f"{short}{of}_d{dim}{suffix}",
            )
        )
    return specs


def _sm90(dtype: str, dim: int, fp8: bool) -> KernelSpec:
    return KernelSpec(
        name=f"sm90_{SHORT[dtype]}_attn_prefill{_OF[fp8]}_d{dim}",
        source="attention/prefill_sm90.cu",
        symbol=f"attn_prefill_sm90{_OF[fp8]}<{TYPES[dtype]}, {dim}>",
        arch=90,
        exact=True,
        smem=prefill_sm90_smem(dim, fp8),
        static_smem=0,
        unit=f"{SHORT[dtype]}{_OF[fp8]}_d{dim}",
    )


def _ring(dtype: str, dim: int, rows: int) -> KernelSpec:
    return KernelSpec(
        name=f"sm90_{SHORT[dtype]}_attn_decode_d{dim}{'' if rows == 8 else '_wide'}",
        source="attention/decode_ring.cu",
        symbol=f"attn_decode_ring<{TYPES[dtype]}, {dim}, {rows}, {DECODE_RING_SLOTS[dim]}>",
        arch=90,
        smem=decode_ring_smem(dim),
        static_smem=4096,
        unit=f"{SHORT[dtype]}_d{dim}_{rows}",
    )


def _ring_fp8(dtype: str, dim: int) -> KernelSpec:
    return KernelSpec(
        name=f"sm90_{SHORT[dtype]}_attn_decode_fp8_d{dim}",
        source="attention/decode_ring_fp8.cu",
        symbol=f"attn_decode_ring_fp8<{TYPES[dtype]}, {dim}, {DECODE_RING_FP8_SLOTS}>",
        arch=90,
        smem=decode_ring_smem(dim, fp8=True),
        static_smem=4096,
        unit=f"{SHORT[dtype]}_d{dim}",
    )


def _ring_rope(dtype: str, dim: int) -> KernelSpec:
    return KernelSpec(
        name=f"sm90_{SHORT[dtype]}_attn_decode_rope_d{dim}",
        source="attention/decode_ring.cu",
        symbol=f"attn_decode_rope<{TYPES[dtype]}, {dim}, {DECODE_RING_SLOTS[dim]}>",
        arch=90,
        smem=decode_ring_smem(dim),
        static_smem=4096,
        unit=f"{SHORT[dtype]}_d{dim}_rope",
    )


DTYPES = ("bfloat16", "float16")
SPECS: list[KernelSpec] = [
    *(spec for dtype in DTYPES for dim in HEAD_DIMS for fp8 in _OF for spec in _attention(dtype, dim, fp8)),
    *(_sm90(dtype, dim, fp8) for dtype in DTYPES for dim in PREFILL_SM90_DIMS for fp8 in _OF),
    *(_ring(dtype, dim, rows) for dtype in DTYPES for dim in DECODE_RING_SLOTS for rows in (8,)),
    *(_ring_rope(dtype, dim) for dtype in DTYPES for dim in DECODE_RING_SLOTS if dim == 128),
    *(_ring_fp8(dtype, dim) for dtype in DTYPES for dim in DECODE_RING_SLOTS),
]
_BY_NAME = {spec.name: spec for spec in SPECS}

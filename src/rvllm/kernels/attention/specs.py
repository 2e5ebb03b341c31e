"""Attention over the paged cache: decode and prefill kernels, and the shared memory each may ask for."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal

from rvllm.errors import MissingKernelError
from rvllm.kernels.constants import constants
from rvllm.kernels.spec import Folder, KernelSpec
from rvllm.kernels.types import SHORT, TYPES

HEAD_DIMS = (32, 64, 80, 96, 128, 160, 256)
SPARSE_HEAD_DIMS = (64, 128)  # of block-sparse attention
TURN_HEAD_DIMS = (64, 256)  # of attn_decode_turn
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
    name = f"sm90_{SHORT[dtype]}_attn_decode{_OF[fp8]}_d{head_dim}"
    return name if name in _BY_NAME and _BY_NAME[name].smem + 4096 <= smem_per_block else None


def decode_rope_kernel(ring: str) -> str | None:
    """The kernel that rotates besides what the kernel with rings `ring` does, where there is one."""
    name = ring.replace("_attn_decode_", "_attn_decode_rope_")
    return name if name in _BY_NAME else None


def decode_turn_kernel(plain: str) -> str | None:
    """The kernel that rotates besides what the attn_decode `plain` does, where there is one.

    Like launches of one token that it stands between, it has been timed on Hopper alone.
    """
    name = plain.replace("sm80_", "sm90_").replace("_attn_decode_", "_attn_decode_turn_")
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


def sparse_kernel(dense: str, head_dim: int) -> str:
    """The block-sparse kernel beside a dense one; raises MissingKernelError where there is none."""
    if head_dim not in SPARSE_HEAD_DIMS:
        sizes = ", ".join(map(str, SPARSE_HEAD_DIMS))
        raise MissingKernelError(
            f"no block-sparse attention kernel for head size {head_dim}; there are {sizes}"
        )
    return dense.replace(f"_d{head_dim}", f"_sparse_d{head_dim}")


def mma_kernel(
    phase: Literal["decode", "prefill"], dtype: str, head_dim: int, smem_per_block: int, fp8: bool
) -> str:
    """The attention kernel by mma.sync that fits; raises MissingKernelError when none does."""
    base = f"sm80_{SHORT[dtype]}_attn_{phase}{_OF[fp8]}_d{head_dim}"
    static = 1024 if phase == "decode" else 0  # what the kernel declares besides
    for name in (base, f"{base}_small"):
        if name in _BY_NAME and _BY_NAME[name].smem + static <= smem_per_block:
            return name
    raise MissingKernelError(
        f"no {phase} attention kernel for {dtype}, head size {head_dim} "
        f"and {smem_per_block // 1024} KB of shared memory; head sizes are {', '.join(map(str, HEAD_DIMS))}"
    )


_kernel = Folder("attention").kernel


def _mma(dtype: str, dim: int, of: str) -> Iterator[KernelSpec]:
    """Both phases by mma.sync, on every GPU."""
    t, short = TYPES[dtype], SHORT[dtype]
    sizes = str(dim) if of == "_fp8" else f"{dim}, {dim}"
    for small in (False, True) if dim <= 160 else (False,):
        end, rows, fp8 = f"{of}_d{dim}{'_small' if small else ''}", prefill_rows(dim, small), of == "_fp8"
        unit, symbol = f"{short}{end}", f"{of}<{t}, {sizes}"
        if dim <= 128 or not small:
            smem = decode_smem(dim, separate=not small and dim <= 128, fp8=fp8)
            yield _kernel(
                f"sm80_{short}_attn_decode{end}", "decode", f"attn_decode{symbol}>", smem, unit=unit
            )
        smem, static = prefill_smem(dim, rows, fp8), 1024 if of == "_sparse" else 0
        symbol = f"attn_prefill{symbol}, {rows // 16}>"
        yield _kernel(f"sm80_{short}_attn_prefill{end}", "prefill", symbol, smem, static, unit)


def _turn(dtype: str, dim: int) -> KernelSpec:
    """attn_decode that rotates besides."""
    name, symbol = f"sm90_{SHORT[dtype]}_attn_decode_turn_d{dim}", f"attn_decode_turn<{TYPES[dtype]}, {dim}>"
    smem = decode_smem(dim, separate=dim <= 128)
    return _kernel(name, "decode", symbol, smem, unit=f"{SHORT[dtype]}_turn_d{dim}")


def _prefill_sm90(dtype: str, dim: int, fp8: bool) -> KernelSpec:
    end, smem = f"{_OF[fp8]}_d{dim}", prefill_sm90_smem(dim, fp8)
    symbol = f"attn_prefill_sm90{_OF[fp8]}<{TYPES[dtype]}, {dim}>"
    name = f"sm90_{SHORT[dtype]}_attn_prefill{end}"
    return _kernel(name, "prefill_sm90", symbol, smem, 0, f"{SHORT[dtype]}{end}")


def _rings(dtype: str, dim: int) -> Iterator[KernelSpec]:
    """Decode with rings of tiles: plain, rotating besides, and over a cache in E4M3."""
    name, t, unit = f"sm90_{SHORT[dtype]}_attn_decode", TYPES[dtype], f"{SHORT[dtype]}_d{dim}"
    smem, slots = decode_ring_smem(dim), DECODE_RING_SLOTS[dim]
    symbol = f"attn_decode_ring<{t}, {dim}, 8, {slots}>"
    yield _kernel(f"{name}_d{dim}", "decode_ring", symbol, smem, 4096, f"{unit}_8")
    symbol = f"attn_decode_rope<{t}, {dim}, {slots}>"
    yield _kernel(f"{name}_rope_d{dim}", "decode_ring", symbol, smem, 4096, f"{unit}_rope")
    for kind, rope in (("ring", ""), ("rope", "_rope")):
        symbol = f"attn_decode_{kind}_fp8<{t}, {dim}, {DECODE_RING_FP8_SLOTS}>"
        smem = decode_ring_smem(dim, fp8=True)
        yield _kernel(f"{name}{rope}_fp8_d{dim}", "decode_ring_fp8", symbol, smem, 4096, f"{unit}{rope}")


DTYPES = ("bfloat16", "float16")
SPECS: list[KernelSpec] = [
    *(spec for dtype in DTYPES for dim in HEAD_DIMS for of in _OF.values() for spec in _mma(dtype, dim, of)),
    *(spec for dtype in DTYPES for dim in SPARSE_HEAD_DIMS for spec in _mma(dtype, dim, "_sparse")),
    *(_turn(dtype, dim) for dtype in DTYPES for dim in TURN_HEAD_DIMS),
    *(_prefill_sm90(dtype, dim, fp8) for dtype in DTYPES for dim in PREFILL_SM90_DIMS for fp8 in _OF),
    *(spec for dtype in DTYPES for dim in DECODE_RING_SLOTS for spec in _rings(dtype, dim)),
]
_BY_NAME = {spec.name: spec for spec in SPECS}

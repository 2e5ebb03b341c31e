"""Stored tensor bytes to float32: the block formats of llama.cpp (ggml) and the plain 16-bit ones.

A block format stores runs of a row as small integers with a scale, and for some a minimum, per group:

    Q4_0, Q5_0  d * (q - 8), d * (q - 16)         Q4_1, Q5_1  d * q + m          Q8_0  d * q
    Q4_K, Q5_K, Q2_K  (d * s) * q - (dmin * n)    Q6_K, Q3_K  (d * s) * (q - 32), (d * s) * (q - 4)
    IQ4_NL, IQ4_XS    d * table[q], (d * s) * table[q]          MXFP4  2^(e - 128) * table[q]

with q the level, d, dmin and m float16 per block, s and n small integers per group of 32 (Q6_K, Q2_K, Q3_K:
16) elements. Layouts as ggml defines them; results are bit-identical to the `gguf` package's, which the
tests compare with. They are written here again because this is most of what loading a model costs, and
working through blocks in pieces that stay in the cache is several times faster.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from rvllm.weights.checkpoint import TensorType

Bytes = NDArray[np.uint8]
Floats = NDArray[np.float32]
Scales = tuple[Floats, Floats | None]  # of the groups of each block, [blocks, groups]

# What the levels of IQ4_NL and IQ4_XS, and of MXFP4 (twice the numbers of e2m1), stand for.
NORMAL_TABLE = np.array([-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113], np.int8)
FP4_TABLE = np.array([0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12], np.int8)

PIECE = 1 << 15  # elements handled at a time: levels and floats of a piece stay in the second-level cache


def dequantise(kind: TensorType, raw: Bytes, shape: tuple[int, ...]) -> Floats:
    """A tensor's elements as float32 of `shape`.

    raw: its bytes, flat, uint8; as many as `kind` needs for the shape, else ValueError.
    """
    out = np.empty(shape, dtype=np.float32)
    dequantise_into(kind, raw, out.reshape(-1))
    return out


def dequantise_into(kind: TensorType, raw: Bytes, out: Floats) -> None:
    """Fills the flat, contiguous float32 array `out` from blocks of `kind`; ValueError if sizes differ."""
    elements, nbytes = kind.block
    blocks = len(raw) // nbytes
    if blocks * nbytes != len(raw) or blocks * elements != out.size:
        raise ValueError(f"{len(raw)} bytes of {kind.value} do not hold {out.size} elements")
    plain = _PLAIN.get(kind)
    if plain is not None:
        plain(raw, out)
        return
    blocked = _BLOCKED[kind]
    stored = raw.reshape(blocks, nbytes)
    wanted = out.reshape(blocks, elements)
    step = max(1, PIECE // elements)
    levels = np.empty((min(step, blocks), elements), dtype=np.uint8)
    with np.errstate(invalid="ignore", over="ignore"):  # a scale that is no number gives none, quietly
        for start in range(0, blocks, step):
            piece, numbers = stored[start : start + step], wanted[start : start + step]
            found = levels[: len(piece)]
            blocked.levels(piece, found)
            scale, minimum = blocked.scales(piece)
            numbers[...] = found.view(np.int8) if blocked.signed else found
            groups = numbers.reshape(len(piece), scale.shape[1], -1)
            groups *= scale[:, :, None]
            if minimum is not None:
                groups += minimum[:, :, None]


def _f32(raw: Bytes, out: Floats) -> None:
    out[:] = raw.view(np.float32)


def _f16(raw: Bytes, out: Floats) -> None:
    out[:] = raw.view(np.float16)


def _bf16(raw: Bytes, out: Floats) -> None:
    # bfloat16 is the upper half of float32.
    np.left_shift(raw.view(np.uint16), 16, out=out.view(np.uint32), dtype=np.uint32)


def _halves(piece: Bytes, start: int) -> Floats:
    """The float16 at byte `start` of every block, as float32 [blocks, 1]."""
    return np.ascontiguousarray(piece[:, start : start + 2]).view(np.float16).astype(np.float32)


def _nibbles(packed: Bytes, levels: Bytes) -> None:
    """[blocks, 16] bytes to [blocks, 32] levels: low halves first, then high ones."""
    np.bitwise_and(packed, 15, out=levels[:, :16])
    np.right_shift(packed, 4, out=levels[:, 16:])


def _fifth_bits(piece: Bytes, start: int, levels: Bytes) -> None:
    """Adds 16 to each level whose bit in the 32-bit mask at byte `start` is set."""
    bits = np.unpackbits(piece[:, start : start + 4], axis=1, bitorder="little")
    np.left_shift(bits, 4, out=bits)
    np.bitwise_or(levels, bits, out=levels)


def _nibbles_at(
    start: int, fifth: int | None = None, less: int = 0, table: NDArray[np.int8] | None = None
) -> Callable[[Bytes, Bytes], None]:
    """Levels whose nibbles begin at byte `start` of a block, with fifth bits from byte `fifth` on.

    less: subtracted; it wraps around, and is read back as signed. table: what a level stands for.
    """

    def levels_of(piece: Bytes, levels: Bytes) -> None:
        stop = start + levels.shape[1] // 2
        _nibbles(piece[:, start:stop].reshape(-1, 16), levels.reshape(-1, 32))
        if fifth is not None:
            _fifth_bits(piece, fifth, levels)
        if table is not None:
            levels[...] = table.view(np.uint8)[levels]
        if less:
            levels -= less

    return levels_of


def _q8_0(piece: Bytes, levels: Bytes) -> None:
    levels[...] = piece[:, 2:34]


def _q4_k(piece: Bytes, levels: Bytes) -> None:
    packed, pairs = piece[:, 16:144].reshape(-1, 4, 32), levels.reshape(-1, 4, 2, 32)
    np.bitwise_and(packed, 15, out=pairs[:, :, 0])
    np.right_shift(packed, 4, out=pairs[:, :, 1])


def _q5_k(piece: Bytes, levels: Bytes) -> None:
    packed, pairs = piece[:, 48:176].reshape(-1, 4, 32), levels.reshape(-1, 4, 2, 32)
    np.bitwise_and(packed, 15, out=pairs[:, :, 0])
    np.right_shift(packed, 4, out=pairs[:, :, 1])
    high, groups = piece[:, 16:48], levels.reshape(-1, 8, 32)
    for group in range(8):  # bit `group` of byte i is the fifth bit of element i of the group
        shifted = high << (4 - group) if group < 4 else high >> (group - 4)
        groups[:, group] |= shifted & 16


def _q6_k(piece: Bytes, levels: Bytes) -> None:
    low, high = piece[:, :128].reshape(-1, 2, 64), piece[:, 128:192].reshape(-1, 2, 32)
    halves = levels.reshape(-1, 2, 4, 32)  # each half of a block: four runs of 32
    np.bitwise_and(low, 15, out=halves[:, :, 0:2].reshape(-1, 2, 64))
    np.right_shift(low, 4, out=halves[:, :, 2:4].reshape(-1, 2, 64))
    for run in range(4):  # bits 2 run and 2 run + 1 of `high` are the run's two upper bits
        shifted = high << (4 - 2 * run) if run < 3 else high >> 2
        halves[:, :, run] |= shifted & 48
    levels -= 32


def _q2_k(piece: Bytes, levels: Bytes) -> None:
    packed, runs = piece[:, 16:80].reshape(-1, 2, 32), levels.reshape(-1, 2, 4, 32)
    for run in range(4):
        np.right_shift(packed, 2 * run, out=runs[:, :, run])
    np.bitwise_and(levels, 3, out=levels)


def _q3_k(piece: Bytes, levels: Bytes) -> None:
    packed, runs = piece[:, 32:96].reshape(-1, 2, 32), levels.reshape(-1, 8, 32)
    for run in range(8):  # bit `run` of byte i of the mask is the third bit of element i of the run
        third = (piece[:, :32] >> run & 1) << 2
        runs[:, run] = (packed[:, run // 4] >> run % 4 * 2 & 3) | third
    levels -= 4  # wraps around; read back as signed


def _one_scale(piece: Bytes) -> Scales:
    return _halves(piece, 0), None


def _scale_and_minimum(piece: Bytes) -> Scales:
    return _halves(piece, 0), _halves(piece, 2)


def _k_scales(piece: Bytes) -> Scales:
    """Of a Q4_K or Q5_K block's eight groups.

    Twelve bytes hold eight 6-bit scales and eight 6-bit minima: bytes 0-3 scales 0-3, bytes 4-7 minima
    0-3, bytes 8-11 the low four bits of scales 4-7 and (upper halves) of minima 4-7, whose two upper bits
    are the upper bits of bytes 0-7. A minimum is subtracted: it is given as its negative.
    """
    first, second, third = piece[:, 4:8], piece[:, 8:12], piece[:, 12:16]
    scales = np.concatenate([first & 63, (third & 15) | ((first >> 2) & 48)], axis=1)
    minima = np.concatenate([second & 63, (third >> 4) | ((second >> 2) & 48)], axis=1)
    return _halves(piece, 0) * scales.astype(np.float32), -_halves(piece, 2) * minima.astype(np.float32)


def _q6_k_scales(piece: Bytes) -> Scales:
    scales = np.ascontiguousarray(piece[:, 192:208]).view(np.int8)
    return _halves(piece, 208) * scales.astype(np.float32), None


def _q2_k_scales(piece: Bytes) -> Scales:
    both = piece[:, :16]
    return _halves(piece, 80) * (both & 15).astype(np.float32), -_halves(piece, 82) * (both >> 4).astype(
        np.float32
    )


def _q3_k_scales(piece: Bytes) -> Scales:
    """Sixteen 6-bit scales, less 32: bytes 0-7 have the low four bits of 0-7 and (upper halves) of 8-15,
    bytes 8-11 the two upper bits of scales i % 4, in the order of i / 4.
    """
    low, high = piece[:, 96:104], piece[:, 104:108]
    fours = np.concatenate([low & 15, low >> 4], axis=1)
    twos = np.concatenate([high >> shift & 3 for shift in (0, 2, 4, 6)], axis=1)
    return _halves(piece, 108) * ((fours | twos << 4).astype(np.float32) - np.float32(32)), None


def _iq4_xs_scales(piece: Bytes) -> Scales:
    high = np.ascontiguousarray(piece[:, 2:4]).view(np.uint16)
    fours = np.stack([piece[:, 4:8] & 15, piece[:, 4:8] >> 4], axis=2).reshape(len(piece), 8)
    twos = high >> np.arange(0, 16, 2, dtype=np.uint16) & 3
    return _halves(piece, 0) * ((fours | twos << 4).astype(np.float32) - np.float32(32)), None


def _mxfp4_scales(piece: Bytes) -> Scales:
    return np.ldexp(np.float32(1), piece[:, :1].astype(np.int32) - 128), None


_PLAIN: dict[TensorType, Callable[[Bytes, Floats], None]] = {
    TensorType.F32: _f32,
    TensorType.F16: _f16,
    TensorType.BF16: _bf16,
}


@dataclass(frozen=True)
class _Blocked:
    levels: Callable[[Bytes, Bytes], None]
    signed: bool
    scales: Callable[[Bytes], Scales]


_BLOCKED = {
    TensorType.Q4_0: _Blocked(_nibbles_at(2, less=8), True, _one_scale),
    TensorType.Q4_1: _Blocked(_nibbles_at(4), False, _scale_and_minimum),
    TensorType.Q5_0: _Blocked(_nibbles_at(6, fifth=2, less=16), True, _one_scale),
    TensorType.Q5_1: _Blocked(_nibbles_at(8, fifth=4), False, _scale_and_minimum),
    TensorType.Q8_0: _Blocked(_q8_0, True, _one_scale),
    TensorType.Q4_K: _Blocked(_q4_k, False, _k_scales),
    TensorType.Q5_K: _Blocked(_q5_k, False, _k_scales),
    TensorType.Q6_K: _Blocked(_q6_k, True, _q6_k_scales),
    TensorType.Q2_K: _Blocked(_q2_k, False, _q2_k_scales),
    TensorType.Q3_K: _Blocked(_q3_k, True, _q3_k_scales),
    TensorType.IQ4_NL: _Blocked(_nibbles_at(2, table=NORMAL_TABLE), True, _one_scale),
    TensorType.IQ4_XS: _Blocked(_nibbles_at(8, table=NORMAL_TABLE), True, _iq4_xs_scales),
    TensorType.MXFP4: _Blocked(_nibbles_at(1, table=FP4_TABLE), True, _mxfp4_scales),
}


def levels_into(kind: TensorType, stored: Bytes, levels: Bytes) -> None:
    """The integer levels of blocks [blocks, bytes] into uint8 [blocks, elements].

    Those of kinds without a minimum are signed: view them as int8.
    """
    _BLOCKED[kind].levels(stored, levels)


def scales_of(kind: TensorType, stored: Bytes) -> Scales:
    """Scales and minima of blocks [blocks, bytes], each float32 [blocks, groups]; None: no minima.

    An element is level * scale + minimum; a block's elements fall into equal groups.
    """
    with np.errstate(invalid="ignore", over="ignore"):
        return _BLOCKED[kind].scales(stored)


def stored_nbytes(kind: TensorType, shape: tuple[int, ...]) -> int:
    """Bytes a tensor of `shape` takes; ValueError if its rows are not whole blocks."""
    elements, nbytes = kind.block
    count = math.prod(shape)
    if (shape[-1] if shape else 1) % elements:
        raise ValueError(f"rows of {shape[-1]} elements are not whole {kind.value} blocks of {elements}")
    return count // elements * nbytes

"""Matrices of 4- or 8-bit levels with a zero and a scale a group: GPTQ, AWQ and llm-compressor's packing.

An element is w[n, k] = (level[n, k] - zero[n, g]) * scale[n, g], g the group of input k: k // group_size, or
what `g_idx` says where columns were quantised in order of importance (`desc_act`). The three differ in how
levels and zeros lie in 32-bit words, always from the low end:

    GPTQ   qweight [K * bits / 32, N]: a word holds successive k; qzeros [groups, N * bits / 32] successive n,
           one less than the zero in the first version of the format, modulo 2^bits
    AWQ    qweight [K, N / 8], qzeros [groups, N / 8]: a word holds eight successive n in the order
           0 2 4 6 1 3 5 7 (of its `gemm` version)
    packed weight_packed [N, K * bits / 32]: a word holds successive k; weight_zero_point
           [N * bits / 32, groups] successive n, or none: 2^(bits - 1); weight_shape, if there: N and K

Where rules of the config give modules bits and group sizes of their own, the shapes of tensors tell them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from rvllm.errors import ModelError
from rvllm.weights.safetensors.stored import FLOAT_KINDS, StoredTensor, require, unpack

Levels = NDArray[np.uint8]
Floats = NDArray[np.float32]
AWQ_PLACES = [0, 4, 1, 5, 2, 6, 3, 7]  # the place within its word of each of eight successive columns
AWQ_BITS = 4
BITS = (4, 8)
OTHER_BITS = (2, 3, 5, 6, 7)  # that modules of a checkpoint may have by a rule


@dataclass(frozen=True)
class PackedMatrix:
    """The stored tensors of a matrix, for backends that compute on them.

    kind: see the module; zeros None: all are 2^(bits - 1); plus_one: they are stored one less. signed: levels
    and zeros are signed bytes, 128 less, zeros a byte for each scale. scales: of one row where all rows share
    them.
    """

    kind: Literal["gptq", "awq", "packed"]
    bits: int
    levels: StoredTensor
    scales: StoredTensor
    zeros: StoredTensor | None
    plus_one: bool = False
    signed: bool = False


@dataclass(frozen=True)
class Grouped:
    """See the module. levels(start, stop): [rows, K]; zeros and scales(start, stop): [rows, groups].

    group_size: inputs of a group where `order` is None; order: I32 [K], the group of each input.
    """

    format: str
    stored_nbytes: int
    levels: Callable[[int, int], Levels]
    zeros: Callable[[int, int], Floats]
    scales: Callable[[int, int], Floats]
    group_size: int
    packed: PackedMatrix
    order: StoredTensor | None = None

    def column_order(self, width: int) -> NDArray[np.int32] | None:
        """The stored column of each, sorted by group, where groups are no runs; None where they are.

        Raises ModelError for groups that are not there, ValueError for groups of unequal length.
        """
        groups = -(-width // self.group_size)
        group = self._groups(width, groups)
        if self.order is None or group is None:
            return None
        order = np.argsort(group, kind="stable").astype(np.int32)
        if not np.array_equal(group[order], np.arange(width, dtype=np.int32) // self.group_size):
            raise ValueError(f"{self.format}: groups of unequal length")
        return None if np.array_equal(order, np.arange(width)) else order

    def numbers(self, start: int, stop: int) -> Floats:
        """Rows start to stop, float32 [stop - start, K]."""
        out = self.levels(start, stop).astype(np.float32)
        zeros, scales = self.zeros(start, stop), self.scales(start, stop)
        width, groups = out.shape[1], zeros.shape[1]
        group = self._groups(width, groups)
        if group is None:
            cut = out.reshape(len(out), groups, self.group_size)
            cut -= zeros[:, :, None]
            cut *= scales[:, :, None]
            return out
        out -= zeros[:, group]
        out *= scales[:, group]
        return out

    def _groups(self, width: int, groups: int) -> NDArray[np.int32] | None:
        """The group of each input; None where they are successive runs of the same length."""
        plain = np.arange(width, dtype=np.int32) // self.group_size
        group = plain if self.order is None else self.order.data.view(np.int32)
        if group.size and not (group.min() >= 0 and group.max() < groups):
            place = f"{self.order.file}: g_idx at byte {self.order.offset}" if self.order else self.format
            raise ModelError(f"{place}: names a group that is not there, the scales are of {groups}")
        regular = width == groups * self.group_size and np.array_equal(group, plain)
        return None if regular else group


@dataclass(frozen=True)
class GptqSettings:
    """group_size: -1 for a whole row; first_version: zeros are stored one less; desc_act: g_idx is needed.

    ruled: whether the config has rules by which modules have other group sizes.
    """

    group_size: int
    desc_act: bool
    first_version: bool
    ruled: bool = False


def gptq_matrix(
    stored: dict[str, StoredTensor], module: str, settings: GptqSettings
) -> tuple[tuple[int, int], Grouped]:
    """A GPTQ module's shape [N, K] and matrix. Raises ModelError: what is missing or does not fit."""
    name = f"{module}.qweight"
    words = require(stored, name, ("I32",), (), name)
    scales = require(stored, f"{module}.scales", FLOAT_KINDS, (), name)
    if not _are_matrices(words, scales) or scales.shape[1] != words.shape[1]:
        raise ModelError(
            f"{words.file}: tensors {name} of shape {list(words.shape)} and {module}.scales of shape "
            f"{list(scales.shape)} do not belong together"
        )
    groups, rows = scales.shape
    fitting = tuple((groups, rows * bits // 32) for bits in BITS if rows * bits % 32 == 0)
    if not fitting:
        raise ModelError(f"{words.file}: tensor {name}: zeros of {rows} outputs do not fill 32-bit words")
    _refuse_bits(stored, module, groups, rows)
    packed = require(stored, f"{module}.qzeros", ("I32",), fitting, name)
    bits = packed.shape[1] * 32 // rows
    width = words.shape[0] * 32 // bits
    size = width if settings.group_size < 1 else settings.group_size
    if settings.ruled and groups != -(-width // size) and width % groups == 0:
        size = width // groups
    _check_groups(scales, module, groups, width, size)
    order = _order(stored, f"{module}.g_idx", name, width, settings.desc_act and groups > 1)

    def levels(start: int, stop: int) -> Levels:
        return unpack(words.words()[:, start:stop].T, bits)

    def zeros(start: int, stop: int) -> Floats:
        found = _unpacked_columns(packed, bits, start, stop)
        if settings.first_version:
            found = (found + np.uint8(1)) & np.uint8((1 << bits) - 1)
        return np.ascontiguousarray(found.T, dtype=np.float32)

    total = sum(t.data.nbytes for t in (words, scales, packed))
    label = f"GPTQ {bits}-bit"
    raw = PackedMatrix("gptq", bits, words, scales, packed, settings.first_version)
    return (rows, width), Grouped(label, total, levels, zeros, _columns_of(scales), size, raw, order)


def _refuse_bits(stored: dict[str, StoredTensor], module: str, groups: int, rows: int) -> None:
    """Raises ModelError for zeros of a number of bits that is not read."""
    zeros = stored.get(f"{module}.qzeros")
    sizes = {bits: (groups, rows * bits // 32) for bits in (*BITS, *OTHER_BITS)}
    bits = next((b for b, shape in sizes.items() if zeros and zeros.shape == shape), 0)
    if zeros and bits in OTHER_BITS:
        raise ModelError(
            f"{zeros.file}: module {module} is quantised to {bits} bits; supported: "
            f"{' and '.join(map(str, BITS))}"
        )


def awq_matrix(
    stored: dict[str, StoredTensor], module: str, group_size: int
) -> tuple[tuple[int, int], Grouped]:
    """An AWQ module's shape [N, K] and matrix. Raises ModelError: what is missing or does not fit."""
    name = f"{module}.qweight"
    words = require(stored, name, ("I32",), (), name)
    if not _are_matrices(words):
        raise ModelError(f"{words.file}: tensor {name} has shape {list(words.shape)}, not that of a matrix")
    width, rows = words.shape[0], words.shape[1] * 32 // AWQ_BITS
    size = width if group_size < 1 else group_size
    groups = -(-width // max(size, 1))
    scales = require(stored, f"{module}.scales", FLOAT_KINDS, ((groups, rows),), name)
    packed = require(stored, f"{module}.qzeros", ("I32",), ((groups, words.shape[1]),), name)

    def columns(tensor: StoredTensor, start: int, stop: int) -> Levels:
        first = start // 8
        levels = unpack(tensor.words()[:, first : -(-stop // 8)], AWQ_BITS)
        in_order = levels.reshape(len(levels), -1, 8)[:, :, AWQ_PLACES].reshape(len(levels), -1)
        return in_order[:, start - 8 * first : stop - 8 * first].T

    def zeros(start: int, stop: int) -> Floats:
        return np.ascontiguousarray(columns(packed, start, stop), dtype=np.float32)

    def levels(start: int, stop: int) -> Levels:
        return np.ascontiguousarray(columns(words, start, stop))

    total = sum(t.data.nbytes for t in (words, scales, packed))
    raw = PackedMatrix("awq", AWQ_BITS, words, scales, packed)
    return (rows, width), Grouped("AWQ 4-bit", total, levels, zeros, _columns_of(scales), size, raw)


def packed_matrix(
    stored: dict[str, StoredTensor], name: str, choices: tuple[int, ...]
) -> tuple[tuple[int, int], Grouped]:
    """Shape [N, K] and matrix of X.weight_packed (`name`). Raises ModelError as the others do.

    choices: the numbers of bits that modules of this checkpoint have.
    """
    module = name.removesuffix("_packed")
    words = require(stored, name, ("I32",), (), name)
    scales = require(stored, f"{module}_scale", FLOAT_KINDS, (), name)
    if not _are_matrices(words, scales) or scales.shape[0] != words.shape[0]:
        raise ModelError(
            f"{words.file}: tensors {name} of shape {list(words.shape)} and {module}_scale of shape "
            f"{list(scales.shape)} do not belong together"
        )
    bits, width = _bits_and_width(stored, f"{module}_shape", words, choices)
    rows, groups = words.shape[0], scales.shape[1]
    size = -(-width // max(groups, 1))
    _check_groups(scales, module, groups, width, size)
    packed = stored.get(f"{module}_zero_point")
    if packed is not None:
        require(stored, f"{module}_zero_point", ("I32",), ((-(-rows * bits // 32), groups),), name)
    order = _order(stored, f"{module}_g_idx", name, width, False)

    def levels(start: int, stop: int) -> Levels:
        return unpack(words.piece(slice(start, stop)).words(), bits)[:, :width]

    def zeros(start: int, stop: int) -> Floats:
        if packed is None:
            return np.full((stop - start, groups), 1 << (bits - 1), dtype=np.float32)
        first = start * bits // 32
        found = unpack(packed.words()[first : -(-stop * bits // 32)].T, bits)  # [groups, rows of these words]
        skip = first * 32 // bits
        return np.ascontiguousarray(found[:, start - skip : stop - skip].T, dtype=np.float32)

    def scale_rows(start: int, stop: int) -> Floats:
        return scales.piece(slice(start, stop)).floats()

    total = sum(t.data.nbytes for t in (words, scales, packed) if t is not None)
    label = f"packed {bits}-bit"
    raw = PackedMatrix("packed", bits, words, scales, packed)
    return (rows, width), Grouped(label, total, levels, zeros, scale_rows, size, raw, order)


def _bits_and_width(
    stored: dict[str, StoredTensor], name: str, words: StoredTensor, choices: tuple[int, ...]
) -> tuple[int, int]:
    """Bits of a level and inputs of packed words, by the module's shape (`name`) where it is stored."""
    each = words.shape[1] * 32
    shape = stored.get(name)
    if shape is None and len(choices) == 1:
        return choices[0], each // choices[0]
    if shape is None:
        raise ModelError(
            f"{words.file}: tensor {name} is missing; modules have {' or '.join(map(str, choices))} bits, "
            "and nothing else tells how many this one has"
        )
    numbers = [int(n) for n in shape.integers()]
    width = numbers[1] if len(numbers) == 2 else 0
    bits = next((b for b in choices if width > 0 and -(-width * b // 32) == words.shape[1]), 0)
    if not bits or numbers[0] != words.shape[0]:
        raise ModelError(
            f"{shape.file}: tensor {name} says {numbers}, which words of shape {list(words.shape)} do not "
            f"hold with {' or '.join(map(str, choices))} bits"
        )
    return bits, width


def _are_matrices(*tensors: StoredTensor) -> bool:
    return all(len(t.shape) == 2 and min(t.shape) > 0 for t in tensors)


def _check_groups(scales: StoredTensor, module: str, groups: int, width: int, size: int) -> None:
    if groups != -(-width // max(size, 1)):
        raise ModelError(
            f"{scales.file}: the scales of {module} are of {groups} groups, but {width} inputs in groups of "
            f"{size} are {-(-width // max(size, 1))}"
        )


def _order(
    stored: dict[str, StoredTensor], name: str, whose: str, width: int, needed: bool
) -> StoredTensor | None:
    """g_idx, where it is there or needed."""
    if name not in stored and not needed:
        return None
    return require(stored, name, ("I32",), ((width,),), whose)


def _unpacked_columns(packed: StoredTensor, bits: int, start: int, stop: int) -> Levels:
    """Columns start to stop of levels packed along columns, read from the words that hold them."""
    each = 32 // bits
    first = start // each
    levels = unpack(packed.words()[:, first : -(-stop // each)], bits)
    return levels[:, start - each * first : stop - each * first]


def _columns_of(scales: StoredTensor) -> Callable[[int, int], Floats]:
    """Scales [groups, N] as rows [n, groups]."""

    def rows(start: int, stop: int) -> Floats:
        return np.ascontiguousarray(scales.piece(columns=slice(start, stop)).floats().T)

    return rows

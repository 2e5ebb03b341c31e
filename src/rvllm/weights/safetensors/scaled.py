"""Matrices of small numbers times scales: FP8 (E4M3) and INT8, with a scale a block, row, group or matrix.

An element is w[n, k] = number[n, k] * scale[n // block_rows, k // block_columns]; of INT8 with zero points
(`weight_zero_point`, as many as scales), these are subtracted from the numbers first.

DeepSeek-V3 and Qwen3 store FP8 with blocks of 128 x 128 (`weight_scale_inv`, the factor itself despite its
name); llm-compressor and FBGEMM a scale a row, a group of columns or the whole matrix (`weight_scale`).
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rvllm.errors import ModelError
from rvllm.weights.safetensors.stored import FLOAT_KINDS, StoredTensor, require

SCALE_KINDS = (*FLOAT_KINDS, "F8_E8M0")
SCALE_NAMES = ("_scale_inv", "_scale")
NUMBER_KINDS = {"F8_E4M3": "FP8", "I8": "INT8"}


@cache
def e4m3_numbers() -> NDArray[np.float32]:
    """The 256 numbers of E4M3FN: four bits of exponent (bias 7), three of mantissa; no infinity, 127: NaN."""
    codes = np.arange(128)
    exponent, mantissa = codes >> 3, codes & 7
    normal = np.ldexp(1.0 + mantissa / 8.0, exponent - 7)
    numbers = np.where(exponent == 0, np.ldexp(mantissa / 8.0, -6), normal)
    numbers[127] = np.nan
    return np.concatenate([numbers, -numbers]).astype(np.float32)


@dataclass(frozen=True)
class Scaled:
    """See the module. block: rows and columns that share a scale; scales: [row blocks, column blocks].

    zeros: I8, as many as scales, None where all are zero.
    """

    levels: StoredTensor
    scales: StoredTensor
    grid: tuple[int, int]
    block: tuple[int, int]
    zeros: StoredTensor | None = None

    @property
    def format(self) -> str:
        """`FP8, blocks of 128 x 128`."""
        (rows, columns), (height, width) = self.levels.shape, self.block
        name = NUMBER_KINDS[self.levels.kind]
        if height >= rows and width >= columns:
            return f"{name}, one scale"
        if width >= columns and height == 1:
            return f"{name}, a scale a row"
        return f"{name}, blocks of {height} x {width}"

    @property
    def stored_nbytes(self) -> int:
        """Bytes of levels, scales and zeros."""
        return sum(t.data.nbytes for t in (self.levels, self.scales, self.zeros) if t is not None)

    def numbers(self, start: int, stop: int) -> NDArray[np.float32]:
        """Rows start to stop, float32 [stop - start, width]."""
        (height, width), columns = self.block, self.levels.shape[1]
        codes = self.levels.piece(slice(start, stop)).data.reshape(stop - start, columns)
        if self.levels.kind == "I8":
            out = codes.view(np.int8).astype(np.float32)
        else:
            out = np.take(e4m3_numbers(), codes)
        block_rows = np.arange(start, stop) // height

        def spread(flat: NDArray[Any]) -> NDArray[Any]:
            by_row = flat[block_rows - block_rows[0]]
            return by_row if by_row.shape[1] == 1 else np.repeat(by_row, width, axis=1)[:, :columns]

        here = slice(start // height, (stop - 1) // height + 1)
        if self.zeros is not None:
            out -= spread(replace(self.zeros, shape=self.grid).piece(here).integers())
        out *= spread(replace(self.scales, shape=self.grid).piece(here).floats())
        return out


def scaled_matrix(
    stored: dict[str, StoredTensor], name: str, block: tuple[int, int] | None
) -> tuple[tuple[int, int], Scaled]:
    """The matrix `name` (X.weight) with its scales (X.weight_scale_inv or X.weight_scale), and its shape.

    block: the block that the config names. Raises ModelError when scales are missing or do not fit.
    """
    levels = stored[name]
    if len(levels.shape) != 2 or 0 in levels.shape:
        raise ModelError(f"{levels.file}: tensor {name} has shape {list(levels.shape)}, not that of a matrix")
    rows, columns = levels.shape
    beside = next((name + end for end in SCALE_NAMES if name + end in stored), None)
    if beside is None:
        raise ModelError(
            f"{levels.file}: tensor {name} is {levels.kind} and has no scales: neither {name}_scale_inv nor "
            f"{name}_scale is there"
        )
    scales = require(stored, beside, SCALE_KINDS, (), name)
    grid, size = _grid(scales.shape, rows, columns, block)
    if grid is None:
        blocks = f", a scale a block of {block[0]} x {block[1]}" if block else ""
        raise ModelError(
            f"{scales.file}: tensor {beside} has shape {list(scales.shape)}; for {rows} x {columns} numbers "
            f"it must hold one scale, a scale a row{blocks} or a scale a group of a row"
        )
    zeros = stored.get(f"{name}_zero_point") if levels.kind == "I8" else None
    if zeros is not None:
        require(stored, f"{name}_zero_point", ("I8",), (scales.shape,), name)
    shifted = zeros is not None and zeros.data.any()
    return (rows, columns), Scaled(levels, scales, grid, size, zeros if shifted else None)


def _grid(
    shape: tuple[int, ...], rows: int, columns: int, block: tuple[int, int] | None
) -> tuple[tuple[int, int] | None, tuple[int, int]]:
    """The scales' (row blocks, column blocks) and the block they stand for; None when they fit nothing."""
    if block is not None:
        grid = (-(-rows // block[0]), -(-columns // block[1]))
        if shape in (grid, (grid[0], 1, grid[1], 1)):
            return grid, block
    if all(n == 1 for n in shape):
        return (1, 1), (rows, columns)
    if shape in ((rows,), (rows, 1)):
        return (rows, 1), (1, columns)
    if len(shape) == 2 and shape[0] == rows and shape[1] and columns % shape[1] == 0:
        return (rows, shape[1]), (1, columns // shape[1])
    return None, (0, 0)

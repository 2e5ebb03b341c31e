"""In which numbers a matrix is kept: plain data that a weight carries from the checkpoint to the kernels.

A weight without a format is kept in the model's own type. What a format looks like in a backend's memory
and which kernels run it is the backend's concern (`backends/cuda/formats`).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar, Literal

from rvllm.kernels.gemm.integer.specs import LAYOUTS

FP8_BLOCK = 128  # columns that share a scale, of FP8 weights in blocks
FP8_ROWS = 8  # rows that share one


@dataclass(frozen=True)
class WeightFormat(ABC):
    """Base of all formats."""

    name: ClassVar[str] = ""

    @property
    @abstractmethod
    def label(self) -> str:
        """What `rvllm info` and `rvllm plan` call it."""

    @abstractmethod
    def nbytes(self, rows: int, columns: int) -> int:
        """Bytes of a [rows, columns] matrix, numbers and scales, that a product reads."""


@dataclass(frozen=True)
class Fp8Format(WeightFormat):
    """E4M3 numbers and float32 scales: one a row, or one for each 128 columns of eight rows."""

    name: ClassVar[str] = "fp8"
    scales: Literal["row", "block"]

    @property
    def label(self) -> str:
        """`FP8, a scale a row`."""
        return "FP8, a scale a row" if self.scales == "row" else "FP8, scales of blocks"

    def nbytes(self, rows: int, columns: int) -> int:
        blocks = -(-rows // FP8_ROWS) * -(-columns // FP8_BLOCK)
        return rows * columns + 4 * (rows if self.scales == "row" else blocks)


@dataclass(frozen=True)
class BlocksFormat(WeightFormat):
    """GGUF's blocks as they lie in the file, of a table whose rows are looked up.

    stored: their kind, `Q4_K`; elements, block_bytes: of a block.
    """

    name: ClassVar[str] = "blocks"
    stored: str
    elements: int
    block_bytes: int

    @property
    def label(self) -> str:
        """`Q4_K`."""
        return self.stored

    def nbytes(self, rows: int, columns: int) -> int:
        return rows * (columns // self.elements) * self.block_bytes


@dataclass(frozen=True)
class IntegerFormat(WeightFormat):
    """Levels of a few bits with scales of groups of columns: GPTQ, AWQ, compressed-tensors, GGUF blocks.

    parts: (rows, name of a layout of `kernels.gemm.integer`) of successive rows; one, unless a fused matrix
    is of several kinds. stored: what it is called. reordered: its columns lie in another order than theirs,
    each matrix of a stack in its own; activations are put into that order first. width: columns of a packed
    row; more than the matrix has where groups are padded, 0: as many. table: in what its rows are looked up,
    where the matrix is a table of embeddings too; None: in the model's type.
    """

    name: ClassVar[str] = "integer"
    parts: tuple[tuple[int, str], ...]
    stored: str
    reordered: bool = False
    width: int = 0
    table: BlocksFormat | None = None

    @property
    def label(self) -> str:
        """`Q4_K`, `GPTQ 4-bit`."""
        return self.stored

    def packed_width(self, columns: int) -> int:
        """Columns of a packed row."""
        return self.width or columns

    def nbytes(self, rows: int, columns: int) -> int:
        total, width = 0, self.packed_width(columns)
        for count, name in self.parts:
            layout, here = LAYOUTS[name], rows if len(self.parts) == 1 else count
            total += here * (width * layout.bits // 8 + 4 * -(-width // layout.run))
        return total

"""In which form a weight lies on the device, as the kernels that use it want it."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from rvllm.backends.cuda.ops.gemm.plan import gated_rows
from rvllm.program.formats import BlocksFormat, IntegerFormat, WeightFormat
from rvllm.program.ops.dense import Weight

# packed, gated: tiles for our matrix kernels, gated with gate and up rows interleaved; stack, gated_stack:
# the same for each matrix of a stack, one behind the other; table: row-major, for lookups and for cuBLAS;
# norm: float32; bias, gated_bias: the model's type, gated_bias interleaved like its matrix.
WeightLayout = Literal["packed", "gated", "stack", "gated_stack", "table", "norm", "bias", "gated_bias"]
ELEMENT = 2  # bytes of the model's type on a GPU: bfloat16 or float16


@dataclass(frozen=True)
class PackedWeight:
    """A weight in one form; the same weight may be wanted in two (a tied head).

    matrix_bytes: of one packed matrix, the only one or one of a stack.
    """

    weight: Weight
    form: WeightLayout
    matrix_bytes: int

    @property
    def rows(self) -> int:
        """Rows of the matrix as it lies on the device, elements of a vector.

        Of a stack: of each packed matrix, or of all together in a table.
        """
        shape = self.weight.shape
        rows = shape[0]
        if self.weight.role == "stack":
            rows = shape[1] if self.form in ("stack", "gated_stack") else math.prod(shape[:-1])
        return gated_rows(rows // 2) if self.form in ("gated", "gated_stack", "gated_bias") else rows

    @property
    def width(self) -> int:
        """Elements of a row of a matrix."""
        return self.weight.shape[-1]

    @property
    def format(self) -> WeightFormat | None:
        """Of the numbers in it; None: the model's type. Tables have `blocks`."""
        return self.weight.format if self.form in ("packed", "gated", "stack", "gated_stack") else None

    @property
    def blocks(self) -> BlocksFormat | None:
        """GGUF's blocks that a table stays in; None: the model's type."""
        kept = self.weight.format if self.form == "table" else None
        if isinstance(kept, IntegerFormat):
            return kept.table
        return kept if isinstance(kept, BlocksFormat) else None

    @property
    def nbytes(self) -> int:
        """Bytes it takes on the device."""
        match self.form:
            case "packed" | "gated":
                return self.matrix_bytes
            case "stack" | "gated_stack":
                return self.weight.shape[0] * self.matrix_bytes
            case "table" if self.blocks is not None:
                return self.blocks.nbytes(self.rows, self.width)
            case "table":
                return self.weight.elements * ELEMENT
            case "norm":
                return 4 * self.weight.elements
            case "bias" | "gated_bias":
                return ELEMENT * self.rows

"""In which form each weight lies on the device, as the kernels that use it want it."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

from rvllm.backends.cuda.formats import device_format
from rvllm.backends.cuda.layout.fusion import Stage, is_gate
from rvllm.backends.cuda.ops.gemm.plan import gated_rows, packed_nbytes
from rvllm.program.formats import WeightFormat
from rvllm.program.ops.dense import Embed, Experts, HeadLinear, Linear, Logits, Norm, Route, Weight
from rvllm.program.ops.encoder import AddPositions
from rvllm.program.ops.mamba2 import CausalConv, GatedNorm, StateScan

# packed, gated: tiles for our matrix kernels, gated with gate and up rows interleaved; stack, gated_stack:
# the same for each matrix of a stack, one behind the other; table: row-major, for lookups and for cuBLAS;
# norm: float32; bias, gated_bias: the model's type, gated_bias interleaved like its matrix.
WeightLayout = Literal["packed", "gated", "stack", "gated_stack", "table", "norm", "bias", "gated_bias"]
ELEMENT = 2  # bytes of the model's type on a GPU: bfloat16 or float16


@dataclass(frozen=True)
class PackedWeight:
    """A weight in one form; the same weight may be wanted in two (a tied head)."""

    weight: Weight
    form: WeightLayout

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
        """Of the numbers in it; None: the model's type. Tables are expanded, for lookups and for cuBLAS."""
        return self.weight.format if self.form in ("packed", "gated", "stack", "gated_stack") else None

    @property
    def matrix_bytes(self) -> int:
        """Bytes of one packed matrix, the only one or one of a stack."""
        if self.format is not None:
            return device_format(self.format).packed_nbytes(self.format, self.rows, self.width)
        return packed_nbytes(self.rows, self.width)

    @property
    def nbytes(self) -> int:
        """Bytes it takes on the device."""
        match self.form:
            case "packed" | "gated":
                return self.matrix_bytes
            case "stack" | "gated_stack":
                return self.weight.shape[0] * self.matrix_bytes
            case "table":
                return self.weight.elements * ELEMENT
            case "norm":
                return 4 * self.weight.elements
            case "bias" | "gated_bias":
                return ELEMENT * self.rows


def packed_weights(stages: Iterable[Stage], matrices: WeightLayout = "packed") -> list[PackedWeight]:
    """Every (weight, form) the stages use, each once, in order of first use.

    matrices: the form of matrices that are not gated.
    """
    found: dict[tuple[str, WeightLayout], PackedWeight] = {}

    def want(weight: Weight | None, form: WeightLayout) -> None:
        if weight is not None:
            found.setdefault((weight.name, form), PackedWeight(weight, form))

    for stage in stages:
        gated = any(is_gate(op) for op in stage.ops[1:])
        for op in stage.ops:
            if isinstance(op, Linear | Logits):
                want(op.weight, "gated" if gated else matrices)
                want(op.bias, "gated_bias" if gated else "bias")
            elif isinstance(op, Embed):
                want(op.table, "table")
            elif isinstance(op, HeadLinear):
                want(op.weight, "table")
            elif isinstance(op, Route):
                want(op.weight, "table")
                want(op.bias, "norm")
            elif isinstance(op, Experts):
                want(op.up, "gated_stack" if op.gated else "stack")
                want(op.down, "stack")
            elif isinstance(op, AddPositions):
                want(op.positions, "table")
                want(op.kinds, "table")
            elif isinstance(op, Norm):
                want(op.weight, "norm")
                want(op.bias, "norm")
            elif isinstance(op, CausalConv | StateScan | GatedNorm):
                for weight in op.weights:
                    want(weight, "norm")
    return list(found.values())

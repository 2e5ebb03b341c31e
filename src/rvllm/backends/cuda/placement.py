"""In which form each weight lies on the device, as the kernels that use it want it."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

from rvllm.backends.cuda.fuse import Stage, is_gate
from rvllm.backends.cuda.gemm import gated_rows, packed_nbytes
from rvllm.program.encoder import AddPositions
from rvllm.program.ops import Embed, HeadLinear, Linear, Logits, Norm, Weight

# packed, gated: tiles for our matrix kernels, gated with gate and up rows interleaved; table: row-major, for
# lookups and for cuBLAS; norm: float32; bias, gated_bias: the model's type, gated_bias interleaved like its
# matrix.
Form = Literal["packed", "gated", "table", "norm", "bias", "gated_bias"]
ELEMENT = 2  # bytes of the model's type on a GPU: bfloat16 or float16


@dataclass(frozen=True)
class Wanted:
    """A weight in one form; the same weight may be wanted in two (a tied head)."""

    weight: Weight
    form: Form

    @property
    def rows(self) -> int:
        """Rows of the matrix as it lies on the device, of all matrices of a stack; elements of a vector."""
        rows = math.prod(self.weight.shape[:-1]) if self.weight.role == "stack" else self.weight.shape[0]
        return gated_rows(rows // 2) if self.form in ("gated", "gated_bias") else rows

    @property
    def width(self) -> int:
        """Elements of a row of a matrix."""
        return self.weight.shape[-1]

    @property
    def nbytes(self) -> int:
        """Bytes it takes on the device."""
        match self.form:
            case "packed" | "gated":
                return packed_nbytes(self.rows, self.width)
            case "table":
                return self.weight.elements * ELEMENT
            case "norm":
                return 4 * self.weight.elements
            case "bias" | "gated_bias":
                return ELEMENT * self.rows


def wanted_weights(stages: Iterable[Stage], matrices: Form = "packed") -> list[Wanted]:
    """Every (weight, form) the stages use, each once, in order of first use.

    matrices: the form of matrices that are not gated.
    """
    found: dict[tuple[str, Form], Wanted] = {}

    def want(weight: Weight | None, form: Form) -> None:
        if weight is not None:
            found.setdefault((weight.name, form), Wanted(weight, form))

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
            elif isinstance(op, AddPositions):
                want(op.positions, "table")
                want(op.kinds, "table")
            elif isinstance(op, Norm):
                want(op.weight, "norm")
                want(op.bias, "norm")
    return list(found.values())

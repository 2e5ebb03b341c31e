"""What becomes of a product's sums on their way out."""

from __future__ import annotations

from dataclasses import dataclass

from rvllm.backends.cuda.layout.packed import WeightLayout
from rvllm.backends.cuda.ops.gemm.plan import Kind


@dataclass(frozen=True)
class Epilogue:
    """Where a product's rows go, `pitch` elements apart, and what happens to them on the way.

    form: of the weight. kind, residual (an address), scale, soft_cap: see `gemm_arguments`.
    """

    out: int
    pitch: int
    form: WeightLayout = "packed"
    kind: Kind = Kind.STORE
    residual: int = 0
    scale: float = 1.0
    soft_cap: float = 0.0

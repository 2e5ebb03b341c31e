"""Whose kernels compute a product, by `--gemm-strategy`.

native: ours; cublas: cuBLASLt; cutlass: those built from CUTLASS. hybrid: cuBLASLt computes QKV, O and down
(a bias, a residual), CUTLASS the rest: gate and up with their activation in one kernel, and the logits.
auto: for each shape of a weight what was fastest on this GPU over all batch sizes (`cuda/tuning`).

An output's bits are the same in any batch with native and with cutlass, whose sums have an order that
depends on the weight's shape alone (another one each). cuBLASLt chooses by the number of tokens, so what it
computes does not keep bits over batch sizes. Experts and latent attention's heads are always ours.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from rvllm.backends.cuda.layout.fusion import Stage, is_gate
from rvllm.backends.cuda.layout.packed import WeightLayout
from rvllm.backends.cuda.ops.gemm.plan import gated_rows
from rvllm.program.ops.dense import Add, Linear, Logits

Provider = Literal["native", "cublas", "cutlass"]
EpilogueClass = Literal["plain", "fused", "gated", "logits", "capped"]
USES_CUBLAS = ("cublas", "hybrid")
BY_LIBRARY = ("plain", "logits")  # epilogues that cuBLASLt has


@dataclass(frozen=True, order=True)
class ProductShape:
    """What decides how long a product takes, beside the number of tokens.

    rows: packed rows that exist, N or `gated_rows`; width: K. epilogue: plain: a bias, a residual; gated: an
    activation of halves; fused: another activation, or a scaled residual; capped: logits with a bias or cap.
    """

    rows: int
    width: int
    epilogue: EpilogueClass

    def __str__(self) -> str:
        return f"{self.rows}x{self.width} {self.epilogue}"

    @staticmethod
    def of(stage: Stage) -> ProductShape:
        """Of a stage that a Linear or Logits leads."""
        op, after = stage.ops[0], stage.ops[1] if len(stage.ops) > 1 else None
        assert isinstance(op, Linear | Logits)
        rows, width = op.weight.shape
        if isinstance(op, Logits):
            capped = op.bias is not None or bool(op.soft_cap)
            return ProductShape(rows, width, "capped" if capped else "logits")
        if is_gate(after):
            return ProductShape(gated_rows(rows // 2), width, "gated")
        plain = after is None or (isinstance(after, Add) and after.scale == 1.0)
        return ProductShape(rows, width, "plain" if plain else "fused")


@dataclass(frozen=True)
class Choice:
    """What auto has chosen for a shape: whose kernels, which of them for so many tokens, and why."""

    provider: Provider
    variants: Mapping[int, str] = field(default_factory=dict)
    why: str = ""


@dataclass(frozen=True)
class GemmStrategy:
    """`--gemm-strategy`, with what was measured for it; shapes that auto has no choice for are native."""

    name: str
    tuned: Mapping[ProductShape, Choice] = field(default_factory=dict)

    def provider(self, stage: Stage) -> Provider:
        """Whose kernel computes the product that leads this stage."""
        match self.name:
            case "auto":
                choice = self.tuned.get(ProductShape.of(stage))
                return "native" if choice is None else choice.provider
            case "hybrid":
                return "cublas" if ProductShape.of(stage).epilogue == "plain" else "cutlass"
            case "cublas" | "cutlass" as name:
                return name
        return "native"

    def layout(self, stage: Stage) -> WeightLayout:
        """How this stage's matrix lies, unless it is gated."""
        if not isinstance(stage.ops[0], Linear | Logits):
            return "packed"
        return "table" if self.provider(stage) == "cublas" else "packed"

    @property
    def fuses_gates(self) -> bool:
        """Whether activations behind a product become its epilogue."""
        return self.name != "cublas"

    @property
    def uses_cublas(self) -> bool:
        """Whether cuBLASLt computes anything."""
        return self.name in USES_CUBLAS or any(c.provider == "cublas" for c in self.tuned.values())

    @property
    def keeps_bits(self) -> bool:
        """Whether an output has the same bits in any batch."""
        return not self.uses_cublas

    def variant(self, stage: Stage, tokens: int) -> str:
        """The kernel that was measured to be the best for so many tokens; empty: as the cost model says."""
        choice = self.tuned.get(ProductShape.of(stage)) if self.tuned else None
        return "" if choice is None else choice.variants.get(tokens, "")

    def why(self, stage: Stage) -> str:
        """Why a product has its provider, for `rvllm plan`."""
        if self.name == "auto":
            choice = self.tuned.get(ProductShape.of(stage))
            return "auto: not measured on this GPU yet" if choice is None else f"auto: {choice.why}"
        return f"--gemm-strategy {self.name}"

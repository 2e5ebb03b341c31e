"""What becomes of a product's sums on their way out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from rvllm.backends.cuda.device.launches import Count, fixed
from rvllm.backends.cuda.layout.packed import WeightLayout
from rvllm.backends.cuda.ops.family import Lowering
from rvllm.backends.cuda.ops.gemm.common import Kind, ProductPlan
from rvllm.backends.cuda.ops.gemm.plan import gated_rows
from rvllm.program.ops.dense import Linear, Logits


@dataclass(frozen=True)
class Epilogue:
    """Where a product's rows go, `pitch` elements apart, and what happens to them on the way.

    form: of the weight. kind, residual (an address), scale, soft_cap: see `ProductPlan.arguments`.
    """

    out: int
    pitch: int
    form: WeightLayout = "packed"
    kind: Kind = Kind.STORE
    residual: int = 0
    scale: float = 1.0
    soft_cap: float = 0.0

    def options(self, to: Lowering, op: Linear | Logits) -> dict[str, Any]:
        """What the arguments of all products take by name."""
        return {
            "kind": self.kind,
            "bias": to.weight(op.bias, "gated_bias" if self.form == "gated" else "bias"),
            "residual": self.residual,
            "scale": self.scale,
            "soft_cap": self.soft_cap,
            "tokens": Count(op.x.rows),
        }

    def rows(self, op: Linear | Logits) -> int:
        """Packed rows of the weight that exist."""
        rows = op.weight.shape[0]
        return gated_rows(rows // 2) if self.form == "gated" else rows


def plan_product(
    to: Lowering, name: str, plan: ProductPlan, op: Linear | Logits, end: Epilogue, **more: Any
) -> None:
    """Adds the launch of a product with a weight in 16 bits. more: arguments of this plan alone."""
    k, x = op.weight.shape[-1], to.at.buffers[op.x.name]
    source = to.boxes(x, to.capacity(op.x.rows), k, plan.box_rows) if plan.box_rows else x
    weight, options = to.weight(op.weight, end.form), end.options(to, op)
    parameters = plan.arguments(source, weight, end.out, end.pitch, x_width=k, x_pitch=k, **options, **more)
    plan_launch(to, name, plan, parameters)


def plan_launch(to: Lowering, name: str, plan: ProductPlan, parameters: Sequence[object]) -> None:
    to.plan(
        name,
        plan.kernel,
        fixed(*plan.grid),
        plan.block,
        *parameters,
        smem=plan.smem,
        cluster=plan.cluster,
        why=plan.why,
    )

"""Which weights a program wants on the device, each in the forms that its ops' families ask for."""

from __future__ import annotations

from collections.abc import Callable, Iterable

from rvllm.backends.cuda.formats import device_format
from rvllm.backends.cuda.layout.fusion import Stage
from rvllm.backends.cuda.layout.packed import PackedWeight, WeightLayout
from rvllm.backends.cuda.lowering import wanted_weights
from rvllm.backends.cuda.ops.gemm.plan import packed_nbytes
from rvllm.program.ops.dense import Weight


def packed_weights(
    stages: Iterable[Stage], layout_of: Callable[[Stage], WeightLayout] = lambda stage: "packed"
) -> list[PackedWeight]:
    """Every (weight, form) the stages use, each once, in order of first use.

    layout_of: the form of a stage's matrix that is not gated.
    """
    found: dict[tuple[str, WeightLayout], PackedWeight] = {}
    for stage in stages:
        for weight, form in wanted_weights(stage, layout_of(stage)):
            if weight is not None and (weight.name, form) not in found:
                found[weight.name, form] = packed(weight, form)
    return list(found.values())


def packed(weight: Weight, form: WeightLayout) -> PackedWeight:
    """A weight in that form, with the size that its format gives a matrix."""
    bare = PackedWeight(weight, form, 0)
    if bare.format is None:
        return PackedWeight(weight, form, packed_nbytes(bare.rows, bare.width))
    nbytes = device_format(bare.format).packed_nbytes(bare.format, bare.rows, bare.width)
    return PackedWeight(weight, form, nbytes)

"""What is said of each matrix: how it is stored, in which numbers it is kept, and what a step reads of it."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rvllm.program.ops.dense import Program, Weight
    from rvllm.weights.checkpoint import Checkpoint


def stored_as(weight: Weight, checkpoint: Checkpoint | None) -> str:
    """`BF16`, `FP8, blocks of 128 x 128`, `Q4_K + Q6_K`; `random` without a checkpoint."""
    from rvllm.weights.packing import find_tensor

    if checkpoint is None or not checkpoint.tensors:
        return "random"
    found = (find_tensor(part, checkpoint) for part in weight.parts)
    return " + ".join(dict.fromkeys(info.stored_as for info in found if info is not None)) or "missing"


def kept_as(
    weight: Weight,
    program: Program,
    checkpoint: Checkpoint | None = None,
    packed: Mapping[str, int] | None = None,
) -> str:
    """`bfloat16`, `FP8, a scale a row`. packed: bytes of weights that compiled kernels keep, by name."""
    if (packed or {}).get(weight.name, weight.nbytes(4)) < weight.nbytes(4):
        return stored_as(weight, checkpoint)
    return program.dtype.value if weight.format is None else weight.format.label


def matrices(
    program: Program, checkpoint: Checkpoint | None, packed: Mapping[str, int] | None = None
) -> list[tuple[str, str]]:
    """A line for the matrices of all layers that are alike: name, and shape, numbers and bytes."""
    from rvllm.cli.common.tables import human_bytes

    counts: dict[tuple[str, str], int] = {}
    for weight in program.weights:
        if weight.role == "vector":
            continue
        shape = " x ".join(map(str, weight.shape))
        nbytes = human_bytes((packed or {}).get(weight.name, weight.nbytes(program.dtype.size)))
        stored, kept = stored_as(weight, checkpoint), kept_as(weight, program, checkpoint, packed)
        said = f"{shape}, stored {stored}, kept {kept}, {nbytes}"
        name = re.sub(r"layers\.\d+", "layers.*", weight.name)
        counts[name, said] = counts.get((name, said), 0) + 1
    return [(name, f"{count} of {said}") for (name, said), count in counts.items()]

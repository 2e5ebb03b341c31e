"""The ops that attend to the paged cache, one entry a type: how each is planned, and what they share.

They share the step's list of tiles (blocks of query rows of sequences with several tokens), the memory for
partial results and its counters. So the ops of one program must cut their rows alike.
"""

from __future__ import annotations

from collections.abc import Callable, Container, Iterable, Mapping
from typing import TypeVar

from rvllm.backends.cuda.device.info import DeviceInfo
from rvllm.backends.cuda.layout.allocations import Allocation
from rvllm.backends.cuda.lowering import PAGED
from rvllm.backends.cuda.ops.attention.plan import DecodePlan, PrefillPlan
from rvllm.backends.cuda.ops.family import PagedPlans, TileShape
from rvllm.errors import MissingKernelError
from rvllm.program.dtypes import DType
from rvllm.program.ops.dense import Op

Plan = TypeVar("Plan")


def decode_plans(
    ops: Iterable[Op],
    dtype: DType,
    chip: DeviceInfo,
    seqs: int,
    longest: int,
    blocks: int,
    rotating: Container[str] = (),
) -> dict[str, DecodePlan]:
    """By op: how it is launched for at most `seqs` sequences of one token, each at most `longest` long.

    blocks: of the KV pool. rotating: ops whose stage rotates first, see PagedPlans. Raises MissingKernelError
    with what all ops lack.
    """
    return _plans(
        ops, lambda plans, op: plans.decode(op, dtype, chip, seqs, longest, blocks, op.name in rotating)
    )


def prefill_plans(ops: Iterable[Op], dtype: DType, chip: DeviceInfo) -> dict[str, PrefillPlan]:
    """By op: how it is launched for sequences of several tokens; raises as `decode_plans` does."""
    return _plans(ops, lambda plans, op: plans.prefill(op, dtype, chip))


def _plans(ops: Iterable[Op], plan: Callable[[PagedPlans, Op], Plan]) -> dict[str, Plan]:
    found, missing = dict[str, Plan](), list[str]()
    for op in ops:
        if type(op) not in PAGED:
            continue
        try:
            found[op.name] = plan(PAGED[type(op)], op)
        except MissingKernelError as error:
            missing.append(str(error))
    if missing:
        raise MissingKernelError("; ".join(dict.fromkeys(missing)))
    return found


def allocations(plans: Iterable[DecodePlan]) -> list[Allocation]:
    """What all decode kernels share: memory for unfinished splits, and counters."""
    largest = [(p.partial_bytes, p.arrivals_bytes) for p in plans] or [(0, 0)]
    partial, arrivals = (max(sizes) for sizes in zip(*largest, strict=True))
    line = "attention workspace"
    return [Allocation("partial", line, partial), Allocation("arrivals", line, arrivals, zeroed=True)]


def tile_shape(ops: Iterable[Op], plans: Mapping[str, PrefillPlan]) -> TileShape | None:
    """How all these ops cut the rows of a step; None where none attends to the cache.

    Raises MissingKernelError naming two ops that disagree.
    """
    found: tuple[str, TileShape] | None = None
    for op in ops:
        if type(op) not in PAGED:
            continue
        shape = TileShape(plans[op.name].rows, PAGED[type(op)].group(op))
        if found is None:
            found = op.name, shape
        elif found[1] != shape:
            raise MissingKernelError(
                f"{found[0]} takes {found[1].rows} rows of {found[1].group} heads a block and {op.name} "
                f"{shape.rows} of {shape.group}; attention layers of one shape are supported"
            )
    return found[1] if found else None

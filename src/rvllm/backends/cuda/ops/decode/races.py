"""What a chain of steps must not do, checked before it is launched: wait for blocks that never come, or race.

All blocks pass the same barriers, one between two steps, so a launch ends if all its blocks are resident at
once. Within a step blocks run free: none may write what another may still read. Weights come before a step's
barrier, so no step may write them.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from rvllm.backends.cuda.ops.decode.step import Step, Type
from rvllm.backends.cuda.ops.gemm.common import Kind, ceil_div
from rvllm.kernels.gemm.tiles import TILE, TILE_BYTES

Range = tuple[str, int, int]  # what, first byte, bytes
ELEMENT = 2


def faults(steps: Sequence[Step], grid: int, sm_count: int) -> list[str]:
    """What is wrong with a launch of these steps on so many blocks; nothing if it may run.

    Addresses of 0 are of nothing yet and race with nothing.
    """
    found = []
    if grid > sm_count:
        found.append(f"{grid} blocks wait for each other on {sm_count} multiprocessors")
    for i, step in enumerate(steps):
        before = steps[i - 1].type if i else None
        wanted = {Type.UP: Type.ROUTE, Type.DOWN: Type.UP}.get(step.type, before)
        if before != wanted:
            found.append(
                f"step {i} is {step.type.name} without {'' if wanted is None else wanted.name} before it"
            )
        for what, first, nbytes in _written(step):
            for other, at, size in (*_read_by_all(step), *(r for s in steps for r in _weights(s))):
                if first and at and first < at + size and at < first + nbytes:
                    found.append(f"step {i} writes {what} over {other}, which other blocks may still read")
    choices = sum(step.type == Type.UP for step in steps)
    if choices > 1:
        found.append(f"{choices} choices of experts, and memory for one")
    return found


def _written(step: Step) -> Iterator[Range]:
    entries = step.mixture.entries if step.mixture and step.type == Type.UP else 1
    element = 4 if step.kind == Kind.LOGITS else ELEMENT
    yield "its result", step.out, entries * step.pitch * element
    if step.norm:  # by the first block, while others normalise
        yield "the norm's result", step.norm.normed, step.k * ELEMENT


def _read_by_all(step: Step) -> Iterator[Range]:
    if step.norm:
        yield "what is normalised", step.norm.x, step.k * ELEMENT
    elif step.type != Type.UP:  # whose x is in shared memory
        rows = step.mixture.entries if step.mixture and step.type == Type.DOWN else 1
        yield "its input", step.x, rows * step.k * ELEMENT
    if step.residual and step.residual != step.out:  # else each element is read by who writes it
        yield "its residual", step.residual, step.pitch * ELEMENT


def _weights(step: Step) -> Iterator[Range]:
    if step.type == Type.ROUTE:
        nbytes = step.rows * step.k * ELEMENT
    else:
        stack = step.mixture.experts if step.mixture else 1
        nbytes = stack * ceil_div(step.rows, TILE) * step.blocks * TILE_BYTES
    yield "weights", step.weights, nbytes

"""One token's product by `kernels/decode/one_token_sm90.cu`: how it is launched, with which parameters."""

from __future__ import annotations

import ctypes

from rvllm.backends.cuda.device.launches import Planned, fixed, ints
from rvllm.backends.cuda.ops.decode.step import Step
from rvllm.backends.cuda.ops.gemm.common import Grid, ceil_div, resident_grid
from rvllm.kernels.decode.specs import ONE_STAGE, ONE_TAIL, ONE_THREADS, one_token_kernel
from rvllm.kernels.gemm.tiles import TILE

# Clusters of so many blocks that fit at once on an H200, says its driver, if each block has a multiprocessor.
PLACES = {1: 1 << 30, 2: 66, 3: 39, 4: 30, 5: 22, 6: 17, 7: 15, 8: 15}
# Stages of rings: of those timed on an H200 the ones that three small models' steps took least time with.
WALK_STAGES, SPLIT_STAGES, SHARED_STAGES = 11, 10, 6
MAX_WIDTH = (
    2560  # of the models whose steps were timed to take less time so; one of 3,584 columns takes 5 % more
)
PLAIN, RMS, LAYER_NORM = range(3)  # what stands before the product; mirrors Front


def one_token_launch(name: str, step: Step, tag: str, sm_count: int) -> Planned:
    """The launch of a step of one product, with a norm in front or not."""
    split, norm = step.segments > 1, step.norm
    pairs = ceil_div(step.rows, 2 * TILE)
    grid: Grid = (step.segments, 1, pairs) if split else resident_grid(step.rows, 1, 8, 1, sm_count)
    held = ceil_div(step.blocks, step.segments)  # blocks of K that a block sums
    fixed_bytes = 2 * TILE * (held + 1) + ONE_TAIL
    stages = min(SPLIT_STAGES, held) if split else WALK_STAGES
    if pairs > PLACES[step.segments]:  # they fit at once if two blocks share a multiprocessor
        stages = min(SHARED_STAGES if step.segments <= 4 else SHARED_STAGES - 1, stages)
    front = PLAIN if norm is None else LAYER_NORM if norm.layer else RMS
    parameters: list[object] = [
        norm.x if norm else step.x,
        step.weights,
        step.out,
        step.bias,
        step.residual,
        *ints(int(step.kind), step.rows),
        ctypes.c_float(step.scale),
        ctypes.c_float(step.soft_cap),
        *ints(step.k, step.blocks, step.segments, stages, front),
        *((norm.normed, norm.weight, norm.bias) if norm else (0, 0, 0)),
        ctypes.c_float(norm.eps if norm else 0.0),
    ]
    return Planned(
        name,
        one_token_kernel(tag, split),
        fixed(*grid),
        ONE_THREADS,
        parameters,
        stages * ONE_STAGE + fixed_bytes,
        step.segments if split else 1,
        why="one token" if norm is None else "norm and product of one token",
    )

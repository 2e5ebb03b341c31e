"""How attention within texts is launched: which kernel, and the rows of a block."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from rvllm.backends.cuda.device.info import DeviceInfo
from rvllm.backends.cuda.ops.attention.plan import PrefillPlan
from rvllm.kernels.attention.specs import PREFILL_SM90_ROWS, PREFILL_SM90_THREADS
from rvllm.kernels.encoder.specs import TEXT_ROWS, text_attention_kernel, text_attention_sm90_kernel
from rvllm.program.dtypes import DType
from rvllm.program.ops.dense import Program
from rvllm.program.ops.encoder import TextAttention


def plan_text(head_dim: int, dtype: DType, chip: DeviceInfo) -> PrefillPlan:
    """By wgmma on Hopper where a kernel has this head size: the same bits. Raises MissingKernelError."""
    found = text_attention_sm90_kernel(dtype.value, head_dim) if chip.capability == 90 else None
    if found:
        return PrefillPlan(found[0], PREFILL_SM90_ROWS, PREFILL_SM90_THREADS, found[1], chip.sm_count)
    kernel, smem = text_attention_kernel(dtype.value, head_dim)
    return PrefillPlan(kernel, TEXT_ROWS, 2 * TEXT_ROWS, smem)


def text_rows(program: Program, chip: DeviceInfo) -> int:
    """Query rows of a block of the program's attention."""
    ops = (op for op in program.ops if isinstance(op, TextAttention))
    return min((plan_text(op.head_dim, program.dtype, chip).rows for op in ops), default=TEXT_ROWS)


def text_tiles(lengths: NDArray[np.int32], rows: int) -> NDArray[np.int32]:
    """int32 [n, 2] rows (text, first row): the blocks of texts of these lengths, the longest text's first."""
    order = np.argsort(-lengths, kind="stable")
    blocks = -(-lengths[order] // rows)
    within = np.arange(int(blocks.sum())) - np.repeat(np.cumsum(blocks) - blocks, blocks)
    return np.stack([np.repeat(order, blocks), within * rows], axis=1).astype(np.int32)

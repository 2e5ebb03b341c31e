"""How attention kernels are launched: which one, how many blocks, how much shared memory and workspace.

Pure functions of shapes and of the GPU's limits; the kernels' own comments say how they cut the work.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from rvllm.backends.base import KV_BLOCK
from rvllm.backends.cuda.device.info import DeviceInfo
from rvllm.errors import MissingKernelError
from rvllm.kernels.attention.specs import (
    DECODE_RING_WARPS,
    DECODE_SEQS,
    PREFILL_SM90_ROWS,
    PREFILL_SM90_THREADS,
    SIZES,
    decode_ring_kernel,
    decode_ring_smem,
    decode_ring_state,
    decode_rope_kernel,
    decode_smem,
    mma_kernel,
    prefill_rows,
    prefill_sm90_kernel,
    prefill_sm90_smem,
    prefill_smem,
)
from rvllm.program.dtypes import DType
from rvllm.program.ops.dense import Attention, BlockSparseAttention

Plan = TypeVar("Plan")
RING_ROWS = 8  # sequences times key heads from which on attn_decode_ring is quicker on an H200
RING_FP8_ROWS = 32  # the same over a cache in E4M3
RING_FEW = 8  # rows below which all warps of its blocks are taken, for one long sequence
SPLIT = SIZES["SPLIT"]  # positions after which partial results are merged
TABLE_ALIGNMENT = SIZES["TILE"] // KV_BLOCK  # a slot's block table is a multiple of this many entries


@dataclass(frozen=True)
class DecodePlan:
    """A launch of `attn_decode` or `attn_decode_ring`.

    grid: blocks of `block` threads, for any contexts. smem: bytes a block. partial_bytes: workspace for
    unfinished splits. arrivals_bytes: counters that are zero before the first launch. ring: whether it is
    attn_decode_ring over 16-bit elements, which is told the tensor maps of the cache.
    """

    kernel: str
    grid: int
    block: int
    smem: int
    partial_bytes: int
    arrivals_bytes: int
    ring: bool = field(default=False, kw_only=True)


@dataclass(frozen=True)
class PrefillPlan:
    """A launch of `attn_prefill`, a block a (tile, kv head), or of `attn_prefill_sm90`.

    rows: query rows a tile has. persistent: blocks of `attn_prefill_sm90`, which take tile after tile; 0 for
    the other kernel.
    """

    kernel: str
    rows: int
    block: int
    smem: int
    persistent: int = 0


def table_stride(max_model_len: int) -> int:
    """Entries of a slot's block table: enough for `max_model_len` tokens, aligned for vector loads."""
    return -(-max_model_len // (KV_BLOCK * TABLE_ALIGNMENT)) * TABLE_ALIGNMENT


def plan_decode(
    dtype: DType,
    head_dim: int,
    heads: int,
    kv_heads: int,
    *,
    max_seqs: int,
    max_model_len: int,
    num_blocks: int,
    sm_count: int,
    smem_per_block: int,
    fp8: bool = False,
) -> DecodePlan:
    """The launch that decodes up to `max_seqs` sequences of up to `max_model_len` tokens.

    num_blocks: size of the KV pool, which bounds how long one sequence can be. fp8: it is in E4M3.
    Raises MissingKernelError when no kernel has this head size or fits the GPU's shared memory.
    """
    if max_seqs > DECODE_SEQS:
        raise MissingKernelError(
            f"decode attention takes at most {DECODE_SEQS} sequences a step, not {max_seqs}; "
            f"lower --max-num-seqs"
        )
    kernel = mma_kernel("decode", dtype.value, head_dim, smem_per_block, fp8)
    group = heads // kv_heads
    parts = -(-group // 16)
    items = _splits(max_seqs, max_model_len, num_blocks) * kv_heads * parts
    stride = -(-(min(group, 16) * (head_dim + 2)) // 4) * 4
    # Few pieces of work that are usually there at once: more shared memory a block. Otherwise more blocks.
    separate = (
        max_seqs * kv_heads * parts <= sm_count // 2 and head_dim <= 128 and not kernel.endswith("_small")
    )
    smem = decode_smem(head_dim, separate, max_seqs, fp8)
    resident = max(1, min(4 if head_dim <= 64 else 3, (smem_per_block + 1024) // (smem + 1664)))
    # A block for each sequence and head, where that fills the GPU: most blocks then hold whole sequences.
    blocks = max(sm_count * resident, min(max_seqs * kv_heads * parts, 4 * sm_count * resident))
    return DecodePlan(
        kernel=kernel,
        grid=min(items, blocks),
        block=128,
        smem=smem,
        partial_bytes=4 * items * stride,
        arrivals_bytes=4 * max_seqs * kv_heads * parts,
    )


def plan_decode_ring(
    dtype: DType,
    head_dim: int,
    heads: int,
    kv_heads: int,
    *,
    max_seqs: int,
    max_model_len: int,
    num_blocks: int,
    sm_count: int,
    smem_per_block: int,
    fp8: bool = False,
    rotates: bool = False,
) -> DecodePlan | None:
    """`plan_decode` for the kernel whose tiles the copy engine brings.

    rotates: whether it is launched as the kernel that rotates too, which saves a launch. None where it has no
    such heads, or where there are so few of them that the other kernel is quicker.
    """
    group = heads // kv_heads
    kernel = decode_ring_kernel(dtype.value, head_dim, group, smem_per_block, fp8)
    rows = kv_heads * -(-group // (8 if group <= 8 else 16))
    if kernel is None or (max_seqs * rows < (RING_FP8_ROWS if fp8 else RING_ROWS) and not rotates):
        return None
    items = _splits(max_seqs, max_model_len, num_blocks) * rows
    few, many = DECODE_RING_WARPS
    return DecodePlan(
        kernel=kernel,
        grid=min(items, sm_count * (2 if fp8 else 1)),
        block=32 * (few if fp8 or RING_FEW <= max_seqs * rows <= sm_count else many),
        smem=decode_ring_smem(head_dim, fp8),
        partial_bytes=4 * items * decode_ring_state(head_dim, group),
        arrivals_bytes=4 * max_seqs * rows,
        ring=not fp8,
    )


def decode_of(
    op: Attention | BlockSparseAttention,
    dtype: DType,
    chip: DeviceInfo,
    seqs: int,
    longest: int,
    blocks: int,
    rotates: bool = False,
) -> DecodePlan:
    """The launch for an op: up to `seqs` sequences of up to `longest` tokens, `blocks` in the KV pool.

    rotates: whether the launch is to rotate too, where there is a kernel that does. By the copy engine where
    the GPU has one and there is a kernel, else by `plan_decode`: both give the same bits. Raises as
    `plan_decode` does.
    """

    def planned(plan: Callable[..., Plan]) -> Plan:
        return plan(
            dtype,
            op.head_dim,
            op.heads,
            op.kv_heads,
            max_seqs=seqs,
            max_model_len=longest,
            num_blocks=blocks,
            sm_count=chip.sm_count,
            smem_per_block=chip.smem_per_block,
            fp8=op.cache.fp8,
        )

    if chip.capability < 90 or not isinstance(op, Attention):
        return planned(plan_decode)
    ring = planned(partial(plan_decode_ring, rotates=rotates))
    if ring is not None and rotates and decode_rope_kernel(ring.kernel) is None:
        ring = planned(plan_decode_ring)
    return ring or planned(plan_decode)


def _splits(max_seqs: int, max_model_len: int, num_blocks: int) -> int:
    """The most splits there can be, of one head each.

    Sequences may share blocks (a common prefix), so the size of the pool does not bound their sum.
    """
    return max_seqs * min(-(-max_model_len // SPLIT), -(-num_blocks * KV_BLOCK // SPLIT))


def plan_prefill(dtype: DType, head_dim: int, *, smem_per_block: int, fp8: bool = False) -> PrefillPlan:
    """The launch that computes prompts. fp8: of a cache in E4M3. Raises as `plan_decode` does."""
    kernel = mma_kernel("prefill", dtype.value, head_dim, smem_per_block, fp8)
    rows = prefill_rows(head_dim, kernel.endswith("_small"))
    return PrefillPlan(kernel, rows, rows * 2, prefill_smem(head_dim, rows, fp8))


def plan_prefill_sm90(dtype: DType, head_dim: int, *, sm_count: int, fp8: bool = False) -> PrefillPlan | None:
    """The launch that computes prompts by wgmma; None where no kernel has this head size."""
    kernel = prefill_sm90_kernel(dtype.value, head_dim, fp8)
    if kernel is None:
        return None
    smem = prefill_sm90_smem(head_dim, fp8)
    return PrefillPlan(kernel, PREFILL_SM90_ROWS, PREFILL_SM90_THREADS, smem, sm_count)


def prefill_of(op: Attention | BlockSparseAttention, dtype: DType, chip: DeviceInfo) -> PrefillPlan:
    """How an op computes prompts: by wgmma on Hopper where a kernel for it is there, else by `plan_prefill`.

    Both give the same bits. The wgmma kernel knows neither capped logits nor block-sparse masks.
    """
    plan = None
    if chip.capability == 90 and isinstance(op, Attention) and not op.soft_cap:
        plan = plan_prefill_sm90(dtype, op.head_dim, sm_count=chip.sm_count, fp8=op.cache.fp8)
    return plan or plan_prefill(dtype, op.head_dim, smem_per_block=chip.smem_per_block, fp8=op.cache.fp8)


def prefill_tiles(
    query_lens: NDArray[np.int32], kv_lens: NDArray[np.int32], first: int, group: int, rows: int
) -> NDArray[np.int32]:
    """int32 [n, 2] rows (sequence, first row): the tiles of prefill attention, those with most keys first.

    query_lens, kv_lens: of all sequences of the step, kv_lens counting this step's tokens; sequences
    before `first` are decodes and get no block. group: query heads of a kv head; rows: of the plan.
    """
    total = query_lens[first:].astype(np.int64) * group
    blocks = -(-total // rows)
    seqs = np.repeat(np.arange(first, len(query_lens)), blocks)
    within = np.arange(len(seqs)) - np.repeat(np.cumsum(blocks) - blocks, blocks)
    start_rows = within * rows
    last = np.minimum(start_rows + rows, np.repeat(total, blocks)) - 1
    keys = (kv_lens - query_lens)[seqs] + last // group
    order = np.argsort(-keys, kind="stable")
    return np.stack([seqs, start_rows], axis=1)[order].astype(np.int32)

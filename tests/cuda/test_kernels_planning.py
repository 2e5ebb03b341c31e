"""Launch planning of attention and packing of sampling parameters: pure functions, no GPU."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rvllm.backends.base import SamplingSpec, SlotStart
from rvllm.backends.cuda.ops.attention.plan import (
    RING_ROWS,
    plan_decode,
    plan_decode_ring,
    plan_prefill,
    plan_prefill_sm90,
    prefill_tiles,
    table_stride,
)
from rvllm.backends.cuda.ops.sampling.slots import (
    HISTORY,
    MAX_BIASES,
    SLOT,
    START_WORDS,
    StateSizes,
    pack_starts,
)
from rvllm.errors import MissingKernelError, UsageError
from rvllm.kernels.attention.specs import HEAD_DIMS, PREFILL_SM90_DIMS
from rvllm.kernels.rowwise.specs import norm_kernel
from rvllm.program.dtypes import DType

H100, A100, ADA = 232448, 166912, 101376  # bytes of shared memory a block may have


def decode(head_dim: int = 128, heads: int = 28, kv_heads: int = 4, smem: int = H100, **changes: int):
    sizes = {"max_seqs": 128, "max_model_len": 32768, "num_blocks": 60000, "sm_count": 132} | changes
    return plan_decode(DType.BF16, head_dim, heads, kv_heads, smem_per_block=smem, **sizes)


@pytest.mark.parametrize("smem", [H100, A100, ADA])
@pytest.mark.parametrize("dim", HEAD_DIMS)
def test_plans_fit_the_gpu(dim: int, smem: int) -> None:
    if smem == ADA and dim > 160:
        with pytest.raises(MissingKernelError, match=f"head size {dim}"):
            plan_prefill(DType.F16, dim, smem_per_block=smem)
        return
    for seqs in (1, 8, 128, 2048):
        plan = decode(dim, smem=smem, max_seqs=seqs)
        assert plan.smem + 1024 <= smem and plan.grid >= 1 and plan.block == 128
    prefill = plan_prefill(DType.F16, dim, smem_per_block=smem)
    assert prefill.smem <= smem and prefill.block == prefill.rows * 2


@pytest.mark.parametrize("dim", HEAD_DIMS)
def test_the_hopper_kernel_fits_and_cuts_rows_as_the_other_does(dim: int) -> None:
    plan = plan_prefill_sm90(DType.BF16, dim, sm_count=132)
    assert (plan is None) == (dim not in PREFILL_SM90_DIMS)
    if plan is not None:
        assert plan.smem <= H100 and plan.persistent == 132
        assert plan.rows == plan_prefill(DType.BF16, dim, smem_per_block=H100).rows


@pytest.mark.parametrize("dim", HEAD_DIMS)
@pytest.mark.parametrize("smem", [H100, ADA])
def test_rings_fit_where_they_are_taken(dim: int, smem: int) -> None:
    sizes = {"max_seqs": 128, "max_model_len": 4096, "num_blocks": 60000, "sm_count": 132}
    for kv_heads, rows in ((4, 4), (2, 2), (1, 2)):  # 28 heads of one key head are two parts of 16
        plan = plan_decode_ring(DType.F16, dim, 28, kv_heads, smem_per_block=smem, **sizes)
        checked = dim == 128 and kv_heads == 4  # on a GPU, so far
        assert (plan is None) == (not checked or smem == ADA)
        if plan is not None:
            assert plan.ring and plan.grid == 132 and plan.smem + 4096 <= smem
            assert plan.arrivals_bytes == 4 * 128 * rows
            heads = min(-(-28 // kv_heads), 16)
            assert plan.partial_bytes >= 4 * 128 * 16 * rows * heads * (dim + 2)


def test_few_rows_go_to_the_kernel_that_is_quicker_there() -> None:
    sizes = {"max_model_len": 200, "num_blocks": 99, "sm_count": 132, "smem_per_block": H100}
    assert plan_decode_ring(DType.BF16, 128, 28, 4, max_seqs=RING_ROWS // 4 - 1, **sizes) is None
    plan = plan_decode_ring(DType.BF16, 128, 28, 4, max_seqs=RING_ROWS // 4, **sizes)
    assert plan is not None and plan.grid == RING_ROWS  # no more blocks than splits
    # Where it rotates too it saves a launch; one long sequence has more splits than there are blocks.
    for seqs, warps in ((1, 8), (2, 4)):
        alone = plan_decode_ring(DType.BF16, 128, 28, 4, max_seqs=seqs, rotates=True, **sizes)
        assert alone is not None and (alone.grid, alone.block) == (4 * seqs, 32 * warps)


def test_unknown_head_size_is_named() -> None:
    with pytest.raises(MissingKernelError, match=r"head size 72.*64, 80, 96, 128, 160, 256"):
        decode(72)


def test_too_many_sequences_are_named() -> None:
    with pytest.raises(MissingKernelError, match="--max-num-seqs"):
        decode(max_seqs=5000)


def test_workspace_holds_every_split_that_can_be() -> None:
    small, large = decode(num_blocks=1000), decode(num_blocks=10**9)
    assert small.partial_bytes < large.partial_bytes
    items = large.partial_bytes // (4 * (-(-7 * 130 // 4) * 4))
    assert items == 128 * 128 * 4  # sequences x splits x kv heads
    assert decode(heads=32, kv_heads=1).arrivals_bytes == 128 * 2 * 4  # 32 heads are two parts of 16


def test_table_stride_is_aligned() -> None:
    assert [table_stride(n) for n in (1, 64, 65, 4096)] == [4, 4, 8, 256]


@given(
    st.lists(st.tuples(st.integers(1, 900), st.integers(0, 4000)), min_size=1, max_size=12),
    st.integers(1, 32), st.sampled_from([64, 128]), st.integers(0, 3),
)  # fmt: skip
def test_tiles_cover_every_row_once(seqs: list[tuple[int, int]], group: int, rows: int, first: int) -> None:
    lens = np.array([n for n, _ in seqs], np.int32)
    kv = lens + np.array([start for _, start in seqs], np.int32)
    first = min(first, len(seqs))
    tiles = prefill_tiles(lens, kv, first, group, rows)
    covered = [
        (s, r) for s, begin in tiles.tolist() for r in range(begin, min(begin + rows, lens[s] * group))
    ]
    assert sorted(covered) == [(s, r) for s in range(first, len(seqs)) for r in range(lens[s] * group)]
    keys = [kv[s] - lens[s] + (min(b + rows, lens[s] * group) - 1) // group for s, b in tiles.tolist()]
    assert keys == sorted(keys, reverse=True)


def test_norm_kernels_by_width() -> None:
    assert norm_kernel("bfloat16", "rms", 3584, True) == ("sm80_bf16_norm_rms_add", 448)
    assert norm_kernel("float16", "layer", 16384, False) == ("sm80_f16_norm_layer_wide", 1024)
    for width in (20, 100000):
        with pytest.raises(MissingKernelError, match=str(width)):
            norm_kernel("bfloat16", "rms", width, False)


def test_starts_are_packed() -> None:
    assert SLOT.itemsize == 64
    spec = SamplingSpec(
        temperature=0.5, top_k=7, top_p=0.9, min_p=0.1, seed=2**64 - 3, logit_bias=((3, 1.5), (9, -2.0)),
        min_tokens=2, stop_token_ids=(5, 6), frequency_penalty=0.25,
    )  # fmt: skip
    plain = SlotStart(0, SamplingSpec(), np.arange(9, dtype=np.int32), 9)
    entries, words = pack_starts([plain, SlotStart(4, spec, np.array([7, 8, 9], np.int32), 2)], 100)
    assert entries.shape == (2, START_WORDS) and entries[0, 2] == 0  # nothing to count without a penalty
    at = entries[1]
    assert at[0] == 4 and words[at[1] : at[1] + at[2]].tolist() == [7, 8, 9] and at[3] == 2
    assert words[at[4] : at[4] + 2].tolist() == [3, 9]
    assert words[at[4] + 2 : at[4] + 4].view(np.float32).tolist() == [1.5, -2.0]
    assert words[at[5] : at[5] + 2].tolist() == [5, 6]
    slot = at[8:].view(SLOT)[0]
    assert (slot["seed"], slot["generated"], slot["flags"], slot["biases"], slot["stops"]) == (
        2**64 - 3, 1, HISTORY, 2, 2,
    )  # fmt: skip
    assert float(slot["top_p"]) == pytest.approx(0.9)


def test_ids_beyond_the_vocabulary_are_left_out() -> None:
    spec = SamplingSpec(logit_bias=((3, 1.0), (100, 1.0)), min_tokens=1, stop_token_ids=(99, 100))
    entries, words = pack_starts([SlotStart(0, spec, np.zeros(1, np.int32), 1)], 100)
    slot = entries[0, 8:].view(SLOT)[0]
    assert (slot["biases"], slot["stops"]) == (1, 1)
    assert 100 not in words


def test_lists_too_long_are_refused() -> None:
    bias = tuple((i, 1.0) for i in range(MAX_BIASES + 1))
    with pytest.raises(UsageError, match="logit_bias"):
        pack_starts([SlotStart(0, SamplingSpec(logit_bias=bias), np.zeros(1, np.int32), 1)], 10**6)
    stops = SamplingSpec(min_tokens=1, stop_token_ids=tuple(range(500)))
    with pytest.raises(UsageError, match="stop tokens"):
        pack_starts([SlotStart(0, stops, np.zeros(1, np.int32), 1)], 10**6)


def test_state_sizes() -> None:
    sizes = StateSizes(4, 151936)
    assert sizes.history_stride == 151936 and sizes.histories == 2 * 4 * 151936
    assert sizes.chunks() == -(-151936 // 1024) and sizes.parameters == 256

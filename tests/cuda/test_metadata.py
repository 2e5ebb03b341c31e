"""The packed metadata of a step says the same as the batch it was made from."""

import numpy as np
import pytest

from rvllm.backends.base import LAST_SAMPLED, StepBatch
from rvllm.backends.cuda.layout.metadata import (
    NUM_BLOCK_UPDATES,
    NUM_DECODES,
    NUM_SAMPLES,
    NUM_SEQS,
    NUM_TILES,
    NUM_TOKENS,
    Layout,
    SampledRows,
)


def batch(query_lens: list[int], starts: list[int], rng: np.random.Generator) -> StepBatch:
    count = len(query_lens)
    tokens = rng.integers(0, 1000, sum(query_lens), dtype=np.int32)
    tokens[: query_lens.count(1)] = LAST_SAMPLED
    return StepBatch(
        step=7,
        slots=rng.permutation(64)[:count].astype(np.int32),
        query_lens=np.array(query_lens, dtype=np.int32),
        starts=np.array(starts, dtype=np.int32),
        tokens=tokens,
        sample=np.ones(count, dtype=bool),
        new_blocks=rng.integers(0, 99, (5, 3), dtype=np.int32),
    )


@pytest.mark.parametrize("query_lens", [[1], [1, 1, 1], [1, 1, 5, 17], [40]])
def test_pack_reads_back(query_lens: list[int]) -> None:
    rng = np.random.default_rng(len(query_lens))
    starts = [int(s) for s in rng.integers(0, 500, len(query_lens))]
    given = batch(query_lens, starts, rng)
    layout = Layout(tokens=64, seqs=8, samples=8, tiles=6, updates=16)
    words = np.full(layout.nbytes // 4, -77, dtype=np.int32)
    ends = np.cumsum(query_lens)
    used = layout.pack(
        given, given.new_blocks, SampledRows.of(given), np.array([[2, 0], [2, 64]], dtype=np.int32), words
    )

    def read(offset: int, count: int) -> list[int]:
        return [int(w) for w in words[offset : offset + count]]

    header = words[:16]
    assert (header[NUM_TOKENS], header[NUM_SEQS], header[NUM_SAMPLES]) == (
        sum(query_lens),
        len(starts),
        len(starts),
    )
    assert header[NUM_BLOCK_UPDATES] == 5
    assert header[NUM_DECODES] == query_lens.count(1)
    assert header[NUM_TILES] == 2
    positions = [s + i for s, n in zip(starts, query_lens, strict=True) for i in range(n)]
    slots = [int(s) for s, n in zip(given.slots, query_lens, strict=True) for _ in range(n)]
    assert read(layout.token_ids, sum(query_lens)) == [int(t) for t in given.tokens]
    assert read(layout.positions, sum(query_lens)) == positions
    assert read(layout.token_slots, sum(query_lens)) == slots
    assert read(layout.kv_lens, len(starts)) == [s + n for s, n in zip(starts, query_lens, strict=True)]
    assert read(layout.query_offsets, len(starts) + 1) == [0, *map(int, ends)]
    assert read(layout.sample_slots, len(starts)) == [int(s) for s in given.slots]
    assert read(layout.sample_rows, len(starts)) == [int(e) - 1 for e in ends]
    assert read(layout.tile_list, 12) == [2, 0, 2, 64] + [-1, 0] * 4
    assert read(layout.block_updates, 15) == [int(b) for b in given.new_blocks.reshape(-1)]
    assert used <= layout.nbytes
    assert words[used // 4] == -77 or used == layout.nbytes


def test_arrays_do_not_overlap() -> None:
    layout = Layout(tokens=33, seqs=5, samples=9, tiles=7, updates=3)
    names = ["token_ids", "positions", "token_slots", "seq_slots", "kv_lens", "query_offsets", "sample_rows",
             "sample_slots", "mask_rows", "tile_list", "block_updates"]  # fmt: skip
    sizes = [33, 33, 33, 5, 5, 6, 9, 9, 9, 14, 9]
    starts = [getattr(layout, name) for name in names]
    for start, end, size in zip(starts, [*starts[1:], layout.nbytes // 4], sizes, strict=True):
        assert end - start >= size


def test_rows_of_a_step_with_masks_and_prompt_logprobs() -> None:
    given = batch([1, 1, 4, 3], [9, 5, 0, 2], np.random.default_rng(3))
    given.sample[2] = False
    given.masks = {1: np.zeros(1, dtype=np.uint32), 3: np.zeros(1, dtype=np.uint32)}
    given.prompt_logprobs = {2: 5}
    rows = SampledRows.of(given)
    assert rows.rows.tolist() == [0, 1, 8, 2, 3, 4, 5]
    assert rows.seqs.tolist() == [0, 1, 3, 2, 2, 2, 2]
    assert rows.slots.tolist() == [*given.slots[[0, 1, 3]].tolist(), -1, -1, -1, -1]
    assert rows.masks.tolist() == [-1, 0, 1, -1, -1, -1, -1]

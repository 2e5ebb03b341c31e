"""A row's bits depend on its own sequence alone: not on batch-mates, chunks, block placement or threads."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rvllm.backends.base import SamplingSpec, StepBatch
from rvllm.backends.cpu.backend import CpuBackend
from rvllm.backends.cpu.reference import ops
from rvllm.backends.cpu.reference.attention import Pages, Scoring, paged_attention
from rvllm.backends.cpu.reference.gemm import chunk_rows, product, same_at_every_position, tile_rows
from rvllm.backends.cpu.step import flat_step
from rvllm.backends.cpu.threads import Workers
from support.models import tiny

CONFIG = tiny.CASES["qwen2_layer_types"] | {
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "hidden_size": 64,
}
LENGTHS = [5, 61, 130, 17, 200, 33]
BLOCKS_EACH = 14


@pytest.fixture(scope="module")
def backend() -> CpuBackend:
    config = CONFIG | {"max_position_embeddings": 256}
    return tiny.load(config, num_blocks=BLOCKS_EACH * len(LENGTHS) + 10)


@pytest.fixture(scope="module")
def prompts() -> list[np.ndarray]:
    return [tiny.prompt_of(CONFIG, n, seed) for seed, n in enumerate(LENGTHS)]


@pytest.fixture(scope="module")
def alone(backend: CpuBackend, prompts: list[np.ndarray]) -> list[np.ndarray]:
    return [tiny.logits_of(backend, p) for p in prompts]


@settings(max_examples=10, deadline=None, derandomize=True)
@given(data=st.data())
def test_rows_are_the_same_in_any_batch_and_chunking(
    data: st.DataObject, backend: CpuBackend, prompts: list[np.ndarray], alone: list[np.ndarray]
) -> None:
    total = backend.limits.num_blocks
    blocks = np.random.default_rng(data.draw(st.integers(0, 1000))).permutation(total)
    done = [0] * len(prompts)
    waiting = set(range(len(prompts)))
    while waiting:
        chosen = data.draw(st.lists(st.sampled_from(sorted(waiting)), min_size=1, unique=True))
        lens = [data.draw(st.sampled_from([1, 1, 2, 7, 40, 200])) for _ in chosen]
        lens = [min(n, len(prompts[s]) - done[s]) for s, n in zip(chosen, lens, strict=True)]
        batch = StepBatch(
            0, tiny.i32(chosen), tiny.i32(lens), tiny.i32([done[s] for s in chosen]),
            np.concatenate([prompts[s][done[s] : done[s] + n] for s, n in zip(chosen, lens, strict=True)]),
            np.zeros(len(chosen), dtype=bool),
        )  # fmt: skip
        fresh = [s for s in chosen if done[s] == 0]
        batch.started = [tiny.started(s, prompts[s]) for s in fresh]
        own = [tiny.table_rows(s, blocks[s * BLOCKS_EACH : (s + 1) * BLOCKS_EACH]) for s in fresh]
        batch.new_blocks = np.concatenate([batch.new_blocks, *own])
        logits = backend.forward(batch, np.arange(sum(lens)))
        at = 0
        for s, n in zip(chosen, lens, strict=True):
            assert np.array_equal(logits[at : at + n], alone[s][done[s] : done[s] + n])
            at += n
            done[s] += n
            if done[s] == len(prompts[s]):
                waiting.remove(s)


def test_a_broken_neighbour_reaches_nobody(backend: CpuBackend, alone: list[np.ndarray]) -> None:
    """Blocks left full of nan by another sequence do not touch the one that takes them over."""
    prompt = tiny.prompt_of(CONFIG, LENGTHS[1], 1)
    for keys, values in backend._model.caches.values():
        keys[:-1], values[:-1] = np.nan, np.nan  # the last block pads tables and is nobody's
    try:
        assert np.array_equal(tiny.logits_of(backend, prompt), alone[1])
        assert np.array_equal(tiny.logits_of(backend, prompt, [1] * len(prompt)), alone[1])
    finally:
        for keys, values in backend._model.caches.values():
            keys[:], values[:] = 0, 0


def test_sampled_tokens_are_the_same_with_one_thread_or_two() -> None:
    spec = SamplingSpec(temperature=1.0, seed=3)
    prompt = tiny.prompt_of(CONFIG)
    drawn = [tiny.generate(tiny.load(CONFIG, threads=n), prompt, 12, spec) for n in (1, 2, 3)]
    assert drawn[0] == drawn[1] == drawn[2]
    assert len(set(drawn[0])) > 3


@pytest.mark.parametrize(("outer", "inner"), [(96, 64), (960, 576), (130, 1536), (7, 40), (200, 4864)])
def test_product_rows_do_not_depend_on_their_number(outer: int, inner: int) -> None:
    source = np.random.default_rng(outer)
    weight = source.standard_normal((outer, inner), dtype=np.float32)
    x = source.standard_normal((64, inner), dtype=np.float32)
    workers = Workers(2)
    whole = product(x, weight, workers)
    np.testing.assert_allclose(whole, x.astype(np.float64) @ weight.T.astype(np.float64), rtol=0, atol=1e-2)
    for count in range(1, 65):
        first = (count * 7) % (65 - count)
        assert np.array_equal(
            product(x[first : first + count], weight, workers), whole[first : first + count]
        )
    workers.close()


def test_every_place_of_a_tile_is_checked() -> None:
    for inner in (64, 576, 896, 1536, 4864):
        assert same_at_every_position(inner, 1000)
        assert chunk_rows(inner, tile_rows()) % 16 == 0


@pytest.mark.parametrize(
    "scoring",
    [Scoring(0.3), Scoring(0.3, window=9), Scoring(0.3, window=150), Scoring(0.3, soft_cap=2.0)],
    ids=["full", "window", "wide_window", "capped"],
)
@pytest.mark.parametrize(("heads", "kv_heads", "dim"), [(3, 1, 16), (4, 4, 24), (14, 2, 64)])
def test_paged_attention_equals_the_reference(scoring: Scoring, heads: int, kv_heads: int, dim: int) -> None:
    source = np.random.default_rng(heads)
    lens, starts = [1, 1, 70, 33], [0, 290, 0, 200]
    blocks = source.permutation(100).astype(np.int32)[:96].reshape(4, 24)
    keys, values = (source.standard_normal((100, 16, kv_heads, dim), dtype=np.float32) for _ in range(2))
    q = source.standard_normal((sum(lens), heads, dim), dtype=np.float32)
    step = flat_step(
        np.zeros(sum(lens), np.int32), tiny.i32(lens), tiny.i32(starts), blocks, np.zeros(0, np.int64)
    )
    ours = paged_attention(q, Pages(keys, values), step, scoring, Workers(2))
    at = 0
    for n, start, table in zip(lens, starts, blocks, strict=True):
        k = keys[table].reshape(-1, kv_heads, dim)[: start + n]
        v = values[table].reshape(-1, kv_heads, dim)[: start + n]
        expected = ops.attention(q[at : at + n], k, v, start, scoring.scale, scoring.window, scoring.soft_cap)
        np.testing.assert_allclose(ours[at : at + n], expected, atol=5e-6, rtol=0)
        at += n


@pytest.mark.parametrize("window", [1, 2, 9, 128, 150])
def test_the_first_split_has_the_oldest_key_of_a_window(window: int) -> None:
    """By counting: a query sees itself and the window - 1 keys before it, in splits of 128 keys."""
    scoring, positions = Scoring(1.0, window=window), np.arange(600)
    oldest = [min(k for k in range(p + 1) if p - k < window) // 128 for p in positions.tolist()]
    assert scoring.first_splits(positions).tolist() == oldest

"""Drawing tokens: each step of vLLM's order against a plain formula, and seeds that always give the same."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rvllm.backends.base import SamplingSpec
from rvllm.backends.cpu.reference.philox import gumbel, noise_words, philox2x32, philox4x32, uniform
from rvllm.backends.cpu.reference.sampler import History, adjust, distribution, draw, nucleus
from rvllm.backends.logprobs import top_logprobs

VOCAB = 50


def row(seed: int = 0, vocab: int = VOCAB) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(vocab).astype(np.float32) * 3


def begin(spec: SamplingSpec, tokens: tuple[int, ...] = (1, 2, 2, 5), prompt_len: int = 2) -> History:
    return History.begin(spec, np.array(tokens, dtype=np.int32), prompt_len, VOCAB)


def test_philox_known_answers() -> None:
    """The known-answer vectors published with the generator (Random123)."""
    assert philox4x32(0, 0) == (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)
    full = philox4x32(2**64 - 1, 2**128 - 1)
    assert full == (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)
    pi = philox4x32(0x299F31D0A4093822, 0x0370734413198A2E85A308D3243F6A88)
    assert pi == (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1)


@pytest.mark.parametrize(
    ("low", "high", "key", "words"),
    [
        (0, 0, 0, (0x257A3673, 0xCD26BE2A)),
        (0xFFFFFFFF, 0xFFFFFFFF, 0xFFFFFFFF, (0xAB302C4D, 0x3DC9D239)),
        (0x243F6A88, 0x85A308D3, 0x13198A2E, (0xBEDBBE6B, 0xE4C770B3)),
    ],
)
def test_philox2x32_known_answers(low: int, high: int, key: int, words: tuple[int, int]) -> None:
    """Of 7 rounds, as published with the generator (Random123)."""
    found = philox2x32(key, np.array([7, low], np.uint64), high)
    assert tuple(int(w[1]) for w in found) == words


def test_noise_is_gumbel_and_independent_of_id_step_and_seed() -> None:
    """Moments of the standard Gumbel distribution; no correlation between neighbours of any kind."""
    noise = np.array([gumbel(noise_words(seed, i, 1000)) for seed in (5, 6) for i in range(50)])
    assert abs(noise.mean() - np.euler_gamma) < 0.02
    assert abs(noise.var() - np.pi**2 / 6) < 0.04
    assert np.corrcoef(noise.reshape(-1)[:-8], noise.reshape(-1)[8:])[0, 1] < 0.01
    assert np.abs(np.corrcoef(noise)[~np.eye(100, dtype=bool)]).max() < 0.2
    assert np.isfinite(gumbel(np.array([0, 2**32 - 1], np.uint64))).all()


@pytest.mark.parametrize("vocab", [1, 7, 8, 50, 1031])
@pytest.mark.parametrize("spread", [0.0, 2.0, 30.0])
def test_a_draw_by_temperature_is_the_largest_sum_with_noise(vocab: int, spread: float) -> None:
    """Whatever ids are not looked at closely."""
    logits = row(3, vocab) * np.float32(spread)
    for index in range(20):
        history = History.begin(SamplingSpec(temperature=0.7, seed=11), np.zeros(index, np.int32), 0, vocab)
        sums = logits.astype(np.float64) / 0.7 + gumbel(noise_words(11, index, vocab))
        assert draw(logits, history) == int(np.argmax(sums))


def test_greedy_takes_the_first_of_the_largest() -> None:
    logits = np.zeros(VOCAB, np.float32)
    logits[[7, 30]] = 4
    assert draw(logits, begin(SamplingSpec())) == 7


def test_penalties_follow_vllm() -> None:
    spec = SamplingSpec(repetition_penalty=1.5, presence_penalty=0.25, frequency_penalty=0.5)
    logits = row()
    out = adjust(logits.copy(), begin(spec), None)  # prompt 1 2, output 2 5
    expected = logits.copy()
    for token in (1, 2, 5):
        expected[token] = logits[token] / 1.5 if logits[token] > 0 else logits[token] * 1.5
    for token in (2, 5):
        expected[token] -= 0.5 + 0.25
    np.testing.assert_allclose(out, expected, rtol=1e-6)


def test_history_grows_with_each_token() -> None:
    spec = SamplingSpec(frequency_penalty=1.0, repetition_penalty=2.0)
    history = begin(spec)
    history.append(9)
    history.append(9)
    fresh = begin(spec, (1, 2, 2, 5, 9, 9))
    assert np.array_equal(adjust(row(), history, None), adjust(row(), fresh, None))
    assert history.generated == 4


def test_bias_min_tokens_and_mask() -> None:
    logits = np.zeros(VOCAB, np.float32)
    logits[3] = 5.0
    assert draw(logits, begin(SamplingSpec(logit_bias=((8, 9.0),)))) == 8
    spec = SamplingSpec(min_tokens=3, stop_token_ids=(3,))
    history = begin(spec)
    assert draw(logits, history) != 3
    history.append(0)
    assert draw(logits, history) == 3  # three tokens are out
    mask = np.zeros(2, np.uint32)
    mask[1] = 1 << (41 - 32)
    for temperature in (0.0, 2.0):
        assert draw(logits, begin(SamplingSpec(temperature=temperature)), mask) == 41


def test_all_forbidden_still_answers() -> None:
    assert 0 <= draw(row(), begin(SamplingSpec(temperature=1.0)), np.zeros(2, np.uint32)) < VOCAB


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 1000),
    temperature=st.floats(0.05, 5),
    top_k=st.integers(0, VOCAB + 5),
    top_p=st.floats(0.01, 1.0),
    min_p=st.floats(0, 1),
)
def test_filters_keep_what_the_definition_keeps(
    seed: int, temperature: float, top_k: int, top_p: float, min_p: float
) -> None:
    logits = row(seed)
    spec = SamplingSpec(temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p)
    weights = distribution(logits, spec)
    ids = np.flatnonzero(weights)
    scaled = (logits / np.float32(temperature)).astype(np.float64)
    p = np.exp(scaled - scaled.max())
    alive = p >= min_p * p.max() * (1 + 1e-6)
    near = np.abs(p - min_p * p.max()) <= 1e-5  # either side of the edge may be right
    order = np.argsort(-p, kind="stable")
    if top_k:
        alive[order[top_k:]] = False
    assert set(ids) <= set(np.flatnonzero(alive | near))
    assert order[0] in ids
    inside = p[np.flatnonzero(alive)]
    if not near.any():
        kept = np.sort(p[ids])[::-1]
        assert kept.sum() >= top_p * inside.sum() * (1 - 1e-5)  # sums of float32, in another order
        assert len(kept) == 1 or kept[:-1].sum() < top_p * inside.sum() * (1 + 1e-5)
    np.testing.assert_allclose(weights[ids], p[ids], rtol=1e-4)


@pytest.mark.parametrize("top_p", [0.1, 0.5, 0.9, 0.999, 1.0])
def test_nucleus_of_a_flat_distribution(top_p: float) -> None:
    weights = np.ones(5000, dtype=np.float32)
    kept = nucleus(weights, top_p)
    assert len(kept) == int(np.ceil(top_p * 5000))
    assert np.array_equal(kept, np.arange(len(kept)))


def test_draws_follow_the_distribution_and_the_seed() -> None:
    logits = np.log(np.array([0.1, 0.2, 0.0001, 0.6999], dtype=np.float32))
    counts = np.zeros(4)
    spec = SamplingSpec(temperature=1.0, seed=5)
    history = History.begin(spec, np.zeros(1, np.int32), 1, 4)
    first = []
    for _ in range(4000):
        token = draw(logits, history)
        history.append(token)
        counts[token] += 1
        first.append(token)
    expected = 4000 * np.exp(logits.astype(np.float64))
    assert float(((counts - expected) ** 2 / expected).sum()) < 16.3  # chi-squared of 3 degrees: 1 in 1,000
    again = History.begin(spec, np.zeros(51, np.int32), 1, 4)  # resumed after 50 tokens
    assert draw(logits, again) == first[50]


def test_a_filtered_draw_inverts_the_cumulative_distribution_in_order_of_id() -> None:
    logits = row(3)
    p = np.exp(logits.astype(np.float64) - logits.max())
    p[p < 1e-4 * p.max()] = 0
    for index in range(50):
        u = uniform(11, index)
        spec = SamplingSpec(temperature=1.0, seed=11, min_p=1e-4)
        history = History.begin(spec, np.zeros(index, np.int32), 0, VOCAB)
        expected = int(np.searchsorted(np.cumsum(p) / p.sum(), u, side="right"))
        assert draw(logits, history) == expected


def test_top_logprobs() -> None:
    logits = row(4)
    out = top_logprobs(logits, 17, 5)
    logp = logits - np.log(np.exp(logits.astype(np.float64)).sum())
    order = np.argsort(-logits, kind="stable")
    assert out.top_ids == order[:5].tolist()
    np.testing.assert_allclose(out.top_logprobs, logp[order[:5]], atol=1e-5)
    assert out.logprob == pytest.approx(logp[17], abs=1e-5)
    assert order[out.rank - 1] == 17
    assert len(top_logprobs(logits, 17, 0).top_ids) == 0


def test_a_token_has_the_logprob_it_has_among_the_top() -> None:
    """Clients find the drawn token in the top list by comparing numbers."""
    for seed in range(20):
        logits = np.random.default_rng(seed).normal(0, 3, 1000).astype(np.float32)
        best = int(np.argmax(logits))
        out = top_logprobs(logits, best, 3)
        assert out.logprob == out.top_logprobs[0]


def test_a_rank_is_one_more_than_the_number_of_larger_logits() -> None:
    logits = np.array([1, 3, 3, 0, 3, 2], np.float32)
    assert [top_logprobs(logits, token, 0).rank for token in range(6)] == [5, 1, 1, 6, 1, 4]

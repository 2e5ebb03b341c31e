"""Sampling and logprob kernels against the NumPy sampler, and rows against themselves in other batches."""

from __future__ import annotations

import numpy as np
from msgspec.structs import replace

from rvllm.backends.base import BROKEN_ROW, SamplingSpec, SlotStart
from rvllm.backends.cpu.reference.philox import gumbel, noise_words, uniform
from rvllm.backends.cpu.reference.sampler import History, adjust, distribution, draw, unfiltered
from rvllm.backends.cuda.ops.sampling.slots import (
    MAX_TOP,
    PICK_THREADS,
    SCAN_WARPS,
    SLOT,
    StateSizes,
    pack_starts,
)
from rvllm.backends.logprobs import top_logprobs
from support.kernels.harness import Gpu


class Sampler:
    """Slot state and the three launches of a sampling step."""

    def __init__(self, gpu: Gpu, slots: int, vocab: int) -> None:
        self.gpu, self.vocab, self.sizes = gpu, vocab, StateSizes(slots, vocab)
        self.slots = gpu.empty((slots,), SLOT)
        self.histories = gpu.empty((slots, self.sizes.history_stride), np.uint16)
        self.bias_ids = gpu.empty((self.sizes.biases // 4,), np.int32)
        self.biases = gpu.empty((self.sizes.biases // 4,), np.float32)
        self.stops = gpu.empty((self.sizes.stops // 4,), np.int32)
        self.last = gpu.empty((slots,), np.int32)

    def start(self, started: list[SlotStart]) -> None:
        """Gives slots to sequences."""
        entries, words = pack_starts(started, self.vocab)
        args = [self.slots, self.histories, self.bias_ids, self.biases, self.stops, self.gpu.array(entries),
                self.gpu.array(words), self.vocab, self.sizes.history_stride]  # fmt: skip
        self.gpu.launch("sm80_slot_start", len(started), 1024, args)

    def arrays(
        self, logits: np.ndarray, row_slots: np.ndarray, pad: int, masks: dict[int, np.ndarray]
    ) -> list:
        """Device arguments of a step, logits padded to a multiple of four columns."""
        gpu, rows = self.gpu, len(row_slots) + pad
        stride = -(-self.vocab // 4) * 4 + 4
        padded = np.full((rows, stride), np.nan, np.float32)
        padded[: len(logits), : self.vocab] = logits
        words = -(-self.vocab // 32)
        mask_rows = np.full(rows, -1, np.int32)
        packed = np.zeros((max(1, len(masks)), words), np.uint32)
        for i, (row, mask) in enumerate(masks.items()):
            mask_rows[row], packed[i] = i, mask
        slots = np.concatenate([row_slots, np.full(pad, -9)]).astype(np.int32)
        return [gpu.array(padded), gpu.empty((rows, stride), np.float32),
                gpu.empty((rows, self.sizes.chunks(), 2), np.int32), gpu.array(slots),
                gpu.array([len(row_slots)], np.int32), gpu.array(packed), gpu.array(mask_rows),
                gpu.empty((rows,), np.int32), stride, words]  # fmt: skip

    def step(self, a: list) -> None:
        """Queues scan and pick."""
        logits, scaled, bests, slots, count, masks, mask_rows, tokens, stride, words = a
        rows, chunks = logits.shape[0], self.sizes.chunks()
        args = [logits, scaled, bests, self.slots, slots, count, self.histories, self.bias_ids,
                self.biases, self.stops, masks, mask_rows, None, self.vocab, stride,
                self.sizes.history_stride, words]  # fmt: skip
        self.gpu.launch("sm80_sample_scan", (-(-chunks // SCAN_WARPS), rows), 32 * SCAN_WARPS, args)
        args = [tokens, self.last, scaled, bests, self.slots, slots, count, self.histories, None, None, None,
                self.vocab, stride,
                self.sizes.history_stride, chunks]  # fmt: skip
        self.gpu.launch("sm80_sample_pick", rows, PICK_THREADS, args)

    def sample(
        self, logits: np.ndarray, row_slots: np.ndarray, pad: int = 0, masks: dict | None = None
    ) -> np.ndarray:
        """Draws a token a row."""
        a = self.arrays(logits, row_slots, pad, masks or {})
        self.step(a)
        tokens = a[7].get()
        assert (tokens[len(row_slots) :] == -1).all()
        return tokens[: len(row_slots)]


def specs(rng: np.random.Generator, vocab: int) -> list[SamplingSpec]:
    """Every parameter alone and in company."""
    some = rng.permutation(vocab)[:40]
    base = SamplingSpec(temperature=0.8, seed=int(rng.integers(2**63)))
    bias = tuple((int(i), float(b)) for i, b in zip(some[:20], rng.normal(0, 4, 20), strict=True))
    greedy = [
        SamplingSpec(),
        SamplingSpec(repetition_penalty=1.3),
        SamplingSpec(presence_penalty=0.7, frequency_penalty=0.4, logit_bias=bias),
        SamplingSpec(min_tokens=50, stop_token_ids=tuple(int(i) for i in some)),
    ]
    sampled = [
        base,
        replace(base, temperature=0.2, top_k=5),
        replace(base, temperature=1.5, top_k=50, top_p=0.9),
        replace(base, top_p=0.5),
        replace(base, top_p=0.95, temperature=1.3),
        replace(base, min_p=0.05),
        replace(base, min_p=0.02, top_k=100, top_p=0.8, repetition_penalty=1.1, presence_penalty=0.3),
        replace(base, top_k=1),
        replace(base, top_k=vocab + 5, top_p=0.01),
        replace(base, logit_bias=bias, frequency_penalty=0.2, min_tokens=3, stop_token_ids=(1, 2, 3)),
    ]
    return greedy + [replace(s, seed=int(rng.integers(2**63)) * 2 + 1) for s in sampled]


def agrees(token: int, logits: np.ndarray, history: History, mask: np.ndarray | None) -> bool:
    """Whether a token is the reference's, or within 1e-5 of the distribution, 1e-4 of a sum with noise."""
    if token == draw(logits, history, mask):
        return True
    spec = history.spec
    changed = adjust(logits.copy(), history, mask)
    if spec.temperature < 1e-5:
        return False
    if unfiltered(spec, len(logits)):
        noise = gumbel(noise_words(spec.seed, history.generated, len(logits)))
        sums = changed.astype(np.float64) / spec.temperature + noise
        return bool(sums[token] >= sums.max() - 1e-4)
    weights = distribution(changed, spec).astype(np.float64)
    if weights[token] == 0:
        return False
    total = np.cumsum(weights) / weights.sum()
    u = uniform(spec.seed, history.generated)
    return bool((total[token - 1] if token else 0.0) - 1e-5 <= u <= total[token] + 1e-5)


def check_sampling(gpu: Gpu, rng: np.random.Generator, vocab: int) -> str:
    """Several steps of all specs: tokens, histories, and the same tokens alone and with other neighbours."""
    chosen = specs(rng, vocab)
    count = len(chosen)
    sampler, alone = Sampler(gpu, count + 2, vocab), Sampler(gpu, count + 2, vocab)
    place = rng.permutation(count + 2)[:count].astype(np.int32)
    starts, histories = [], []
    for slot, spec in zip(place, chosen, strict=True):
        tokens = rng.integers(0, vocab, 30).astype(np.int32)
        tokens[20:] = tokens[12]
        starts.append(SlotStart(int(slot), spec, tokens, 14))
        histories.append(History.begin(spec, tokens, 14, vocab))
    sampler.start(starts)
    alone.start(starts)
    exact = 0
    for step in range(4):
        spread = (0.5, 2.0, 4.0, 8.0)[step]
        logits = (rng.standard_normal((count, vocab), np.float32) * np.float32(spread)).astype(np.float32)
        logits[:, rng.integers(0, vocab, 50)] = logits.max(axis=1, keepdims=True)  # ties
        for row, start in enumerate(starts):
            logits[row, start.tokens[12:16]] += np.float32(2)
        masks = {
            2: rng.integers(0, 2**32, -(-vocab // 32), dtype=np.uint32),
            6: np.full(-(-vocab // 32), 0x10, np.uint32),
        }
        tokens = sampler.sample(logits, place, pad=2, masks=masks)
        for row in (0, 3, 5, 6, 9):
            single = alone.sample(
                logits[row : row + 1], place[row : row + 1], masks={0: masks[row]} if row in masks else {}
            )
            assert single[0] == tokens[row], f"row {row} draws {single[0]} alone and {tokens[row]} in a batch"
        for row, token in enumerate(tokens):
            mask = masks.get(row)
            assert 0 <= token < vocab and agrees(int(token), logits[row], histories[row], mask), (
                step,
                chosen[row],
            )
            exact += int(token == draw(logits[row], histories[row], mask))
            histories[row].append(int(token))
        assert (sampler.last.get()[place] == tokens).all()
    assert (sampler.slots.get()["generated"][place] == [h.generated for h in histories]).all()
    counts = sampler.histories.get()
    for row, history in enumerate(histories):
        if history.counts is not None:
            assert (counts[place[row], :vocab] & 0x7FFF == history.counts).all()
    return f"{exact}/{4 * count} the same token, the rest on an edge"


def check_broken_logits(gpu: Gpu, rng: np.random.Generator, vocab: int) -> None:
    """Rows with one +inf or NaN are told by their token, -inf is no fault, and neighbours notice nothing."""
    base = SamplingSpec(temperature=1.0, seed=7)
    chosen = [SamplingSpec(), base, replace(base, top_p=0.9, top_k=9, min_p=0.1), base, base]
    tokens = np.zeros(2, np.int32)
    place = np.arange(len(chosen), dtype=np.int32)
    sampler = Sampler(gpu, len(chosen), vocab)
    rows = rng.standard_normal((len(chosen), vocab), np.float32)
    wanted = [draw(row, History.begin(s, tokens, 2, vocab)) for row, s in zip(rows, chosen, strict=True)]
    for broken in (np.inf, -np.inf, np.nan):
        for share in (1, vocab):
            sampler.start([SlotStart(i, spec, tokens, 2) for i, spec in enumerate(chosen)])
            logits = rows.copy()
            logits[:3, rng.permutation(vocab)[:share]] = broken
            found = sampler.sample(logits, place)
            if broken == -np.inf:
                assert ((found >= 0) & (found < vocab)).all(), (broken, share, found)
            else:
                assert (found[:3] == BROKEN_ROW).all(), (broken, share, found)
            assert (found[3:] == wanted[3:]).all(), (broken, share, found, wanted)


def check_logprobs(gpu: Gpu, rng: np.random.Generator, vocab: int) -> float:
    """Token, rank and top list, with ties; the worst absolute difference."""
    rows, stride, n = 6, -(-vocab // 4) * 4, 5
    logits = (rng.standard_normal((rows, stride), np.float32) * 3).astype(np.float32)
    logits[2] = np.round(logits[2])
    logits[:, vocab:] = np.nan
    chosen = np.array([0, 2, 2, 5, 4], np.int32)
    targets = np.array([7, -1, 9, vocab - 1, -1], np.int32)
    wanted = np.array([0, 20, 5, 1, 20], np.int32)
    drawn = rng.integers(0, vocab, rows).astype(np.int32)
    out = [gpu.empty((n + 1,), np.float32), gpu.empty((n + 1,), np.int32),
           gpu.empty((n + 1, MAX_TOP), np.int32),
           gpu.empty((n + 1, MAX_TOP), np.float32)]  # fmt: skip
    pad = lambda a: gpu.array(np.append(a, 0), np.int32)  # noqa: E731
    args = [*out, gpu.array(logits), pad(chosen), pad(targets), pad(wanted), gpu.array(drawn),
            gpu.array([n], np.int32), vocab, stride]  # fmt: skip
    gpu.launch("sm80_logprobs", n + 1, PICK_THREADS, args)
    token, ranks, ids, top = (a.get() for a in out)
    worst = 0.0
    for i in range(n):
        target = targets[i] if targets[i] >= 0 else drawn[chosen[i]]
        reference = top_logprobs(logits[chosen[i], :vocab], int(target), int(wanted[i]))
        k = int(wanted[i])
        assert ranks[i] == reference.rank
        assert (ids[i, :k] == reference.top_ids).all(), (i, ids[i, :k], reference.top_ids)
        worst = max(worst, abs(float(token[i]) - reference.logprob))
        if k:
            worst = max(worst, float(np.abs(top[i, :k] - reference.top_logprobs).max()))
    assert np.isnan(token[n])
    assert np.isfinite(token[:n]).all()
    assert worst < 2e-5, worst
    return worst

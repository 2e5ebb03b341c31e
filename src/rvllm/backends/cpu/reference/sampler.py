"""Draws tokens from logits, row by row, in vLLM's order.

Mask, min_tokens, logit bias, penalties; then the arg max when greedy, else temperature and, where nothing
filters, the arg max with Gumbel noise, or min-p, top-k, top-p and a draw by inverting the cumulative
distribution in order of token id (docs/decisions/0045-gumbel-noise.md).
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from rvllm.backends.base import BROKEN_ROW, SamplingSpec
from rvllm.backends.cpu.reference.philox import gumbel, noise_words, uniform

F32 = NDArray[np.float32]
GREEDY = 1e-5  # temperatures below are greedy, as in vLLM
NEVER = np.float32(-np.inf)


@dataclass
class History:
    """What a sequence has said so far, as far as drawing its next token needs it.

    generated: tokens drawn since the end of the prompt. seen, counts: [vocab] whether a token occurs in
    prompt or output, and how often in the output; kept only when a penalty asks for them.
    """

    spec: SamplingSpec
    generated: int
    seen: NDArray[np.bool_] | None = None
    counts: NDArray[np.int32] | None = None
    stops: NDArray[np.int64] = field(init=False)
    bias_ids: NDArray[np.int64] = field(init=False)
    bias: F32 = field(init=False)

    def __post_init__(self) -> None:
        self.stops = np.array(self.spec.stop_token_ids, dtype=np.int64)
        self.bias_ids = np.array([i for i, _ in self.spec.logit_bias], dtype=np.int64)
        self.bias = np.array([b for _, b in self.spec.logit_bias], dtype=np.float32)

    @staticmethod
    def begin(spec: SamplingSpec, tokens: NDArray[np.int32], prompt_len: int, vocab: int) -> History:
        """The history of a sequence whose tokens so far are these."""
        out = History(spec, len(tokens) - prompt_len)
        if spec.repetition_penalty != 1.0:
            out.seen = np.zeros(vocab, dtype=np.bool_)
            out.seen[tokens] = True
        if spec.presence_penalty != 0.0 or spec.frequency_penalty != 0.0:
            out.counts = np.bincount(tokens[prompt_len:], minlength=vocab).astype(np.int32)
        return out

    def append(self, token: int) -> None:
        self.generated += 1
        if self.seen is not None:
            self.seen[token] = True
        if self.counts is not None:
            self.counts[token] += 1

    @property
    def quick(self) -> bool:
        """Whether the next token is the plain arg max: not worth another thread."""
        return self.spec.temperature < GREEDY and self.spec.logprobs is None and not self.alters

    @property
    def alters(self) -> bool:
        """Whether logits are changed before the draw."""
        spec = self.spec
        return (
            self.seen is not None
            or self.counts is not None
            or len(self.bias_ids) > 0
            or (self.generated < spec.min_tokens and len(self.stops) > 0)
        )


def draw(logits: F32, history: History, mask: NDArray[np.uint32] | None = None) -> int:
    """The next token of one row, BROKEN_ROW where a logit that may be drawn is +inf or no number.

    logits [vocab] stay as they are.
    """
    spec = history.spec
    if mask is not None or history.alters:
        logits = adjust(logits.copy(), history, mask)
    if spec.temperature < GREEDY:
        return _largest(logits)
    if unfiltered(spec, len(logits)):
        return noisiest(logits, spec, history.generated)
    total = np.cumsum(distribution(logits, spec), dtype=np.float64)
    if not total[-1] > 0:  # every token is forbidden, or the logits are not numbers
        return _largest(logits)
    u = uniform(spec.seed, history.generated)
    return int(np.searchsorted(total, u * total[-1], side="right"))


def unfiltered(spec: SamplingSpec, vocab: int) -> bool:
    """Whether nothing but the temperature says what is drawn."""
    return not 0 < spec.top_k < vocab and spec.top_p >= 1.0 and spec.min_p <= 0.0


def noisiest(logits: F32, spec: SamplingSpec, index: int) -> int:
    """The arg max of logits / temperature with the noise of output index `index`; BROKEN_ROW as `_largest`.

    It has the softmax's distribution (Gumbel 1954; Yellott 1977). Only ids that can win are looked at
    closely: what wins has -log(u) below exp(its logit - the best sum so far), and 1 - u is below -log(u).
    """
    largest = _largest(logits)
    if largest == BROKEN_ROW or logits[largest] == NEVER:
        return largest
    scaled = logits / np.float32(spec.temperature)
    words = noise_words(spec.seed, index, len(logits))
    early = np.array([largest, int(np.argmin(words))])
    least = np.float32((scaled[early] + gumbel(words[early])).max())
    limits = np.exp(np.clip(scaled - least, -30, 30)) * np.float32(1.001 * 2.0**32)
    near = np.flatnonzero(words <= limits)
    sums = scaled[near] + gumbel(words[near])
    return int(near[np.argmax(sums)])


def _largest(logits: F32) -> int:
    """Index of the largest; BROKEN_ROW where that is +inf or where one is no number."""
    found = int(np.argmax(logits))  # the first that is no number, if there is one
    return found if logits[found] < np.inf else BROKEN_ROW


def adjust(logits: F32, history: History, mask: NDArray[np.uint32] | None) -> F32:
    """Everything that changes logits whether or not the draw is greedy, in place."""
    spec = history.spec
    if mask is not None:
        allowed = np.unpackbits(np.ascontiguousarray(mask).view(np.uint8), bitorder="little")
        logits[allowed[: len(logits)] == 0] = NEVER
    if history.generated < spec.min_tokens:
        logits[history.stops] = NEVER
    if len(history.bias_ids):
        logits[history.bias_ids] += history.bias
    if history.seen is not None:
        penalty = np.float32(spec.repetition_penalty)
        scaled = np.where(logits > 0, logits / penalty, logits * penalty)
        np.copyto(logits, scaled, where=history.seen)
    if history.counts is not None:
        logits -= np.float32(spec.frequency_penalty) * history.counts
        logits -= np.float32(spec.presence_penalty) * (history.counts > 0)
    return logits


def distribution(logits: F32, spec: SamplingSpec) -> F32:
    """Weights [vocab], not normalised, the largest 1; 0 for tokens that may not be drawn."""
    scaled = logits / np.float32(spec.temperature)
    with np.errstate(invalid="ignore"):  # all forbidden: nothing but nan, which the caller sees
        scaled -= scaled.max()
    weights: F32 = np.exp(scaled, out=scaled)
    if spec.min_p > 0.0:
        weights[weights < np.float32(spec.min_p)] = 0
    if 0 < spec.top_k < len(weights):
        weights[weights < np.partition(weights, -spec.top_k)[-spec.top_k]] = 0
    if spec.top_p < 1.0:
        kept = nucleus(weights, spec.top_p)
        inside = weights[kept]
        weights[:] = 0
        weights[kept] = inside
    return weights


def nucleus(weights: F32, top_p: float) -> NDArray[np.int64]:
    """Indices of the fewest largest weights that hold `top_p` of the sum (Holtzman et al. 2020).

    At least one is kept; of equal weights at the edge the one with the lower index.
    """
    alive = np.flatnonzero(weights)
    weights = weights[alive]
    target = top_p * weights.sum(dtype=np.float64)
    count = 256
    while True:
        if count < len(weights):
            # All that equal the smallest of the largest `count` come along, so ties stay in order.
            largest = np.flatnonzero(weights >= np.partition(weights, -count)[-count])
        else:
            largest = np.arange(len(weights))
        order = largest[np.argsort(-weights[largest], kind="stable")]
        held = np.cumsum(weights[order], dtype=np.float64)
        if len(order) == len(weights) or held[-1] >= target:
            return alive[order[: int(np.searchsorted(held, target, side="left")) + 1]]
        count *= 8

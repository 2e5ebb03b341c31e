"""From times to choices: for each shape one provider for all numbers of tokens, and its kernel for each.

One provider, because the bits of an output must not depend on the batch where it can be helped: all of our
kernels for a weight give the same bits, and so do all of CUTLASS's.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from rvllm.backends.cuda.device.info import DeviceInfo
from rvllm.backends.cuda.ops.gemm.strategy import Choice, GemmStrategy, ProductShape, Provider
from rvllm.backends.cuda.tuning.cache import Conditions, Key, TuningCache
from rvllm.backends.cuda.tuning.candidates import Candidate, candidates, tokens_of

ROUNDS = 5  # of which the median counts
MARGIN = 1.01  # what is less than this faster is noise: the provider named first keeps the product
PROVIDERS: tuple[Provider, ...] = ("native", "cutlass", "cublas")

Times = Mapping[int, Mapping[Candidate, float]]  # microseconds by number of tokens
Timer = Callable[[ProductShape, int, Sequence[Candidate], int], Mapping[Candidate, float]]  # with rounds


@dataclass(frozen=True)
class Lookup:
    """What entries of the cache are found by. code: the hash of a candidate's machine code."""

    conditions: Conditions
    chip: DeviceInfo
    providers: Sequence[Provider]
    code: Callable[[ProductShape, int, Candidate], str]
    memory_rate: float  # bytes a second; 0: unknown

    def key(self, shape: ProductShape, tokens: int, candidate: Candidate) -> Key:
        """Of one entry."""
        return Key(self.conditions, shape, tokens, str(candidate), self.code(shape, tokens, candidate))

    def floor(self, shape: ProductShape) -> float:
        """Microseconds that reading the weights takes at least."""
        return 2e6 * shape.rows * shape.width / self.memory_rate if self.memory_rate else 0.0


def known_times(shape: ProductShape, lookup: Lookup, cache: TuningCache) -> tuple[Times, Times]:
    """What the cache knows of a shape, and as NaN what it lacks."""
    known: dict[int, dict[Candidate, float]] = {}
    absent: dict[int, dict[Candidate, float]] = {}
    for tokens in tokens_of(shape):
        for candidate in candidates(shape, tokens, lookup.chip, lookup.providers):
            found = cache.get(lookup.key(shape, tokens, candidate), lookup.floor(shape))
            if found is None:
                absent.setdefault(tokens, {})[candidate] = math.nan
            else:
                known.setdefault(tokens, {})[candidate] = found
    return known, absent


def tune(
    shapes: Sequence[ProductShape],
    lookup: Lookup,
    cache: TuningCache,
    timer: Timer,
    progress: Callable[[float, str], None],
) -> tuple[dict[ProductShape, Choice], int]:
    """The choice for each shape; what the cache lacks is timed and put into it. Also how many were timed."""
    work = [(shape, *known_times(shape, lookup, cache)) for shape in shapes]
    total = sum(len(absent) for _, _, absent in work)
    choices, done, timed = {}, 0, 0
    for shape, known, absent in work:
        times = {tokens: dict(found) for tokens, found in known.items()}
        for tokens, lacking in absent.items():
            for candidate, microseconds in timer(shape, tokens, list(lacking), ROUNDS).items():
                cache.put(lookup.key(shape, tokens, candidate), microseconds)
                times.setdefault(tokens, {})[candidate] = microseconds
                timed += 1
            done += 1
            progress(done / total, "timing matrix kernels")
        choices[shape] = choose(times)
    return choices, timed


def choose(times: Times) -> Choice:
    """The provider whose best kernels are the least behind the best of all, over all numbers of tokens."""
    behind = scores(times)
    winner = min(behind, key=lambda provider: (behind[provider], PROVIDERS.index(provider)))
    first = next(p for p in PROVIDERS if p in behind and behind[p] <= behind[winner] * MARGIN)
    variants = {}
    for tokens, found in times.items():
        own = {c: t for c, t in found.items() if c.provider == first}
        if first != "cublas" and own:
            variants[tokens] = min(own, key=own.__getitem__).variant
    others = [f"{p} {(b / behind[first] - 1) * 100:+.0f} %" for p, b in behind.items() if p != first]
    return Choice(first, variants, f"{first}; {', '.join(others)}" if others else f"{first} alone")


def scores(times: Times) -> dict[Provider, float]:
    """Of each provider that can do all: the geometric mean, over numbers of tokens, of its best time beside
    the best time of all."""
    found: dict[Provider, float] = {}
    for provider in PROVIDERS:
        logs = []
        for row in times.values():
            own = [t for c, t in row.items() if c.provider == provider]
            logs.append(math.log(min(own) / min(row.values())) if own else math.inf)
        mean = sum(logs) / len(logs)
        if math.isfinite(mean):
            found[provider] = math.exp(mean)
    return found


def told(strategy: GemmStrategy) -> list[str]:
    """What an operator is told of auto's choices, a line each, and what follows for bits."""
    lines = [f"{shape}: {choice.why}" for shape, choice in sorted(strategy.tuned.items())]
    kept = "the same bits in any batch"
    lost = "products by cuBLASLt: bits depend on the batch"
    return [*lines, kept if strategy.keeps_bits else lost]

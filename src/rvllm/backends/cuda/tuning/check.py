"""Kept times are believed as far as the GPU shows the same now: a start times some of every group again.

A group is a shape and a number of tokens. Only how its times compare with each other decides anything. So
those that decide, the best of each provider, are timed again in turns, and one of the others, another at each
start: a kernel whose kept time is too long is never among the best. Where new and old disagree, nothing says
which time of the group is wrong, and all of it is measured again.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

from rvllm.backends.cuda.ops.gemm.strategy import ProductShape
from rvllm.backends.cuda.tuning.cache import TuningCache
from rvllm.backends.cuda.tuning.candidates import Candidate
from rvllm.backends.cuda.tuning.choose import Lookup, Timer, known_times

ROUNDS = 2
APART = 1.1  # how far changes within a group may differ: launches of a few microseconds differ by 2 or 3 %
CLOCKS = 1.5  # how far all of a group may have changed: with clocks and temperature, which decides nothing

Group = tuple[ProductShape, int]  # and its number of tokens


def drawn(known: Mapping[Candidate, float], draw: int) -> list[Candidate]:
    """The best of each provider, and one of the others by `draw`."""
    best: dict[str, Candidate] = {}
    for candidate in sorted(known, key=known.__getitem__):
        best.setdefault(candidate.provider, candidate)
    others = [candidate for candidate in known if candidate not in best.values()]
    return [*best.values(), *(others[draw % len(others)],)] if others else list(best.values())


def checks(
    shapes: Sequence[ProductShape], lookup: Lookup, cache: TuningCache, draw: int
) -> Iterator[tuple[Group, list[Candidate]]]:
    """What is to be timed again, of those groups that leave a choice."""
    for shape in shapes:
        known, absent = known_times(shape, lookup, cache)
        for tokens, found in known.items():
            if len(found) + len(absent.get(tokens, ())) > 1:
                yield (shape, tokens), drawn(found, draw)


def agree(kept: Mapping[Candidate, float], seen: Mapping[Candidate, float], whole: bool) -> bool:
    """Whether new times say what the kept ones do. whole: no time of this group has yet to be measured."""
    changes = [microseconds / kept[candidate] for candidate, microseconds in seen.items()]
    if not whole:
        changes.append(1.0)  # new times will stand beside the old ones, so the clocks have to be alike
    return max(changes) <= APART * min(changes) and min(changes) >= 1 / CLOCKS and max(changes) <= CLOCKS


def forget_wrong(
    shapes: Sequence[ProductShape], lookup: Lookup, cache: TuningCache, timer: Timer, draw: int
) -> int:
    """Takes groups out of the cache whose times the GPU does not show now; how many times that were."""
    forgotten = 0
    for (shape, tokens), candidates in list(checks(shapes, lookup, cache, draw)):
        known, absent = known_times(shape, lookup, cache)
        if not agree(known[tokens], timer(shape, tokens, candidates, ROUNDS), tokens not in absent):
            for candidate in known[tokens]:
                cache.drop(lookup.key(shape, tokens, candidate))
            forgotten += len(known[tokens])
    return forgotten

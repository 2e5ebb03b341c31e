"""Which replica a request goes to: the one where it costs least, counted in KV blocks of prompt.

    cost = blocks of the prompt that the replica does not hold
         + a fixed number for each request that it has
         - a number for the replica that is home to the request's session

So a long shared prefix outweighs a queue, and a short one (the first lines of a chat template) does not draw
everything to one replica: what it saves is a block or two. What a replica holds is what was sent to it, the
least recently used forgotten at the size of its cache; nothing is asked of it. Nothing here knows of Ray.
"""

from __future__ import annotations

import random
from array import array
from collections import Counter, OrderedDict
from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from hashlib import blake2b

from rvllm.engine.blocks import ROOT, Digest, chain

Replica = str
STALE_SECONDS = 30.0  # a placement that was neither confirmed nor ended is forgotten after so long
CAPACITY = 100_000  # blocks that a replica is believed to hold before it has said how many
MAX_BLOCKS = 2_000_000  # that are remembered of all replicas: a gigabyte


def digests(tokens: Sequence[int], block_size: int) -> list[Digest]:
    """The content hashes of a prompt's full blocks, as its engine makes them, without its last token's."""
    whole = (len(tokens) - 1) // block_size * block_size
    return chain(ROOT, array("i", tokens[: max(0, whole)]), block_size)


def home_of(session: str, replicas: Iterable[Replica]) -> Replica:
    """The replica that every router sends a session to: the highest hash (rendezvous hashing), so that a
    replica that comes or goes moves its own share of sessions only."""
    return max(replicas, key=lambda name: blake2b(f"{session}\0{name}".encode(), digest_size=8).digest())


class PrefixIndex:
    """Which replicas were sent which blocks."""

    def __init__(self) -> None:
        self._holders: dict[Digest, set[Replica]] = {}
        self._held: dict[Replica, OrderedDict[Digest, None]] = {}  # the least recently used first

    def matches(self, blocks: Sequence[Digest], replicas: Iterable[Replica]) -> dict[Replica, int]:
        """How many of a prompt's first blocks each replica holds; those with none are left out."""
        found: dict[Replica, int] = {}
        alive = set(replicas)
        for count, block in enumerate(blocks):
            still = alive & self._holders.get(block, _NONE)
            if count:
                for name in alive - still:
                    found[name] = count
            alive = still
            if not alive:
                return found
        return found | dict.fromkeys(alive, len(blocks))

    def add(self, replica: Replica, blocks: Sequence[Digest], capacity: int) -> None:
        """These blocks are at a replica that holds `capacity` of them."""
        held = self._held.setdefault(replica, OrderedDict())
        for block in reversed(blocks):  # the beginning, which more prompts share, is kept longest
            held[block] = None
            held.move_to_end(block)
            self._holders.setdefault(block, set()).add(replica)
        steps = 2 * len(blocks) + 100  # in which a smaller capacity is reached
        for _ in range(min(len(held) - capacity, steps)):
            self._drop(replica, held.popitem(last=False)[0])

    def forget(self, replica: Replica) -> None:
        """A replica is gone."""
        for block in self._held.pop(replica, {}):
            self._drop(replica, block)

    def _drop(self, replica: Replica, block: Digest) -> None:
        holders = self._holders[block]
        holders.discard(replica)
        if not holders:
            del self._holders[block]


_NONE: frozenset[Replica] = frozenset()


@dataclass
class Policy:
    """Places requests. Belongs to one event loop.

    request_blocks, session_blocks: see `rvllm.ray.config.Routing`. prefix: whether prompts are looked at.
    """

    request_blocks: int = 4
    session_blocks: int = 16
    prefix: bool = True
    index: PrefixIndex = field(default_factory=PrefixIndex)
    capacity: dict[Replica, int] = field(default_factory=dict)
    # Where a request is on its way to, and since when in seconds, in the order of their placement.
    _on_their_way: dict[Hashable, tuple[Replica, float]] = field(default_factory=dict)
    _placed: dict[Hashable, list[Replica]] = field(default_factory=dict)
    _load: Counter[Replica] = field(default_factory=Counter)

    def rank(
        self,
        blocks: Sequence[Digest],
        prompt_blocks: int,
        replicas: Sequence[Replica],
        session: str | None = None,
        ongoing: Mapping[Replica, int] | None = None,
    ) -> list[tuple[int, Replica]]:
        """(cost, replica), cheapest first, equals in random order.

        prompt_blocks: of the whole prompt, its last part included. ongoing: what each replica says that it
        has, for requests that other routers placed.
        """
        found = self.index.matches(blocks, replicas) if self.prefix else {}
        home = home_of(session, replicas) if session and replicas else None
        costs, said = [], ongoing or {}
        for name in replicas:
            load = max(self._load[name], said.get(name, 0))
            cost = prompt_blocks - found.get(name, 0) + self.request_blocks * load
            costs.append((cost - self.session_blocks * (name == home), random.random(), name))
        costs.sort()
        return [(cost, name) for cost, _, name in costs]

    def place(self, key: Hashable, replica: Replica, blocks: Sequence[Digest], now: float) -> None:
        """A request is on its way to a replica; `confirm` or `withdraw` should follow."""
        self.withdraw(key)
        self._on_their_way[key] = (replica, now)
        self._load[replica] += 1
        if self.prefix:
            room = min(self.capacity.get(replica, CAPACITY), MAX_BLOCKS // len(self._load))
            self.index.add(replica, blocks, room)
        while now - (oldest := next(iter(self._on_their_way.items())))[1][1] > STALE_SECONDS:
            self.withdraw(oldest[0])

    def chosen(self, key: Hashable) -> Replica | None:
        """Where a request is on its way to."""
        return self._on_their_way.get(key, (None,))[0]

    def withdraw(self, key: Hashable) -> None:
        """A request that was on its way does not go there."""
        replica = self._on_their_way.pop(key, (None,))[0]
        if replica is not None:
            self._load[replica] -= 1

    def confirm(self, key: Hashable, request: Hashable) -> None:
        """The replica has taken a request, which is called `request` from now on; names may be shared."""
        replica = self._on_their_way.pop(key, (None,))[0]
        if replica is not None:
            self._placed.setdefault(request, []).append(replica)

    def end(self, request: Hashable, replica: Replica) -> None:
        """One request of this name has ended at this replica."""
        placed = self._placed.get(request, [])
        if replica in placed:
            placed.remove(replica)
            self._load[replica] -= 1
        if not placed:
            self._placed.pop(request, None)

    def keep(self, replicas: Iterable[Replica]) -> None:
        """Forgets all replicas but these."""
        stay = set(replicas)
        for name in {*self._load, *self.capacity} - stay:
            self.index.forget(name)
            self._load.pop(name, None)
            self.capacity.pop(name, None)
        for key in [key for key, (replica, _) in self._on_their_way.items() if replica not in stay]:
            del self._on_their_way[key]
        for request, placed in list(self._placed.items()):
            placed[:] = [replica for replica in placed if replica in stay]
            if not placed:
                del self._placed[request]

    def load(self, replica: Replica) -> int:
        """Requests that this router has at a replica."""
        return self._load[replica]

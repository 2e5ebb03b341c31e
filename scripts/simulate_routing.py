"""Routing for 8 to 1,000 replicas by measured service times: `python scripts/simulate_routing.py [--quick]`.

Each replica is a fluid model of one engine, step by step where prompts are computed, in jumps where it only
decodes. The policy is the server's own (`rvllm.ray.routing`), the traffic made up. Assumptions:

- Service times of Qwen2.5-7B on one H200 (docs/performance/gpu.md): 47,000 prompt tokens a second, at
  most 8,192 a step and 2,048 beside decoding sequences, as the server's defaults are; a decode step as the
  table there for 1 to 512 sequences of short context, linear between, and 18 ns more for each token of
  context (32 sequences of 1,024 and of 4,160: 4.45 and 6.29 ms).
- 60,000 KV blocks a replica (an 80 GB card), the least recently used forgotten first; blocks of an answer
  stay too.
- Conversations of 1 to 8 turns: one of 200 system prompts of 256 to 2,048 tokens (Zipf, exponent 1), 50
  to 600 new tokens a turn, answers of 20 to 400 tokens, 2 to 20 s from an answer to the next turn.
  Poisson arrivals, the same rate a replica at each size.
- Front ends (one a 64 replicas) share nothing: each knows where it sent what, and of other requests how
  many each replica has, as Ray's replicas tell. A conversation comes to any of them.
- Routing itself, the network and the HTTP front take no time here.
"""

from __future__ import annotations

import argparse
import heapq
import itertools
import random
import sys
import time
from bisect import bisect_left
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1] / "src"))

from rvllm.ray.routing import Policy, PrefixIndex

BLOCK = 16
CAPACITY = 60_000  # blocks of a replica
PREFILL = 47_000.0  # tokens a second
CHUNK, MIXED = 8_192, 2_048  # prompt tokens a step, and of one that decodes too
STEPS = [(1, 3.69), (8, 3.75), (32, 3.87), (64, 4.19), (96, 4.56), (128, 5.11), (256, 7.68), (512, 14.1)]
CONTEXT = 18e-9  # seconds a step and token that attention reads
REPLICAS_A_FRONT = 64


def decode_seconds(sequences: int, context: int) -> float:
    """Of a step with so many sequences, and so many tokens in front of them all together."""
    if sequences <= 1:
        return STEPS[0][1] / 1000 + CONTEXT * context
    at = min(bisect_left([n for n, _ in STEPS], sequences), len(STEPS) - 1)
    (low, a), (high, b) = STEPS[at - 1], STEPS[at]
    return (a + (b - a) * (sequences - low) / (high - low)) / 1000 + CONTEXT * context


@dataclass
class Request:
    """A turn; blocks: names of its prompt's full blocks, answer: those that its answer fills."""

    number: int
    session: int
    turn: int
    arrival: float
    prompt: int  # tokens
    output: int
    blocks: list[Any]
    replica: str = ""
    left: int = 0  # prompt tokens to compute
    hit: int = 0
    first: float = 0.0
    ended: float = 0.0


@dataclass
class Replica:
    """An engine; now: until when it has been computed."""

    name: str
    now: float = 0.0
    prefills: deque[Request] = field(default_factory=deque)
    decoding: list[tuple[int, int, Request]] = field(
        default_factory=list
    )  # (step of the end, number, request)
    step: int = 0
    context: int = 0  # tokens of those that decode, half of each answer included
    computed: int = 0  # prompt tokens

    @property
    def load(self) -> int:
        """Requests that it has."""
        return len(self.prefills) + len(self.decoding)

    @property
    def budget(self) -> int:
        """Prompt tokens of the next step."""
        return MIXED if self.decoding else CHUNK

    @property
    def decode_seconds(self) -> float:
        """What the sequences that decode add to a step."""
        return decode_seconds(len(self.decoding), self.context)

    def next_end(self) -> float | None:
        """When something next happens here, if nothing comes."""
        if self.prefills:
            tokens = min(self.budget, sum(r.left for r in itertools.islice(self.prefills, 64)))
            return self.now + tokens / PREFILL + self.decode_seconds
        if self.decoding:
            return self.now + (self.decoding[0][0] - self.step) * self.decode_seconds
        return None

    def advance(self, to: float) -> list[Request]:
        """Computes up to `to`, whole steps only; returns what has ended."""
        ended: list[Request] = []
        while (end := self.next_end()) is not None and end <= to:
            if self.prefills:
                budget = self.budget
                while self.prefills and budget:
                    first = self.prefills[0]
                    took = min(budget, first.left)
                    first.left -= took
                    budget -= took
                    self.computed += took
                    if first.left:
                        break
                    self.prefills.popleft()
                    first.first = end
                    self.context += first.prompt + first.output // 2
                    heapq.heappush(self.decoding, (self.step + first.output, first.number, first))
                self.step += 1
            else:
                self.step = self.decoding[0][0]
            self.now = end
            while self.decoding and self.decoding[0][0] <= self.step:
                done = heapq.heappop(self.decoding)[2]
                done.ended = end
                self.context -= done.prompt + done.output // 2
                ended.append(done)
        if self.decoding and not self.prefills:  # part of the way to the next end
            seconds = self.decode_seconds
            steps = int((to - self.now) / seconds)
            self.step += steps
            self.now += steps * seconds
        elif not self.load:
            self.now = max(self.now, to)
        return ended


class Traffic:
    """Conversations; a turn follows its predecessor's end."""

    def __init__(self, rate: float, total: int, seed: int) -> None:
        """rate: new conversations a second; total: requests in all."""
        self.rng = random.Random(seed)
        self.rate, self.total, self.made = rate, total, itertools.count()
        self.sessions = itertools.count()
        self.templates = [self.rng.randrange(256, 2049) for _ in range(200)]
        self.weights = [1 / rank for rank in range(1, 201)]
        self.turns_left: dict[int, int] = {}

    def opening(self, now: float) -> tuple[float, Request]:
        """(when the next conversation begins, its first turn)."""
        session = next(self.sessions)
        template = self.rng.choices(range(200), self.weights)[0]
        self.turns_left[session] = self.rng.randrange(1, 9) - 1
        shared = [("t", template, i) for i in range(self.templates[template] // BLOCK)]
        tokens = self.templates[template] + self.rng.randrange(50, 601)
        when = now + self.rng.expovariate(self.rate)
        return when, self._request(session, 0, when, tokens, shared)

    def following(self, done: Request) -> Request | None:
        """The turn after one that has ended, if there is one."""
        if not self.turns_left[done.session]:
            del self.turns_left[done.session]
            return None
        self.turns_left[done.session] -= 1
        tokens = done.prompt + done.output + self.rng.randrange(50, 601)
        when = done.ended + self.rng.uniform(2, 20)
        return self._request(done.session, done.turn + 1, when, tokens, done.blocks)

    def _request(self, session: int, turn: int, when: float, tokens: int, known: list[Any]) -> Request:
        full = (tokens - 1) // BLOCK
        blocks = known + [("s", session, i) for i in range(len(known), full)]
        return Request(next(self.made), session, turn, when, tokens, self.rng.randrange(20, 401), blocks)


Choose = Callable[[Request, list[Replica], float], str]


def random_choice(rng: random.Random) -> Choose:
    """Any replica."""
    return lambda request, replicas, now: rng.choice(replicas).name


def two_choices(rng: random.Random) -> Choose:
    """Ray's default: the shorter queue of two."""

    def choose(request: Request, replicas: list[Replica], now: float) -> str:
        return min(rng.sample(replicas, 2), key=lambda replica: replica.load).name

    return choose


def by_session(rng: random.Random) -> Choose:
    """A conversation keeps to one replica, whatever its queue."""
    return lambda request, replicas, now: replicas[hash((request.session, 7)) % len(replicas)].name


class Fronts:
    """The server's own policy, in as many front ends as there would be."""

    def __init__(self, rng: random.Random, replicas: int, sessions: bool, **settings: Any) -> None:
        count = max(1, -(-replicas // REPLICAS_A_FRONT))
        self.policies = [Policy(**settings) for _ in range(count)]
        for policy in self.policies:
            policy.capacity = {f"r{i}": CAPACITY for i in range(replicas)}
        self.rng, self.sessions, self.seconds, self.asked = rng, sessions, 0.0, 0

    def __call__(self, request: Request, replicas: list[Replica], now: float) -> str:
        """Places a request."""
        policy = self.rng.choice(self.policies)
        blocks, count = request.blocks, -(-request.prompt // BLOCK)
        session = str(request.session) if self.sessions else None
        began = time.process_time()
        ongoing = {replica.name: replica.load for replica in replicas}
        name = policy.rank(blocks, count, [r.name for r in replicas], session, ongoing)[0][1]
        policy.place(request.number, name, blocks, now)
        policy.confirm(request.number, request.number)
        self.seconds += time.process_time() - began
        self.asked += 1
        return name

    def ended(self, request: Request) -> None:
        """A request has left its replica; the front end that placed it hears of it."""
        for policy in self.policies:
            policy.end(request.number, request.replica)


def simulate(choose: Any, replicas: int, rate: float, total: int, seed: int = 1) -> list[Request]:
    """All requests of a run, ended."""
    fleet = [Replica(f"r{i}") for i in range(replicas)]
    by_name = {replica.name: replica for replica in fleet}
    traffic, truth = Traffic(rate, total, seed), PrefixIndex()
    waiting: list[tuple[float, int, str, Any]] = []
    order = itertools.count()

    def wake(replica: Replica) -> None:
        if (end := replica.next_end()) is not None:
            heapq.heappush(waiting, (end, next(order), "replica", replica))

    when, request = traffic.opening(0.0)
    heapq.heappush(waiting, (when, next(order), "opening", request))
    done: list[Request] = []
    placed = 0
    while waiting:
        now, _, kind, what = heapq.heappop(waiting)
        if kind == "replica":
            for one in what.advance(now):
                done.append(one)
                if hasattr(choose, "ended"):
                    choose.ended(one)
                answer = [
                    ("s", one.session, i) for i in range(len(one.blocks), (one.prompt + one.output) // BLOCK)
                ]
                truth.add(one.replica, [*one.blocks, *answer], CAPACITY)
                if placed < total and (turn := traffic.following(one)) is not None:
                    heapq.heappush(waiting, (turn.arrival, next(order), "turn", turn))
            if not waiting or what.next_end() is not None:
                wake(what)
            continue
        if placed >= total:
            continue
        placed += 1
        what.replica = choose(what, fleet, now)
        replica = by_name[what.replica]
        replica.advance(now)
        held = truth.matches(what.blocks, [replica.name]).get(replica.name, 0)
        what.hit = held * BLOCK
        what.left = what.prompt - what.hit
        truth.add(replica.name, what.blocks, CAPACITY)
        replica.prefills.append(what)
        wake(replica)
        if kind == "opening":
            when, request = traffic.opening(now)
            heapq.heappush(waiting, (when, next(order), "opening", request))
    return done


def row(name: str, done: list[Request]) -> str:
    """A line of the table."""
    settled = sorted(done, key=lambda r: r.number)[len(done) // 5 :]  # the first fifth fills the caches
    first = sorted(r.first - r.arrival for r in settled)
    between = sorted((r.ended - r.first) / max(1, r.output - 1) for r in settled)
    counts: dict[str, int] = {}
    for r in settled:
        counts[r.replica] = counts.get(r.replica, 0) + r.prompt - r.hit
    mean = sum(counts.values()) / len(counts)
    hit = sum(r.hit for r in settled) / sum(r.prompt for r in settled)

    def at(values: list[float], share: float) -> float:
        return values[min(len(values) - 1, int(share * len(values)))] * 1000

    return (
        f"| {name} | {hit:.1%} | {at(first, 0.5):,.0f} | {at(first, 0.95):,.0f} | {at(first, 0.99):,.0f} | "
        f"{at(between, 0.5):.1f} | {at(between, 0.99):.1f} | {max(counts.values()) / mean:.2f} |"
    )


def variants(replicas: int) -> Iterator[tuple[str, Any]]:
    """(name, how it chooses)."""
    rng = random.Random(9)
    if replicas < 200:  # the larger ones take long enough
        yield "any replica", random_choice(rng)
        yield "queues alone", Fronts(rng, replicas, False, prefix=False)
    yield "shorter of two queues (Ray's default)", two_choices(rng)
    yield "by session", by_session(rng)
    yield "prefix", Fronts(rng, replicas, False)
    yield "prefix and session", Fronts(rng, replicas, True)


def main() -> None:
    """Prints a table for each size."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--sizes", default="8,64,256,1000")
    parser.add_argument("--requests", type=int, default=40, help="a replica")
    parser.add_argument("--most", type=int, default=24_000, help="requests in all, at most")
    parser.add_argument("--rate", type=float, default=2.5, help="conversations a second and replica")
    parser.add_argument("--quick", action="store_true", help="8 replicas only")
    args = parser.parse_args()
    for size in [8] if args.quick else [int(word) for word in args.sizes.split(",")]:
        total = min(args.most, max(4000, size * args.requests))
        print(f"\n{size} replicas, {args.rate * size:,.0f} conversations a second, {total:,} requests\n")
        print("| routed by | hits | TTFT p50 ms | p95 | p99 | ITL p50 ms | p99 | most over mean work |")
        print("| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: |")
        for name, choose in variants(size):
            print(row(name, simulate(choose, size, args.rate * size, total)), flush=True)
            if isinstance(choose, Fronts) and choose.sessions:
                print(f"\nA choice takes {choose.seconds / choose.asked * 1e6:,.0f} us of Python.")


if __name__ == "__main__":
    main()

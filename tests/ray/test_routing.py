"""Where requests go, by a model of the caches that is kept beside the router's own."""

from __future__ import annotations

import random

import pytest

from rvllm.engine.blocks import BlockManager
from rvllm.ray import routing
from rvllm.ray.routing import STALE_SECONDS, Policy, PrefixIndex, digests, home_of

BLOCK = 16


def prompt(seed: int, length: int) -> list[int]:
    rng = random.Random(seed)
    return [rng.randrange(1000) for _ in range(length)]


def send(
    policy: Policy, name: str, tokens: list[int], replicas: list[str], session: str | None = None
) -> str:
    """Places and confirms a request as the router does; returns its replica."""
    blocks, count = digests(tokens, BLOCK), -(-len(tokens) // BLOCK)
    chosen = policy.rank(blocks, count, replicas, session)[0][1]
    policy.place(("way", name), chosen, blocks, 0.0)
    policy.confirm(("way", name), name)
    return chosen


def policy_held(policy: Policy) -> int:
    return sum(map(len, policy.index._held.values()))


def test_hashes_are_those_of_the_engine() -> None:
    from rvllm.engine.ipc.messages import Generate, Sampling
    from rvllm.engine.sequence import Sequence

    for length in (1, 15, 16, 17, 32, 33, 100):
        tokens = prompt(length, length)
        seq = Sequence(Generate("a", tokens, Sampling()), 1000, BLOCK)
        assert digests(tokens, BLOCK) == seq.digest_chain((length - 1) // BLOCK)


def test_the_index_is_a_set_of_least_recently_used_blocks() -> None:
    """Against the plain definition: a list of blocks by last use for each replica."""
    rng = random.Random(3)
    chains = [digests(prompt(seed, 120), BLOCK) for seed in range(6)]
    index, capacity = PrefixIndex(), 12
    model: dict[str, list[bytes]] = {"a": [], "b": [], "c": []}
    for _ in range(300):
        name, blocks = rng.choice("abc"), rng.choice(chains)[: rng.randrange(1, 8)]
        if rng.random() < 0.05:
            index.forget(name)
            model[name] = []
            continue
        index.add(name, blocks, capacity)
        for block in reversed(blocks):
            model[name] = [b for b in model[name] if b != block] + [block]
        model[name] = model[name][-capacity:]
        asked = rng.choice(chains)
        expected = {}
        for replica, held in model.items():
            count = next((i for i, b in enumerate(asked) if b not in held), len(asked))
            if count:
                expected[replica] = count
        assert index.matches(asked, model) == expected


def test_what_is_remembered_of_all_replicas_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    """One replica may fill the bound; when others come, it gives room in steps and not at once."""
    monkeypatch.setattr(routing, "MAX_BLOCKS", 3000)
    policy, held, drops = Policy(), policy_held, list[int]()
    for number in range(700):
        name = "abc"[number % 3 if number > 350 else 0]
        blocks, before = digests(prompt(number, 161), BLOCK), held(policy)
        policy.place(number, name, blocks, 0.0)
        policy.confirm(number, number)
        drops.append(before + len(blocks) - held(policy))
        if number == 350:
            assert held(policy) == 3000
    assert 2900 <= held(policy) <= 3000 and max(drops) <= 2 * 10 + 100


def test_a_known_prefix_draws_its_requests_and_new_ones_spread() -> None:
    policy, replicas = Policy(), list("abcd")
    homes = {seed: send(policy, f"first {seed}", prompt(seed, 800), replicas) for seed in range(4)}
    assert sorted(homes.values()) == replicas
    for seed, home in homes.items():
        policy.end(f"first {seed}", home)
    for seed, home in homes.items():
        for turn in range(3):
            longer = prompt(seed, 800) + prompt(100 * seed + turn, 40)
            assert send(policy, f"{seed} {turn}", longer, replicas) == home
            policy.end(f"{seed} {turn}", home)


def test_a_short_shared_prefix_does_not_draw_everything_to_one_replica() -> None:
    policy, replicas = Policy(), list("abcd")
    template = prompt(1, 3 * BLOCK)
    counts = dict.fromkeys(replicas, 0)
    for i in range(100):  # all alive at once
        counts[send(policy, f"r{i}", template + prompt(1000 + i, 200), replicas)] += 1
    assert max(counts.values()) - min(counts.values()) <= 2


def test_a_queue_outweighs_a_long_prefix_at_last() -> None:
    policy, replicas = Policy(), ["a", "b"]
    home = send(policy, "first", prompt(7, 640), replicas)
    other = "b" if home == "a" else "a"
    seen = [send(policy, f"r{i}", prompt(7, 640), replicas) for i in range(30)]
    assert seen[:5] == [home] * 5
    assert other in seen


def test_a_session_stays_and_moves_only_when_its_replica_goes() -> None:
    replicas = [f"replica {i}" for i in range(10)]
    homes = {f"s{i}": home_of(f"s{i}", replicas) for i in range(1000)}
    fewer = [name for name in replicas if name != "replica 3"]
    moved = sum(home_of(session, fewer) != home for session, home in homes.items())
    assert moved == sum(home == "replica 3" for home in homes.values())
    assert 50 < moved < 150
    policy = Policy()
    for i in range(20):
        assert send(policy, f"r{i}", prompt(i, 40), replicas, "s1") == homes["s1"]
        policy.end(f"r{i}", homes["s1"])


def test_books_balance_whatever_order_ends_come_in() -> None:
    rng = random.Random(11)
    policy, replicas, alive = Policy(), list("abc"), []
    for i in range(400):
        name = f"r{i // 2}"  # the choices of one request share its name
        alive.append((name, send(policy, name, prompt(rng.randrange(9), rng.randrange(1, 300)), replicas)))
        while alive and rng.random() < 0.5:
            policy.end(*alive.pop(rng.randrange(len(alive))))
    for name, replica in alive:
        policy.end(name, replica)
    assert [policy.load(name) for name in replicas] == [0, 0, 0]
    policy.end("never heard of", "a")
    assert policy.load("a") == 0


def test_what_was_never_taken_is_forgotten() -> None:
    policy = Policy()
    policy.place("a", "x", [], 0.0)
    policy.place("a", "y", [], 1.0)  # the second choice
    assert (policy.load("x"), policy.load("y")) == (0, 1)
    policy.place("b", "x", [], 1.1 + STALE_SECONDS)
    assert policy.load("y") == 0
    policy.withdraw("b")
    assert policy.load("x") == 0


def test_a_replica_that_went_leaves_nothing_behind() -> None:
    policy = Policy()
    home = send(policy, "r", prompt(1, 200), ["a", "b"])
    other = "b" if home == "a" else "a"
    policy.place("on its way", home, [], 0.0)
    policy.capacity[home] = 50
    policy.keep([other])
    assert policy.load(home) == 0
    assert policy.index.matches(digests(prompt(1, 200), BLOCK), ["a", "b"]) == {}
    policy.end("r", home)
    assert policy.load(home) == 0


def test_requests_of_other_routers_count() -> None:
    policy = Policy()
    assert policy.rank([], 4, ["a", "b"], None, {"a": 3})[0][1] == "b"


@pytest.mark.parametrize("capacity", [40, 200])
def test_what_the_router_believes_is_what_the_engine_holds(capacity: int) -> None:
    """The engine's own prefix cache, fed with the same prompts one by one, holds what is believed."""
    policy, cache = Policy(), BlockManager(capacity, BLOCK)
    policy.capacity["a"] = capacity
    rng = random.Random(5)
    believed = held = 0
    for i in range(200):
        tokens = prompt(rng.randrange(8), 100) + prompt(1000 + i, 30)
        blocks = digests(tokens, BLOCK)
        believed += policy.index.matches(blocks, ["a"]).get("a", 0)
        shared = cache.find(blocks)
        held += len(shared)
        cache.share(shared, blocks)
        taken = cache.take(len(blocks) + 1 - len(shared))
        for block, digest in zip(taken, blocks[len(shared) :], strict=False):
            cache.publish(block, digest)
        cache.release([*shared, *taken])
        send(policy, f"r{i}", tokens, ["a"])
        policy.end(f"r{i}", "a")
    assert abs(believed - held) <= 0.05 * held


def test_what_replicas_say_they_have_counts_for_other_routers_requests() -> None:
    ranked = Policy().rank([], 1, ["busy", "idle"], ongoing={"busy": 3, "idle": 0})
    assert [name for _, name in ranked] == ["idle", "busy"] and ranked[0][0] < ranked[1][0]

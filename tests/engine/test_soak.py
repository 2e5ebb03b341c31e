"""As many seeded scenarios as a test may take; `scripts/soak_scheduler.py` runs them by the million steps."""

from __future__ import annotations

from collections import Counter

import pytest

from rvllm.backends.base import COPY, MOVE_IN, MOVE_OUT, RESTORE, SAVE, Limits
from rvllm.config import EngineConfig
from rvllm.engine.core import EngineCore
from rvllm.engine.ipc.messages import Generate, Sampling
from rvllm.engine.scheduling.cost import PrefillCost
from rvllm.engine.scheduling.host import worth_moving
from support.doubles.engine import PagedDouble, RecurrentDouble, facts
from support.doubles.soak import run


def test_many_lives() -> None:
    moves: Counter[int] = Counter()
    steps = 0
    for seed in range(16):
        try:
            more, moved = run(seed)
        except AssertionError as error:
            raise AssertionError(f"seed {seed}: {error}") from error
        steps += more
        moves += moved
    assert steps > 2_000
    kinds = (MOVE_OUT, MOVE_IN, COPY, SAVE, RESTORE)
    assert min(moves[kind] for kind in kinds) > 10, "the scenarios do what they are for"


def make(blocks: int = 12, host: int = 40, **settings: object) -> EngineCore:
    limits = Limits(4, 64, 1000, 16, blocks, 2, num_cpu_blocks=host, block_move_seconds=1e-6)
    return EngineCore(PagedDouble(limits), facts(1000), EngineConfig(**settings))


def answers(core: EngineCore, jobs: list[tuple[list[int], int]]) -> list[list[int]]:
    for i, (prompt, output) in enumerate(jobs):
        core.add_request(Generate(f"{i}", prompt, Sampling(max_tokens=output, seed=i)))
    found: list[list[int]] = [[] for _ in jobs]
    while core.has_work():
        for out in core.step():
            found[int(out.request_id)] += out.token_ids
    core.scheduler.blocks.check()
    return found


JOBS = [([(i * 7 + k) % 90 for k in range(30 + i)], 60) for i in range(8)]


def test_swap_and_recompute_give_the_same_tokens_and_swap_computes_less() -> None:
    computed, found = {}, []
    for mode, host in (("recompute", 0), ("recompute", 40), ("swap", 40)):
        core = make(host=host, preemption_mode=mode)
        found.append(answers(core, JOBS))
        assert core.counted.preemptions > 2
        assert bool(core.scheduler.blocks.moved_out) is bool(core.scheduler.blocks.moved_in) or mode != "swap"
        computed[mode, host] = core.backend.tokens_computed
    assert found[0] == found[1] == found[2]
    assert computed["swap", 40] < 0.9 * computed["recompute", 0]


def test_an_evicted_prefix_comes_back_from_host_memory() -> None:
    core = make(blocks=8)
    prompt = [1] * 100
    first = answers(core, [(prompt, 2)])
    answers(core, [([2] * 100, 2)])  # takes the blocks
    assert core.scheduler.blocks.host is not None and core.scheduler.blocks.host.used
    before = core.backend.tokens_computed
    assert answers(core, [(prompt, 2)]) == first
    assert core.backend.tokens_computed - before < 24, "96 of its 100 tokens were in host memory"
    stats = core.stats()
    assert (stats.host_hits, stats.cached_prompt_tokens) == (80, 96), "one block was still on the device"
    core.reset_prefix_cache()
    assert not core.scheduler.blocks.host.used and core.stats().blocks_cached == 0


@pytest.mark.parametrize("caching", [True, False])
def test_choices_of_one_prompt_compute_it_once(caching: bool) -> None:
    for copies, computed in ((True, 100 + 3 * 1), (False, 100 + 3 * 4 if caching else 4 * 100)):
        limits = Limits(4, 200, 1000, 16, 64, 2, block_copies=copies)
        core = EngineCore(PagedDouble(limits), facts(1000), EngineConfig(enable_prefix_caching=caching))
        for i in range(4):
            sampling = Sampling(max_tokens=5, seed=i)
            core.add_request(Generate(f"{i}", [k % 90 for k in range(100)], sampling, group="g"))
        while core.has_work():
            core.step()
        assert core.backend.tokens_computed == computed + 4 * 4


def test_a_recurrent_model_goes_on_from_snapshots() -> None:
    limits = Limits(4, 200, 1000, 16, 64, 2, prefix_reuse=False, num_snapshots=4)
    core = EngineCore(RecurrentDouble(limits), facts(1000), EngineConfig())
    system = [k % 90 for k in range(70)]

    def computed(*prompts: list[int]) -> int:
        before = core.backend.tokens_computed
        answers(core, [(prompt, 1) for prompt in prompts])
        return core.backend.tokens_computed - before

    assert computed([*system, 1, 2, 3]) == 73
    assert computed([*system, 1, 2, 3]) == 73 - 64, "the state at the last border of the same prompt"
    assert computed([7, *system]) == 71
    other = [*system, *[5] * 30]
    assert computed(other) == 100 - 64
    assert computed(other, other, other) == 3 * (100 - 96), "three at once, each from its last border"
    fresh = [9] * 50 + system
    assert computed(fresh, fresh) == 120 + 120 - 112, "the second waits for the first one's state"
    assert core.scheduler.snapshots is not None and core.scheduler.snapshots.used == 4
    core.reset_prefix_cache()
    assert computed(fresh) == 120


def test_a_common_beginning_is_kept_once_it_was_seen_twice() -> None:
    limits = Limits(4, 200, 1000, 16, 64, 2, prefix_reuse=False, num_snapshots=8)
    core = EngineCore(RecurrentDouble(limits), facts(1000), EngineConfig())
    system = [k % 90 for k in range(40)]
    computed = []
    for tail in range(1, 5):
        before = core.backend.tokens_computed
        answers(core, [([*system, *[tail] * 60], 1)])
        computed.append(core.backend.tokens_computed - before)
    assert computed == [100, 100, 100 - 32, 100 - 32]


def test_moving_is_weighed_against_computing() -> None:
    cost = PrefillCost()
    assert worth_moving("auto", 16, 1.0, cost), "nothing was measured yet"
    cost.measured(0.1, 0, 100)
    assert worth_moving("auto", 16, 0.007, cost) and not worth_moving("auto", 16, 0.009, cost)
    assert worth_moving("swap", 16, 1.0, cost) and not worth_moving("recompute", 16, 0.0, cost)

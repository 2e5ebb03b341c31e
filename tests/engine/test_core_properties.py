"""Random lives of requests on a backend whose tokens show any mistake in the books (see double.py)."""

from __future__ import annotations

from collections import Counter
from random import Random

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from rvllm.backends.base import Limits
from rvllm.config import EngineConfig
from rvllm.engine.core import EngineCore
from rvllm.engine.ipc.messages import Generate, Sampling
from support.doubles.engine import VOCAB, PagedDouble, facts, row_logprobs
from support.doubles.lives import MAX_LEN, Plan, Received, alone, check_books, take

FEW = st.sampled_from(range(4))
PREFIX = tuple((i * 7 + 3) % VOCAB for i in range(80))


@st.composite
def plans(draw: st.DrawFn) -> Plan:
    shared = draw(st.integers(0, 70))
    prompt = PREFIX[:shared] + tuple(draw(st.lists(st.integers(0, VOCAB - 1), max_size=25)))
    stops = tuple(draw(st.sets(st.integers(0, VOCAB - 1), max_size=12)))
    at = draw(st.integers(0, 30))
    return Plan(
        at=at,
        prompt=prompt or (5,),
        max_tokens=draw(st.integers(1, 40)),
        seed=draw(FEW),
        stops=stops,
        min_tokens=draw(st.sampled_from([0, 0, 3, 10])),
        priority=draw(st.sampled_from([0, 0, 0, 1, 5])),
        prompt_logprobs=draw(st.sampled_from([None, None, None, 0, 2])),
        logprobs=draw(st.sampled_from([None, None, 0, 3])),
        cancel_at=draw(st.one_of(st.none(), st.none(), st.integers(at, 60))),
    )


LIMITS = st.builds(
    Limits,
    max_num_seqs=st.integers(1, 6),
    max_num_batched_tokens=st.sampled_from([1, 2, 3, 7, 16, 40, 200]),
    max_model_len=st.just(MAX_LEN),
    block_size=st.sampled_from([4, 16]),
    num_blocks=st.integers(7, 40),
    pipeline_depth=st.sampled_from([1, 2, 2, 3]),
)


def request(index: int, plan: Plan) -> Generate:
    sampling = Sampling(
        seed=plan.seed,
        stop_token_ids=plan.stops,
        min_tokens=plan.min_tokens,
        max_tokens=plan.max_tokens,
        logprobs=plan.logprobs,
        prompt_logprobs=plan.prompt_logprobs,
    )
    return Generate(f"r{index}", list(plan.prompt), sampling, plan.priority, arrival=1.0)


def drive(core: EngineCore, scenario: list[Plan]) -> dict[int, Received]:
    """Runs a scenario to its end, checking the books after every step."""
    received = {i: Received() for i in range(len(scenario))}
    last_event = max(max(plan.at, plan.cancel_at or 0) for plan in scenario)
    step = 0
    while step <= last_event or core.has_work():
        for i, plan in enumerate(scenario):
            if plan.at == step:
                core.add_request(request(i, plan))
            if plan.cancel_at == step:
                core.abort([f"r{i}", "unknown"])
        take(core.step(), received, step)
        for i, plan in enumerate(scenario):
            assert plan.cancel_at != step or received[i].finish, "a cancellation takes one step"
        core.scheduler.blocks.check()
        check_books(core)
        step += 1
        assert step < 20_000, "starved or stuck"
    assert core.step() == []
    return received


def check_all(core: EngineCore, scenario: list[Plan], received: dict[int, Received]) -> None:
    limit = core.ready.limits.max_model_len
    for i, plan in enumerate(scenario):
        got = received[i]
        assert len(got.finish) == 1, "every request ends exactly once"
        reason, stop = got.finish[0]
        if len(plan.prompt) >= limit:
            assert reason == "error"
            continue
        tokens, expected, stop_token = alone(plan, limit)
        if reason == "abort":
            assert plan.cancel_at is not None
            assert got.tokens == tokens[: len(got.tokens)]
            continue
        assert (got.tokens, reason, stop) == (tokens, expected, stop_token)
        history = list(plan.prompt) + tokens
        if plan.logprobs is not None:
            for n, entry in enumerate(got.logprobs):
                row = row_logprobs(history[: len(plan.prompt) + n], tokens[n], plan.logprobs)
                assert (entry.token_id, entry.logprob, entry.rank) == (tokens[n], row.logprob, row.rank)
            assert len(got.logprobs) == len(tokens)
        if plan.prompt_logprobs is not None:
            assert got.prompt_logprobs is not None
            assert [e.token_id for e in got.prompt_logprobs] == list(plan.prompt[1:])
            assert [e.logprob for e in got.prompt_logprobs] == [
                row_logprobs(plan.prompt[:p], plan.prompt[p], 0).logprob for p in range(1, len(plan.prompt))
            ]
            assert all(len(e.top_ids) == plan.prompt_logprobs for e in got.prompt_logprobs)
    stats = core.stats()
    assert (stats.running, stats.waiting, stats.blocks_used) == (0, 0, 0)
    assert core.scheduler.blocks.available == stats.blocks_total
    assert sum(stats.finished.values()) == len(scenario)
    assert stats.generation_tokens == sum(len(r.tokens) for r in received.values())
    assert stats.cached_prompt_tokens <= stats.prefix_queries
    # No more slots than a step has tokens: decodes would keep prompts from running for ever.
    limits = core.scheduler.limits
    slots = min(limits.max_num_seqs, limits.max_num_batched_tokens)
    assert sorted(core.scheduler._free_slots) == list(range(slots))


@settings(max_examples=80, deadline=None, suppress_health_check=list(HealthCheck))
@given(LIMITS, st.lists(plans(), min_size=1, max_size=14), st.booleans())
def test_requests_live_right(limits: Limits, scenario: list[Plan], caching: bool) -> None:
    core = EngineCore(PagedDouble(limits), facts(MAX_LEN), EngineConfig(enable_prefix_caching=caching))
    check_all(core, scenario, drive(core, scenario))


def crowd(random: Random) -> list[Plan]:
    """Up to 40 requests with common prefixes; hypothesis prefers small cases, this one does not."""
    scenario = []
    for _ in range(random.randint(1, 40)):
        prefix = PREFIX[: random.choice([0, 0, 20, 35, 50, 70])]
        at = random.randint(0, 60)
        scenario.append(
            Plan(
                at=at,
                prompt=(*prefix, *random.choices(range(VOCAB), k=random.choice([0, 1, 5, 30]))) or (5,),
                max_tokens=random.randint(1, 60),
                seed=random.randrange(3),
                stops=tuple(random.sample(range(VOCAB), random.choice([0, 0, 3, 12]))),
                min_tokens=random.choice([0, 0, 3, 10]),
                priority=random.choice([0, 0, 0, 1, 5]),
                prompt_logprobs=random.choice([None, None, None, None, 0, 2]),
                logprobs=random.choice([None, None, 3]),
                cancel_at=random.choice([None, None, None, at + random.randint(0, 40)]),
            )
        )
    return scenario


def test_crowds_live_right() -> None:
    pressure: Counter[str] = Counter()
    for seed in range(60):
        random = Random(seed)
        limits = Limits(
            max_num_seqs=random.randint(1, 8),
            max_num_batched_tokens=random.choice([1, 2, 3, 7, 16, 40, 200]),
            max_model_len=MAX_LEN,
            block_size=random.choice([4, 16]),
            num_blocks=random.randint(7, 40),
            pipeline_depth=random.choice([1, 2, 3]),
        )
        scenario = crowd(random)
        caching = EngineConfig(enable_prefix_caching=random.random() < 0.8)
        core = EngineCore(PagedDouble(limits), facts(MAX_LEN), caching)
        check_all(core, scenario, drive(core, scenario))
        stats = core.stats()
        pressure.update(preemptions=stats.preemptions, hits=stats.cached_prompt_tokens, **stats.finished)
    # The scenarios must really bring the engine into trouble, or the test says nothing.
    assert pressure["preemptions"] > 40 and pressure["hits"] > 2000
    assert min(pressure[reason] for reason in ("stop", "length", "abort", "error")) > 40

"""Random lives of the whole scheduler: policies, clients, groups, both pools, cancellations, pressure, sleep.

A scenario is all that `Random(seed)` says. `run(seed)` drives it on the double whose tokens show any mistake
in the books, and checks after every plan and every step what must always hold. `scripts/soak_scheduler.py`
runs millions of steps of it, `test_soak.py` as many as a test may take.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Sequence as Seq
from dataclasses import replace
from random import Random

import numpy as np

from rvllm.backends.base import COPY, MOVE_IN, MOVE_OUT, Limits, StepBatch, StepResult
from rvllm.config import EngineConfig
from rvllm.engine.core import EngineCore
from rvllm.engine.ipc.messages import Generate, Sampling
from rvllm.engine.sequence import Sequence
from rvllm.engine.step import Step
from support.doubles.engine import VOCAB, RecurrentDouble, SleepingDouble, facts
from support.doubles.lives import MAX_LEN, Plan, Received, alone, check_books, take

SYSTEM = [tuple((i * k + 3) % VOCAB for i in range(80)) for k in (5, 7)]


class SoakDouble(SleepingDouble):
    """Counts moves, and takes a made-up time for each step."""

    def __init__(self, limits: Limits, token_seconds: float) -> None:
        super().__init__(limits)
        self.token_seconds = token_seconds
        self.moves: Counter[int] = Counter()
        self.late_copies = False  # on the device, behind those between the tiers, as a GPU makes them

    def _move(self, batch: StepBatch) -> None:
        copies = batch.moves[:, 0] == COPY
        if self.late_copies and copies.any():
            batch = replace(batch, moves=np.concatenate((batch.moves[~copies], batch.moves[copies])))
        super()._move(batch)

    def launch(self, batch: StepBatch) -> StepResult:
        result = super().launch(batch)
        self.moves.update(batch.moves[:, 0].tolist())
        result.device_seconds = 1e-3 + self.token_seconds * (batch.num_tokens - len(batch.slots))
        return result


class RecurrentSoakDouble(SoakDouble, RecurrentDouble):
    """The same with states that a slot carries."""

    def drop_caches(self, kept: Seq[int] = ()) -> bool:
        if not kept:
            self.states = [None] * len(self.states)
        return super().drop_caches(kept)


def with_states(limits: Limits, random: Random) -> Limits:
    """The limits of a model with recurrent layers, which keeps so many snapshots."""
    return replace(
        limits,
        num_cpu_blocks=0,
        block_copies=False,
        prefix_reuse=False,
        num_snapshots=random.choice([0, 1, 3, 9]),
    )


def settings_of(random: Random) -> tuple[Limits, EngineConfig]:
    """What the engine is built for, and its flags."""
    limits = Limits(
        max_num_seqs=random.randint(1, 6),
        max_num_batched_tokens=random.choice([1, 3, 7, 16, 40, 200]),
        max_model_len=MAX_LEN,
        block_size=random.choice([4, 16]),
        num_blocks=random.randint(7, 30),
        pipeline_depth=random.choice([1, 2, 2, 3]),
        num_cpu_blocks=random.choice([0, 1, 3, 12, 60]),
        block_move_seconds=random.choice([1e-6, 1e-3, 1.0]),
        block_copies=random.random() < 0.7,
    )
    limits = replace(limits, max_mixed_tokens=[0, 0, 9, 150][limits.num_blocks % 4])
    config = EngineConfig(
        enable_prefix_caching=random.random() < 0.8,
        scheduling_policy=random.choice(["fcfs", "priority", "sjf"]),
        aging_seconds=random.choice([0.0, 5.0, 60.0]),
        fairness=random.choice(["none", "none", "user"]),
        max_prefill_chunk=random.choice([None, None, 16]),
        max_prefill_delay_ms=random.choice([0.0, 0.0, 2.0]),
        preemption_mode=random.choice(["auto", "swap", "recompute"]),
    )
    return limits, config


def requests_of(random: Random, steps: int) -> list[tuple[Plan, Generate]]:
    """Requests that come within so many steps, most in bursts with a prompt's beginning in common."""
    made: list[tuple[Plan, Generate]] = []
    for number in range(random.randint(1, 24)):
        at = random.choice([0, 0, 5, random.randrange(steps)])
        prompt = random.choice(SYSTEM)[: random.choice([0, 16, 33, 64, 70])]
        prompt += tuple(random.randrange(VOCAB) for _ in range(random.choice([1, 3, 12, 25])))
        plan = Plan(
            at=at,
            prompt=prompt,
            max_tokens=random.randint(1, 40),
            seed=random.randrange(4),
            stops=tuple(random.sample(range(VOCAB), random.choice([0, 0, 10]))),
            min_tokens=random.choice([0, 0, 3]),
            priority=random.choice([0, 0, 0, 1, 5, -2]),
            prompt_logprobs=random.choice([None] * 9 + [1]),
            logprobs=None,
            cancel_at=random.choice([None, None, None, random.randint(at, at + 60)]),
        )
        choices = random.choice([1, 1, 1, 2, 4])
        for index in range(choices):
            one = replace(plan, seed=plan.seed + index)
            sampling = Sampling(
                seed=one.seed,
                stop_token_ids=one.stops,
                min_tokens=one.min_tokens,
                max_tokens=one.max_tokens,
                prompt_logprobs=one.prompt_logprobs,
            )
            made.append((one, Generate(
                f"r{len(made)}", list(prompt), sampling, one.priority, arrival=1.0 + at,
                client=random.choice("abc"), group=f"g{number}" if choices > 1 else "",
            )))  # fmt: skip
    return made


class Watch:
    """Checks each plan of a scheduler the moment it is made."""

    def __init__(self, core: EngineCore) -> None:
        self.scheduler = core.scheduler
        self._schedule = core.scheduler.schedule
        core.scheduler.schedule = self.schedule  # type: ignore[method-assign]

    def schedule(self) -> Step | None:
        scheduler = self.scheduler
        before = set(scheduler.waiting)
        step = self._schedule()
        if step is not None:
            self._order(before)
            self._bounds(step)
        ranks = [seq.rank for seq in scheduler.waiting]
        assert ranks == sorted(ranks) and len(set(ranks)) == len(ranks)
        scheduler.blocks.check()
        if scheduler.snapshots is not None:
            scheduler.snapshots.check(scheduler.running)
        return step

    def _order(self, before: set[Sequence]) -> None:
        """Nobody who could have run was overtaken; where clients have shares, by nobody of the same one."""
        scheduler = self.scheduler
        placed = [seq for seq in scheduler.running if seq in before]
        if not placed:
            return
        for early in scheduler.waiting:
            if early.in_flight or early not in before or self._passed_over(early):
                continue
            for late in placed:
                if scheduler.shares is None or early.client == late.client:
                    assert early.rank > late.rank, "overtaken"

    def _passed_over(self, seq: Sequence) -> bool:
        return self.scheduler._soon_shared(seq, len(self.scheduler._shared(seq)))

    def _bounds(self, step: Step) -> None:
        scheduler, lens = self.scheduler, step.batch.query_lens.tolist()
        assert max(lens) <= scheduler.max_chunk
        if scheduler.max_delay and step.decodes:
            prompts = sum(lens[step.decodes :])
            assert prompts <= max(16, scheduler.cost.tokens(scheduler.max_delay))


def run(seed: int) -> tuple[int, Counter[int]]:
    """Lives one scenario to its end; returns its steps and the moves it made. Raises AssertionError."""
    random = Random(seed)
    limits, config = settings_of(random)
    if not config.enable_prefix_caching:
        limits = replace(limits, num_cpu_blocks=0)
    requests = requests_of(random, 60)
    kind = SoakDouble
    if seed % 4 == 3:
        limits, kind = with_states(limits, random), RecurrentSoakDouble
    backend = kind(limits, random.choice([1e-6, 1e-4]))
    backend.late_copies = seed % 2 == 0
    core = EngineCore(backend, facts(MAX_LEN), config)
    Watch(core)
    received = {i: Received() for i in range(len(requests))}
    coming, leaving = defaultdict[int, list[Generate]](list), defaultdict[int, list[str]](list)
    for plan, request in requests:
        coming[plan.at].append(request)
        if plan.cancel_at is not None:
            leaving[plan.cancel_at].append(request.request_id)
    last = max(*coming, *leaving, 0)
    naps = random.choice([0.0, 0.0, 0.0, 0.03])
    step = wake_at = 0
    while step <= last or core.sleep_level or core.has_work():
        for request in coming.get(step, ()):
            core.add_request(request)
        if step in leaving:
            core.abort(leaving[step])
        if core.sleep_level and step >= wake_at:
            core.wake_up()
        elif naps and random.random() < naps:
            _give_up(core, random)
            wake_at = step + random.randint(0, 6)
        take(core.step(), received, step)
        check_books(core)
        step += 1
        assert step < 20_000, "starved or stuck"
    for i, (plan, _) in enumerate(requests):
        _check_answer(core, plan, received[i])
    _check_end(core)
    return step, backend.moves


def _give_up(core: EngineCore, random: Random) -> None:
    """Forgets prefixes, or sleeps with or without what the blocks hold; in sleep it sleeps on."""
    kind = random.randrange(4)
    if kind < 2:
        core.reset_prefix_cache(running=kind == 1)
        return
    blocks, kept = core.scheduler.blocks, kind == 2 or core.sleep_level > 0
    core.sleep(1, keep_kv=kind == 2)
    assert kept or not (blocks.used or blocks.cached or core.scheduler.running)
    blocks.check()


def _check_answer(core: EngineCore, plan: Plan, got: Received) -> None:
    assert len(got.finish) == 1
    reason, stop = got.finish[0]
    if len(plan.prompt) >= core.ready.limits.max_model_len:
        assert reason == "error"
        return
    tokens, expected, stop_token = alone(plan, core.ready.limits.max_model_len)
    if reason == "abort":
        assert plan.cancel_at is not None and got.tokens == tokens[: len(got.tokens)]
    else:
        assert (got.tokens, reason, stop) == (tokens, expected, stop_token)


def _check_end(core: EngineCore) -> None:
    scheduler, backend = core.scheduler, core.backend
    assert not scheduler.running and not scheduler.waiting and not scheduler.blocks.used
    assert not scheduler._leaders and not scheduler._computing
    assert scheduler.snapshots is None or not scheduler.snapshots._coming
    assert scheduler.shares is None or not scheduler.shares._served
    blocks = scheduler.blocks
    assert backend.moves[MOVE_IN] <= blocks.moved_in and backend.moves[MOVE_OUT] <= blocks.moved_out
    assert backend.limits.block_copies or not backend.moves[COPY]

"""Who is served when: policies, aging, fair shares, bounds on prompts, waits that end."""

from __future__ import annotations

import time
from random import Random

import pytest

from rvllm.backends.base import Limits, StepBatch, StepResult
from rvllm.config import EngineConfig
from rvllm.engine.core import EngineCore
from rvllm.engine.ipc.messages import Generate, Sampling
from rvllm.engine.scheduling.cost import PrefillCost
from rvllm.engine.scheduling.policy import FairShares
from support.doubles.engine import PagedDouble, facts


class Timed(PagedDouble):
    """A step takes 1 ms and 0.1 ms for each token of a prompt; nobody waits for it."""

    def launch(self, batch: StepBatch) -> StepResult:
        result = super().launch(batch)
        prompts = batch.num_tokens - int((batch.query_lens == 1).sum())
        result.device_seconds = 1e-3 + 1e-4 * prompts
        self.batches = [*getattr(self, "batches", []), batch]
        return result


def make(seqs: int = 1, tokens: int = 64, blocks: int = 64, depth: int = 1, **settings: object) -> EngineCore:
    limits = Limits(seqs, tokens, 1000, 16, blocks, depth)
    return EngineCore(Timed(limits), facts(1000), EngineConfig(**settings))


def ask(core: EngineCore, name: str, prompt: int = 4, output: int = 4, **more: object) -> None:
    salt = sum(map(ord, name))
    tokens = [(salt + 7 * i) % 90 for i in range(prompt)]
    core.add_request(Generate(name, tokens, Sampling(max_tokens=output), **more))


def order(core: EngineCore) -> list[str]:
    """Requests in the order in which they ended."""
    done: list[str] = []
    while core.has_work():
        done += [o.request_id for o in core.step() if o.finish_reason]
    return done


def test_fcfs_heeds_no_priority() -> None:
    core = make(scheduling_policy="fcfs")
    for name, priority in (("a", 5), ("b", 0), ("c", -3)):
        ask(core, name, priority=priority)
    assert order(core) == ["a", "b", "c"]


def test_sjf_serves_who_has_fewest_tokens_left() -> None:
    core = make(scheduling_policy="sjf")
    for name, prompt, output in (("long", 60, 30), ("answer", 4, 60), ("short", 4, 4), ("prompt", 50, 4)):
        ask(core, name, prompt, output)
    assert order(core) == ["short", "prompt", "answer", "long"]


@pytest.mark.parametrize(("policy", "worse"), [("priority", {"priority": 1}), ("sjf", {"output": 900})])
def test_waiting_outweighs_in_the_end(policy: str, worse: dict) -> None:
    now = time.time()
    for waited, first in ((50.0, "fresh"), (70.0, "old")):
        core = make(scheduling_policy=policy, aging_seconds=60.0)
        ask(core, "old", arrival=now - waited, **worse)
        ask(core, "fresh", output=4, arrival=now)
        if policy == "sjf":  # 896 tokens more weigh 52.5 s
            assert core.scheduler.waiting[0].request_id == first
        else:
            assert order(core)[0] == first


def test_a_stream_of_better_requests_keeps_nobody_out_for_ever() -> None:
    for aging, served in ((0.0, False), (60.0, True)):
        core = make(aging_seconds=aging)
        ask(core, "patient", priority=10, arrival=1.0)
        ended: list[str] = []
        for second in range(1, 800):
            ask(core, f"{second}", 2, 2, arrival=1.0 + second)
            ended += [o.request_id for _ in range(2) for o in core.step() if o.finish_reason]
        assert ("patient" in ended) is served


def test_clients_get_the_same_whatever_they_ask_for() -> None:
    core = make(seqs=4, fairness="user", blocks=400, tokens=128)
    for i in range(200):
        ask(core, f"flood{i}", 30, 20, client="flood")
    for i in range(20):
        ask(core, f"few{i}", 30, 20, client="few")
    given = {"flood": 0, "few": 0}
    while core.has_work() and any(seq.client == "few" for seq in core._alive.values()):
        for output in core.step():
            given[output.request_id.rstrip("0123456789")] += len(output.token_ids)
    assert 0.8 < given["flood"] / given["few"] < 1.3
    order(core)
    assert not core.scheduler.shares._served and not core.scheduler.shares._alive


def test_nobody_saves_up_turns() -> None:
    shares = FairShares()
    shares.joined("busy")
    shares.charge("busy", 1000)
    shares.joined("new")
    assert shares._served["new"] == 1000, "who comes late is no further behind than the others"
    shares.charge("new", 50)
    shares.left("new")
    shares.joined("new")
    assert shares._served["new"] == 1050, "nor does leaving forgive"
    for i in range(5000):
        shares.joined(f"{i}")
        shares.left(f"{i}")
    assert len(shares._served) < 2000, "who has no requests is forgotten"


def test_a_prompt_takes_no_more_of_a_step_than_its_chunk() -> None:
    core = make(seqs=4, tokens=100, max_prefill_chunk=32, blocks=100)
    ask(core, "a", 90)
    ask(core, "b", 90)
    order(core)
    lens = [b.query_lens.tolist() for b in core.backend.batches]
    assert lens[0] == [32, 32] and max(max(step) for step in lens) == 32


def test_prompts_add_no_more_than_the_bound_to_a_step_with_decodes() -> None:
    core = make(seqs=4, tokens=500, blocks=200, max_prefill_delay_ms=5.0)
    ask(core, "stream", 4, 60)
    for _ in range(5):
        core.step()
    ask(core, "long", 700, 2)
    order(core)
    beside = [
        b.num_tokens - 1 for b in core.backend.batches[5:] if len(b.slots) == 2 and b.query_lens.max() > 1
    ]
    assert beside[0] == PrefillCost.LEAST and sum(beside) == 700
    assert all(0.8 * 50 <= tokens <= 50 for tokens in beside[1:-1]), "5 ms at 0.1 ms a token"
    core = make(seqs=4, tokens=500, blocks=200, max_prefill_delay_ms=5.0)
    ask(core, "long", 700, 2)
    order(core)
    assert core.backend.batches[0].num_tokens == 500, "where nobody decodes nothing is held back"


def test_the_dearest_prompt_token_counts() -> None:
    limit = PrefillCost()
    limit.measured(0.002, 4, 0)
    for tokens, seconds in ((100, 0.004), (100, 0.012), (100, 0.006)):
        limit.measured(seconds, 4, tokens)
    assert limit.tokens(0.010) == 100
    limit.measured(5.0, 4, 1)  # a token alone says nothing
    assert limit.tokens(0.010) == 100
    for _ in range(4):
        limit.measured(0.502, 4, 16)
    assert limit.tokens(0.010) == PrefillCost.LEAST, "prompts go on at any cost"


def test_a_wait_that_is_too_long_ends() -> None:
    core = make(max_queue_seconds=2.0)
    ask(core, "runs", output=900, arrival=time.time())
    core.step()
    ask(core, "waits", arrival=time.time() - 3)
    ask(core, "fresh", arrival=time.time())
    core._looked_at_queue = 0.0
    outputs = {o.request_id: o for o in core.step()}
    assert outputs["waits"].finish_reason == "error" and outputs["waits"].waited_too_long
    assert "--max-queue-seconds" in (outputs["waits"].error or "")
    assert outputs["runs"].finish_reason is None and "fresh" not in outputs


@pytest.mark.parametrize("policy", ["fcfs", "priority", "sjf"])
@pytest.mark.parametrize("fairness", ["none", "user"])
def test_policies_change_no_token(policy: str, fairness: str) -> None:
    random = Random(3)
    jobs = [(f"{i}", random.randrange(1, 60), random.randrange(1, 40)) for i in range(24)]
    found = []
    for shuffled, chunk, delay in ((False, None, 0.0), (True, 16, 2.0)):
        core = make(3, 40, 8, 2, scheduling_policy=policy, fairness=fairness, max_prefill_chunk=chunk,
                    max_prefill_delay_ms=delay)  # fmt: skip
        for name, prompt, output in random.sample(jobs, len(jobs)) if shuffled else jobs:
            ask(core, name, prompt, output, priority=len(name), client=name[-1])
        answers: dict[str, list[int]] = {}
        while core.has_work():
            for out in core.step():
                answers.setdefault(out.request_id, []).extend(out.token_ids)
        core.scheduler.blocks.check()
        assert core.counted.preemptions
        found.append(answers)
    assert found[0] == found[1] and len(found[0]) == 24

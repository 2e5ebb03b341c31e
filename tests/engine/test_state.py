"""The state that people watch: who runs, who holds which blocks, and what it costs to ask."""

from __future__ import annotations

import time

import msgspec

from rvllm.backends.base import Limits
from rvllm.config import EngineConfig
from rvllm.engine.core import EngineCore
from rvllm.engine.ipc.messages import FromEngine, Generate, GetState, Sampling, State
from rvllm.engine.state import complete, snapshot
from rvllm.telemetry.stats import STEP_TOKENS, StepKernel, grouped
from support.doubles.engine import PagedDouble, facts


def core_of(seqs: int = 2) -> EngineCore:
    return EngineCore(PagedDouble(Limits(seqs, 64, 1000, 16, 100, 1)), facts(1000), EngineConfig())


def ask(core: EngineCore, name: str, prompt: list[int], max_tokens: int = 50) -> None:
    core.add_request(Generate(name, prompt, Sampling(max_tokens=max_tokens), arrival=time.time() - 3))


def state(core: EngineCore, **asked: int) -> State:
    return snapshot(core, core.stats(), GetState(**asked))


def test_running_waiting_and_shared_blocks() -> None:
    core = core_of()
    for name in "abc":
        ask(core, name, list(range(40)))
    for _ in range(4):
        core.step()
    seen = state(core)
    assert [(s.request_id, s.running) for s in seen.sequences] == [("a", True), ("b", True), ("c", False)]
    a, b, c = seen.sequences
    assert a.blocks[:2] == b.blocks[:2] and a.blocks[2:] != b.blocks[2:], "equal prefixes share full blocks"
    assert (a.cached_tokens, b.cached_tokens) == (0, 32)
    assert c.blocks == [] and c.computed == 0
    assert a.prompt_tokens == 40 and a.output_tokens >= 1 and a.max_tokens == 50
    assert a.computed >= 40
    assert 3 <= a.age < 60 and 3 <= a.queued <= a.age and c.queued == c.age
    assert len({block for s in seen.sequences for block in s.blocks}) == seen.stats.blocks_used
    assert not seen.cut
    assert [(k.op, k.kernel, k.count) for k in seen.kernels] == [("hash", "blake2b", 2)]
    tokens = a.prompt_tokens + a.output_tokens + b.prompt_tokens + b.output_tokens
    assert seen.floor_seconds == 2 * (tokens // 2) * 1e-6


def test_what_was_cached_is_listed_and_nothing_else_when_idle() -> None:
    core = core_of()
    ask(core, "a", list(range(40)), 1)
    while core.has_work():
        core.step()
    seen = state(core)
    assert seen.sequences == [] and seen.floor_seconds is None
    assert len(seen.cached_blocks) == seen.stats.blocks_cached == 2


def test_the_answer_is_bounded_and_says_so() -> None:
    core = core_of(seqs=3)
    for i, name in enumerate("abcd"):
        ask(core, name, [i] * 60)
    for _ in range(6):
        core.step()
    few = state(core, sequences=2, blocks=5)
    assert [s.request_id for s in few.sequences] == ["a", "b"]
    assert sum(len(s.blocks) for s in few.sequences) + len(few.cached_blocks) == 5
    assert few.cut and not state(core).cut


def test_it_survives_the_wire() -> None:
    core = core_of()
    ask(core, "a", [1, 2, 3])
    core.step()
    seen = state(core)
    assert msgspec.msgpack.decode(msgspec.msgpack.encode(seen), type=FromEngine) == seen


def test_layers_are_counted_together_in_the_order_of_first_use() -> None:
    launches = [
        ("embed", "k0", ""),
        ("layers.0.o", "k1", "x"),
        ("layers.11.o", "k1", "x"),
        ("layers.1.o", "k2", ""),
    ]
    assert grouped(launches) == [
        StepKernel("embed", "k0", 1), StepKernel("o", "k1", 2, "x"), StepKernel("o", "k2", 1)
    ]  # fmt: skip


def test_a_prompts_chunks_come_with_its_first_token() -> None:
    core = core_of()
    ask(core, "a", [i % 90 for i in range(150)], 3)
    outputs, began = [], time.time()
    while core.has_work():
        outputs += core.step()
    first, *later = outputs
    assert first.prefill is not None and [output.prefill for output in later] == [None] * len(later)
    assert [(chunk.step, chunk.tokens) for chunk in first.prefill] == [(0, 64), (1, 64), (2, 22)]
    assert all(began <= c.began <= c.ended <= time.time() for c in first.prefill)


def test_steps_are_counted_by_size_and_compared_with_the_floor() -> None:
    core, began = core_of(), time.perf_counter()
    assert complete(core, core.stats()).floor_ratio is None
    ask(core, "a", [i % 90 for i in range(150)], 40)
    while core.has_work():
        core.step()
    stats = complete(core, core.stats())
    by_bound = dict(zip((*STEP_TOKENS, None), stats.step_counts, strict=True))
    assert (by_bound[1], by_bound[32], by_bound[64]) == (39, 1, 2) and sum(stats.step_counts) == stats.steps
    assert stats.step_tokens == 150 + 39
    # The double's floor is a microsecond for each token of each sequence; no step took longer than all.
    assert stats.floor_ratio is not None and stats.floor_ratio > 39 * 169e-6 / (time.perf_counter() - began)
    assert [k.kernel for k in stats.kernels] == ["blake2b"]

"""Sleep gives memory back, and whoever was served goes on as if nothing had been."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from rvllm.backends.base import Limits
from rvllm.config import EngineConfig
from rvllm.engine.core import EngineCore
from rvllm.engine.ipc.messages import (
    FromEngine,
    Generate,
    Outputs,
    Sampling,
    Shutdown,
    Sleep,
    Slept,
    ToEngine,
)
from rvllm.engine.loop import EngineLoop
from rvllm.errors import UsageError
from support.doubles.engine import PagedDouble, SleepingDouble, facts

LLAMA = {
    "architectures": ["LlamaForCausalLM"], "hidden_size": 64, "intermediate_size": 80, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16, "vocab_size": 160,
    "max_position_embeddings": 4096, "rms_norm_eps": 1e-5, "rope_theta": 10000.0, "hidden_act": "silu",
    "eos_token_id": 2, "bos_token_id": 1, "torch_dtype": "float32", "tie_word_embeddings": False,
}  # fmt: skip


@pytest.fixture
def config(tmp_path: Path) -> EngineConfig:
    (tmp_path / "config.json").write_text(json.dumps(LLAMA))
    return EngineConfig(
        model=str(tmp_path), load_format="dummy", device="cpu", threads=1, num_blocks=900, num_cpu_blocks=20
    )


def ask(core: EngineCore, name: str, length: int, output: int = 12) -> None:
    prompt = [(7 * i + len(name)) % 90 + 3 for i in range(length)]
    core.add_request(Generate(name, prompt, Sampling(max_tokens=output, temperature=1.0, seed=4)))


def finish(core: EngineCore, into: dict[str, list[int]]) -> dict[str, list[int]]:
    while core.has_work():
        step(core, into)
    return into


def step(core: EngineCore, into: dict[str, list[int]]) -> None:
    for output in core.step():
        into.setdefault(output.request_id, []).extend(output.token_ids)


def resident(core: EngineCore) -> int:
    """Bytes of this process in memory."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * 4096


def test_requests_sleep_and_go_on(config: EngineConfig) -> None:
    core = EngineCore.from_config(config)
    for name in ("a", "bb", "ccc"):
        ask(core, name, 40)
    expected = finish(core, {})
    limits = core.backend.limits
    for level in (1, 2, 2, 1):
        got: dict[str, list[int]] = {}
        ask(core, "a", 40)
        ask(core, "bb", 40)
        for _ in range(5):
            step(core, got)
        core.sleep(level)
        assert core.sleep_level == core.stats().sleep_level == level
        assert core.stats().blocks_used == core.stats().blocks_cached == 0
        ask(core, "ccc", 40)
        assert not core.has_work() and core.step() == []
        core.wake_up()
        assert core.sleep_level == 0 and core.backend.limits == limits
        assert finish(core, got) == expected
        core.scheduler.blocks.check()
    core.close()


def test_what_ends_in_sleep_is_told(config: EngineConfig) -> None:
    core = EngineCore.from_config(config)
    ask(core, "a", 40)
    core.step()
    core.sleep(2)
    core.sleep(1)
    assert core.sleep_level == 2, "a lighter sleep changes nothing"
    core.abort(["a"])
    (output,) = core.step()
    assert output.finish_reason == "abort" and not core.has_work()
    core.close()


def test_level_one_gives_up_the_blocks_and_deepens_to_two(config: EngineConfig) -> None:
    core = EngineCore.from_config(config)
    expected: dict[str, list[int]] = {}
    ask(core, "long", 4000)
    finish(core, expected)
    before = resident(core)
    core.sleep(1)
    pool = 250 * 16 * 2 * 2 * 2 * 16 * 4  # blocks, tokens, layers, keys and values, heads, width, bytes
    assert before - resident(core) > 0.8 * pool
    core.sleep(2)
    core.wake_up()
    ask(core, "long", 4000)
    assert finish(core, {}) == expected
    core.close()


@pytest.mark.parametrize("host_blocks", [0, 7])
def test_kept_blocks_are_gone_on_with(host_blocks: int) -> None:
    limits = Limits(3, 64, 1000, 16, 24, 1, num_cpu_blocks=host_blocks)

    def core_and_answers() -> tuple[EngineCore, dict[str, list[int]]]:
        core, got = EngineCore(SleepingDouble(limits), facts(1000), EngineConfig()), dict[str, list[int]]()
        for turn in range(3):  # more prefixes than there is room for: some have moved to host memory
            for name in "abc":
                ask(core, f"{turn}{name * (turn + 1)}", 50 + 31 * turn, 40)
            finish(core, got)
        assert len(got) == 9 and all(len(tokens) == 40 for tokens in got.values())
        return core, got

    core, expected = core_and_answers()
    for name, length in (("x", 100), ("yy", 70)):
        ask(core, name, length, 30)
    finish(core, expected)
    computed = core.stats().prompt_tokens
    core, got = core_and_answers()
    for name, length in (("x", 100), ("yy", 70)):
        ask(core, name, length, 30)
    for _ in range(12):
        step(core, got)
        before = core.stats()
        core.sleep(1, keep_kv=True)
        assert core.sleep_level == 1 and not core.has_work()
        core.wake_up()
        after = core.stats()
        assert (after.running, after.blocks_used, after.blocks_cached, after.cpu_blocks_used) == (
            before.running, before.blocks_used, before.blocks_cached, before.cpu_blocks_used)  # fmt: skip
    assert finish(core, got) == expected
    assert core.stats().prompt_tokens == computed and core.stats().preemptions == 0
    core.scheduler.blocks.check()


def test_a_kept_sleep_can_deepen() -> None:
    core = EngineCore(SleepingDouble(Limits(3, 64, 1000, 16, 24, 1)), facts(1000), EngineConfig())
    ask(core, "a", 40)
    core.step()
    core.sleep(1, keep_kv=True)
    assert core.stats().running == 1
    core.sleep(2)
    assert core.sleep_level == 2 and core.stats().running == core.stats().blocks_used == 0


def test_a_host_without_room_for_the_blocks_refuses_and_stays_awake() -> None:
    backend = SleepingDouble(Limits(3, 64, 1000, 16, 24, 1))
    core, got = EngineCore(backend, facts(1000), EngineConfig()), dict[str, list[int]]()
    backend.room = False
    core.sleep(1, keep_kv=True)  # nothing to keep yet
    core.wake_up()
    ask(core, "a", 40)
    step(core, got)
    with pytest.raises(UsageError, match=r"no room for weights and 3 KV blocks.*kv_cache=drop"):
        core.sleep(1, keep_kv=True)
    with pytest.raises(UsageError, match="at level 2 nothing of a model stays"):
        core.sleep(2, keep_kv=True)
    assert core.sleep_level == 0 and len(finish(core, got)["a"]) == 12


def test_kept_blocks_of_a_cpu_stay_where_they_are(config: EngineConfig) -> None:
    core = EngineCore.from_config(config)
    ask(core, "a", 40)
    expected = finish(core, {})
    got: dict[str, list[int]] = {}
    ask(core, "a", 40)
    step(core, got)
    core.sleep(1, keep_kv=True)
    core.wake_up()
    assert finish(core, got) == expected and core.stats().preemptions == 0
    core.close()


class Scripted:
    """A link on which messages come one after the other."""

    def __init__(self, *messages: ToEngine) -> None:
        self.messages, self.sent = [*messages, Shutdown()], list[FromEngine]()

    def receive(self, wait: bool) -> list[ToEngine]:
        return [self.messages.pop(0)]

    def send(self, message: FromEngine) -> None:
        self.sent.append(message)


def test_who_is_woken_without_room_sleeps_on_and_is_woken_later() -> None:
    core = EngineCore(SleepingDouble(Limits(2, 64, 1000, 16, 100, 1)), facts(1000), EngineConfig())
    core.backend.refusals = 2
    ask(core, "a", 40)
    link = Scripted(Sleep(1, keep_kv=True), Sleep(0), Sleep(0), Sleep(0))
    EngineLoop(core, link).run()
    slept = [message for message in link.sent if isinstance(message, Slept)]
    assert [message.level for message in slept] == [1, 1, 1, 0]
    assert [message.refused for message in slept[1:]] == ["no memory; the engine sleeps on"] * 2 + [None]
    alone = EngineCore(SleepingDouble(core.backend.limits), facts(1000), EngineConfig())
    ask(alone, "a", 40)
    got: dict[str, list[int]] = {}
    for message in link.sent:
        for output in message.outputs if isinstance(message, Outputs) else []:
            got.setdefault(output.request_id, []).extend(output.token_ids)
    assert finish(core, got) == finish(alone, {})


def test_the_loop_says_how_deep_the_engine_sleeps() -> None:
    core = EngineCore(PagedDouble(Limits(2, 64, 1000, 16, 100, 1)), facts(1000), EngineConfig())
    link = Scripted(Sleep(2, keep_kv=True), Sleep(1), Sleep(2))
    EngineLoop(core, link).run()
    slept = [message for message in link.sent if isinstance(message, Slept)]
    assert [message.level for message in slept] == [0, 1, 2] and core.sleep_level == 2
    assert [message.refused is not None for message in slept] == [True, False, False]

"""Sleep gives memory back, and whoever was served goes on as if nothing had been."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from rvllm.backends.base import Limits
from rvllm.config import EngineConfig
from rvllm.engine.core import EngineCore
from rvllm.engine.ipc.messages import FromEngine, Generate, Sampling, Shutdown, Sleep, Slept, ToEngine
from rvllm.engine.loop import EngineLoop
from support.doubles.engine import PagedDouble, facts

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
    prompt = [(7 * i + len(name)) % 150 + 3 for i in range(length)]
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


def test_the_loop_says_how_deep_the_engine_sleeps() -> None:
    class Scripted:
        def __init__(self, *messages: ToEngine) -> None:
            self.messages, self.sent = [*messages, Shutdown()], list[FromEngine]()

        def receive(self, wait: bool) -> list[ToEngine]:
            return [self.messages.pop(0)]

        def send(self, message: FromEngine) -> None:
            self.sent.append(message)

    core = EngineCore(PagedDouble(Limits(2, 64, 1000, 16, 100, 1)), facts(1000), EngineConfig())
    link = Scripted(Sleep(1), Sleep(2))
    EngineLoop(core, link).run()
    assert [message.level for message in link.sent if isinstance(message, Slept)] == [1, 2]
    assert core.sleep_level == 2

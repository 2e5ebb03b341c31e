"""The engine on the CPU backend: a request's tokens do not depend on its batch-mates or the pressure."""

from __future__ import annotations

import asyncio
import dataclasses
import json
from pathlib import Path
from random import Random

import msgspec
import pytest

from rvllm.backends.base import LedgerLine
from rvllm.backends.cpu.compiled.library import missing
from rvllm.config import EngineConfig
from rvllm.engine.core import EngineCore
from rvllm.engine.ipc.client import EngineClient
from rvllm.engine.ipc.messages import Generate, Output, Sampling
from rvllm.errors import ModelError, RvllmError
from support.models.tiny_llm import CONFIG

TINY = CONFIG | {
    "hidden_size": 48, "intermediate_size": 80, "num_attention_heads": 6, "vocab_size": 160,
    "max_position_embeddings": 256, "tie_word_embeddings": False, "eos_token_id": [2, 3], "bos_token_id": 1,
    "torch_dtype": "float32",
}  # fmt: skip


@pytest.fixture
def model(tmp_path: Path) -> EngineConfig:
    (tmp_path / "config.json").write_text(json.dumps(TINY))
    (tmp_path / "generation_config.json").write_text(json.dumps({"temperature": 0.5, "eos_token_id": 3}))
    return EngineConfig(
        model=str(tmp_path), load_format="dummy", device="cpu", threads=1, num_blocks=200, max_model_len=200
    )


def requests(random: Random) -> list[Generate]:
    prefix = [random.randrange(160) for _ in range(60)]
    made = []
    for i in range(14):
        prompt = prefix[: random.choice([0, 20, 40, 60])] + random.choices(
            range(160), k=random.randint(1, 30)
        )
        sampling = Sampling(
            temperature=random.choice([0.0, 0.7, 1.5]),
            top_k=random.choice([0, 20]),
            top_p=random.choice([1.0, 0.9]),
            repetition_penalty=random.choice([1.0, 1.3]),
            presence_penalty=random.choice([0.0, 0.5]),
            seed=random.randrange(1 << 60),
            logit_bias=((5, 2.0),) if random.random() < 0.3 else (),
            stop_token_ids=tuple(random.sample(range(160), random.choice([0, 2]))),
            min_tokens=random.choice([0, 5]),
            max_tokens=random.randint(5, 40),
            logprobs=random.choice([None, 2]),
            prompt_logprobs=random.choice([None, None, 1]),
        )
        made.append(Generate(f"{i}", prompt, sampling))
    return made


def run(core: EngineCore, wanted: list[Generate], spread: int = 0) -> dict[str, list[Output]]:
    """All outputs by request, one request joining every `spread` steps."""
    outputs: dict[str, list[Output]] = {request.request_id: [] for request in wanted}
    left = list(wanted)
    step = 0
    while left or core.has_work():
        while left and (not spread or step % spread == 0):
            core.add_request(left.pop(0))
            if spread:
                break
        for output in core.step():
            outputs[output.request_id].append(output)
        step += 1
    return outputs


def essence(outputs: list[Output]) -> list[object]:
    return [
        (o.token_ids, o.logprobs, o.prompt_logprobs, o.finish_reason, o.stop_reason, o.error) for o in outputs
    ]


def test_alone_and_in_a_crowd(model: EngineConfig) -> None:
    wanted = requests(Random(1))
    alone = EngineCore.from_config(dataclasses.replace(model, enable_prefix_caching=False))
    expected = {r.request_id: essence(run(alone, [r])[r.request_id]) for r in wanted}
    alone.close()
    assert len({json.dumps(e, default=str) for e in expected.values()}) == len(wanted)
    for settings in (
        {},
        {"max_num_batched_tokens": 7, "max_num_seqs": 3},
        {"num_blocks": 16, "max_model_len": 140, "max_num_batched_tokens": 33},
    ):
        core = EngineCore.from_config(dataclasses.replace(model, **settings))
        for spread in (0, 3):
            got = run(core, wanted, spread)
            assert {name: essence(outputs) for name, outputs in got.items()} == expected
        stats = core.stats()
        assert stats.blocks_used == 0 and stats.cached_prompt_tokens > 0
        assert (stats.preemptions > 0) == ("num_blocks" in settings)
        core.close()


@pytest.mark.parametrize("kernels", ["numpy", "compiled"])
def test_a_second_pool_changes_no_bit(model: EngineConfig, kernels: str) -> None:
    """Swapped, recomputed, shared by several choices: every request has the tokens that it has alone."""
    if kernels == "compiled" and missing():
        pytest.skip(f"no compiled CPU kernels: {missing()}")
    model = dataclasses.replace(model, cpu_kernels=kernels)
    wanted = requests(Random(5))
    wanted += [
        msgspec.structs.replace(r, request_id=f"{r.request_id}-b", group=r.request_id) for r in wanted[::2]
    ]
    for first in wanted:
        first.group = first.group or first.request_id
    core = EngineCore.from_config(model)
    expected = {r.request_id: essence(run(core, [r])[r.request_id]) for r in wanted}
    core.close()
    small = {"num_blocks": 14, "max_model_len": 140, "max_num_batched_tokens": 33}
    for mode, host in (("swap", 100), ("recompute", 12)) if kernels == "numpy" else (("auto", 20),):
        settings = {**small, "num_cpu_blocks": host, "preemption_mode": mode}
        core = EngineCore.from_config(dataclasses.replace(model, **settings))
        got = run(core, wanted, 1)
        assert {name: essence(outputs) for name, outputs in got.items()} == expected
        stats = core.stats()
        assert stats.preemptions and stats.blocks_moved_out and stats.blocks_moved_in
        assert stats.swaps == (0 if mode == "recompute" else stats.preemptions)
        assert LedgerLine("kv cache, second tier", host * 16 * 2 * 2 * 2 * 8 * 4) in core.ready.ledger
        core.close()


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"enable_prefix_caching": False, "num_cpu_blocks": 10}, "--no-enable-prefix-caching"),
        ({"num_cpu_blocks": 1 << 40}, "--num-cpu-blocks .* GB .* lower it to"),
    ],
)
def test_a_second_pool_that_cannot_be_is_refused(model: EngineConfig, settings: dict, said: str) -> None:
    with pytest.raises(RvllmError, match=said):
        EngineCore.from_config(dataclasses.replace(model, **settings))


def test_facts(model: EngineConfig) -> None:
    core = EngineCore.from_config(model)
    facts = core.facts
    assert (facts.architecture, facts.vocab_size, facts.max_model_len) == ("LlamaForCausalLM", 160, 200)
    assert (facts.eos_token_ids, facts.bos_token_id) == ([3, 2], 1)
    assert facts.generation_config["temperature"] == 0.5
    assert core.ready.facts == facts and core.ready.load_seconds > 0 and core.ready.ledger
    core.close()
    plain = EngineCore.from_config(dataclasses.replace(model, generation_config="none"))
    assert plain.facts.generation_config == {} and plain.facts.eos_token_ids == [3, 2]
    plain.close()


def test_missing_weights_are_named(model: EngineConfig) -> None:
    with pytest.raises(ModelError, match=r"model\.embed_tokens\.weight|safetensors"):
        EngineCore.from_config(dataclasses.replace(model, load_format="auto"))


def test_in_its_own_process(model: EngineConfig) -> None:
    """`python -m rvllm.engine.ipc.process` as it is served: the same tokens as in this process."""
    wanted = requests(Random(2))
    core = EngineCore.from_config(model)
    expected = {name: essence(outputs) for name, outputs in run(core, wanted).items()}
    core.close()

    async def outputs_of(client: EngineClient, request: Generate) -> list[Output]:
        return [output async for output in client.generate(request)]

    async def serve() -> None:
        heard: list[tuple[float, str]] = []
        client = await EngineClient.start(model, lambda *progress: heard.append(progress))
        try:
            assert client.ready.facts.vocab_size == 160 and ("loading weights") in {text for _, text in heard}
            got = await asyncio.gather(*(outputs_of(client, request) for request in wanted))
            for request, outputs in zip(wanted, got, strict=True):
                assert essence(outputs) == expected[request.request_id]
        finally:
            await client.close()

        missing = dataclasses.replace(model, model=f"{model.model}/absent")
        with pytest.raises(RvllmError, match="absent") as caught:
            await EngineClient.start(missing)
        assert caught.value.exit_code == 2

    asyncio.run(asyncio.wait_for(serve(), 60))

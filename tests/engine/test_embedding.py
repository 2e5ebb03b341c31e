"""Texts through the engine: who shares a step, what comes back, and what never gets that far."""

from __future__ import annotations

import asyncio
import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest

from rvllm.config import EngineConfig
from rvllm.engine.core import EngineCore
from rvllm.engine.ipc.client import EngineClient
from rvllm.engine.ipc.messages import Embed, Generate, Output, Sampling, embedded
from rvllm.errors import UsageError

ENCODER = {
    "architectures": ["BertModel"], "hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": 2,
    "num_attention_heads": 3, "vocab_size": 90, "max_position_embeddings": 40,
}  # fmt: skip


@pytest.fixture
def model(tmp_path: Path) -> EngineConfig:
    (tmp_path / "config.json").write_text(json.dumps(ENCODER))
    return EngineConfig(model=str(tmp_path), load_format="dummy", device="cpu", threads=1)


def texts() -> list[Embed]:
    source = np.random.default_rng(0)
    return [
        Embed(f"{i}", source.integers(0, 90, n).tolist()) for i, n in enumerate((5, 40, 1, 12, 12, 33, 7))
    ]


def test_texts_and_tokens_take_turns(model: EngineConfig) -> None:
    core = EngineCore.from_config(model)
    ids = [text.prompt_token_ids for text in texts()]
    for i, tokens in enumerate((False, True, True, False)):
        core.add_embed(Embed(f"{i}", ids[i], tokens=tokens))
    steps = drain(core)
    assert [[output.request_id for output in step] for step in steps] == [["0"], ["1", "2"], ["3"]]
    for output in steps[1]:
        text = Embed(output.request_id, ids[int(output.request_id)], tokens=True)
        assert embedded(text, output.embedding or b"").shape == (len(text.prompt_token_ids), 24)
    core.close()


def drain(core: EngineCore) -> list[list[Output]]:
    steps = []
    while core.has_work():
        steps.append(core.step())
    return steps


def test_steps_are_filled_in_order_and_vectors_do_not_depend_on_them(model: EngineConfig) -> None:
    wanted = texts()
    alone = {}
    core = EngineCore.from_config(model)
    assert core.facts.embedding_size == 24 and core.facts.max_model_len == 40
    for text in wanted:
        core.add_embed(text)
        [[alone[text.request_id]]] = drain(core)
    core.close()
    assert len({output.embedding for output in alone.values()}) == len(wanted)
    for settings, steps in (
        ({}, ["0123456"]),
        ({"max_num_batched_tokens": 45}, ["01", "234", "56"]),
        ({"max_num_seqs": 3}, ["012", "345", "6"]),
    ):
        core = EngineCore.from_config(dataclasses.replace(model, **settings))
        for text in wanted:
            core.add_embed(text)
        assert core.stats().waiting == len(wanted)
        got = drain(core)
        assert ["".join(o.request_id for o in step) for step in got] == steps
        for output in (o for step in got for o in step):
            assert output.embedding == alone[output.request_id].embedding and output.finish_reason == "stop"
        stats = core.stats()
        assert (stats.waiting, stats.steps, stats.finished) == (0, len(steps), {"stop": len(wanted)})
        assert stats.prompt_tokens == sum(len(text.prompt_token_ids) for text in wanted)
        core.close()


def test_priority_abort_and_refusals(model: EngineConfig) -> None:
    core = EngineCore.from_config(dataclasses.replace(model, max_num_seqs=2))
    for name, priority in (("a", 5), ("b", 0), ("c", 5), ("d", -1), ("e", 0)):
        core.add_embed(Embed(name, [1, 2, 3], priority))
    with pytest.raises(UsageError, match="'c'"):
        core.add_embed(Embed("c", [1]))
    core.abort(["e", "unknown"])
    core.add_embed(Embed("long", [1] * 41))
    core.add_embed(Embed("empty", []))
    core.add_embed(Embed("beyond", [90]))
    core.add_request(Generate("text", [1], Sampling()))
    ended = [(o.request_id, o.finish_reason, o.error) for step in drain(core) for o in step]
    assert [name for name, _, _ in ended] == ["e", "long", "empty", "beyond", "text", "d", "b", "a", "c"]
    assert [reason for _, reason, _ in ended] == ["abort", *["error"] * 4, *["stop"] * 4]
    errors = [error or "" for _, _, error in ended[1:5]]
    for error, word in zip(errors, ("41 tokens", "empty", "vocabulary", "generates no text"), strict=True):
        assert word in error
    core.close()


def test_a_generating_model_gives_no_embeddings(model: EngineConfig) -> None:
    llama = {
        "architectures": ["LlamaForCausalLM"], "hidden_size": 16, "intermediate_size": 16, "vocab_size": 50,
        "num_hidden_layers": 1, "num_attention_heads": 2, "max_position_embeddings": 64,
    }  # fmt: skip
    (Path(model.model) / "config.json").write_text(json.dumps(llama))
    core = EngineCore.from_config(dataclasses.replace(model, num_blocks=8))
    assert core.facts.embedding_size is None
    core.add_embed(Embed("a", [1]))
    [output] = core.step()
    assert output.finish_reason == "error" and "gives no embeddings" in (output.error or "")
    core.close()


def test_through_the_engine_process(model: EngineConfig) -> None:
    wanted = texts()
    core = EngineCore.from_config(model)
    for text in wanted:
        core.add_embed(text)
    expected = {o.request_id: o.embedding for step in drain(core) for o in step}
    core.close()

    async def serve() -> None:
        client = await EngineClient.start(model)
        try:
            vectors = await asyncio.gather(*(client.embed(text) for text in wanted))
            for text, vector in zip(wanted, vectors, strict=True):
                assert vector.dtype == np.float32 and vector.tobytes() == expected[text.request_id]
            with pytest.raises(UsageError, match="41 tokens"):
                await client.embed(Embed("long", [1] * 41))
            task = asyncio.ensure_future(client.embed(Embed("cancelled", [1] * 40)))
            await asyncio.sleep(0)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
            assert len(await client.embed(Embed("after", [1]))) == 24
        finally:
            await client.close()

    asyncio.run(asyncio.wait_for(serve(), 60))

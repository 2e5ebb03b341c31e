"""vLLM's Python names: scripts written for it run with the import changed."""

from __future__ import annotations

import asyncio
import dataclasses
import gc
import importlib
import math
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import rvllm
from rvllm import LLM, AsyncEngineArgs, AsyncLLM, EngineArgs, LLMEngine, SamplingParams
from rvllm.errors import UsageError
from rvllm.sampling_params import BeamSearchParams, RequestOutputKind
from rvllm.utils import FlexibleArgumentParser
from rvllm.v1.metrics.reader import Counter, Gauge
from support.models.tiny_llm import SETTINGS, directory

GREEDY = SamplingParams(temperature=0, max_tokens=8)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return directory(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture(scope="module")
def llm(model: Path) -> Iterator[LLM]:
    with LLM(str(model), **SETTINGS) as loaded:
        yield loaded


@pytest.mark.parametrize(
    ("module", "names"),
    [
        ("rvllm", "LLM SamplingParams EngineArgs AsyncEngineArgs LLMEngine RequestOutput PoolingParams"),
        (
            "rvllm.sampling_params",
            "SamplingParams BeamSearchParams RequestOutputKind StructuredOutputsParams",
        ),
        ("rvllm.pooling_params", "PoolingParams"),
        ("rvllm.outputs", "RequestOutput CompletionOutput EmbeddingRequestOutput"),
        ("rvllm.engine.arg_utils", "EngineArgs AsyncEngineArgs"),
        ("rvllm.utils", "FlexibleArgumentParser"),
        ("rvllm.utils.argparse_utils", "FlexibleArgumentParser"),
        ("rvllm.v1.engine.async_llm", "AsyncLLM"),
        ("rvllm.v1.engine.llm_engine", "LLMEngine"),
        ("rvllm.v1.metrics.reader", "Counter Gauge Histogram Vector"),
        ("rvllm.entrypoints.llm", "LLM"),
        ("rvllm.distributed", "cleanup_dist_env_and_memory"),
    ],
)
def test_names_are_where_vllm_has_them(module: str, names: str) -> None:
    assert all(hasattr(importlib.import_module(module), name) for name in names.split())


def test_a_script_takes_its_settings_from_a_command_line(model: Path) -> None:
    """As vLLM's examples/offline_inference/basic/generate.py does."""
    parser = FlexibleArgumentParser()
    group = parser.add_argument_group("Engine arguments")
    EngineArgs.add_cli_args(group)
    group.set_defaults(model=str(model))
    parser.add_argument("--max-tokens", type=int)
    words = ["--max_tokens", "3", "--dtype", "float", "--enforce_eager", "--max_model_len", "0.1k"]
    args = vars(parser.parse_args([*words, "--load_format=dummy", "--device", "cpu", "-tp", "1"]))
    assert args.pop("max_tokens") == 3
    with LLM(**args) as llm:
        assert llm.engine.facts.max_model_len == 100
        params = llm.get_default_sampling_params()
        params.max_tokens = 3
        assert len(llm.generate("hello", params, use_tqdm=False)[0].outputs[0].token_ids) == 3


def test_engine_args(model: Path) -> None:
    args = EngineArgs(model=str(model), tensor_parallel_size=1, enforce_eager=True, **SETTINGS)
    with LLM(**dataclasses.asdict(args)) as llm:
        assert llm.config.num_blocks == 64
    with pytest.raises(UsageError, match="one GPU"):
        LLM(**dataclasses.asdict(EngineArgs(model=str(model), tensor_parallel_size=2)))
    with pytest.raises(TypeError):
        EngineArgs(nonsense=1)


def test_the_engine_is_driven_step_by_step(llm: LLM) -> None:
    engine = llm.llm_engine
    assert isinstance(engine, LLMEngine)
    prompts = ["hello world", "def main", "the and of"]
    expected = [o.outputs[0].token_ids for o in llm.generate(prompts, GREEDY, use_tqdm=False)]
    for i, prompt in enumerate(prompts):
        engine.add_request(str(i), prompt, GREEDY)
    with pytest.raises(UsageError, match="in use"):
        engine.add_request("0", "hello", GREEDY)
    found: dict[str, list[int]] = {}
    while engine.has_unfinished_requests():
        for output in engine.step():
            if output.finished:
                found[output.request_id] = output.outputs[0].token_ids
    assert [found[str(i)] for i in range(3)] == expected
    engine.add_request("late", "hello", GREEDY)
    engine.abort_request("late")
    assert engine.get_num_unfinished_requests() == 0
    while llm.engine.has_work():
        engine.step()


@pytest.mark.parametrize("kind", list(RequestOutputKind))
def test_the_asynchronous_engine_streams(model: Path, llm: LLM, kind: RequestOutputKind) -> None:
    (expected,) = llm.generate("hello world", GREEDY, use_tqdm=False)[0].outputs

    async def run() -> list[Any]:
        engine = AsyncLLM.from_engine_args(AsyncEngineArgs(model=str(model), **SETTINGS))
        try:
            params = SamplingParams(temperature=0, max_tokens=8, output_kind=kind)
            return [
                o async for o in engine.generate(request_id="a", prompt="hello world", sampling_params=params)
            ]
        finally:
            engine.shutdown()
            await asyncio.sleep(0.2)

    outputs = asyncio.run(run())
    assert outputs[-1].finished and all(o.request_id == "a" for o in outputs)
    if kind is RequestOutputKind.DELTA:
        assert [t for o in outputs for t in o.outputs[0].token_ids] == expected.token_ids
        assert "".join(o.outputs[0].text for o in outputs) == expected.text
    else:
        assert outputs[-1].outputs[0].token_ids == expected.token_ids
        assert (len(outputs) == 1) == (kind is RequestOutputKind.FINAL_ONLY)


def test_deleting_gives_the_engine_back(model: Path) -> None:
    llm = LLM(str(model), **SETTINGS)
    core, closed = llm.engine, []
    core.backend.close = lambda: closed.append(True)  # type: ignore[method-assign]
    gone = weakref.ref(llm)
    llm.generate("hello", GREEDY, use_tqdm=False)
    gc.disable()
    try:
        del llm
        assert gone() is None and closed == [True]
    finally:
        gc.enable()


def test_sleeping_and_waking_change_no_answer(model: Path) -> None:
    with LLM(str(model), **SETTINGS) as llm:
        before = llm.generate("hello world", GREEDY, use_tqdm=False)[0].outputs[0].token_ids
        llm.sleep(level=1)
        with pytest.raises(UsageError, match="leave tags out"):
            llm.wake_up(tags=["weights"])
        llm.wake_up()
        assert llm.generate("hello world", GREEDY, use_tqdm=False)[0].outputs[0].token_ids == before


def test_long_answers_begin_first_and_outputs_keep_their_order(
    llm: LLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    began: list[int] = []
    schedule = llm.engine.scheduler.schedule

    def watched() -> Any:
        if not began:
            began.extend(seq.sampling.max_tokens for seq in llm.engine.scheduler.waiting)
        return schedule()

    monkeypatch.setattr(llm.engine.scheduler, "schedule", watched)
    lengths = [2, 5, 3, 5]
    params = [SamplingParams(temperature=0, max_tokens=n, ignore_eos=True) for n in lengths]
    for priority, order in ((None, [5, 5, 3, 2]), ([0] * 4, lengths)):
        began.clear()
        outputs = llm.generate(["one", "two", "three", "four"], params, use_tqdm=False, priority=priority)
        assert began == order
        assert [len(output.outputs[0].token_ids) for output in outputs] == lengths


def test_metrics_and_the_prefix_cache(model: Path) -> None:
    with LLM(str(model), **SETTINGS) as llm:
        ids = {"prompt_token_ids": list(range(1, 41))}
        llm.generate(ids, GREEDY, use_tqdm=False)
        assert llm.generate(ids, GREEDY, use_tqdm=False)[0].num_cached_tokens == 32
        assert llm.reset_prefix_cache()
        llm.engine.scheduler.blocks.check()
        assert llm.generate(ids, GREEDY, use_tqdm=False)[0].num_cached_tokens == 0
        found = {metric.name: metric for metric in llm.get_metrics()}
        tokens, running = found["vllm:generation_tokens"], found["vllm:num_requests_running"]
        assert isinstance(tokens, Counter) and tokens.value == 24
        assert isinstance(running, Gauge) and running.value == 0


def test_beam_search_finds_the_best_of_all_continuations(llm: LLM) -> None:
    """Two tokens deep with a beam as wide as the ranks reach: against every pair of the first ten tokens."""
    params = BeamSearchParams(beam_width=3, max_tokens=2, ignore_eos=True)
    (found,) = llm.beam_search([{"prompt_token_ids": [1, 2, 3]}], params)
    one = SamplingParams(temperature=0, max_tokens=1, logprobs=6, ignore_eos=True)

    def nexts(ids: list[int]) -> dict[int, float]:
        (output,) = llm.generate({"prompt_token_ids": ids}, one, use_tqdm=False)[0].outputs
        assert output.logprobs is not None
        return {token: entry.logprob for token, entry in output.logprobs[0].items()}

    first = sorted(nexts([1, 2, 3]).items(), key=lambda pair: -pair[1])[:3]
    pairs = [(p + q, [1, 2, 3, a, b]) for a, p in first for b, q in nexts([1, 2, 3, a]).items()]
    best = sorted(pairs, reverse=True)[:3]
    assert [beam.tokens for beam in found.sequences] == [tokens for _, tokens in best]
    for beam, (logprob, _) in zip(found.sequences, best, strict=True):
        assert math.isclose(beam.cum_logprob, logprob, abs_tol=1e-5)
        assert llm.get_tokenizer().decode(beam.tokens) == beam.text


def test_what_is_not_served_is_said(llm: LLM) -> None:
    for what in (
        lambda: llm.generate("a", GREEDY, lora_request=object()),
        lambda: llm.classify("a"),
        lambda: llm.encode("a", pooling_task="classify"),
        lambda: llm.score("a", ["b"]),
        lambda: SamplingParams(bad_words=["x", " "]),
        lambda: SamplingParams(allowed_token_ids=[]),
        lambda: llm.generate("a", SamplingParams(allowed_token_ids=[512])),
        lambda: llm.generate("a", SamplingParams(logprobs=-1)),
        lambda: rvllm.PoolingParams(normalize=False),
        lambda: BeamSearchParams(beam_width=11, max_tokens=1),
    ):
        with pytest.raises(UsageError):
            what()
    assert llm.generate("a", GREEDY, use_tqdm=False, lora_request=None, tokenization_kwargs=None)


def test_parameters_are_copied() -> None:
    params = SamplingParams(
        stop=["a"], bad_words=[], extra_args={"x": 1}, output_kind=RequestOutputKind.DELTA
    )
    other = params.clone()
    other.stop.append("b")
    assert params.stop == ["a"] and other.output_kind is RequestOutputKind.DELTA
    assert SamplingParams.from_optional(n=None, temperature=0.5).temperature == 0.5


def test_prefixes_are_forgotten_under_running_requests(llm: LLM) -> None:
    """What they write stays the same: they are computed again."""
    params = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True)
    wanted = [
        list(o.outputs[0].token_ids) for o in llm.generate(["hello world", "def"], params, use_tqdm=False)
    ]
    engine = llm.llm_engine
    for name, prompt in (("a", "hello world"), ("b", "def")):
        engine.add_request(name, prompt, params)
    found: dict[str, list[int]] = {}
    steps = 0
    while engine.has_unfinished_requests():
        found |= {o.request_id: list(o.outputs[0].token_ids) for o in engine.step()}
        steps += 1
        if steps == 5:
            assert not engine.reset_prefix_cache()
            assert engine.reset_prefix_cache(reset_running_requests=True)
            assert llm.engine.stats().blocks_used == 0
    assert [found["a"], found["b"]] == wanted

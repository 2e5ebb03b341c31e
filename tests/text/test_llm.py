"""`rvllm.LLM` on a tiny random model: vLLM's names and shapes, nothing left behind in the engine."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import rvllm
from rvllm import LLM, RequestOutput, SamplingParams
from rvllm.errors import ModelError, UsageError
from rvllm.offline.llm import engine_config
from support.models.tiny_llm import SETTINGS, directory
from support.text import tiny_tokenizers as tiny

GREEDY = SamplingParams(temperature=0, max_tokens=8)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    eos = tiny.trained().token_to_id("<|im_end|>")
    path = directory(tmp_path_factory.mktemp("models") / "tiny", eos_token_id=eos)
    (path / "generation_config.json").write_text(json.dumps({"temperature": 0.5, "top_k": 7}))
    return path


@pytest.fixture(scope="module")
def llm(model: Path) -> Iterator[LLM]:
    with LLM(str(model), **SETTINGS) as loaded:
        yield loaded


def idle(llm: LLM) -> bool:
    stats = llm.engine.stats()
    return not llm.engine.has_work() and stats.blocks_used == 0 and stats.running == stats.waiting == 0


def test_one_output_a_prompt_in_order(llm: LLM) -> None:
    prompts = ["hello world", {"prompt": "def main"}, {"prompt_token_ids": [1, 2, 3]}]
    outputs = llm.generate(prompts, GREEDY, use_tqdm=False)
    assert [o.prompt for o in outputs] == ["hello world", "def main", None]
    assert outputs[2].prompt_token_ids == [1, 2, 3]
    for output in outputs:
        assert isinstance(output, RequestOutput)
        (completion,) = output.outputs
        assert (completion.index, completion.finish_reason, len(completion.token_ids)) == (0, "length", 8)
        assert completion.text == llm.get_tokenizer().decode(completion.token_ids, skip_special_tokens=True)
        assert completion.logprobs is None
        assert output.finished
        assert output.metrics is not None
        assert output.metrics.arrival_time <= (output.metrics.first_token_time or 0)
        assert (output.metrics.first_token_time or 0) <= (output.metrics.finished_time or 0)
    alone = llm.generate("def main", GREEDY, use_tqdm=False)[0]
    assert alone.outputs[0].token_ids == outputs[1].outputs[0].token_ids
    assert idle(llm)


def test_a_flat_list_of_ids_is_one_prompt(llm: LLM) -> None:
    assert [o.prompt_token_ids for o in llm.generate([5, 6], GREEDY, use_tqdm=False)] == [[5, 6]]
    assert llm.generate([], GREEDY) == []


def test_parameters_for_each_prompt(llm: LLM) -> None:
    params = [SamplingParams(max_tokens=2), SamplingParams(max_tokens=5, ignore_eos=True)]
    outputs = llm.generate(["a", "b"], params, use_tqdm=False)
    assert [len(o.outputs[0].token_ids) for o in outputs] == [2, 5]
    with pytest.raises(UsageError, match="sampling_params has 2 entries for 1 prompts"):
        llm.generate("a", params)
    with pytest.raises(UsageError, match="priority has 1 entries for 2 prompts"):
        llm.generate(["a", "b"], priority=[1])


def test_choices_and_seeds(llm: LLM) -> None:
    params = SamplingParams(n=3, temperature=1.0, seed=4, max_tokens=8, ignore_eos=True)
    first, again = (llm.generate("hello", params, use_tqdm=False)[0] for _ in range(2))
    tokens = [c.token_ids for c in first.outputs]
    assert [c.index for c in first.outputs] == [0, 1, 2]
    assert tokens == [c.token_ids for c in again.outputs]
    assert len({tuple(t) for t in tokens}) == 3
    shifted = llm.generate("hello", SamplingParams(temperature=1.0, seed=5, max_tokens=8, ignore_eos=True))
    assert shifted[0].outputs[0].token_ids == tokens[1]


def test_logprobs_have_vllms_shape(llm: LLM) -> None:
    params = SamplingParams(temperature=0, max_tokens=4, logprobs=3, prompt_logprobs=1, ignore_eos=True)
    output = llm.generate({"prompt_token_ids": [9, 8, 7, 6]}, params, use_tqdm=False)[0]
    completion = output.outputs[0]
    assert completion.logprobs is not None
    assert [next(iter(entry)) for entry in completion.logprobs] == completion.token_ids
    for entry in completion.logprobs:
        assert [p.rank for p in entry.values()] == [1, 2, 3]
        values = [p.logprob for p in entry.values()]
        assert values == sorted(values, reverse=True)
        assert all(p.decoded_token == llm.get_tokenizer().token_text(i) for i, p in entry.items())
    chosen = sum(entry[t].logprob for entry, t in zip(completion.logprobs, completion.token_ids, strict=True))
    assert completion.cumulative_logprob == pytest.approx(chosen)
    assert output.prompt_logprobs is not None
    assert output.prompt_logprobs[0] is None
    assert [next(iter(e or {})) for e in output.prompt_logprobs[1:]] == [8, 7, 6]


def test_a_stop_string_ends_the_request_and_frees_its_blocks(llm: LLM) -> None:
    free = llm.generate(
        "hello", SamplingParams(temperature=0, max_tokens=40, ignore_eos=True), use_tqdm=False
    )
    text = free[0].outputs[0].text
    stop = text[len(text) // 2 : len(text) // 2 + 3]
    params = SamplingParams(temperature=0, max_tokens=40, ignore_eos=True, stop=[stop])
    completion = llm.generate("hello", params, use_tqdm=False)[0].outputs[0]
    assert completion.text == text[: text.index(stop)]
    assert (completion.finish_reason, completion.stop_reason) == ("stop", stop)
    assert idle(llm)


def test_an_interrupted_call_leaves_nothing_running(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    step, calls = llm.engine.step, []

    def interrupted() -> Any:
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return step()

    monkeypatch.setattr(llm.engine, "step", interrupted)
    with pytest.raises(KeyboardInterrupt):
        llm.generate(["hello", "world"], SamplingParams(max_tokens=50, ignore_eos=True), use_tqdm=False)
    assert idle(llm)


def test_chat_is_generate_on_the_rendered_prompt(llm: LLM) -> None:
    messages = [{"role": "user", "content": "hi"}]
    prompt = llm.get_tokenizer().apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    chat = llm.chat(messages, GREEDY, use_tqdm=False)
    plain = llm.generate(prompt, GREEDY, use_tqdm=False)
    assert chat[0].prompt == prompt
    assert chat[0].outputs[0].token_ids == plain[0].outputs[0].token_ids
    assert len(llm.chat([messages, messages], GREEDY, use_tqdm=False)) == 2
    continued = [*messages, {"role": "assistant", "content": "I am"}]
    output = llm.chat(continued, GREEDY, False, add_generation_prompt=False, continue_final_message=True)
    assert (output[0].prompt or "").endswith("assistant\nI am")


def test_defaults_come_from_the_model(llm: LLM, model: Path) -> None:
    params = llm.get_default_sampling_params()
    assert (params.temperature, params.top_k, params.max_tokens) == (0.5, 7, 16)
    with LLM(str(model), **SETTINGS, generation_config="none") as other:
        assert other.get_default_sampling_params() == SamplingParams()


def test_a_bad_prompt_stops_the_call_before_anything_runs(llm: LLM) -> None:
    steps = llm.engine.stats().steps
    with pytest.raises(UsageError, match=r"prompts\[1\]: prompt must not be empty"):
        llm.generate(["a", ""], GREEDY)
    with pytest.raises(UsageError, match="token id 512 is not in the vocabulary of 512"):
        llm.generate({"prompt_token_ids": [512]}, GREEDY)
    with pytest.raises(UsageError, match="prompt has 128 tokens, but the context holds 128"):
        llm.generate({"prompt_token_ids": [1] * 128}, GREEDY)
    with pytest.raises(ValueError, match="temperature"):  # what scripts written for vLLM catch
        SamplingParams(temperature=-1)
    assert llm.engine.stats().steps == steps
    assert idle(llm)


def test_token_ids_alone(model: Path) -> None:
    with LLM(str(model), **SETTINGS, skip_tokenizer_init=True) as llm:
        completion = llm.generate({"prompt_token_ids": [1, 2]}, GREEDY, use_tqdm=False)[0].outputs[0]
        assert completion.text == ""
        assert len(completion.token_ids) == 8
        with pytest.raises(UsageError, match="skip_tokenizer_init"):
            llm.get_tokenizer()
        with pytest.raises(UsageError, match="skip_tokenizer_init"):
            llm.generate("hello", GREEDY)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"tensor_parallel_size": 2}, "tensor_parallel_size=2 is not supported: rvLLM runs on one GPU"),
        ({"max_num_sequences": 2}, "unknown argument 'max_num_sequences'"),
        ({"max_num_seqs": 0}, "max-num-seqs: must be at least 1"),
        ({"dtype": "int8"}, "dtype: 'int8' is not one of"),
        ({"tokenizer_mode": "slow"}, "tokenizer_mode='slow' is not supported"),
        ({"quantization": "bitsandbytes"}, "quantization: 'bitsandbytes' is not one of auto, none, fp8"),
    ],
)
def test_settings_are_checked(settings: dict[str, Any], said: str) -> None:
    with pytest.raises(UsageError, match=said):
        engine_config("x", None, settings)


def test_settings_of_vllm_scripts_are_taken() -> None:
    config = engine_config(
        "org/name:a.gguf",
        "v1",
        {"tensor_parallel_size": 1, "enforce_eager": True, "quantization": None, "seed": 3},
    )
    assert (config.model, config.seed, config.quantization) == ("org/name@v1:a.gguf", 3, "auto")


def test_a_missing_model_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="nowhere") as caught:
        LLM(str(tmp_path / "nowhere"))
    assert "\n" not in str(caught.value)


def test_the_package_gives_its_names_lazily() -> None:
    assert set(rvllm.__all__) <= set(dir(rvllm))
    assert all(hasattr(rvllm, name) for name in rvllm.__all__)
    with pytest.raises(AttributeError, match="nothing_such"):
        _ = rvllm.nothing_such
    heavy = "numpy", "tokenizers", "jinja2", "msgspec", "rich"
    code = f"import rvllm, sys; print([m for m in {heavy} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"

"""Real models end to end on the CPU: the tokens, logits and ids that Transformers gives (tests/golden)."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from rvllm import LLM, RequestOutput, SamplingParams
from support.models.fetched import model_path

pytestmark = pytest.mark.models
GOLDEN = Path(__file__).parent / "golden"
NAMES = ["smollm2-135m", "qwen2.5-coder-0.5b"]


def golden(kind: str, name: str) -> list[dict[str, Any]]:
    cases: list[dict[str, Any]] = json.loads((GOLDEN / f"{kind}_{name}.json").read_text(encoding="utf-8"))[
        "cases"
    ]
    return cases


@pytest.fixture(scope="module", params=NAMES)
def loaded(request: pytest.FixtureRequest) -> Iterator[tuple[str, LLM]]:
    with LLM(
        str(model_path(request.param)), device="cpu", max_model_len=512, generation_config="none"
    ) as llm:
        yield request.param, llm


@pytest.fixture(scope="module")
def greedy(loaded: tuple[str, LLM]) -> list[tuple[dict[str, Any], RequestOutput]]:
    """All golden prompts in one batch, beside what Transformers answered to each alone."""
    name, llm = loaded
    cases = golden("greedy", name)
    params = SamplingParams(temperature=0, max_tokens=64, ignore_eos=True, logprobs=20)
    outputs = llm.generate(
        [{"prompt_token_ids": c["prompt_token_ids"]} for c in cases], params, use_tqdm=False
    )
    return list(zip(cases, outputs, strict=True))


def test_greedy_tokens_equal_transformers(greedy: list[tuple[dict[str, Any], RequestOutput]]) -> None:
    assert len(greedy) >= 8
    for case, output in greedy:
        assert output.outputs[0].token_ids == case["output_token_ids"], case["prompt"]
        assert output.outputs[0].text == case["text"]
        assert len(case["output_token_ids"]) == 64


def test_logits_equal_transformers(greedy: list[tuple[dict[str, Any], RequestOutput]]) -> None:
    for case, output in greedy:
        logprobs = output.outputs[0].logprobs
        assert logprobs is not None
        theirs = dict(zip(case["logit_ids"], case["logits"], strict=True))
        assert len(logprobs[0]) == 20
        for token, entry in logprobs[0].items():
            assert entry.logprob + case["log_sum_exp"] == pytest.approx(theirs[token], rel=1e-3), case[
                "prompt"
            ]


def test_token_ids_equal_transformers(loaded: tuple[str, LLM]) -> None:
    name, llm = loaded
    tokenizer = llm.get_tokenizer()
    for case in golden("tokens", name):
        assert tokenizer.encode(case["text"]) == case["ids"], case["text"]
        assert tokenizer.decode(case["ids"]) == case["decoded"]
        assert tokenizer.decode(case["ids"], skip_special_tokens=True) == case["decoded_plain"]


def test_prompts_are_tokenised_as_transformers_does(loaded: tuple[str, LLM]) -> None:
    name, llm = loaded
    for case in golden("greedy", name):
        assert llm.get_tokenizer().encode(case["prompt"]) == case["prompt_token_ids"]


def test_chats_equal_transformers(loaded: tuple[str, LLM]) -> None:
    name, llm = loaded
    for case in golden("chat", name):
        text = llm.get_tokenizer().apply_chat_template(case["messages"], tokenize=False, **case["arguments"])
        assert text == case["text"], case["name"]


def test_a_chat_answers(loaded: tuple[str, LLM]) -> None:
    name, llm = loaded
    question = [{"role": "user", "content": "What is the capital of France? Answer in one word."}]
    answer = llm.chat(question, SamplingParams(temperature=0, max_tokens=32), use_tqdm=False)[0].outputs[0]
    assert "Paris" in answer.text
    if name == "qwen2.5-coder-0.5b":
        assert (answer.finish_reason, answer.stop_reason) == ("stop", None)
        assert answer.token_ids[-1] == llm.get_tokenizer().eos_token_id


def test_a_vllm_script_runs_unchanged_but_for_the_import() -> None:
    """The quickstart shape: prompts, SamplingParams, LLM, generate, outputs[0].text."""
    script = """
from rvllm import LLM, SamplingParams

prompts = ["Hello, my name is", "The president of the United States is"]
sampling_params = SamplingParams(temperature=0.8, top_p=0.95)
llm = LLM(model=MODEL)
outputs = llm.generate(prompts, sampling_params)
for output in outputs:
    prompt = output.prompt
    generated_text = output.outputs[0].text
    print(f"Prompt: {prompt!r}, Generated text: {generated_text!r}")
"""
    script = script.replace("MODEL", repr(str(model_path("smollm2-135m"))))
    environ = {**os.environ, "RVLLM_DEVICE": "cpu", "RVLLM_MAX_MODEL_LEN": "512"}
    command = [sys.executable, "-c", script]
    done = subprocess.run(command, env=environ, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert lines[0].startswith("Prompt: 'Hello, my name is', Generated text: ")
    assert done.stderr == ""

"""Forms as grammars, and through `rvllm.LLM`."""

from __future__ import annotations

import json
import re

import pytest

from rvllm import LLM, SamplingParams, StructuredOutputsParams
from rvllm.errors import UsageError
from rvllm.text.grammar.grammar import grammar_of
from support.models.fetched import model_path


@pytest.mark.parametrize(
    ("form", "reason"),
    [
        ({"json": {"type": "strin"}}, "json: .*strin"),
        ({"json": "{"}, "json: "),
        ({"json": {"not": {}}}, "json: .*not"),
        ({"json": {"type": "array", "uniqueItems": True}}, "json: .*uniqueItems"),
        ({"json": {"$ref": "#/missing"}}, "json: .*missing"),
        ({"json": False}, "json: "),
        ({"regex": "(a"}, "regex: .*group"),
        ({"regex": "a" * 2_000_000}, "regex has 2000000 characters"),
        ({"choice": []}, "choice must"),
        ({"choice": ["a", 1]}, "choice must"),
        ({"choice": ["a"] * 10_001}, "choice takes at most"),
        ({"grammar": "start: missing"}, "grammar: .*missing"),
        ({"grammar": "root ::= missing"}, "grammar: "),
        ({"grammar": "root ::= " + "(" * 5000}, "grammar: "),
        ({"structural_tag": {"triggers": ["<a"], "structures": [{"begin": "<b>", "end": ""}]}}, "no trigger"),
        ({"structural_tag": {"triggers": "<a"}}, "structural_tag must"),
        ({"structural_tag": {"triggers": [], "structures": []}}, "structures must not be empty"),
    ],
    ids=str,
)  # fmt: skip
def test_what_cannot_be_followed_is_refused_with_its_reason(form: dict, reason: str) -> None:
    with pytest.raises(UsageError, match=f"(?s){reason}"):
        grammar_of(StructuredOutputsParams(**form))


def test_one_form_at_a_time() -> None:
    with pytest.raises(UsageError, match="json and regex"):
        StructuredOutputsParams(json={}, regex="a")
    assert grammar_of(StructuredOutputsParams()) is None
    assert grammar_of(StructuredOutputsParams(json=True)) is not None


@pytest.mark.models
def test_forms_in_process() -> None:
    schema = {"type": "object", "properties": {"n": {"type": "integer", "minimum": 1, "maximum": 9}},
              "required": ["n"], "additionalProperties": False}  # fmt: skip
    forms = [
        StructuredOutputsParams(json=schema),
        StructuredOutputsParams(regex="[a-c]{2}[0-9]"),
        StructuredOutputsParams(choice=["left", "right"]),
        StructuredOutputsParams(grammar='root ::= "<" [x-z]{3} ">"'),
    ]
    params = [
        SamplingParams(temperature=1.5, seed=i, max_tokens=60, structured_outputs=form)
        for i, form in enumerate(forms)
    ]
    with LLM(str(model_path("smollm2-135m")), device="cpu", max_model_len=128, num_blocks=64) as llm:
        outputs = [output.outputs[0] for output in llm.generate(["Say:"] * 4, params, use_tqdm=False)]
    assert {output.finish_reason for output in outputs} == {"stop"}
    assert 1 <= json.loads(outputs[0].text)["n"] <= 9
    assert re.fullmatch("[a-c]{2}[0-9]", outputs[1].text)
    assert outputs[2].text in ("left", "right")
    assert re.fullmatch("<[x-z]{3}>", outputs[3].text)

"""Requests with a grammar through the engine: masks, ends, errors, pressure, company."""

from __future__ import annotations

import json
import re
import time

import numpy as np
import pytest

from rvllm.engine.matcher import Matcher
from support.doubles.grammar_engine import SCHEMA, TOKENIZER, core_of, grammar, request, run, text_of


@pytest.fixture(params=[0.0, 1e9], ids=["beside", "inline"])
def costly(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> float:
    monkeypatch.setattr("rvllm.engine.matcher.COSTLY", request.param)
    monkeypatch.setattr("rvllm.engine.grammar.COSTLY", request.param)
    return float(request.param)


@pytest.mark.parametrize("depth", [1, 2, 3])
def test_outputs_follow_their_grammars_beside_free_ones(depth: int, costly: float) -> None:
    core = core_of(depth)
    made = [request(f"json{i}", grammar(json=SCHEMA), temperature=0.3 * i) for i in range(6)]
    made += [request(f"word{i}", grammar(regex="[a-f]{3}-[0-9]{1,4}")) for i in range(4)]
    made += [request(f"free{i}", None, max_tokens=30) for i in range(3)]
    done = run(core, made)
    for name, (tokens, last) in done.items():
        if name.startswith("json"):
            value = json.loads(text_of(tokens))
            assert set(value) == {"name", "ages"} and all(0 <= age <= 120 for age in value["ages"])
        elif name.startswith("word"):
            assert re.fullmatch("[a-f]{3}-[0-9]{1,4}", text_of(tokens))
        if not name.startswith("free"):
            assert (last.finish_reason, last.stop_reason, last.error) == ("stop", None, None)
    stats = core.stats()
    assert stats.masks == core.backend.masked_rows > 0  # type: ignore[attr-defined]
    assert 0 < stats.mask_p50_seconds <= stats.mask_p99_seconds < 1
    if costly and depth == 1:  # nothing is ever in flight while masks are made
        assert stats.mask_exposed_seconds > 0
    assert stats.mask_exposed_seconds < 10
    assert stats.finished["stop"] >= 10


@pytest.mark.usefixtures("costly")
def test_a_request_gives_the_same_in_company_preempted_and_at_any_depth() -> None:
    one = request("long", grammar(regex="[a-z ]{300,320}"))
    one.priority = 1
    alone, last = run(core_of(1), [one])["long"]
    assert last.finish_reason == "stop" and re.fullmatch("[a-z ]{300,320}", text_of(alone))
    others = [request(f"free{i}", None, max_tokens=200, stop_token_ids=()) for i in range(5)]
    tight = core_of(2, blocks=40)
    run(tight, [request("first", one.sampling.grammar, max_tokens=1)])  # so that the next one begins at once
    crowded = run(tight, [others[0], others[1], one, *others[2:]])
    assert tight.stats().preemptions > 0
    assert crowded["long"][0] == alone


def test_max_tokens_cuts_and_an_end_just_there_is_a_stop() -> None:
    form = grammar(choice=["abcabcabc"])
    whole, last = run(core_of(), [request("a", form)])["a"]
    assert text_of(whole) == "abcabcabc" and last.finish_reason == "stop"
    cut, last = run(core_of(), [request("a", form, max_tokens=len(whole) - 1)])["a"]
    assert cut == whole[:-1] and last.finish_reason == "length"
    exact, last = run(core_of(), [request("a", form, max_tokens=len(whole))])["a"]
    assert exact == whole and last.finish_reason == "stop"


def test_min_tokens_delays_the_end_where_the_grammar_can_go_on() -> None:
    tokens, last = run(core_of(), [request("a", grammar(regex="(ab)*"), min_tokens=9, max_tokens=300)])["a"]
    assert last.finish_reason in ("stop", "length")
    assert len(tokens) >= 9 and re.fullmatch("(ab)*a?", text_of(tokens))
    tokens, last = run(core_of(), [request("a", grammar(choice=["x"]), min_tokens=9)])["a"]
    assert text_of(tokens) == "x" and last.finish_reason == "stop"  # nothing could follow


def test_ignored_eos_ends_with_the_grammar() -> None:
    tokens, last = run(core_of(), [request("a", grammar(regex="[xy]{0,40}"), stop_token_ids=())])["a"]
    assert re.fullmatch("[xy]*", text_of(tokens)) and last.finish_reason == "stop"


def test_a_stop_token_the_grammar_needs_is_an_error_that_says_so() -> None:
    needed = TOKENIZER.encode("q", add_special_tokens=False)[0]
    sampling = {"stop_token_ids": (needed,), "min_tokens": 5}
    _, last = run(core_of(), [request("a", grammar(choice=["q1", "q2"]), **sampling)])["a"]
    assert last.finish_reason == "error" and "min_tokens" in (last.error or "")


def test_the_empty_text_ends_at_once() -> None:
    tokens, last = run(core_of(), [request("a", grammar(regex=""))])["a"]
    assert text_of(tokens) == "" and last.finish_reason == "stop"


def test_a_grammar_that_does_not_compile_ends_its_request_only() -> None:
    core = core_of()
    done = run(core, [request("bad", "start: missing"), request("good", grammar(choice=["yes"]))])
    assert done["bad"][1].finish_reason == "error" and "missing" in (done["bad"][1].error or "")
    assert text_of(done["good"][0]) == "yes"
    done = run(core_of(vocabulary=False), [request("early", grammar(choice=["yes"]))])
    assert "vocabulary" in (done["early"][1].error or "")


def test_a_request_can_be_aborted_while_its_grammar_compiles() -> None:
    core = core_of()
    core.add_request(request("a", grammar(json=SCHEMA)))
    assert core.has_work() and core.stats().waiting == 1
    core.abort(["a"])
    (output,) = core.step()
    assert output.finish_reason == "abort" and not core.has_work()


def test_an_equal_grammar_is_compiled_once() -> None:
    core, form = core_of(), grammar(choice=["left", "right"])
    run(core, [request("a", form)])
    core.grammars._compile = None  # type: ignore[method-assign,assignment]  # a second compilation would fail
    tokens, last = run(core, [request("b", form)])["b"]
    assert text_of(tokens) in ("left", "right") and last.finish_reason == "stop"


def test_a_grammar_that_costs_too_much_ends_its_request_only(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("rvllm.engine.matcher.ALLOWANCE", 0.001)
    monkeypatch.setattr("rvllm.engine.matcher.ALLOWANCE_PER_TOKEN", 0.0)
    ambiguous = 'start: a\na: a a | "b" | ""'
    done = run(core_of(), [request("slow", ambiguous, min_tokens=400), request("free", None, max_tokens=9)])
    assert done["free"][1].finish_reason in ("length", "stop")
    last = done["slow"][1]
    assert last.finish_reason == "error" and "too costly" in (last.error or "")


def test_a_slow_mask_holds_up_its_own_sequence_only(monkeypatch: pytest.MonkeyPatch) -> None:
    class SlowMatcher(Matcher):
        def next_mask(self, words: int) -> tuple[np.ndarray, float]:
            time.sleep(0.25)
            return super().next_mask(words)[0], 0.25

    monkeypatch.setattr("rvllm.engine.grammar.Matcher", SlowMatcher)
    core = core_of(2)
    core.add_request(request("slow", grammar(regex="[a-z]{40}")))
    drawn = {"slow": 0, "free": 0}
    while not drawn["slow"]:
        drawn["slow"] += sum(len(output.token_ids) for output in core.step())
    core.add_request(request("free", None, max_tokens=400, stop_token_ids=()))
    began = time.perf_counter()
    while drawn["free"] < 400:
        for output in core.step():
            drawn[output.request_id] += len(output.token_ids)
    took = time.perf_counter() - began
    assert took < 5, "40 masks take 10 s"
    assert drawn["slow"] <= took / 0.25 + 2
    core.abort(["slow"])
    while core.has_work():
        core.step()


def test_many_choices_and_wide_unions_are_followed() -> None:
    core = core_of()
    choices = [f"item {i} of many" for i in range(10_000)]
    union = {"anyOf": [{"type": "object", "properties": {f"k{i}": {"const": i}}} for i in range(300)]}
    done = run(core, [request("choice", grammar(choice=choices)), request("union", grammar(json=union))])
    assert text_of(done["choice"][0]) in choices
    assert done["union"][1].finish_reason in ("stop", "length"), done["union"][1].error
    assert core.stats().mask_seconds < 2


def test_a_grammar_beyond_the_limits_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("rvllm.engine.grammar.MAX_ITEMS", 10)
    union = {"anyOf": [{"type": "object", "properties": {f"k{i}": {"const": i}}} for i in range(300)]}
    _, last = run(core_of(), [request("union", grammar(json=union))])["union"]
    assert last.finish_reason == "error" and "too complex" in (last.error or "")


def test_a_grammar_that_allows_no_text_says_so() -> None:
    _, last = run(core_of(), [request("endless", grammar(json={"$ref": "#"}))])["endless"]
    assert last.finish_reason == "error" and "allows no text" in (last.error or "")


@pytest.mark.parametrize("beside", [False, True])
@pytest.mark.parametrize("company", [0, 6])
def test_a_mask_beyond_the_limits_is_an_error_and_no_end(
    beside: bool, company: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Such a matcher's mask allows EOS wherever the text stands."""
    monkeypatch.setattr("rvllm.engine.grammar.COSTLY", 0.0 if beside else 1e9)
    monkeypatch.setattr("rvllm.engine.grammar.MAX_ITEMS", 200)
    keys = {f"k{i}": {"const": i} for i in range(300)}
    wide = {"type": "object", "properties": {"first": {"const": 1}, **keys}, "required": ["first"]}
    made = [request(f"wide{i}", grammar(json=wide)) for i in range(1 + company)]
    done = run(core_of(), [*made, request("good", grammar(choice=["yes"]))])
    for name, (_, last) in done.items():
        if name.startswith("wide"):
            assert last.finish_reason == "error" and "too complex" in (last.error or ""), last
    assert text_of(done["good"][0]) == "yes"

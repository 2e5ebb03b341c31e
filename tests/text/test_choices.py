"""From prompts to engine messages, and from engine outputs to a choice's text."""

from __future__ import annotations

from itertools import count
from typing import Any

import numpy as np
import pytest

from rvllm.backends.base import SamplingSpec, SlotStart, TokenLogprobs
from rvllm.backends.cuda.ops.sampling.slots import pack_starts
from rvllm.engine.ipc.messages import ModelFacts, Output
from rvllm.engine.sampling_params import SamplingParams
from rvllm.errors import UsageError
from rvllm.text.outputs import RequestMetrics
from rvllm.text.pending import PendingRequest
from rvllm.text.processor import Choice, Delta
from rvllm.text.requests import RequestMaker, prompt_tokens, to_sampling
from support.text import tiny_tokenizers as tiny

TOKENIZER = tiny.byte_level()
EOS = TOKENIZER.eos_token_id
assert EOS is not None


def facts(**changes: Any) -> ModelFacts:
    known: dict[str, Any] = {"architecture": "x", "model_path": "x", "vocab_size": 500, "max_model_len": 20}
    return ModelFacts(**(known | {"eos_token_ids": [7]} | changes))


def test_one_message_a_choice() -> None:
    made = RequestMaker(facts()).make(
        "r", [1, 2], SamplingParams(n=3, seed=5, max_tokens=4), priority=2, arrival=1.5
    )
    assert [m.request_id for m in made] == ["r-0", "r-1", "r-2"]
    assert [m.sampling.seed for m in made] == [5, 6, 7]
    assert {(m.priority, m.arrival, tuple(m.prompt_token_ids)) for m in made} == {(2, 1.5, (1, 2))}


def test_seeds_fit_in_64_bits_and_come_from_the_engines() -> None:
    wrapped = RequestMaker(facts()).make("r", [1], SamplingParams(n=2, seed=2**64 - 1))
    assert [m.sampling.seed for m in wrapped] == [2**64 - 1, 0]
    negative = RequestMaker(facts()).make("r", [1], SamplingParams(seed=-1))
    assert negative[0].sampling.seed == 2**64 - 1
    params = SamplingParams()
    first, second = RequestMaker(facts(), 1), RequestMaker(facts(), 1)
    seeds = [first.make("r", [1], params)[0].sampling.seed for _ in range(3)]
    assert seeds == [second.make("r", [1], params)[0].sampling.seed for _ in range(3)]
    assert len(set(seeds)) == 3
    assert RequestMaker(facts(), 2).make("r", [1], params)[0].sampling.seed not in seeds


def test_lengths_are_cut_to_the_context() -> None:
    assert to_sampling(SamplingParams(max_tokens=None), 5, facts()).max_tokens == 15
    assert to_sampling(SamplingParams(max_tokens=100, min_tokens=90), 5, facts()).max_tokens == 15
    assert to_sampling(SamplingParams(max_tokens=100, min_tokens=90), 5, facts()).min_tokens == 15
    assert to_sampling(SamplingParams(max_tokens=3), 5, facts()).max_tokens == 3


def test_stop_tokens_hold_the_models_own_unless_ignored() -> None:
    assert to_sampling(SamplingParams(stop_token_ids=[3, 7]), 1, facts()).stop_token_ids == (3, 7)
    assert to_sampling(SamplingParams(stop_token_ids=[3]), 1, facts()).stop_token_ids == (3, 7)
    assert to_sampling(SamplingParams(stop_token_ids=[3], ignore_eos=True), 1, facts()).stop_token_ids == (3,)


@pytest.mark.parametrize(
    ("prompt", "params", "said"),
    [
        ([], {}, "prompt must not be empty"),
        (list(range(20)), {}, "prompt has 20 tokens, but the context holds 20"),
        ([1, 500], {}, "token id 500 is not in the vocabulary of 500"),
        ([-1], {}, "token id -1"),
        ([1], {"logit_bias": {500: 1.0}}, "logit_bias: token id 500"),
        ([1], {"logit_bias": {-1: 1.0}}, "logit_bias: token id -1"),
        ([1], {"logit_bias": {1: 101.0}}, r"logit_bias must be in \[-100, 100\]"),
        ([1], {"logit_bias": {1: float("nan")}}, r"logit_bias must be in \[-100, 100\]"),
        ([1], {"stop_token_ids": [500]}, "stop_token_ids: token id 500"),
        (
            [1],
            {"logit_bias": dict.fromkeys(range(1025), 1.0)},
            "logit_bias takes at most 1024 tokens, got 1025",
        ),
        ([1], {"stop_token_ids": list(range(130)), "min_tokens": 1}, "stop_token_ids: min_tokens .* 128"),
    ],
)
def test_bad_requests_name_the_parameter(prompt: list[int], params: dict[str, Any], said: str) -> None:
    with pytest.raises(UsageError, match=said):
        RequestMaker(facts()).make("r", prompt, SamplingParams(**params))


def test_whatever_is_taken_fits_a_slot_of_the_gpu() -> None:
    wide = facts(vocab_size=5000)
    params = SamplingParams(
        logit_bias=dict.fromkeys(range(1024), 1.0), stop_token_ids=[*range(100, 227)] * 3, min_tokens=2
    )
    sampling = to_sampling(params, 1, wide)
    assert len(sampling.stop_token_ids) == 128  # each once, and the model's own
    spec = SamplingSpec(logit_bias=sampling.logit_bias, stop_token_ids=sampling.stop_token_ids, min_tokens=2)
    pack_starts([SlotStart(0, spec, np.zeros(1, np.int32), 1)], 5000)
    many = SamplingParams(
        stop_token_ids=list(range(300))
    )  # nothing is held back: only the host looks at them
    assert len(to_sampling(many, 1, wide).stop_token_ids) == 300


def test_the_longest_prompt_leaves_one_token() -> None:
    (made,) = RequestMaker(facts()).make("r", [1] * 19, SamplingParams(max_tokens=None))
    assert made.sampling.max_tokens == 1


def test_generation_config_gives_defaults() -> None:
    given = {
        "temperature": 0.6,
        "top_k": 20,
        "max_new_tokens": 9,
        "do_sample": True,
        "top_p": None,
        "eos_token_id": 7,
    }
    maker = RequestMaker(facts(generation_config=given))
    assert maker.defaults == {"temperature": 0.6, "top_k": 20, "max_tokens": 9}
    with pytest.raises(UsageError, match=r"generation_config: temperature .*--generation-config none"):
        RequestMaker(facts(generation_config={"temperature": -1}))
    with pytest.raises(UsageError, match="generation_config: "):
        RequestMaker(facts(generation_config={"top_p": "a"}))


def test_prompts_come_in_several_forms() -> None:
    ids = TOKENIZER.encode("hello")
    assert prompt_tokens("hello", TOKENIZER) == ("hello", ids)
    assert prompt_tokens({"prompt": "hello"}, TOKENIZER) == ("hello", ids)
    assert prompt_tokens({"prompt_token_ids": [1, 2]}, None) == (None, [1, 2])
    assert prompt_tokens({"prompt_token_ids": np.array([1, 2]), "prompt": "x"}, None) == ("x", [1, 2])
    assert prompt_tokens([3, 4], None) == (None, [3, 4])


@pytest.mark.parametrize(
    "prompt", [3, {"text": "x"}, {"prompt_token_ids": [1.5]}, ["a"], [True], {"prompt_token_ids": "ab"}]
)
def test_other_prompts_are_refused(prompt: Any) -> None:
    with pytest.raises(UsageError, match="prompt"):
        prompt_tokens(prompt, TOKENIZER)


def test_text_needs_a_tokenizer() -> None:
    with pytest.raises(UsageError, match="skip_tokenizer_init"):
        prompt_tokens("hello", None)


def run(
    text: str, *, final: str | None = "length", at_once: bool = False, **params: Any
) -> tuple[Choice, list[Delta]]:
    """A choice fed with a text's tokens, one an Output or all in one."""
    choice = Choice(TOKENIZER, SamplingParams(**params))
    ids = TOKENIZER.encode(text)
    groups = [ids] if at_once else [[i] for i in ids]
    deltas = [
        choice.feed(Output("r", group, finish_reason=final if k == len(groups) - 1 else None))
        for k, group in enumerate(groups)
    ]
    return choice, deltas


@pytest.mark.parametrize("at_once", [True, False])
def test_a_choice_collects_text_and_tokens(at_once: bool) -> None:
    choice, deltas = run("héllo 😀 world", at_once=at_once)
    assert choice.text == "".join(d.text for d in deltas) == "héllo 😀 world"
    assert choice.token_ids == TOKENIZER.encode("héllo 😀 world")
    assert [d.finish_reason for d in deltas][-1] == choice.finish_reason == "length"
    assert not any(d.abort_needed for d in deltas)


@pytest.mark.parametrize("at_once", [True, False])
@pytest.mark.parametrize("include", [True, False])
def test_a_stop_string_ends_a_choice(at_once: bool, include: bool) -> None:
    choice, deltas = run(
        "hello wor|ld and more", at_once=at_once, final=None, stop=["r|l"], include_stop_str_in_output=include
    )
    assert choice.text == "".join(d.text for d in deltas) == ("hello wor|l" if include else "hello wo")
    assert (choice.finish_reason, choice.stop_reason) == ("stop", "r|l")
    assert [d.abort_needed for d in deltas].count(True) == 1
    assert len([d for d in deltas if d.finish_reason]) == 1
    assert TOKENIZER.decode(choice.token_ids).startswith("hello wor|l")
    assert len(choice.token_ids) < len(TOKENIZER.encode("hello wor|ld and more"))


def test_a_stop_string_on_the_last_token_needs_no_abort() -> None:
    choice, deltas = run("hello|", stop=["|"])
    assert (choice.text, choice.finish_reason, choice.stop_reason) == ("hello", "stop", "|")
    assert not deltas[-1].abort_needed


def test_held_text_comes_out_at_the_end() -> None:
    choice, deltas = run("hello ab", stop=["abc"])
    assert choice.text == "hello ab"
    assert deltas[-1].finish_reason == "length"


def test_min_tokens_lets_stop_strings_pass() -> None:
    count = len(TOKENIZER.encode("a.b"))
    assert run("a.b.c", stop=["."], min_tokens=count)[0].text == "a.b"
    assert run("a.b.c", stop=["."])[0].text == "a"
    count = len(TOKENIZER.encode("a."))  # the stop string ends with the last token that must come
    assert run("a.b.c", stop=["."], min_tokens=count)[0].text == "a.b"
    assert run("a.b.c", stop=["."], min_tokens=count - 1)[0].text == "a"


def test_the_stop_token_is_no_text() -> None:
    for include, skip, text in [
        (False, True, "hi"),
        (True, True, "hi"),
        (True, False, "hi<|im_end|>"),
        (False, False, "hi"),
    ]:
        params = {"include_stop_str_in_output": include, "skip_special_tokens": skip}
        choice, _ = run("hi<|im_end|>", final="stop", **params)
        assert (choice.text, choice.token_ids[-1], choice.stop_reason) == (text, EOS, None)


def test_after_the_end_everything_is_ignored() -> None:
    choice, _ = run("hello|", final=None, stop=["|"])
    late = choice.feed(Output("r", [5, 6], finish_reason="abort"))
    assert late == Delta()
    assert (choice.text, choice.finish_reason) == ("hello", "stop")


def test_without_a_tokenizer_there_are_tokens_only() -> None:
    for asked, told in (([2], 2), ([], None)):  # an end of the model's own is not told
        params = SamplingParams(stop_token_ids=asked), SamplingParams(stop_token_ids=asked, detokenize=False)
        for choice in (Choice(None, params[0]), Choice(TOKENIZER, params[1])):
            delta = choice.feed(Output("r", [1, 2], finish_reason="stop", stop_reason=2))
            assert (delta.text, delta.token_ids, delta.stop_reason) == ("", [1, 2], told)


def test_logprobs_follow_the_tokens_that_are_kept() -> None:
    choice = Choice(TOKENIZER, SamplingParams(logprobs=1, prompt_logprobs=0, stop=["b"]))
    a, b, c = (TOKENIZER.encode(x)[0] for x in "abc")
    entries = [TokenLogprobs(t, -float(t), 2, [c, a], [-0.5, -0.7]) for t in (a, b, c)]
    prompt = [TokenLogprobs(9, -1.0, 4, [], [])]
    delta = choice.feed(Output("r", [a, b, c], entries, prompt, cached_tokens=3))
    assert delta.token_ids == [a, b]
    assert delta.logprobs == entries[:2]
    assert choice.prompt_logprobs == delta.prompt_logprobs == prompt
    assert choice.cached_tokens == 3
    output = choice.to_output(TOKENIZER)
    assert output.cumulative_logprob == -float(a + b)
    assert output.logprobs is not None
    assert [list(entry) for entry in output.logprobs] == [[a, c], [b, c]]
    assert (output.logprobs[0][a].rank, output.logprobs[0][a].decoded_token) == (2, "a")
    assert (output.logprobs[0][c].rank, output.logprobs[0][c].logprob) == (1, -0.5)


def test_an_error_is_passed_on() -> None:
    choice = Choice(TOKENIZER, SamplingParams())
    delta = choice.feed(Output("r", [], finish_reason="error", error="no room"))
    assert (delta.finish_reason, delta.error) == ("error", "no room")


def test_times_are_those_of_the_first_token_and_the_end(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = count(10)
    monkeypatch.setattr("rvllm.text.pending.time.time", lambda: float(next(clock)))
    choices = {"r": Choice(None, SamplingParams())}
    request = PendingRequest("r", None, [1], SamplingParams(), [], choices, RequestMetrics(arrival_time=4.0))
    for token, end in ((1, None), (2, None), (3, "length")):
        request.feed(Output("r", [token], finish_reason=end))
    metrics = request.to_output(None).metrics
    assert metrics is not None and metrics.time_to_first_token == 6.0
    assert 11.0 <= (metrics.finished_time or 0) <= 13.0

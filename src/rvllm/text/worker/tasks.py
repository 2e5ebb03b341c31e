"""What workers are asked: functions of the tokenizer and of what a client sent."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rvllm.engine.ipc.messages import ModelFacts
from rvllm.engine.sampling_params import StructuredOutputsParams
from rvllm.errors import UsageError
from rvllm.text.chat.template import template_traits
from rvllm.text.embedding import text_tokens
from rvllm.text.grammar.grammar import check, grammar_of, try_out, with_lead
from rvllm.text.grammar.limits import check_schema
from rvllm.text.tokenizers.tokenizer import Tokenizer
from rvllm.text.tools.calls_grammar import Function, calls_or_form, forced_calls, offered_calls
from rvllm.text.tools.choose import ToolFormat, tool_format


def encode(tokenizer: Tokenizer, text: str, add_special_tokens: bool, limit: int | None) -> list[int] | None:
    """Token ids of a text; None where its size alone says that it has `limit` or more."""
    if limit is not None and tokenizer.surely_reaches(text, limit):
        return None
    return tokenizer.encode(text, add_special_tokens)


def prompt(
    tokenizer: Tokenizer,
    template: str | None,
    messages: Sequence[Mapping[str, Any]],
    options: Mapping[str, Any],
    variables: Mapping[str, Any],
    add_special_tokens: bool,
    limit: int,
) -> tuple[str, list[int] | None]:
    """What `Tokenizer.render` and then `encode` give: one way to the worker and back instead of two."""
    text = tokenizer.render(template, messages, options, variables)
    return text, encode(tokenizer, text, add_special_tokens, limit)


def check_template(tokenizer: Tokenizer, template: str) -> None:
    """Raises UsageError when a template does not compile."""
    template_traits(template)


def try_template(tokenizer: Tokenizer, template: str | None, parser: str) -> None:
    """Does with a chat template what the server does with it at its start; what is wrong, requests will say.

    parser: `--tool-call-parser`.
    """
    with contextlib.suppress(UsageError):
        if template is None or template in tokenizer.chat_templates:
            template = tokenizer.get_chat_template(template, tools=True)
        tool_format(parser, template)
        _ = template_traits(template).places_tools


def fill_in(
    tokenizer: Tokenizer, before: list[int], after: str, add_special_tokens: bool, limit: int
) -> list[int] | None:
    """Token ids of a prompt around a gap; None where the text behind it surely has `limit` or more."""
    if tokenizer.surely_reaches(after, limit):
        return None
    return tokenizer.encode_around(before, after, add_special_tokens)


def embedding_tokens(
    tokenizer: Tokenizer, text: str, facts: ModelFacts, truncate: int | None, prompt_name: str | None
) -> list[int]:
    """Token ids of a text for a model that pools."""
    return text_tokens(text, tokenizer, facts, truncate, prompt_name)[1]


def token_texts(tokenizer: Tokenizer, tokens: list[int]) -> list[str]:
    """Each token's text by itself."""
    return [tokenizer.token_text(token) for token in tokens]


@dataclass(frozen=True)
class Calls:
    """The tools an answer may use. forced: those of which it must call one; None: any, or none."""

    known: ToolFormat
    functions: tuple[Function, ...]
    forced: tuple[Function, ...] | None
    parallel: bool


def answer_grammar(
    tokenizer: Tokenizer,
    form: StructuredOutputsParams | None,
    calls: Calls | None,
    thoughts: tuple[str, str, bool] | None,
) -> str | None:
    """The grammar of an answer, checked and once compiled; None for a free one.

    thoughts: the marks around a model's thoughts, and whether the prompt has opened them.
    Raises UsageError.
    """
    found = grammar_of(form)
    if calls is not None:
        found = _with_calls(tokenizer, calls, found)
    if found is not None and thoughts is not None:
        begin, end, opened = thoughts
        found = with_lead(found, begin, end, tokenizer, opened=opened)
        check(found, "grammar")
    if found is not None:
        try_out(found, tokenizer)
    return found


def _with_calls(tokenizer: Tokenizer, calls: Calls, form: str | None) -> str | None:
    """The grammar of an answer that may use tools, or has to; None for a free one."""
    known, parallel = calls.known, calls.parallel
    for function in calls.functions:
        check_schema(function.parameters, "tools: parameters")
    if calls.forced is not None:
        found: str | None = forced_calls(known, calls.forced, tokenizer, parallel=parallel)
    elif form is not None:
        found = calls_or_form(known, calls.functions, tokenizer, form, parallel=parallel)
    else:
        found = offered_calls(known, calls.functions, tokenizer, parallel=parallel)
    if found is not None:
        try:
            check(found, "parameters")
        except UsageError as error:
            raise UsageError(f"tools: {error}") from None
    return found

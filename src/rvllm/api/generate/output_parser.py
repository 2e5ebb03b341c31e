"""What an answer consists of: thoughts, words and tool calls, out of the text of one choice."""

from __future__ import annotations

import random
import string
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from rvllm.api.generate.generation import Service
from rvllm.api.http.body import MAX_TOOLS, check_count
from rvllm.api.http.errors import invalid
from rvllm.text.chat.reasoning import ReasoningSplitter
from rvllm.text.tools.calls_grammar import Function
from rvllm.text.tools.choose import ToolFormat, unread_format
from rvllm.text.tools.events import CallStart, Event, Text

_NAME_LENGTH = 256


@dataclass(frozen=True)
class ToolPlan:
    """The tools of a request, and what the answer may do with them.

    forced: the functions of which the answer must call one; None when it may call any of `functions` or none.
    """

    known: ToolFormat
    functions: tuple[Function, ...]
    forced: tuple[Function, ...] | None
    parallel: bool


def tool_plan(
    service: Service,
    tools: Sequence[Mapping[str, Any]] | None,
    choice: str | Mapping[str, Any] | None,
    parallel: bool | None,
) -> ToolPlan | None:
    """The plan of OpenAI's `tools`, `tool_choice` and `parallel_tool_calls`; None without tools.

    Raises a 400 naming the field: tools that are no functions, a choice that names none of them, or a model
    whose calls we cannot read.
    """
    check_count(tools or (), MAX_TOOLS, "tools")
    functions = [_function(tool, i) for i, tool in enumerate(tools or ())]
    if not functions:
        if choice not in (None, "none", "auto"):
            raise invalid("tool_choice needs tools", "tool_choice")
        return None
    forced = _forced(functions, choice)
    if choice == "none":
        return None
    if service.tools is None:
        unread = unread_format(service.template)
        shown = f"this model writes calls as {unread}, which this server does not read"
        if unread is None:
            shown = "this model's chat template does not show how it writes tool calls"
        raise invalid(
            f"tools: {shown}; start the server with --tool-call-parser, or send tool_choice none",
            "tools",
        )
    if not service.places_tools:
        raise invalid(
            "tools: this model's chat template has no place for tools, so it would never see them; "
            "start the server with --chat-template FILE, or send tool_choice none",
            "tools",
        )
    named = isinstance(choice, Mapping)
    return ToolPlan(service.tools, tuple(functions), forced, parallel is not False and not named)


def allowed_tools(
    tools: list[dict[str, Any]] | None, choice: str | dict[str, Any] | None
) -> tuple[list[dict[str, Any]] | None, str | dict[str, Any] | None]:
    """(tools, choice) of a request; a choice of allowed tools leaves out the others. Raises a 400."""
    if not isinstance(choice, Mapping) or choice.get("type") != "allowed_tools":
        return tools, choice
    given = choice.get("allowed_tools")
    mode = given.get("mode", "auto") if isinstance(given, Mapping) else None
    listed = given.get("tools") if isinstance(given, Mapping) else None
    if mode not in ("auto", "required") or not isinstance(listed, list):
        raise invalid(
            "tool_choice.allowed_tools must have a mode, auto or required, and tools", "tool_choice"
        )
    functions = [tool.get("function") for tool in listed if isinstance(tool, Mapping)]
    names = [function.get("name") for function in functions if isinstance(function, Mapping)]
    kept = [tool for tool in tools or () if _name_of(tool) in names]
    if not kept:
        raise invalid("tool_choice.allowed_tools names none of the tools", "tool_choice")
    return kept, mode


def _name_of(tool: Mapping[str, Any]) -> Any:
    function = tool.get("function")
    return function.get("name") if isinstance(function, Mapping) else None


def _function(tool: Mapping[str, Any], index: int) -> Function:
    where = f"tools[{index}]"
    function = tool.get("function")
    if tool.get("type", "function") != "function" or not isinstance(function, Mapping):
        raise invalid(f"{where} must be of type function, with a function", where)
    name, parameters = function.get("name"), function.get("parameters")
    if not isinstance(name, str) or not 0 < len(name) <= _NAME_LENGTH:
        raise invalid(f"{where}.function.name must be a string of 1 to {_NAME_LENGTH} characters", where)
    if parameters is not None and not isinstance(parameters, dict):
        raise invalid(f"{where}.function.parameters must be a JSON schema", where)
    return Function(name, parameters, function.get("strict") is True)


def _forced(functions: list[Function], choice: str | Mapping[str, Any] | None) -> tuple[Function, ...] | None:
    if choice in (None, "auto", "none"):
        return None
    if choice == "required":
        return tuple(functions)
    function = choice.get("function") if isinstance(choice, Mapping) else None
    name = function.get("name") if isinstance(function, Mapping) else None
    if name is None:
        raise invalid(
            "tool_choice must be none, auto, required or the name of a function: "
            '{"type": "function", "function": {"name": ...}}',
            "tool_choice",
        )
    found = tuple(f for f in functions if f.name == name)
    if not found:
        raise invalid(f"tool_choice names {str(name)[:80]!r}, which is none of the tools", "tool_choice")
    return found[:1]


@dataclass
class Call:
    """A tool call: its id, and what has come of it."""

    id: str
    name: str
    arguments: str = ""


@dataclass
class OutputParser:
    """Takes one choice's text apart. Without thoughts and tools, the text is the words as it is.

    reasoning_tokens: those of the thoughts so far, with their marks.
    """

    thoughts: ReasoningSplitter | None
    plan: ToolPlan | None
    calls: list[Call] = field(default_factory=list)
    reasoning_tokens: int = 0
    _undecided: int = 0  # tokens that may belong to the mark that begins thoughts

    def __post_init__(self) -> None:
        self._parser = None
        if self.plan is not None:
            self._parser = self.plan.known.parser(
                [function.name for function in self.plan.functions],
                {function.name: function.parameters for function in self.plan.functions},
            )

    def feed(self, text: str, final: bool, tokens: int = 0) -> tuple[str, list[Event]]:
        """(thoughts, what else was found in its order: words, beginnings of calls with ids, arguments).

        tokens: how many the text came from.
        """
        thoughts, words = "", text
        if self.thoughts is not None:
            inside = self.thoughts.inside
            thoughts, words = self.thoughts.feed(text, final)
            self._count(tokens, inside or self.thoughts.inside or bool(thoughts), self.thoughts.thinking)
        if self._parser is None:
            return thoughts, [Text(words)] if words else []
        events = self._parser.feed(words, final)
        if self.plan is not None and not self.plan.parallel:  # all but the first call are dropped
            events = [event for event in events if isinstance(event, Text) or event.index == 0]
        for event in events:
            if isinstance(event, CallStart):
                event.id = event.id or self._new_id()
                self.calls.append(Call(event.id, event.name))
            elif not isinstance(event, Text):
                self.calls[event.index].arguments += event.text
        return thoughts, events

    def _count(self, tokens: int, thought: bool, undecided: bool) -> None:
        self._undecided += tokens
        if thought:
            self.reasoning_tokens += self._undecided
        if thought or not undecided:
            self._undecided = 0

    def _new_id(self) -> str:
        """An id for a call; Mistral's templates insist on nine letters and digits."""
        assert self.plan is not None
        if self.plan.known.name.startswith("mistral"):
            return "".join(random.choices(string.ascii_letters + string.digits, k=9))
        return "call_" + "".join(random.choices(string.ascii_letters + string.digits, k=24))

    def finish_reason(self, reason: str | None) -> str | None:
        """The choice's finish reason in OpenAI's words: a stop after calls is "tool_calls"."""
        return "tool_calls" if reason == "stop" and self.calls else reason


def marks_are_special(service: Service, plan: ToolPlan | None) -> bool:
    """Whether marks of calls or thoughts are special tokens, which must then stay in the text to be seen."""
    marks: list[str] = []
    if plan is not None:
        parser = plan.known.parser
        marks += [*parser.marks, *parser.hidden, *parser.inner]
    if service.reasoning is not None:
        marks += [service.reasoning.begin, service.reasoning.end]
    tokenizer = service.tokenizer
    return any(tokenizer.backend.token_to_id(mark) in tokenizer.special_ids for mark in marks)

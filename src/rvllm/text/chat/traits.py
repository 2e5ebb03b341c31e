"""What a chat template makes of messages, found by rendering small trial conversations with it.

Templates differ in what they can be given: some join a call's arguments as text, some walk through them as
an object; some look for `content is none` to find calls, some fail on it. Guessing from a template's source
goes wrong with the next one, so the template itself is asked.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from typing import Any

Render = Callable[[Mapping[str, Any]], str | None]
"""Renders a template's values; None where the template fails."""

ABSENT = object()
"""Stands for a message without the field, where None is a field that is null."""

USER, CALL, KEY, VALUE, RESULT = "zquser", "zqcall", "zqkey", "zqvalue", "zqresult"
ARGUMENTS = {KEY: VALUE}
TEXT_ARGUMENTS = f'{{"{KEY}": "{VALUE}"}}'
_IDENTITY = "zq1234567"  # Mistral's templates insist on nine letters and digits
TOOL = {
    "type": "function",
    "function": {
        "name": CALL,
        "description": "A trial.",
        "parameters": {
            "type": "object",
            "properties": {KEY: {"type": "string", "description": "A text."}},
            "required": [KEY],
        },
    },
}
_TOKENS = {name: f"<{name}>" for name in ("bos_token", "eos_token", "unk_token", "pad_token")}
# In the order in which they are tried in place of one that does not do.
_CONTENTS: dict[str, Any] = {"null": None, "absent": ABSENT, "empty": ""}


class TemplateTraits:
    """What a template wants; each answer costs a few renderings, once."""

    def __init__(self, render: Render, loops_over_content: bool) -> None:
        """loops_over_content: whether the template iterates over some message's content."""
        self._render = render
        self.loops_over_content = loops_over_content

    @cached_property
    def wants_parts(self) -> bool:
        """Whether the template shows text only when content is a list of parts."""
        if not self.loops_over_content:
            return False
        as_text = self._conversation([{"role": "user", "content": USER}])
        if as_text is not None and USER in as_text:
            return False
        parts = [{"type": "text", "text": USER}]
        as_parts = self._conversation([{"role": "user", "content": parts}])
        return as_parts is not None and USER in as_parts

    @cached_property
    def wants_text_arguments(self) -> bool:
        """Whether a call's arguments must be JSON text to be shown as JSON."""
        return not self._shows(ARGUMENTS) and self.takes_text_arguments

    @cached_property
    def takes_text_arguments(self) -> bool:
        """Whether a call is shown with arguments that are text."""
        return self._shows(TEXT_ARGUMENTS)

    def _shows(self, arguments: Any) -> bool:
        """Whether a call is shown with some content, and its arguments not as Python spells them."""
        turns = (turn or "" for turn in self._turns(arguments).values())
        return any(VALUE in turn and f"'{KEY}': '" not in turn for turn in turns)

    def _turns(self, arguments: Any) -> dict[str, str | None]:
        """The turn that is a call, for each content that it may have; None where the template fails.

        Some templates insist on an answer to each call, some take none: one that any content lets through
        stands behind it.
        """
        turns: dict[str, str | None] = {}
        for answered in (True, False):
            turns = {name: self.call(arguments, content, answered) for name, content in _CONTENTS.items()}
            if any(turn is not None and _names_call(turn) for turn in turns.values()):
                return turns
        return turns

    @cached_property
    def places_tools(self) -> bool:
        """Whether tools that are offered appear in the prompt; True where the trials say nothing."""
        talks = (
            [{"role": "user", "content": self._user()}],
            [
                {"role": "system", "content": self._user()},
                {"role": "user", "content": self._user()},
            ],
        )
        shown = [self._conversation(talk) for talk in talks]
        return all(text is None for text in shown) or any(text and CALL in text for text in shown)

    def content(self, given: Any, *, with_calls: bool) -> Any:
        """What does for an assistant's content that is None, ABSENT or "": itself, if it can."""
        return self._contents[with_calls].get(_name(given), given)

    @cached_property
    def _contents(self) -> dict[bool, dict[str, Any]]:
        """By whether there are calls: what to give in place of which content."""
        arguments = TEXT_ARGUMENTS if self.wants_text_arguments else ARGUMENTS
        turns = self._turns(arguments)
        renders = {name for name, turn in turns.items() if turn is not None and "None" not in turn}
        shows = {name for name in renders if _names_call(turns[name] or "")}
        asked = {"role": "user", "content": self._user(RESULT)}
        turns = {name: self._turn(_assistant(content), asked) for name, content in _CONTENTS.items()}
        empty = {name for name, turn in turns.items() if turn is not None and "None" not in turn}
        return {True: _stand_ins(shows or renders), False: _stand_ins(empty)}

    @cached_property
    def written_call(self) -> str | None:
        """What the template writes for a turn that is one call of CALL with ARGUMENTS, headers included."""
        turns = self._turns(TEXT_ARGUMENTS if self.wants_text_arguments else ARGUMENTS)
        shown = [turn for turn in turns.values() if turn is not None]
        return next(
            (turn for turn in shown if _names_call(turn) and "None" not in turn), shown[0] if shown else None
        )

    @cached_property
    def answer_header(self) -> str:
        """What stands between the user's words and an answer in words; "" where the trial says nothing."""
        return self._turn({"role": "assistant", "content": self._user(RESULT)}) or ""

    def call(self, arguments: Any, content: Any, answered: bool) -> str | None:
        """The text between the user's words and the tool's answer; None where the template fails."""
        call = {"id": _IDENTITY, "type": "function", "function": {"name": CALL, "arguments": arguments}}
        answer = {"role": "tool", "tool_call_id": _IDENTITY, "name": CALL, "content": RESULT}
        return self._turn({**_assistant(content), "tool_calls": [call]}, *([answer] if answered else []))

    def _turn(self, *messages: Mapping[str, Any]) -> str | None:
        """What messages behind the user's become, up to RESULT; None where the template fails."""
        text = self._conversation([{"role": "user", "content": self._user()}, *messages])
        return None if text is None else text.rpartition(USER)[2].partition(RESULT)[0]

    def _user(self, text: str = USER) -> Any:
        return [{"type": "text", "text": text}] if self.wants_parts else text

    def _conversation(self, messages: Sequence[Mapping[str, Any]]) -> str | None:
        for tools in ([TOOL], None):
            values = {**_TOKENS, "messages": list(messages), "tools": tools, "documents": None}
            text = self._render({**values, "add_generation_prompt": False})
            if text is not None:
                return text
        return None


def _assistant(content: Any) -> dict[str, Any]:
    return {"role": "assistant"} if content is ABSENT else {"role": "assistant", "content": content}


def _names_call(turn: str) -> bool:
    return CALL in turn or VALUE in turn


def _stand_ins(fitting: set[str]) -> dict[str, Any]:
    """For each content itself if it fits, else the first that does; itself when none does."""
    best = next((name for name in _CONTENTS if name in fitting), None)
    return {name: _CONTENTS[name if name in fitting or best is None else best] for name in _CONTENTS}


def _name(content: Any) -> str:
    return "absent" if content is ABSENT else "null" if content is None else "empty"

"""Gemma's calls: `call:NAME{key:value,...}`, an object whose keys are bare and whose strings have marks."""

from __future__ import annotations

import json
import re
from typing import Any

from rvllm.text.tools.formats import LONGEST_NAME, ToolParser
from rvllm.text.tools.reader import END, Reading
from rvllm.text.tools.scan import read_value
from rvllm.text.tools.values import json_or_text

_DEEPEST = 32  # objects and lists within each other; deeper ones are taken as text
_CALL = "call:"
_BARE_FLOAT = re.compile(r"-?([0-9]{1,300}\.|\.[0-9]{1,300})")


class Gemma4(ToolParser):
    """`<|tool_call>call:NAME{KEY:<|"|>text<|"|>,KEY:3,KEY:[...],KEY:{...}}<tool_call|>`: Gemma 4."""

    marks = ("<|tool_call>",)
    hidden = ("<tool_call|>",)
    quote = '<|"|>'
    inner = (quote,)

    def call_after(self, mark: str) -> Reading[None]:
        before = mark + (yield from self.reader.skip_space())
        begins = yield from self.reader.starts_with(_CALL)
        name, brace = "", ""
        if begins:
            name, brace = yield from self.reader.until("{", "\n")
        if brace != "{" or not 0 < len(name.strip()) <= LONGEST_NAME:
            self.say(before + begins + name + brace)
            return
        self.begin(name.strip())
        yield from self._object(1)

    def _object(self, depth: int) -> Reading[None]:
        """Reads members up to the object's end; its `{` has been read."""
        self.arguments("{")
        first = True
        while not (yield from self._closes("}")):
            key = yield from self._key()
            if not key:
                return
            self.arguments(("" if first else ", ") + json.dumps(key, ensure_ascii=False) + ": ")
            yield from self._value(depth)
            first = False

    def _list(self, depth: int) -> Reading[None]:
        """Reads values up to the list's end; its `[` has been read."""
        self.arguments("[")
        first = True
        while not (yield from self._closes("]")):
            follows = yield from self.reader.peek()
            if follows in (END, "}"):
                return
            self.arguments("" if first else ", ")
            yield from self._value(depth)
            first = False

    def _closes(self, bracket: str) -> Reading[bool]:
        """Takes commas, spaces and the bracket, if it comes."""
        while True:
            yield from self.reader.skip_space()
            follows = yield from self.reader.next()
            if follows == bracket:
                self.arguments(bracket)
                return True
            if follows != ",":
                self.reader.unread(follows)
                return False

    def _key(self) -> Reading[str]:
        """A member's name, and takes the colon behind it; "" when there is none."""
        if (yield from self.reader.starts_with(self.quote)):
            name, found = yield from self.reader.until(self.quote)
            _, colon = yield from self.reader.until(":", "}")
        else:
            name, colon = yield from self.reader.until(":", "}")
            name, found = name.strip().strip('"'), colon
        if colon == "}":
            self.reader.unread(colon)
        return name if found and colon == ":" else ""

    def _value(self, depth: int) -> Reading[None]:
        yield from self.reader.skip_space()
        if (yield from self.reader.starts_with(self.quote)):
            text, _ = yield from self.reader.until(self.quote)
            self.arguments(json.dumps(text, ensure_ascii=False))
            return
        first = yield from self.reader.next()
        if first == "{" and depth < _DEEPEST:
            yield from self._object(depth + 1)
        elif first == "[" and depth < _DEEPEST:
            yield from self._list(depth + 1)
        elif first == '"':
            self.reader.unread(first)
            yield from read_value(self.reader, self.arguments)
        else:
            self.reader.unread(first)
            word, end = yield from self.reader.until(",", "}", "]")
            self.reader.unread(end)
            self.arguments(json.dumps(_value_of(word.strip()), ensure_ascii=False))


def _value_of(word: str) -> Any:
    """A bare word's value: JSON's, or a number that only lacks digits before or behind its point."""
    return float(word) if _BARE_FLOAT.fullmatch(word) else json_or_text(word)


class FunctionGemma(Gemma4):
    """`<start_function_call>call:NAME{KEY:<escape>text<escape>}<end_function_call>`: FunctionGemma."""

    marks = ("<start_function_call>",)
    hidden = ("<end_function_call>",)
    quote = "<escape>"
    inner = (quote,)

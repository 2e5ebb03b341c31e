"""Tool calls whose arguments stand one by one between marks, as text: Qwen3-Coder's XML, GLM, MiniMax."""

from __future__ import annotations

import json
from typing import Any

from rvllm.text.tools.formats import ToolParser
from rvllm.text.tools.reader import Reading
from rvllm.text.tools.values import property_schema, typed

_LONGEST_NAME = 256


class TaggedParser(ToolParser):
    """Calls of the shape: name, then for each argument a key and its text, then an end mark.

    An argument goes out when its text is whole: its type decides how it is written as JSON.
    """

    key_begin = ""  # what begins an argument's key
    key_end = ""  # what stands between key and text
    value_end = ""
    call_end = ""

    def members(self, name: str) -> Reading[bool]:
        """Reads a call's arguments up to its end mark; False when the text ends before."""
        self.begin(name)
        schema = self.schemas.get(name)
        written: list[str] = []
        self.arguments("{")
        while True:
            yield from self.reader.skip_space()
            mark = yield from self.reader.starts_with(self.key_begin, self.call_end)
            if mark != self.key_begin:
                follows = yield from self.reader.next()
                self.reader.unread(follows)
                self.arguments("}")
                return bool(mark)
            key, _ = yield from self.reader.until(self.key_end)
            text, found = yield from self.reader.until(self.value_end, self.key_begin, self.call_end)
            if not found:
                return False
            if found != self.value_end:  # the model forgot the end mark
                self.reader.unread(found)
            key = key.strip()
            if key not in written:
                value = typed(self.text_of(text), property_schema(schema, key))
                self.arguments(", " if written else "")
                self.arguments(f"{json.dumps(key, ensure_ascii=False)}: {_json(value)}")
                written.append(key)

    def text_of(self, text: str) -> str:
        """An argument's text without what only sets it off from the marks."""
        return text


def _json(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False)


class Qwen3Coder(TaggedParser):
    """`<tool_call><function=NAME><parameter=KEY>text</parameter></function></tool_call>`.

    Qwen3-Coder, Qwen3.5, Nemotron 3; line breaks stand around each text. Some write JSON instead, as Hermes.
    """

    marks = ("<tool_call>", "<function=")
    hidden = ("</tool_call>",)
    key_begin, key_end, value_end, call_end = "<parameter=", ">", "</parameter>", "</function>"

    def call_after(self, mark: str) -> Reading[None]:
        before = mark
        if mark != self.marks[-1]:
            space = yield from self.reader.skip_space()
            begin = yield from self.reader.starts_with(self.marks[-1])
            before = mark + space
            if not begin:
                yield from self.object_or_text(before)
                return
            before += begin
        name, end = yield from self.reader.until(">", "\n")
        if end != ">" or not 0 < len(name.strip()) <= _LONGEST_NAME:
            self.say(before + name + end)
            return
        yield from self.members(name.strip())

    def text_of(self, text: str) -> str:
        return text.removeprefix("\n").removesuffix("\n")


class SeedOss(Qwen3Coder):
    """Qwen3-Coder's way between ByteDance's marks."""

    marks = ("<seed:tool_call>", "<function=")
    hidden = ("</seed:tool_call>",)


class MiniMaxM2(TaggedParser):
    """`<invoke name="NAME"><parameter name="KEY">text</parameter></invoke>`: MiniMax M2."""

    marks = ('<invoke name="',)
    hidden = ("<minimax:tool_call>", "</minimax:tool_call>")
    key_begin, key_end, value_end, call_end = '<parameter name="', '">', "</parameter>", "</invoke>"

    def call_after(self, mark: str) -> Reading[None]:
        name, end = yield from self.reader.until('">', "\n")
        if end != '">' or not 0 < len(name) <= _LONGEST_NAME:
            self.say(mark + name + end)
            return
        yield from self.members(name)

    def text_of(self, text: str) -> str:
        return text.removeprefix("\n").removesuffix("\n")


class Glm(TaggedParser):
    """`<tool_call>NAME<arg_key>KEY</arg_key><arg_value>text</arg_value></tool_call>`: GLM 4.5 to 4.7."""

    marks = ("<tool_call>",)
    hidden = ("</tool_call>",)
    key_begin, key_end, value_end, call_end = "<arg_key>", "</arg_key>", "</arg_value>", "</tool_call>"
    inner = (key_begin, key_end, "<arg_value>", value_end)

    def call_after(self, mark: str) -> Reading[None]:
        space = yield from self.reader.skip_space()
        first = yield from self.reader.next()
        self.reader.unread(first)
        if first == "{":
            yield from self.object_or_text(mark + space)
            return
        name, end = yield from self.reader.until(self.key_begin, self.call_end, "\n\n")
        bare = name.strip()
        if end not in (self.key_begin, self.call_end) or not 0 < len(bare) <= _LONGEST_NAME or "\n" in bare:
            self.say(mark + space + name + end)
            return
        self.reader.unread(end)
        yield from self.members(bare)

    def text_of(self, text: str) -> str:
        return text.partition("<arg_value>")[2] if "<arg_value>" in text else text.strip()

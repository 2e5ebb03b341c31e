"""Tool calls whose arguments stand one by one between marks, as text: Qwen3-Coder, GLM, MiniMax, DeepSeek."""

from __future__ import annotations

import json
from typing import Any

from rvllm.text.tools.formats import LONGEST_NAME, ToolParser
from rvllm.text.tools.reader import Reading
from rvllm.text.tools.values import json_or_text, property_schema, typed


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
                yield from self.reader.peek()  # the call is whole once something follows, or nothing more
                self.arguments("}")
                return bool(mark)
            key, _ = yield from self.reader.until(self.key_end)
            text, found = yield from self.value_text()
            if not found:
                return False
            if found != self.value_end:  # the model forgot the end mark
                self.reader.unread(found)
            key, value = self.member(key.strip(), self.text_of(text), schema)
            if key not in written:
                self.arguments(", " if written else "")
                self.arguments(f"{json.dumps(key, ensure_ascii=False)}: {_json(value)}")
                written.append(key)

    def value_text(self) -> Reading[tuple[str, str]]:
        """Reads an argument's text and the mark behind it; "" for the mark at the end of the text."""
        return (yield from self.reader.until(self.value_end, self.key_begin, self.call_end))

    def text_of(self, text: str) -> str:
        """An argument's text without what only sets it off from the marks."""
        return text

    def member(self, key: str, text: str, schema: Any) -> tuple[str, Any]:
        """An argument's name and value. schema: the function's parameters."""
        return key, typed(text, property_schema(schema, key))


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
        if end != ">" or not 0 < len(name.strip()) <= LONGEST_NAME:
            self.say(before + name + end)
            return
        yield from self.members(name.strip())

    def text_of(self, text: str) -> str:
        return text.removeprefix("\n").removesuffix("\n")


class SeedOss(Qwen3Coder):
    """Qwen3-Coder's way between ByteDance's marks."""

    marks = ("<seed:tool_call>", "<function=")
    hidden = ("</seed:tool_call>",)


class Invoke(TaggedParser):
    """A call that begins with its name in quotes: `<invoke name="NAME">`."""

    def call_after(self, mark: str) -> Reading[None]:
        name, end = yield from self.reader.until('">', "\n")
        if end != '">' or not 0 < len(name) <= LONGEST_NAME:
            self.say(mark + name + end)
            return
        yield from self.members(name)


class MiniMaxM2(Invoke):
    """`<invoke name="NAME"><parameter name="KEY">text</parameter></invoke>`: MiniMax M2."""

    marks = ('<invoke name="',)
    hidden = ("<minimax:tool_call>", "</minimax:tool_call>")
    key_begin, key_end, value_end, call_end = '<parameter name="', '">', "</parameter>", "</invoke>"

    def text_of(self, text: str) -> str:
        return text.removeprefix("\n").removesuffix("\n")


class Dsml(Invoke):
    """DeepSeek V3.2, V4: `<｜DSML｜parameter name="KEY" string="true">`, which tells strings from JSON."""

    marks = ('<｜DSML｜invoke name="',)
    hidden = tuple(f"<{end}｜DSML｜{word}>" for word in ("function_calls", "tool_calls") for end in ("", "/"))
    key_begin, key_end = '<｜DSML｜parameter name="', '">'
    value_end, call_end = "</｜DSML｜parameter>", "</｜DSML｜invoke>"
    inner = ("｜DSML｜",)  # the token in all of these

    def member(self, key: str, text: str, schema: Any) -> tuple[str, Any]:
        name, _, is_string = key.partition('" string="')
        if is_string == "true":
            return name, text
        if is_string == "false":
            return name, json_or_text(text)
        return super().member(name, text, schema)


class MiniCpm5(Invoke):
    """MiniCPM5: `<function name="NAME"><param name="KEY">text</param></function>`, marks within CDATA."""

    marks = ('<function name="',)
    key_begin, key_end, value_end, call_end = '<param name="', '">', "</param>", "</function>"

    def value_text(self) -> Reading[tuple[str, str]]:
        if not (yield from self.reader.starts_with("<![CDATA[")):
            return (yield from super().value_text())
        text, found = yield from self.reader.until("]]>")
        _, end = yield from super().value_text()
        return text, found and end


class Glm(TaggedParser):
    """`<tool_call>NAME<arg_key>KEY</arg_key><arg_value>text</arg_value></tool_call>`: GLM 4.5 to 4.7."""

    marks: tuple[str, ...] = ("<tool_call>",)
    hidden: tuple[str, ...] = ("</tool_call>",)
    key_begin, key_end, value_end, call_end = "<arg_key>", "</arg_key>", "</arg_value>", "</tool_call>"
    value_begin = "<arg_value>"
    inner: tuple[str, ...] = (key_begin, key_end, value_begin, value_end)

    def call_after(self, mark: str) -> Reading[None]:
        space = yield from self.reader.skip_space()
        first = yield from self.reader.peek()
        if first == "{":
            yield from self.object_or_text(mark + space)
            return
        name, end = yield from self.reader.until(self.key_begin, self.call_end, "\n\n")
        bare = name.strip()
        if end not in (self.key_begin, self.call_end) or not 0 < len(bare) <= LONGEST_NAME or "\n" in bare:
            self.say(mark + space + name + end)
            return
        self.reader.unread(end)
        yield from self.members(bare)

    def text_of(self, text: str) -> str:
        return text.partition(self.value_begin)[2] if self.value_begin in text else text.strip()


def _hunyuan(word: str) -> str:
    return f"<{word}:opensource>"


class Hunyuan3(Glm):
    """Hy3: GLM's way with a mark behind the name, and `:opensource` in every mark."""

    marks = (_hunyuan("tool_call"),)
    name_end = _hunyuan("tool_sep")
    key_begin, key_end = _hunyuan("arg_key"), _hunyuan("/arg_key")
    value_begin, value_end = _hunyuan("arg_value"), _hunyuan("/arg_value")
    call_end = _hunyuan("/tool_call")
    hidden = (call_end, _hunyuan("tool_calls"), _hunyuan("/tool_calls"))
    inner = (name_end, key_begin, key_end, value_begin, value_end)

    def call_after(self, mark: str) -> Reading[None]:
        name, end = yield from self.reader.until(self.name_end, self.call_end, "\n\n")
        if end != self.name_end or not 0 < len(name.strip()) <= LONGEST_NAME:
            self.say(mark + name + end)
            return
        yield from self.members(name.strip())

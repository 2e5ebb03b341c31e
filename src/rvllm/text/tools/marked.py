"""Tool calls that are JSON behind a mark."""

from __future__ import annotations

from rvllm.text.tools.formats import BareParser, ToolParser, arguments_object
from rvllm.text.tools.reader import Reading

_LONGEST_NAME = 256


class MarkedJson(ToolParser):
    """A mark, then a list of calls or one call, as JSON."""

    def call_after(self, mark: str) -> Reading[None]:
        space = yield from self.reader.skip_space()
        first = yield from self.reader.next()
        if first == "[":
            yield from self.array_of_calls(mark + space + first)
            return
        self.reader.unread(first)
        before = mark + space
        while (yield from self.object_or_text(before)):
            before = yield from self.reader.skip_space()
            follows = yield from self.reader.peek()
            if follows != "{":
                self.reader.unread(before)
                return


class Granite(MarkedJson):
    """`<|tool_call|>[{"name": ..., "arguments": {...}}]`, Granite 3; Granite 20B writes `<function_call>`."""

    marks = ("<|tool_call|>", "<function_call>")
    hidden = ("</function_call>",)


class Phi4(MarkedJson):
    """Phi-4: `functools[{"name": ..., "arguments": {...}}]`, or the call between `<|tool_call|>` marks."""

    marks = ("functools", "<|tool_call|>")
    hidden = ("<|/tool_call|>",)


class ToolCalls(MarkedJson):
    """`<tool_calls>[{"name": ..., "arguments": {...}}]</tool_calls>`: Jamba, Hunyuan, MiniMax M1."""

    marks = ("<tool_calls>",)
    hidden = ("</tool_calls>",)


class Nemotron(MarkedJson):
    """`<TOOLCALL>[{"name": ..., "arguments": {...}}]</TOOLCALL>`: Nemotron Nano v2 and Llama Nemotron."""

    marks = ("<TOOLCALL>",)
    hidden = ("</TOOLCALL>",)


class LongCat(MarkedJson):
    """`<longcat_tool_call>{"name": ..., "arguments": {...}}</longcat_tool_call>`: LongCat Flash."""

    marks = ("<longcat_tool_call>",)
    hidden = ("</longcat_tool_call>",)


class GigaChat3(MarkedJson):
    """`function call<|role_sep|>` and a call, a message of its own: GigaChat 3; 3.1 has a token for it."""

    marks = ("function call<|role_sep|>", "<|function_call|>")
    inner = ("<|role_sep|>",)
    hidden = ("<|message_sep|>",)


class InternLm(MarkedJson):
    """`<|action_start|><|plugin|>{"name": ..., "parameters": {...}}<|action_end|>`: InternLM 2.5 and 3."""

    marks = ("<|action_start|>",)
    inner = ("<|plugin|>",)
    hidden = ("<|action_end|>",)

    def call_after(self, mark: str) -> Reading[None]:
        space = yield from self.reader.skip_space()
        plugin = yield from self.reader.starts_with("<|plugin|>")
        yield from super().call_after(mark + space + plugin)


class Xlam(BareParser):
    """An answer that is `[{"name": ..., "arguments": {...}}, ...]`, or that in a fence: xLAM 2."""

    marks = ("<tool_call>", "[TOOL_CALLS]")
    hidden = ("</tool_call>",)

    def read(self) -> Reading[None]:
        before = yield from self.reader.skip_space()
        fence = yield from self.reader.starts_with("```json", "```")
        before += fence + (yield from self.reader.skip_space())
        first = yield from self.reader.next()
        self._bare = True
        if first == "[":
            if (yield from self.array_of_calls(before + first)) and fence:
                yield from self.reader.skip_space()
                yield from self.reader.starts_with("```")
        else:
            self.reader.unread(before + first)
        self._bare = False
        yield from super().read()

    def call_after(self, mark: str) -> Reading[None]:
        yield from self.list_or_call(mark)


class Apertus(ToolParser):
    """`<|tools_prefix|>[{"NAME": {...}}, ...]<|tools_suffix|>`: Apertus."""

    marks = ("<|tools_prefix|>",)
    hidden = ("<|tools_suffix|>",)

    def call_after(self, mark: str) -> Reading[None]:
        before = mark + (yield from self.reader.starts_with("["))
        while True:
            before += yield from self.reader.skip_space()
            begins = yield from self.reader.starts_with('{"')
            name, end = (yield from self.reader.until('"', "\n")) if begins else ("", "")
            if end != '"' or not 0 < len(name) <= _LONGEST_NAME:
                self.say(before + begins + name + end)
                return
            yield from self.reader.skip_space()
            yield from self.reader.starts_with(":")
            self.begin(name)
            yield from self.reader.skip_space()
            yield from arguments_object(self)
            yield from self.reader.skip_space()
            yield from self.reader.starts_with("}")
            before = yield from self.reader.skip_space()
            follows = yield from self.reader.next()
            if follows != ",":
                if follows != "]":
                    self.reader.unread(before + follows)
                return
            before = ""

"""Tool calls that are JSON behind a mark."""

from __future__ import annotations

from typing import cast

from rvllm.text.tools.formats import LONGEST_NAME, BareParser, ToolParser, arguments_object
from rvllm.text.tools.reader import Reading


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


def _marked(
    name: str, marks: tuple[str, ...], hidden: tuple[str, ...] = (), inner: tuple[str, ...] = ()
) -> type[MarkedJson]:
    """A format that has nothing of its own but its marks, see ToolParser."""
    return cast(
        type[MarkedJson], type(name, (MarkedJson,), {"marks": marks, "hidden": hidden, "inner": inner})
    )


# Granite 3: `<|tool_call|>[{"name": ..., "arguments": {...}}]`; Granite 20B writes `<function_call>`.
Granite = _marked("Granite", ("<|tool_call|>", "<function_call>"), ("</function_call>",))
# Phi-4: `functools[{"name": ..., "arguments": {...}}]`, or the call between `<|tool_call|>` marks.
Phi4 = _marked("Phi4", ("functools", "<|tool_call|>"), ("<|/tool_call|>",))
# Jamba, Hunyuan, MiniMax M1.
ToolCalls = _marked("ToolCalls", ("<tool_calls>",), ("</tool_calls>",))
# Nemotron Nano v2 and Llama Nemotron.
Nemotron = _marked("Nemotron", ("<TOOLCALL>",), ("</TOOLCALL>",))
# LongCat Flash.
LongCat = _marked("LongCat", ("<longcat_tool_call>",), ("</longcat_tool_call>",))
# GigaChat 3, whose call is a message of its own; 3.1 has a token for it.
GigaChat3 = _marked(
    "GigaChat3", ("function call<|role_sep|>", "<|function_call|>"), ("<|message_sep|>",), ("<|role_sep|>",)
)


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
        self._bare = True
        self.reader.unread((yield from self.fenced_calls("")))
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
            if end != '"' or not 0 < len(name) <= LONGEST_NAME:
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

"""How families of models write tool calls: one parser each, as a generator over characters."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from contextlib import suppress
from typing import Any

from rvllm.text.tools.events import CallArguments, CallStart, Event, Text, merged
from rvllm.text.tools.reader import END, Reader, Reading
from rvllm.text.tools.scan import BrokenError, CallKeys, CallReader, read_value

LONGEST_NAME = 256  # characters of a function's name


class ToolParser:
    """Finds the calls in one answer's text.

    names: the functions the request offers; formats without a mark of their own need them to tell a call
    from any other JSON.
    schemas: the functions' parameters, for formats that write arguments as plain text.
    marks: what the formats begin and part calls with; text is held back while it may become one of them.
    """

    marks: tuple[str, ...] = ()
    hidden: tuple[str, ...] = ()  # marks that only structure the text, and are dropped
    inner: tuple[str, ...] = ()  # marks within a call
    keys = CallKeys(("name",), ("arguments", "parameters"))

    def __init__(self, names: Collection[str] = (), schemas: Mapping[str, Any] | None = None) -> None:
        self.names = frozenset(names)
        self.schemas = schemas or {}
        self.calls = 0
        self.reader = Reader()
        self._events: list[Event] = []
        self._spaces = ""  # at the end of the text so far; dropped beside a call
        self._after_call = False
        self._reading = self.read()
        next(self._reading)
        self._done = False

    def feed(self, text: str, final: bool = False) -> list[Event]:
        """What this piece of text completes. final: no more text comes."""
        for character in text:
            self._send(character)
        if final:
            self._send(END)
            self._flush_spaces()
        found, self._events = merged(self._events), []
        return found

    def _send(self, character: str) -> None:
        if self._done:
            return
        try:
            self._reading.send(character)
        except StopIteration:
            self._done = True

    def read(self) -> Reading[None]:
        """Reads the whole answer: text up to a mark, then what the mark begins.

        Where that is no call it is text, and so is the mark that closes it.
        """
        is_text = False
        while True:
            mark = yield from self.plain(*self.marks, *self.hidden)
            if not mark:
                return
            if mark in self.hidden:
                if is_text and "/" in mark:
                    self.say(mark)
                is_text = False
            else:
                before = self.calls
                yield from self.call_after(mark)
                is_text = self.calls == before

    def call_after(self, mark: str) -> Reading[None]:
        """Reads what follows a mark."""
        raise AssertionError("each format reads its own marks")

    def plain(self, *marks: str) -> Reading[str]:
        """Passes text on up to the first of `marks`, and returns it; "" at the end of the text."""
        held = ""
        while True:
            character = yield from self.reader.next()
            held += character
            while held and character != END and not any(mark.startswith(held) for mark in marks):
                self.say(held[0])
                held = held[1:]
            if held in marks:
                return held
            if character == END:
                self.say(held)
                return ""

    def say(self, text: str) -> None:
        """Passes text on; whitespace only once something follows it."""
        stripped = text.rstrip()
        if not stripped:
            self._spaces += text
            return
        self._flush_spaces()
        self._events.append(Text(stripped))
        self._spaces = text[len(stripped) :]

    def _flush_spaces(self) -> None:
        if self._spaces and not self._after_call:
            self._events.append(Text(self._spaces))
        self._spaces, self._after_call = "", False

    def begin(self, name: str, identity: str | None = None) -> bool:
        """A call begins."""
        self._spaces, self._after_call = "", True
        self._events.append(CallStart(self.calls, name, identity))
        self.calls += 1
        return True

    def arguments(self, text: str) -> None:
        """The next piece of the call's arguments."""
        self._events.append(CallArguments(self.calls - 1, text))

    def object_or_text(self, before: str) -> Reading[bool]:
        """Reads a call's object; what is none is text, with `before` in front. False then."""
        space = yield from self.reader.skip_space()
        try:
            yield from CallReader(self.reader, self.keys, self.begin, self.arguments).read()
            return True
        except BrokenError as error:
            self.say(before + space + error.taken)
            return False

    def array_of_calls(self, before: str) -> Reading[bool]:
        """Reads `[call, call, ...]`; its `[` has been read."""
        while True:
            if not (yield from self.object_or_text(before)):
                return False
            before = ""
            yield from self.reader.skip_space()
            follows = yield from self.reader.next()
            if follows != ",":
                if follows != "]":
                    self.reader.unread(follows)
                return True

    def fenced_calls(self, before: str) -> Reading[str]:
        """Reads `[call, call, ...]`, in a fenced block or not; returns what it took where none begins."""
        before += yield from self.reader.skip_space()
        fence = yield from self.reader.starts_with("```json", "```")
        before += fence + (yield from self.reader.skip_space())
        first = yield from self.reader.next()
        if first != "[":
            self.reader.unread(first)
            return before
        if (yield from self.array_of_calls(before + first)) and fence:
            yield from self.end_of_fence()
        return ""

    def end_of_fence(self) -> Reading[None]:
        """Takes the end of a fenced block, if it comes."""
        space = yield from self.reader.skip_space()
        if not (yield from self.reader.starts_with("```")):
            self.reader.unread(space)

    def list_or_call(self, before: str) -> Reading[None]:
        """Reads `[call, call, ...]` or one call; what is neither is text, with `before` in front."""
        space = yield from self.reader.skip_space()
        first = yield from self.reader.next()
        if first == "[":
            yield from self.array_of_calls(before + space + first)
        else:
            self.reader.unread(first)
            yield from self.object_or_text(before + space)


class BareParser(ToolParser):
    """A format whose calls may also stand without a mark at the beginning of the answer, with `opening`.

    Only an offered function's name makes that a call.
    """

    opening = "{"
    _bare = False  # whether what is being read has no mark

    def read(self) -> Reading[None]:
        space = yield from self.reader.skip_space()
        first = yield from self.reader.peek()
        if first == self.opening:
            self._bare = True
            yield from self.bare_calls(space)
            self._bare = False
        else:
            self.say(space)
        yield from super().read()

    def bare_calls(self, before: str) -> Reading[None]:
        """Reads calls, parted by `;`, `,` or nothing; `opening` is next."""
        while (yield from self.object_or_text(before)):
            before = yield from self.reader.skip_space()
            follows = yield from self.reader.next()
            if follows == "{":
                self.reader.unread(follows)
                continue
            if follows == END or follows not in ";,":
                self.reader.unread(before + follows)
                return
            before = ""

    def begin(self, name: str, identity: str | None = None) -> bool:
        return (name in self.names or not self._bare) and super().begin(name, identity)


class Hermes(BareParser):
    """`<tool_call>{"name": ..., "arguments": {...}}</tool_call>`: Hermes, Qwen 2.5 and 3, and others.

    Small models leave the marks out (Qwen2.5-Coder-0.5B nearly always), so an answer may also be bare JSON.
    """

    marks = ("<tool_call>",)
    hidden = ("</tool_call>",)

    def call_after(self, mark: str) -> Reading[None]:
        yield from self.object_or_text(mark)


class Llama3(BareParser):
    """Llama 3's JSON: an answer beginning `{"name": ..., "parameters": {...}}`, or `<|python_tag|>` and that.

    Several calls are parted by `;` or `,`. Only an offered function's name makes the JSON a call.
    """

    marks = ("<|python_tag|>",)
    hidden = ("<|eom_id|>",)

    def call_after(self, mark: str) -> Reading[None]:
        self._bare = True
        yield from self.bare_calls("")
        self._bare = False


class Mistral(ToolParser):
    """`[TOOL_CALLS][{"name": ..., "arguments": {...}}, ...]`; newer ones `[TOOL_CALLS]name[ARGS]{...}`."""

    marks = ("[TOOL_CALLS]",)
    inner = ("[ARGS]", "[CALL_ID]")
    keys = CallKeys(("name",), ("arguments",), ("id",))

    def call_after(self, mark: str) -> Reading[None]:
        space = yield from self.reader.skip_space()
        first = yield from self.reader.next()
        self.reader.unread(first)
        if first in ("[", "{"):
            yield from self.list_or_call(mark + space)
        else:
            yield from self._named(mark + space)

    def _named(self, before: str) -> Reading[None]:
        name = ""
        while True:
            character = yield from self.reader.next()
            if character in ("{", END) or name.endswith("[ARGS]") or len(name) > 200:
                self.reader.unread(character)
                break
            name += character
        bare = name.removesuffix("[ARGS]").partition("[CALL_ID]")
        if character == END or not bare[0].strip():
            self.say(before + name)
            return
        self.begin(bare[0].strip(), bare[2].strip() or None)
        yield from self.reader.skip_space()
        yield from arguments_object(self)


def arguments_object(parser: ToolParser) -> Reading[None]:
    """A call's arguments by themselves; "{}" when no object follows."""
    first = yield from parser.reader.peek()
    if first == "{":
        with suppress(BrokenError):  # what follows is text then
            yield from read_value(parser.reader, parser.arguments)
    else:
        parser.arguments("{}")


class CommandR(ToolParser):
    """`<|START_ACTION|>[{"tool_call_id": ..., "tool_name": ..., "parameters": {...}}, ...]<|END_ACTION|>`."""

    marks = ("<|START_ACTION|>",)
    hidden = ("<|END_ACTION|>", "<|START_RESPONSE|>", "<|END_RESPONSE|>", "<|START_TEXT|>", "<|END_TEXT|>")
    keys = CallKeys(("tool_name", "name"), ("parameters", "arguments"), ("tool_call_id",))

    def call_after(self, mark: str) -> Reading[None]:
        yield from self.list_or_call(mark)


class ActionJson(ToolParser):
    """`Action:` and a list of `{"tool_name": ..., "parameters": {...}}` in a fence: Command R and R+."""

    marks = ("Action:",)
    keys = CallKeys(("tool_name", "name"), ("parameters", "arguments"), ("tool_call_id",))

    def call_after(self, mark: str) -> Reading[None]:
        self.say((yield from self.fenced_calls(mark)))


class Kimi(ToolParser):
    """`<|tool_call_begin|>functions.NAME:0<|tool_call_argument_begin|>{...}<|tool_call_end|>`: Kimi K2."""

    marks = ("<|tool_call_begin|>",)
    inner = ("<|tool_call_argument_begin|>",)
    hidden = ("<|tool_calls_section_begin|>", "<|tool_calls_section_end|>", "<|tool_call_end|>")

    def call_after(self, mark: str) -> Reading[None]:
        identity, found = yield from self.reader.until("<|tool_call_argument_begin|>")
        name = identity.strip().removeprefix("functions.").rpartition(":")[0] or identity.strip()
        if not found or not name:
            self.say(mark + identity + found)
            return
        self.begin(name, identity.strip())
        yield from self.reader.skip_space()
        yield from arguments_object(self)


class Functionary(ToolParser):
    """`<function=NAME>{...}</function>`: Functionary 3.1, and Llama 3.1 with functions of one's own."""

    marks = ("<function=",)
    hidden = ("</function>",)

    def call_after(self, mark: str) -> Reading[None]:
        name, end = yield from self.reader.until(">", "\n")
        space = yield from self.reader.skip_space()
        first = yield from self.reader.peek()
        if end != ">" or first != "{" or not name:
            self.say(mark + name + end + space)
            return
        self.begin(name)
        yield from arguments_object(self)


class DeepSeek(ToolParser):
    """DeepSeek V3, R1 and V3.1: calls between marks of their own, `name<｜tool▁sep｜>` and JSON.

    V3 and R1 write `function` first, then the name, and put the JSON into a fenced block.
    """

    marks = ("<｜tool▁call▁begin｜>",)
    hidden = ("<｜tool▁calls▁begin｜>", "<｜tool▁calls▁end｜>", "<｜tool▁call▁end｜>")
    SEPARATOR = "<｜tool▁sep｜>"
    inner = (SEPARATOR,)

    def call_after(self, mark: str) -> Reading[None]:
        name, found = yield from self.reader.until(self.SEPARATOR)
        if not found:
            self.say(mark + name)
            return
        if name.strip() == "function":
            line, stop = yield from self.reader.until("\n", "{")
            if stop == "{":
                self.reader.unread("{")
            name = line.removesuffix("```json")
        self.begin(name.strip())
        yield from self.reader.skip_space()
        fence = yield from self.reader.starts_with("```json", "```")
        yield from self.reader.skip_space()
        yield from arguments_object(self)
        if fence:
            yield from self.end_of_fence()

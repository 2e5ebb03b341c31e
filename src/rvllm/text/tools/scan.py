"""JSON as a model writes it, character by character: one value, or one object that is a call."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from rvllm.text.tools.reader import END, Reader, Reading

Emit = Callable[[str], None]

_OPENING = {"{": "}", "[": "]"}


class BrokenError(Exception):
    """What came is no JSON; `taken` is the text read so far."""

    def __init__(self, taken: str) -> None:
        super().__init__(taken)
        self.taken = taken


def read_value(reader: Reader, emit: Emit) -> Reading[bool]:
    """Reads one JSON value and hands each of its characters to `emit`; False when the text ends in it.

    Brackets and strings are followed, words in between are taken as they are. Raises BrokenError when a
    bracket closes another one than the last; that bracket is next then.
    """
    open_brackets: list[str] = []
    taken = ""
    while True:
        character = yield from reader.next()
        if character == END:
            return bool(taken) and not open_brackets
        if not open_brackets and taken and (character in ",}]" or character.isspace()):
            reader.unread(character)  # the end of a number or word
            return True
        if character in "}]" and (not open_brackets or open_brackets.pop() != character):
            reader.unread(character)
            raise BrokenError(taken)
        emit(character)
        taken = character
        if character == '"':
            if not (yield from _rest_of_string(reader, emit)):
                return False
        elif character in _OPENING:
            open_brackets.append(_OPENING[character])
            continue
        if character in '"}]' and not open_brackets:
            return True


def _rest_of_string(reader: Reader, emit: Emit) -> Reading[bool]:
    escaped = False
    while True:
        character = yield from reader.next()
        if character == END:
            return False
        emit(character)
        if escaped:
            escaped = False
        elif character == "\\":
            escaped = True
        elif character == '"':
            return True


@dataclass(frozen=True)
class CallKeys:
    """Under which keys a format's objects hold a call's name, arguments and id."""

    name: tuple[str, ...]
    arguments: tuple[str, ...]
    identity: tuple[str, ...] = ("id",)


class CallReader:
    """Reads an object that is a call.

    begin: gets name and id as soon as the arguments or the end of the object are reached; False: this is
    no call. arguments: gets the pieces of the arguments' JSON text, as the model wrote it.
    """

    def __init__(
        self, reader: Reader, keys: CallKeys, begin: Callable[[str, str | None], bool], arguments: Emit
    ) -> None:
        self._reader, self._keys, self._begin, self._arguments = reader, keys, begin, arguments
        self._taken: list[str] = []  # everything, until the call has begun
        self._name: str | None = None
        self._identity: str | None = None
        self._early: str | None = None  # arguments that came before the name
        self._begun = self._had_arguments = False

    def read(self) -> Reading[None]:
        """Reads it; its `{` is next.

        Raises BrokenError, with all that was read, before `begin` was called for anything that is no call
        (no object, no name, a text that ends too early); after it, reading stops quietly.
        """
        try:
            yield from self._object()
            self._start()
        except BrokenError:
            if not self._begun:
                raise BrokenError("".join(self._taken)) from None
        if self._early is not None:
            self._whole_arguments(self._early)
        if not self._had_arguments:
            self._arguments("{}")

    def _object(self) -> Reading[None]:
        yield from self._expect("{")
        while True:
            key = yield from self._string_or("}")
            if key is None:
                return
            yield from self._expect(":")
            yield from self._value(key)
            if (yield from self._expect(",}")) == "}":
                return

    def _value(self, key: str) -> Reading[None]:
        self._keep((yield from self._reader.skip_space()))
        if key in self._keys.arguments and not self._had_arguments and self._name is not None:
            self._start()
            yield from self._stream_arguments()
            return
        text = yield from self._whole(read_value)
        if key in self._keys.arguments:
            self._early = text
        elif key in self._keys.name and self._name is None:
            self._name = _string(text)
        elif key in self._keys.identity:
            self._identity = _string(text) or self._identity

    def _start(self) -> None:
        if self._begun:
            return
        if not self._name or not self._begin(self._name, self._identity):
            raise BrokenError("")
        self._begun = True

    def _stream_arguments(self) -> Reading[None]:
        """An object goes out as it comes; a string that holds JSON, when it is whole."""
        first = yield from self._reader.peek()
        self._had_arguments = True
        if first == "{":
            if not (yield from read_value(self._reader, self._arguments)):
                raise BrokenError("")
        else:
            self._whole_arguments((yield from self._whole(read_value)))

    def _whole_arguments(self, text: str) -> None:
        self._had_arguments = True
        inner = _string(text)
        self._arguments(inner if inner is not None else "{}" if text == "null" else text)

    def _whole(self, read: Callable[[Reader, Emit], Reading[bool]]) -> Reading[str]:
        """What `read` reads. Raises BrokenError where the text ends before."""
        pieces: list[str] = []

        def emit(text: str) -> None:
            pieces.append(text)
            self._keep(text)

        if not (yield from read(self._reader, emit)):
            raise BrokenError("")
        return "".join(pieces)

    def _expect(self, characters: str) -> Reading[str]:
        self._keep((yield from self._reader.skip_space()))
        character = yield from self._reader.next()
        if character == END or character not in characters:
            self._reader.unread(character)
            raise BrokenError("")
        self._keep(character)
        return character

    def _string_or(self, other: str) -> Reading[str | None]:
        """A key, or None when `other` comes instead."""
        if (yield from self._expect('"' + other)) == other:
            return None
        key = _string('"' + (yield from self._whole(_rest_of_string)))
        if key is None:
            raise BrokenError("")
        return key

    def _keep(self, text: str) -> None:
        if not self._begun:
            self._taken.append(text)


def _string(text: str) -> str | None:
    """The value of a JSON string; None for anything else."""
    try:
        value: Any = json.loads(text)
    except ValueError:
        return None
    return value if isinstance(value, str) else None

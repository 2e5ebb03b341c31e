"""Reading a text one character at a time: parsers are written as generators that ask for the next one.

A parser that never sees where the text was cut cannot depend on it, so every chunking of a stream gives
the same events.
"""

from __future__ import annotations

from collections.abc import Generator
from typing import TypeVar

END = ""  # what a parser gets after the last character

ValueT = TypeVar("ValueT")
Reading = Generator[None, str, ValueT]
"""A generator that yields to be sent the next character (END after the last) and returns a value."""


class Reader:
    """Gives a parser its characters, and takes back those it has no use for."""

    def __init__(self) -> None:
        self._back: list[str] = []
        self._ended = False

    def next(self) -> Reading[str]:
        """The next character, or END, however often it is asked for."""
        if self._back:
            return self._back.pop()
        if self._ended:
            return END
        character = yield
        self._ended = character == END
        return character

    def peek(self) -> Reading[str]:
        """The next character, which stays next."""
        character = yield from self.next()
        self.unread(character)
        return character

    def unread(self, text: str) -> None:
        """Puts characters back in front."""
        self._back += reversed(text)

    def skip_space(self) -> Reading[str]:
        """Takes whitespace and returns it; what follows is next."""
        taken = ""
        while True:
            character = yield from self.next()
            if character == END or not character.isspace():
                self.unread(character)
                return taken
            taken += character

    def starts_with(self, *words: str) -> Reading[str]:
        """Takes the longest of `words` that comes next and returns it; takes nothing and returns "" else."""
        taken = best = ""
        while any(word.startswith(taken) and len(word) > len(taken) for word in words):
            character = yield from self.next()
            taken += character
            if taken in words:
                best = taken
            if character == END or not any(word.startswith(taken) for word in words):
                break
        self.unread(taken[len(best) :])
        return best

    def until(self, *marks: str) -> Reading[tuple[str, str]]:
        """(the text before the first mark, the mark, or "" at the end of the text)."""
        taken = ""
        while True:
            character = yield from self.next()
            if character == END:
                return taken, ""
            taken += character
            mark = next((m for m in marks if taken.endswith(m)), None)
            if mark is not None:
                return taken[: -len(mark)], mark

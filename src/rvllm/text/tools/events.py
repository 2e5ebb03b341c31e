"""What a parser finds in a model's text."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(slots=True)
class Text:
    """Words for the user."""

    text: str


@dataclass(slots=True)
class CallStart:
    """Call number `index` begins; its name is whole. id: what the model itself calls it, if it does."""

    index: int
    name: str
    id: str | None = None


@dataclass(slots=True)
class CallArguments:
    """The next piece of a call's arguments; all pieces joined are its JSON text."""

    index: int
    text: str


Event = Text | CallStart | CallArguments


def merged(events: list[Event]) -> list[Event]:
    """Neighbouring pieces of the same text or the same call's arguments as one; the first of them grows."""
    found: list[Event] = []
    for event in events:
        last = found[-1] if found else None
        if (isinstance(event, Text) and isinstance(last, Text)) or (
            isinstance(event, CallArguments) and isinstance(last, CallArguments) and last.index == event.index
        ):
            last.text += event.text
        else:
            found.append(event)
    return found

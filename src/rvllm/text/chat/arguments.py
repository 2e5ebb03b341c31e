"""A tool call's arguments in a conversation's history: JSON text from the client, or already an object.

Models write broken JSON too: cut off by the token limit, or with a bare line break in a string. The server
hands such calls out as they are, so it takes them back.
"""

from __future__ import annotations

import json
from typing import Any

_CLOSING = {"{": "}", "[": "]"}


def parsed(text: str) -> Any:
    """The value of a call's arguments; {} for no text. Raises ValueError for broken JSON.

    Control characters within strings are taken: models write line breaks so.
    """
    return _loads(text) if text.strip() else {}


def mended(text: str) -> dict[str, Any]:
    """The object that broken JSON begins: closed where it breaks off, without what is beyond saving."""
    for attempt in _closings(text):
        try:
            value = _loads(attempt)
        except (ValueError, RecursionError):
            continue
        if isinstance(value, dict):
            return value
    return {}


def as_text(arguments: Any) -> str:
    """Arguments as JSON text, spelled as Python's json does."""
    return arguments if isinstance(arguments, str) else json.dumps(arguments, ensure_ascii=False)


def _loads(text: str) -> Any:
    """The value of JSON, with U+FFFD for the halves of characters that its escapes may name: \\ud83d."""
    value = json.loads(text, strict=False)
    if "\\ud" not in text and "\\uD" not in text:
        return value
    plain = json.dumps(value, ensure_ascii=False)
    return json.loads(plain.encode("utf-16", "surrogatepass").decode("utf-16", "replace"))


def _closings(text: str) -> list[str]:
    """The text closed at its end, and closed after the last member that is whole."""
    open_brackets: list[str] = []
    whole = ""  # up to the last comma, with all that was open there closed
    in_string = escaped = False
    for at, character in enumerate(text):
        if in_string:
            if escaped:
                escaped = False
            elif character == "\\":
                escaped = True
            elif character == '"':
                in_string = False
        elif character == '"':
            in_string = True
        elif character in _CLOSING:
            open_brackets.append(_CLOSING[character])
            if len(open_brackets) == 1:
                whole = text[: at + 1] + _CLOSING[character]
        elif character in "}]":
            if not open_brackets or open_brackets.pop() != character:
                return [whole]
            if not open_brackets:
                return [text[: at + 1], whole]  # what follows the object is none of it
        elif character == "," and len(open_brackets) == 1:
            whole = text[:at] + open_brackets[0]
    closing = ('"' if in_string else "") + "".join(reversed(open_brackets))
    end = text[:-1] if escaped else text
    return [end + closing, whole]

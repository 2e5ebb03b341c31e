"""Lists in OpenAI's pages, and the parameters of a request's query."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Generic, TypeVar
from urllib.parse import parse_qs

import msgspec

from rvllm.api.http.errors import ApiError, invalid
from rvllm.api.http.exchange import Exchange

EntryT = TypeVar("EntryT")


class Page(msgspec.Struct, Generic[EntryT], kw_only=True):
    """A part of a list; `last_id` goes into the next request's `after`."""

    object: str = "list"
    data: list[EntryT]
    first_id: str | None = None
    last_id: str | None = None
    has_more: bool = False


class Query:
    """The parameters behind a path's question mark."""

    def __init__(self, exchange: Exchange) -> None:
        text = exchange.scope.get("query_string", b"").decode("ascii", "replace")
        self._values = parse_qs(text, keep_blank_values=True)

    def text(self, name: str) -> str | None:
        """The parameter's value; None when it is absent or empty."""
        return (self._values.get(name) or [""])[-1] or None

    def texts(self, name: str) -> list[str]:
        """The parameter's values; it may be given several times."""
        return self._values.get(name, [])

    def number(self, name: str, default: int, low: int, high: int) -> int:
        """A whole number in a range. Raises a 400 otherwise."""
        text: str | None = self._values.get(name, [None])[-1]
        if text is None:
            return default
        if not (text.isascii() and text.isdigit() and len(text) < 12 and low <= int(text) <= high):
            raise invalid(f"{name} must be a whole number in [{low}, {high}], got {text[:40]!r}", name)
        return int(text)

    def choice(self, name: str, default: str, choices: Sequence[str]) -> str:
        """One of several words. Raises a 400 for any other."""
        text: str = self._values.get(name, [default])[-1]
        if text not in choices:
            raise invalid(f"{name} must be {' or '.join(choices)}, got {text[:40]!r}", name)
        return text

    def truth(self, name: str) -> bool:
        """Whether the parameter is true; an absent one is not. Raises a 400 for what is neither."""
        text: str = self._values.get(name, ["false"])[-1].lower()
        if text not in ("true", "1", "false", "0"):
            raise invalid(f"{name} must be true or false, got {text[:40]!r}", name)
        return text in ("true", "1")


def page(
    entries: Sequence[EntryT],
    name_of: Callable[[EntryT], str],
    query: Query,
    *,
    order: str = "desc",
    limit: int = 20,
    most: int = 100,
) -> Page[Any]:
    """The page of `entries` (oldest first) that a query asks for by order, after and limit."""
    order = query.choice("order", order, ("asc", "desc"))
    count = query.number("limit", limit, 1, most)
    ordered = list(entries) if order == "asc" else list(reversed(entries))
    after, start = query.text("after"), 0
    if after is not None:
        places = [i for i, entry in enumerate(ordered) if name_of(entry) == after]
        if not places:
            raise ApiError(404, f"after: there is no {after[:80]!r} in this list", param="after")
        start = places[0] + 1
    part = ordered[start : start + count]
    return Page(
        data=part,
        first_id=name_of(part[0]) if part else None,
        last_id=name_of(part[-1]) if part else None,
        has_more=start + count < len(ordered),
    )

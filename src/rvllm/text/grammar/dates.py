"""Dates that exist: JSON schemas' formats `date`, `date-time` and `time`, told to the grammar in full.

llguidance follows RFC 3339 but lets 29 February pass in any year, the year 0000 and a 61st second at
any hour, none of which a validator takes. Patterns say the rest; they and the format both hold.
"""

from __future__ import annotations

from typing import Any

from rvllm.text.grammar.schema import map_schemas

_YEAR = r"([1-9]\d{3}|0[1-9]\d{2}|00[1-9]\d|000[1-9])"
_LEAP = r"(\d{2}(0[48]|[2468][048]|[13579][26])|(0[48]|[2468][048]|[13579][26])00)"
_DAYS = r"((0[1-9]|1[0-2])-(0[1-9]|1\d|2[0-8])|(0[13-9]|1[0-2])-(29|30)|(0[13578]|1[02])-31)"
_DATE = f"({_YEAR}-{_DAYS}|{_LEAP}-02-29)"
_TIME = r"\d{2}:\d{2}:[0-5]\d"
PATTERNS = {"date": f"^{_DATE}$", "date-time": f"^{_DATE}[Tt]{_TIME}", "time": f"^{_TIME}"}


def with_real_dates(schema: Any) -> Any:
    """The schema with a pattern beside every format of a date or a time, wherever a schema stands in it."""
    return map_schemas(schema, _dated)


def _dated(found: dict[str, Any]) -> dict[str, Any]:
    kind = found.get("format")
    pattern = PATTERNS.get(kind) if isinstance(kind, str) else None
    if pattern is None:
        return found
    if "pattern" not in found:
        return {**found, "pattern": pattern}
    others = found.get("allOf", [])
    return {**found, "allOf": [*others, {"pattern": pattern}]} if isinstance(others, list) else found

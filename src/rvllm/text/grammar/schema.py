"""JSON schemas without what constrains nothing.

llguidance refuses every keyword that it does not know, also where the keyword asks for nothing: an unknown
`format` (an annotation, by JSON Schema), `uniqueItems: false`, `propertyNames: {"type": "string"}`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

_ONE = (
    "items", "additionalItems", "additionalProperties", "unevaluatedProperties", "unevaluatedItems",
    "contains", "propertyNames", "not", "if", "then", "else",
)  # fmt: skip
_LISTS = ("allOf", "anyOf", "oneOf", "prefixItems", "items")
_MAPS = ("properties", "patternProperties", "$defs", "definitions", "dependentSchemas")

# Those that llguidance holds an answer to.
FORMATS = frozenset(
    ("date-time", "time", "date", "duration", "email", "hostname", "ipv4", "ipv6", "uuid", "uri", "unknown")
)
_ALWAYS: tuple[Any, ...] = (True, {})
_NEVER: tuple[Any, ...] = (False, {"not": {}}, {"not": True})
# Values that ask for nothing.
_IDLE: dict[str, tuple[Any, ...]] = {
    "uniqueItems": (False,),
    "minContains": (0,),
    "unevaluatedProperties": _ALWAYS,
    "unevaluatedItems": _ALWAYS,
    "propertyNames": (*_ALWAYS, {"type": "string"}),
    "dependentRequired": ({},),
    "dependentSchemas": ({},),
    "dependencies": ({},),
    "not": _NEVER,
}

REWRITTEN = frozenset((*_IDLE, "format", "if", "then", "else", "contains", "maxContains"))
"""Keywords that a schema may lose or change."""


def map_schemas(schema: Any, change: Callable[[dict[str, Any]], dict[str, Any]]) -> Any:
    """The schema with `change` applied to every schema that stands in it, the innermost first."""
    if not isinstance(schema, dict):
        return schema
    found = dict(schema)
    for key in _ONE:
        if isinstance(found.get(key), dict):
            found[key] = map_schemas(found[key], change)
    for key in _LISTS:
        if isinstance(found.get(key), list):
            found[key] = [map_schemas(part, change) for part in found[key]]
    for key in _MAPS:
        if isinstance(found.get(key), dict):
            found[key] = {name: map_schemas(part, change) for name, part in found[key].items()}
    return change(found)


def without_idle_keywords(schema: Any) -> Any:
    """The schema without keywords that every JSON value satisfies."""
    return map_schemas(schema, _cleaned)


def _cleaned(schema: dict[str, Any]) -> dict[str, Any]:
    found = dict(schema)
    kind = found.get("format")
    if isinstance(kind, str) and kind not in FORMATS:
        del found["format"]
    _contains(found)
    for key, idle in _IDLE.items():
        if key in found and any(_same(found[key], value) for value in idle):
            del found[key]
    branches = [found[key] for key in ("then", "else") if key in found] if "if" in found else []
    if not any(branch not in _ALWAYS for branch in branches):
        for key in ("if", "then", "else"):
            found.pop(key, None)
    return found


def _contains(schema: dict[str, Any]) -> None:
    """`contains` with `minContains: 0` holds nothing; its bounds mean nothing without it."""
    least, most = schema.get("minContains"), schema.get("maxContains")
    if "contains" in schema and not (_same(least, 0) and most is None):
        return
    for key in ("contains", "minContains", "maxContains"):
        schema.pop(key, None)


def _same(value: Any, other: Any) -> bool:
    """Equal as JSON, where true is not 1."""
    return isinstance(value, bool) == isinstance(other, bool) and bool(value == other)

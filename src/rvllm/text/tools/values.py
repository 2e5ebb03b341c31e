"""Values of arguments that a model writes as plain text, typed by the function's schema."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

_PYTHON = {"True": True, "False": False, "None": None}
_MOST_DEPTH = 8  # of anyOf and the like that are looked into
_TYPES: dict[str, tuple[type, ...]] = {
    "integer": (int,),
    "number": (int, float),
    "boolean": (bool,),
    "array": (list,),
    "object": (dict,),
    "null": (type(None),),
    "string": (str,),
}


def typed(text: str, schema: Any) -> Any:
    """The value that a text stands for: a string, unless the schema asks for something else and it is that.

    Without a schema it is a string, as in vLLM.
    """
    kinds = kinds_of(schema)
    others = kinds - {"string"}
    if not others:
        return text
    value = json_or_text(text)
    return value if any(_is(value, kind) for kind in others) else text


def json_or_text(text: str) -> Any:
    """The value of JSON or of Python's word for one; the text itself if it is neither."""
    bare = text.strip()
    try:
        return _PYTHON[bare] if bare in _PYTHON else json.loads(bare, strict=False)
    except (ValueError, RecursionError):
        return text


def kinds_of(schema: Any, depth: int = 0) -> frozenset[str]:
    """The JSON types that a schema allows; none where it does not say."""
    if not isinstance(schema, Mapping) or depth > _MOST_DEPTH:
        return frozenset()
    kind = schema.get("type")
    if isinstance(kind, str):
        return frozenset({kind})
    if isinstance(kind, list):
        return frozenset(k for k in kind if isinstance(k, str))
    found: set[str] = set()
    for name in ("anyOf", "oneOf", "allOf"):
        for each in schema.get(name) or ():
            found |= kinds_of(each, depth + 1)
    values = schema.get("enum", [schema["const"]] if "const" in schema else [])
    if isinstance(values, list):
        found |= {k for value in values for k in _TYPES if _is(value, k) and k != "number"}
    if not found and ("properties" in schema or "additionalProperties" in schema):
        return frozenset({"object"})
    if not found and "items" in schema:
        return frozenset({"array"})
    return frozenset(found)


def _is(value: Any, kind: str) -> bool:
    if isinstance(value, bool):
        return kind == "boolean"
    if kind == "integer" and isinstance(value, float):
        return value.is_integer()
    return isinstance(value, _TYPES.get(kind, ()))


def property_schema(schema: Any, name: str) -> Any:
    """The schema of an object's property; None where there is none. References into $defs are followed."""
    if not isinstance(schema, Mapping):
        return None
    properties = schema.get("properties")
    found = properties.get(name) if isinstance(properties, Mapping) else None
    if found is None:
        return schema.get("additionalProperties")
    for _ in range(_MOST_DEPTH):
        reference = found.get("$ref") if isinstance(found, Mapping) else None
        if not isinstance(reference, str) or not reference.startswith("#/"):
            return found
        target: Any = schema
        for step in reference[2:].split("/"):
            target = target.get(step) if isinstance(target, Mapping) else None
        found = target
    return None

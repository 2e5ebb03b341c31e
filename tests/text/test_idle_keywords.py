"""Keywords of JSON schemas that constrain nothing change nothing, and refuse nothing."""

from __future__ import annotations

from typing import Any

import pytest

from rvllm.engine.sampling_params import StructuredOutputsParams
from rvllm.errors import UsageError
from rvllm.text.grammar.grammar import grammar_of, json_rule
from rvllm.text.grammar.schema import without_idle_keywords

# Each with the schema that JSON Schema's specification makes of it.
IDLE: list[tuple[Any, Any]] = [
    *(
        ({"type": "string", "format": name}, {"type": "string"})
        for name in ("password", "path", "binary", "uri-reference", "color", "byte", "regex", "json-pointer")
    ),
    ({"type": "array", "items": {}, "uniqueItems": False}, {"type": "array", "items": {}}),
    ({"propertyNames": {"type": "string"}, "additionalProperties": {"type": "integer"}},
     {"additionalProperties": {"type": "integer"}}),
    ({"type": "array", "minContains": 0}, {"type": "array"}),
    ({"type": "array", "contains": {"const": 1}, "minContains": 0}, {"type": "array"}),
    ({"type": "array", "maxContains": 2}, {"type": "array"}),
    ({"type": "object", "unevaluatedProperties": True}, {"type": "object"}),
    ({"type": "object", "dependentRequired": {}}, {"type": "object"}),
    ({"not": False}, {}),
    ({"if": True, "type": "string"}, {"type": "string"}),
    ({"then": {"type": "string"}}, {}),
    ({"if": {"type": "string"}, "then": True}, {}),
    ({"properties": {"format": {"format": "path"}, "not": {"items": {"uniqueItems": False}}}},
     {"properties": {"format": {}, "not": {"items": {}}}}),
]  # fmt: skip


@pytest.mark.parametrize(("schema", "same"), IDLE)
def test_what_asks_for_nothing_is_served(schema: Any, same: Any) -> None:
    assert without_idle_keywords(schema) == same
    assert grammar_of(StructuredOutputsParams(json=schema)) == grammar_of(StructuredOutputsParams(json=same))
    assert json_rule(schema) == json_rule(same)


@pytest.mark.parametrize(
    "schema",
    [
        {"type": "array", "uniqueItems": True},
        {"type": "object", "propertyNames": {"pattern": "^a"}},
        {"type": "array", "contains": {"const": 1}, "minContains": 1},
        {"not": {"type": "string"}},
        {"if": {"type": "string"}, "then": {"maxLength": 2}},
        {"type": "object", "dependentRequired": {"a": ["b"]}},
        {"unevaluatedProperties": False, "properties": {}},
    ],
)
def test_what_constrains_is_kept_or_refused(schema: Any) -> None:
    assert without_idle_keywords(schema) == schema
    with pytest.raises(UsageError, match="json"):
        grammar_of(StructuredOutputsParams(json=schema))


def test_values_are_no_schemas() -> None:
    schema = {"enum": [{"format": "path", "uniqueItems": False}], "default": {"not": False}}
    assert without_idle_keywords(schema) == schema

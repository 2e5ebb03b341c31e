"""Formats of dates let through what exists, and nothing else."""

from __future__ import annotations

import datetime
import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from llguidance import LLMatcher, LLTokenizer

from rvllm.engine.sampling_params import StructuredOutputsParams
from rvllm.text.grammar.dates import with_real_dates
from rvllm.text.grammar.grammar import grammar_of

BYTES = LLTokenizer("byte")


def accepts(schema: dict[str, Any], value: Any) -> bool:
    """Whether the grammar of a schema can write the value."""
    grammar = grammar_of(StructuredOutputsParams(json=schema))
    assert grammar is not None
    matcher = LLMatcher(BYTES, grammar)
    assert not matcher.get_error(), matcher.get_error()
    tokens = BYTES.tokenize_str(json.dumps(value))
    taken = matcher.try_consume_tokens(tokens)
    return taken == len(tokens) and matcher.is_accepting()


def exists(text: str) -> bool:
    try:
        datetime.date.fromisoformat(text)
    except ValueError:
        return False
    return True


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 9999), st.integers(0, 13), st.integers(0, 32))
def test_a_date_is_accepted_if_it_exists(year: int, month: int, day: int) -> None:
    text = f"{year:04}-{month:02}-{day:02}"
    assert accepts({"type": "string", "format": "date"}, text) == exists(text)
    assert accepts({"type": "string", "format": "date-time"}, f"{text}T12:30:00Z") == exists(text)


@pytest.mark.parametrize("year", [1, 4, 100, 400, 1900, 2000, 2020, 2021, 2100, 2400, 9996])
def test_leap_days(year: int) -> None:
    text = f"{year:04}-02-29"
    assert accepts({"type": "string", "format": "date"}, text) == exists(text)


def test_no_minute_has_61_seconds() -> None:
    assert accepts({"type": "string", "format": "time"}, "12:30:59Z")
    assert not accepts({"type": "string", "format": "time"}, "12:30:60Z")
    assert not accepts({"type": "string", "format": "date-time"}, "2020-01-01T12:30:60Z")


def test_a_pattern_of_the_schema_holds_too() -> None:
    schema = {"type": "string", "format": "date", "pattern": "^20"}
    assert accepts(schema, "2024-02-29")
    assert not accepts(schema, "2023-02-29")
    assert not accepts(schema, "1996-02-29")


def test_only_schemas_are_changed() -> None:
    schema = {
        "type": "object",
        "properties": {"format": {"const": {"format": "date"}}, "on": {"type": "string", "format": "date"}},
        "default": {"format": "date"},
    }
    changed = with_real_dates(schema)
    assert changed["properties"]["format"] == schema["properties"]["format"]  # type: ignore[index]
    assert changed["default"] == schema["default"]
    assert "pattern" in changed["properties"]["on"]
    assert accepts(schema, {"format": {"format": "date"}, "on": "2024-02-29"})
    assert not accepts(schema, {"format": {"format": "date"}, "on": "0000-01-01"})

"""How large a schema or grammar may be; looked at before any parser, which recurses over it, sees it."""

from __future__ import annotations

import re
from itertools import islice
from typing import Any

from rvllm.errors import UsageError

MAX_DEPTH = 200  # of objects and lists inside each other
MAX_NODES = 100_000  # objects, lists and values of a schema
MAX_DEFINITIONS = 1_000
MAX_RULES = 2_000  # of a grammar
_RULE = re.compile(r"^[ \t]*[?!]?[\w.-]+(\[[^\]\n]*\]|\{[^}\n]*\})?(\.-?\d+)?[ \t]*(::=|:)", re.MULTILINE)


def check_schema(schema: Any, name: str) -> None:
    """Raises UsageError, beginning with `name`, for a schema that is too deep or too large."""
    level, depth, nodes = [schema], 0, 0
    while level:
        nodes, depth = nodes + len(level), depth + 1
        if depth > MAX_DEPTH:
            raise UsageError(f"{name}: nested more than {MAX_DEPTH} deep")
        if nodes > MAX_NODES:
            raise UsageError(f"{name}: more than {MAX_NODES} values")
        inner: list[Any] = []
        for value in level:
            if isinstance(value, dict):
                for key in ("$defs", "definitions"):
                    found = value.get(key)
                    if isinstance(found, dict) and len(found) > MAX_DEFINITIONS:
                        raise UsageError(f"{name}: more than {MAX_DEFINITIONS} entries in {key}")
                inner += value.values()
            elif isinstance(value, list):
                inner += value
        level = inner


def check_rules(grammar: str, name: str) -> None:
    """Raises UsageError, beginning with `name`, for a grammar of too many rules."""
    if sum(1 for _ in islice(_RULE.finditer(grammar), MAX_RULES + 1)) > MAX_RULES:
        raise UsageError(f"{name}: more than {MAX_RULES} rules")

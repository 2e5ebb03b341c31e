"""Constants of the CUDA sources as numbers: a tile's size is written down once, in the header that has it."""

from __future__ import annotations

import ast
import operator
import re
from collections.abc import Mapping
from functools import cache
from pathlib import Path

SOURCES = Path(__file__).parent
_DEFINITION = re.compile(r"^(?:inline )?constexpr int (\w+ = [^;]+);", re.MULTILINE)
_OPERATORS = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.floordiv,
}


@cache
def constants(source: str) -> Mapping[str, int]:
    """The `inline constexpr int` of a file in `kernels/` that stand in no function or class, in their order.

    They may be computed from earlier ones of that file with + - * /; what takes more is left out.
    """
    found: dict[str, int] = {}
    for definitions in _DEFINITION.findall((SOURCES / source).read_text()):
        for definition in definitions.split(","):
            name, _, value = definition.partition(" = ")
            try:
                found[name.strip()] = _number(ast.parse(value.strip(), mode="eval").body, found)
            except (KeyError, SyntaxError):  # another file's constant, a call, ...
                continue
    return found


def _number(node: ast.AST, known: Mapping[str, int]) -> int:
    if isinstance(node, ast.Constant) and isinstance(node.value, int):
        return node.value
    if isinstance(node, ast.Name):
        return known[node.id]
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub):
        return -_number(node.operand, known)
    if isinstance(node, ast.BinOp):
        apply = _OPERATORS[type(node.op)]
        return int(apply(_number(node.left, known), _number(node.right, known)))
    raise KeyError(ast.dump(node))

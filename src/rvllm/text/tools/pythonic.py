"""Tool calls written as Python: `[f(city="Oslo", days=2), g()]`, Llama 4's and others' way."""

from __future__ import annotations

import ast
import json
from typing import Any

from rvllm.text.tools.formats import BareParser
from rvllm.text.tools.reader import END, Reading

_LONGEST = 1 << 16  # characters of one call
_DEEPEST = 32  # brackets within brackets: Python's parser recurses
_JSON_NAMES = {"true": True, "false": False, "null": None}
_CLOSING = {"(": ")", "[": "]", "{": "}"}


class Pythonic(BareParser):
    """An answer that begins `[NAME(`; also between Llama 4's or LFM2's marks."""

    marks: tuple[str, ...] = ("<|python_start|>", "<|tool_call_start|>")
    hidden: tuple[str, ...] = ("<|python_end|>", "<|tool_call_end|>")
    opening = "["

    def call_after(self, mark: str) -> Reading[None]:
        space = yield from self.reader.skip_space()
        yield from self.bare_calls(mark + space)

    def bare_calls(self, before: str) -> Reading[None]:
        """Reads `[call, call]`."""
        first = yield from self.reader.next()
        if first != "[":
            self.reader.unread(first)
            self.say(before)
            return
        before += first
        while True:
            text = yield from self._call()
            call = _parsed(text)
            if call is None or not self.begin(call[0]):
                self.say(before + text)
                return
            self.arguments(json.dumps(call[1], ensure_ascii=False))
            before = yield from self.reader.skip_space()
            follows = yield from self.reader.next()
            if follows == "]":
                return
            if follows != ",":
                self.reader.unread(before + follows)
                return
            before = ""

    def _call(self) -> Reading[str]:
        """The text up to the end of `NAME(...)`; less when it is none, or too long or deep."""
        taken, brackets, quote, escaped = "", list[str](), "", False
        while len(taken) < _LONGEST and len(brackets) <= _DEEPEST:
            character = yield from self.reader.next()
            if character == END:
                return taken
            taken += character
            if quote:
                if escaped:
                    escaped = False
                elif character == "\\":
                    escaped = True
                elif character == quote:
                    quote = ""
            elif character in "\"'":
                if not brackets:
                    return taken
                quote = character
            elif character in _CLOSING:
                if not brackets and character != "(":
                    return taken
                brackets.append(_CLOSING[character])
            elif character in ")]}":
                if not brackets or brackets.pop() != character:
                    return taken
                if not brackets:
                    return taken
            elif not brackets and not (character.isalnum() or character in "_.- \n\t"):
                return taken
        return taken


class Olmo3(Pythonic):
    """`<function_calls>`, calls as Python, one a line, `</function_calls>`: OLMo 3."""

    marks = ("<function_calls>",)
    hidden = ("</function_calls>",)

    def call_after(self, mark: str) -> Reading[None]:
        before = mark
        while True:
            before += yield from self.reader.skip_space()
            text = yield from self._call()
            call = _parsed(text)
            if call is None:
                closes = self.calls and "</function_calls>".startswith(text)
                if closes:
                    self.reader.unread(text)
                else:
                    self.say(before + text)
                return
            self.begin(call[0])
            self.arguments(json.dumps(call[1], ensure_ascii=False))
            before = ""


def _parsed(text: str) -> tuple[str, dict[str, Any]] | None:
    """(name, arguments) of a call; None for anything else."""
    name, bracket, rest = text.strip().partition("(")
    if not bracket or not rest.endswith(")") or not name:
        return None
    try:
        tree = ast.parse(f"f({rest}", mode="eval").body
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return None
    if not isinstance(tree, ast.Call) or tree.args or any(k.arg is None for k in tree.keywords):
        return None
    try:
        return name.strip(), {str(k.arg): _value(k.value) for k in tree.keywords}
    except ValueError:
        return None


def _value(node: ast.expr) -> Any:
    """A literal's value; its depth is that of the brackets, which is bounded. Raises ValueError."""
    if isinstance(node, ast.Constant) and isinstance(node.value, str | int | float | bool | None):
        return node.value
    if isinstance(node, ast.Name) and node.id in _JSON_NAMES:
        return _JSON_NAMES[node.id]
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub):
        value = _value(node.operand)
        if isinstance(value, int | float) and not isinstance(value, bool):
            return -value
    if isinstance(node, ast.List | ast.Tuple):
        return [_value(each) for each in node.elts]
    if isinstance(node, ast.Dict) and all(isinstance(key, ast.Constant) for key in node.keys):
        return {str(ast.literal_eval(k)): _value(v) for k, v in zip(node.keys, node.values, strict=True) if k}
    raise ValueError(ast.dump(node)[:80])

"""CUDA C++ sources as g++ takes them: what the shim headers cannot express is rewritten as text.

An asm statement becomes a call of the function in `include/ptx.hpp` that is named after its opcode; one that
is not there fails to compile, by name, when a kernel uses it. `extern __shared__` arrays become pointers.
"""

from __future__ import annotations

import re
from functools import cache
from pathlib import Path

SHIM = Path(__file__).parent / "include"
_ASM = re.compile(r"\basm\s*(?:volatile)?\s*\(")
_STRING = re.compile(r'"((?:[^"\\]|\\.)*)"')
_DYNAMIC = re.compile(
    r"extern\s+__shared__\s+(?:(?:__align__|alignas)\(\s*\d+\s*\)\s*)?([\w:<>, ]+?)\s+(\w+)\s*\[\s*\]"
)
# griddepcontrol is sm_90's, but the emulator, which is sm_80 otherwise, has it.
_GRIDDEP = re.compile(r"#if __CUDA_ARCH__ >= 900((?:\n\s*asm volatile\(\"griddepcontrol[^\n]*)+\n)#endif")
_OPERAND = re.compile(r"%%([\w.]+)|%(\d+)|(?<![\w.])(\d+)(?![\w.])")


@cache
def known() -> frozenset[str]:
    """The instructions and special registers that ptx.hpp has."""
    return frozenset(re.findall(r"^EMU_PTX \S+ (\w+)", (SHIM / "ptx.hpp").read_text(), re.MULTILINE))


def translate(text: str) -> str:
    """The source with asm statements and dynamic shared arrays rewritten; line numbers stay."""
    text = _DYNAMIC.sub(r"\1* const \2 = reinterpret_cast<\1*>(emu::dynamic_shared())", text)
    text = _GRIDDEP.sub(r"\1", text)
    pieces, at = [], 0
    for match in _ASM.finditer(text):
        if match.start() < at or _in_comment(text, match.start()):
            continue
        end = _closing(text, match.end())
        statement = text[match.end() : end]
        breaks = "".join(re.findall(r"\\?\n", statement))
        pieces += [text[at : match.start()], _call(statement), breaks]
        at = end + 1
    return "".join([*pieces, text[at:]])


def _in_comment(text: str, at: int) -> bool:
    return "//" in text[text.rfind("\n", 0, at) + 1 : at]


def _closing(text: str, at: int) -> int:
    """Where the parenthesis closes whose inside begins at `at`; strings do not count."""
    depth = 1
    while depth:
        if text[at] == '"':
            at = _STRING.match(text, at).end()  # type: ignore[union-attr]
            continue
        depth += {"(": 1, ")": -1}.get(text[at], 0)
        at += 1
    return at - 1


def _parts(statement: str) -> list[str]:
    """template : outputs : inputs : clobbers, split at colons outside parentheses, strings and `::` names."""
    parts, depth, start, at = [], 0, 0, 0
    while at < len(statement):
        if statement[at] == '"':
            at = _STRING.match(statement, at).end()  # type: ignore[union-attr]
            continue
        depth += {"(": 1, "[": 1, "{": 1, ")": -1, "]": -1, "}": -1}.get(statement[at], 0)
        if statement[at] == ":" and depth == 0:
            parts.append(statement[start:at])
            start = at + 1
        at += 1
    return [*parts, statement[start:]]


def _expressions(part: str) -> list[str]:
    """The expressions of `"=r"(a), "r"(b[1])`."""
    found, at = [], 0
    while match := _STRING.search(part, at):
        begin = part.index("(", match.end()) + 1
        end = _closing(part, begin)
        found.append(part[begin:end])
        at = end + 1
    return found


def _call(statement: str) -> str:
    parts = _parts(statement)
    code = "".join(_STRING.findall(parts[0])).replace("\\n", " ").replace("\\t", " ").strip()
    operands = [e for part in parts[1:3] for e in _expressions(part)]
    opcode, _, rest = code.rstrip(";").strip().partition(" ")
    name = re.sub(r"\W", "_", opcode)
    arguments = []
    for special, number, literal in _OPERAND.findall(rest):
        if special:
            register = "sreg_" + special.replace(".", "_")
            if register not in known():
                name = register
            arguments.append(f"emu_ptx::{register}()")
        elif number:
            if int(number) < len(operands):
                arguments.append(operands[int(number)])
        else:
            arguments.append(literal)
    if not code:
        return "(void)0"
    if code.startswith("{") or ";" in code.rstrip("; ") or name not in known():
        what = opcode if not code.startswith("{") else " ".join(code.split())
        message = f"the emulator has no {what}".replace('"', "'").replace("\\", " ")[:120]
        return (
            f'do {{ extern void emu_missing_{name[:80]}() __attribute__((error("{message}"))); '
            f"emu_missing_{name[:80]}(); }} while (0)"
        )
    return f"emu_ptx::{name}({', '.join(arguments)})"

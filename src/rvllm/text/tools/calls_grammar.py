"""Grammars for answers that call functions: forced calls, offered ones, and calls beside another form."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from rvllm.text.grammar.grammar import Spelled, json_rule, literal
from rvllm.text.tools.choose import Members, ToolFormat
from rvllm.text.tools.formats import Hermes, Llama3
from rvllm.text.tools.values import kinds_of, property_schema

if TYPE_CHECKING:
    from rvllm.text.tokenizers.tokenizer import Tokenizer

MAX_CALLS = 16  # that a forced answer may make in parallel


@dataclass(frozen=True)
class Function:
    """A function the model may call. strict: its arguments must always fit `parameters`."""

    name: str
    parameters: Any
    strict: bool = False


def forced_calls(
    known: ToolFormat, functions: Sequence[Function], tokenizer: Tokenizer, *, parallel: bool
) -> str:
    """A grammar for an answer that is one call of one of `functions`, or with `parallel` one or more."""
    schemas = [_schema(function) for function in functions]
    whole, rules = _calls(known, functions, schemas, Spelled(tokenizer), parallel)
    return "\n".join([f"start: {whole}", *rules])


def offered_calls(
    known: ToolFormat, functions: Sequence[Function], tokenizer: Tokenizer, *, parallel: bool
) -> str | None:
    """A grammar for free text that may end in calls, in which those of strict functions fit their schemas.

    An answer that begins as a call without marks does (see `Hermes`) has to go on as one.
    None where it would hold nothing: no function is strict, or calls begin with no token of the vocabulary,
    so that any text may look like one.
    """
    spelled = Spelled(tokenizer)
    begins_with_token = spelled.of(known.frame.before + known.frame.call_before).startswith("<[")
    if not begins_with_token or not any(function.strict for function in functions):
        return None
    schemas = _offered_schemas(functions)
    whole, rules = _calls(known, functions, schemas, spelled, parallel)
    text, bare = r"/(.|\n)*/", list[str]()
    if known.parser is Hermes:
        bare = _bare_calls(functions, schemas, parallel)
        names = "|".join(re.escape(_in_json(f.name)) for f in functions).replace("/", r"\/")
        text += rf' & ~/\s*\{{\s*"(name"\s*:\s*"({names})"|arguments")(.|\n)*/'
    start = "start: TEXT calls?" + (" | bare" if bare else "")
    return "\n".join([start, f"TEXT: {text}", f"calls: {whole}", *bare, *rules])


def calls_or_form(
    known: ToolFormat, functions: Sequence[Function], tokenizer: Tokenizer, form: str, *, parallel: bool
) -> str:
    """A grammar for an answer that is either calls or what the grammar `form` says."""
    schemas, bare = _offered_schemas(functions), known.parser in (Hermes, Llama3)
    ways, rules = ["@form"], list[str]()
    if known.parser is not Llama3:
        whole, rules = _calls(known, functions, schemas, Spelled(tokenizer), parallel)
        ways.append(whole)
    if bare:
        # Whole objects, read by the same JSON rules as the form: a literal in front of the arguments would
        # take the form's first characters for its own.
        key, between = ("parameters", "; ") if known.parser is Llama3 else ("arguments", "\n")
        objects = [_call_object(f.name, key, schema) for f, schema in zip(functions, schemas, strict=True)]
        rules += [f"bare_{i}: {json_rule(schema)}" for i, schema in enumerate(objects)]
        rules.append("bare: " + " | ".join(f"bare_{i}" for i in range(len(functions))))
        more = f" ({literal(between)} bare){{0,{MAX_CALLS - 1}}}" if parallel else ""
        ways.append(f"bare{more}")
    main = "\n".join(["start: " + " | ".join(ways), *rules])
    inner = json.loads(form)["grammars"] if form.lstrip().startswith("{") else [{"lark_grammar": form}]
    return json.dumps(
        {"grammars": [{"lark_grammar": main}, {**inner[0], "name": "form"}]}, ensure_ascii=False
    )


def _call_object(name: str, key: str, schema: Any) -> dict[str, Any]:
    """The schema of a whole call; definitions move to its root, where references look for them."""
    inner = dict(schema) if isinstance(schema, dict) else {"allOf": [schema]}
    definitions = {word: inner.pop(word) for word in ("$defs", "definitions") if word in inner}
    properties = {"name": {"const": name}, key: inner}
    return {"type": "object", "properties": properties, "required": ["name", key],
            "additionalProperties": False, **definitions}  # fmt: skip


def _offered_schemas(functions: Sequence[Function]) -> list[Any]:
    return [_schema(function) if function.strict else {"type": "object"} for function in functions]


def _bare_calls(functions: Sequence[Function], schemas: Sequence[Any], parallel: bool) -> list[str]:
    """Rules for calls without marks, at the beginning of an answer."""
    rules = []
    for i, (function, schema) in enumerate(zip(functions, schemas, strict=True)):
        before = f'{{"name": "{_in_json(function.name)}", "arguments": '
        rules.append(f"bare_{i}: {literal(before)} {json_rule(schema)} {literal('}')}")
    rules.append("bare_call: " + " | ".join(f"bare_{i}" for i in range(len(functions))))
    more = rf' ("\n" bare_call){{0,{MAX_CALLS - 1}}}' if parallel else ""
    return [f"bare: bare_call{more}", *rules]


def _calls(
    known: ToolFormat, functions: Sequence[Function], schemas: Sequence[Any], spelled: Spelled, parallel: bool
) -> tuple[str, list[str]]:
    """(the right side of a rule for one or more calls, the rules that it needs)."""
    frame, rules = known.frame, list[str]()
    for i, (function, schema) in enumerate(zip(functions, schemas, strict=True)):
        name = function.name if known.members else _in_json(function.name)
        before = frame.call_before.replace("NAME", name).replace("INDEX", "0")
        if known.members is None:
            arguments = json_rule(schema)
        else:
            arguments = f"members_{i}"
            rules += _members(known.members, i, schema, spelled)
        parts = (spelled.of(before), arguments, spelled.of(frame.call_after))
        rules.append(f"call_{i}: " + " ".join(part for part in parts if part))
    rules.append("call: " + " | ".join(f"call_{i}" for i in range(len(functions))))
    more = f"({spelled.of(frame.between)} call){{0,{MAX_CALLS - 1}}}" if parallel else ""
    whole = (spelled.of(frame.before), "call", more, spelled.of(frame.after))
    return " ".join(part for part in whole if part), rules


def _members(members: Members, call: int, schema: Any, spelled: Spelled) -> list[str]:
    """Rules for `members_CALL`: the function's properties in their order, those not required may be missing.

    A schema that names no properties gives any keys with texts.
    """
    properties = schema.get("properties") if isinstance(schema, Mapping) else None
    if not isinstance(properties, Mapping):
        properties = {}
    required = schema.get("required") if isinstance(schema, Mapping) else ()
    names = list(properties)
    rules = []
    for n, name in enumerate(names):
        rules += _member(members, f"{call}_{n}", name, property_schema(schema, name), schema, spelled)
    separator = f"{spelled.of(members.between)} " if members.between else ""
    for n in reversed(range(len(names))):
        rest, one = f"rest_{call}_{n + 1}" if n + 1 < len(names) else "", f"member_{call}_{n}"
        ways = [f"{one} {separator}{rest}"] if rest else [one]
        if rest and members.between and _may_be_empty(names[n + 1 :], required):
            ways.append(one)
        if names[n] not in (required or ()) and (rest or not members.between):
            ways.append(rest or '""')
        rules.append(f"rest_{call}_{n}: " + " | ".join(ways))
    if not names:
        rules.append(f'members_{call}: ""')
    elif _may_be_empty(names, required):
        rules.append(f"members_{call}: rest_{call}_0?")
    else:
        rules.append(f"members_{call}: rest_{call}_0")
    return rules


def _may_be_empty(names: Sequence[str], required: Any) -> bool:
    return not any(name in (required or ()) for name in names)


def _member(members: Members, number: str, name: str, schema: Any, root: Any, spelled: Spelled) -> list[str]:
    """Rules for `member_NUMBER`: one argument between its marks."""
    kinds = kinds_of(schema)
    is_string = members.bare_strings and kinds <= {"string", "null"}
    text_before, text_after = members.around(name, is_string)
    before, after = spelled.of(text_before), spelled.of(text_after)
    choices = schema.get("enum") if isinstance(schema, Mapping) else None
    if is_string:
        if isinstance(choices, list) and choices and all(isinstance(choice, str) for choice in choices):
            ways = " | ".join(literal(choice) for choice in choices)
            return [f"member_{number}: {before} ({ways}) {after}"]
        if after == literal(text_after):
            text = f"text_{number}[suffix={after}]: /(.|\\n)*/"
            return [f"member_{number}: {before} text_{number}", text]
        return [f"member_{number}: {before} TEXT_{number} {after}", f"TEXT_{number}: /(.|\\n)*/"]
    definitions = {w: root[w] for w in ("$defs", "definitions") if isinstance(root, Mapping) and w in root}
    inner = {**schema, **definitions} if isinstance(schema, Mapping) else {}
    return [" ".join(part for part in (f"member_{number}: {before}", json_rule(inner), after) if part)]


def _schema(function: Function) -> Any:
    schema = {} if function.parameters is None else function.parameters
    if schema == {}:
        return {"type": "object", "properties": {}, "additionalProperties": False}
    return {"type": "object", **schema} if isinstance(schema, dict) else schema


def _in_json(name: str) -> str:
    return json.dumps(name, ensure_ascii=False)[1:-1]

"""Which format a model's tool calls have, and the grammar that forces a call."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from rvllm.errors import UsageError
from rvllm.text.grammar.grammar import Spelled, json_rule, literal
from rvllm.text.tools.formats import CommandR, DeepSeek, Hermes, Llama3, Mistral, ToolParser

if TYPE_CHECKING:
    from rvllm.text.tokenizers.tokenizer import Tokenizer

MAX_CALLS = 16  # that a forced answer may make in parallel


@dataclass(frozen=True)
class Frame:
    """What stands around calls: `call_before` ends with the arguments' key or the like.

    NAME in `call_before` stands for the function's name; `between` parts calls.
    """

    before: str
    call_before: str
    call_after: str
    between: str
    after: str
    sign: str  # a text in chat templates that only this format's have


@dataclass(frozen=True)
class ToolFormat:
    """A family's way to write calls."""

    name: str
    parser: type[ToolParser]
    frame: Frame
    aliases: tuple[str, ...] = field(default=())


_BEGIN, _SEP, _END = "<｜tool▁call▁begin｜>", "<｜tool▁sep｜>", "<｜tool▁call▁end｜>"
_CALLS_BEGIN, _CALLS_END = "<｜tool▁calls▁begin｜>", "<｜tool▁calls▁end｜>"

# In the order in which a template is looked through: the first sign found decides.
FORMATS = (
    ToolFormat("deepseek_v3", DeepSeek, Frame(
        _CALLS_BEGIN, f"{_BEGIN}function{_SEP}NAME\n```json\n", f"\n```{_END}", "\n", _CALLS_END,
        f"function{_SEP}",
    )),
    ToolFormat("deepseek_v31", DeepSeek, Frame(
        _CALLS_BEGIN, f"{_BEGIN}NAME{_SEP}", _END, "", _CALLS_END, _BEGIN,
    )),
    ToolFormat("mistral_args", Mistral, Frame("", "[TOOL_CALLS]NAME[ARGS]", "", "", "", "[ARGS]")),
    ToolFormat("mistral", Mistral, Frame(
        "[TOOL_CALLS][", '{"name": "NAME", "arguments": ', "}", ", ", "]", "[TOOL_CALLS]",
    )),
    ToolFormat("command_r", CommandR, Frame(
        "<|START_ACTION|>[\n",
        '    {"tool_call_id": "INDEX", "tool_name": "NAME", "parameters": ', "}", ",\n",
        "\n]<|END_ACTION|>", "<|START_ACTION|>",
    ), ("cohere",)),
    ToolFormat("hermes", Hermes, Frame(
        "", '<tool_call>\n{"name": "NAME", "arguments": ', "}\n</tool_call>", "\n", "", "<tool_call>",
    ), ("qwen",)),
    ToolFormat("llama3_json", Llama3, Frame(
        "", '{"name": "NAME", "parameters": ', "}", "; ", "", '"parameters":',
    ), ("llama3",)),
)  # fmt: skip
CHOICES = ("auto", "none", *(name for f in FORMATS for name in (f.name, *f.aliases)))


def tool_format(chosen: str, template: str | None) -> ToolFormat | None:
    """The format of `--tool-call-parser`; with "auto", the one that the chat template writes calls in.

    Raises UsageError for an unknown name.
    """
    if chosen == "none":
        return None
    if chosen == "auto":
        return next((f for f in FORMATS if template and _written_in(template, f)), None)
    found = next((f for f in FORMATS if chosen in (f.name, *f.aliases)), None)
    if found is None:
        raise UsageError(f"--tool-call-parser: {chosen!r} is not one of {', '.join(CHOICES)}")
    return found


def _written_in(template: str, known: ToolFormat) -> bool:
    if "tools" not in template:
        return False
    return known.frame.sign in template.replace('\\"', '"').replace("'+'", "")


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
    whole, rules = _calls(known.frame, functions, schemas, Spelled(tokenizer), parallel)
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
    whole, rules = _calls(known.frame, functions, schemas, spelled, parallel)
    text, bare = r"/(.|\n)*/", list[str]()
    if known.parser is Hermes:
        bare = _bare_calls(functions, schemas, parallel)
        names = "|".join(_in_regex(function.name) for function in functions)
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
        whole, rules = _calls(known.frame, functions, schemas, Spelled(tokenizer), parallel)
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
    frame: Frame, functions: Sequence[Function], schemas: Sequence[Any], spelled: Spelled, parallel: bool
) -> tuple[str, list[str]]:
    """(the right side of a rule for one or more calls, the rules that it needs)."""
    rules = []
    for i, (function, schema) in enumerate(zip(functions, schemas, strict=True)):
        before = frame.call_before.replace("NAME", _in_json(function.name)).replace("INDEX", "0")
        parts = (spelled.of(before), json_rule(schema), spelled.of(frame.call_after))
        rules.append(f"call_{i}: " + " ".join(part for part in parts if part))
    rules.append("call: " + " | ".join(f"call_{i}" for i in range(len(functions))))
    more = f"({spelled.of(frame.between)} call){{0,{MAX_CALLS - 1}}}" if parallel else ""
    whole = (spelled.of(frame.before), "call", more, spelled.of(frame.after))
    return " ".join(part for part in whole if part), rules


def _schema(function: Function) -> Any:
    schema = {} if function.parameters is None else function.parameters
    if schema == {}:
        return {"type": "object", "properties": {}, "additionalProperties": False}
    return {"type": "object", **schema} if isinstance(schema, dict) else schema


def _in_regex(name: str) -> str:
    """A pattern for the name as JSON has it, in a grammar's `/.../`."""
    return re.escape(_in_json(name)).replace("/", r"\/")


def _in_json(name: str) -> str:
    return json.dumps(name, ensure_ascii=False)[1:-1]

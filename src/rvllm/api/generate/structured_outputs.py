"""The form that a request asks of its answer: OpenAI's `response_format`, vLLM's `guided_*` and
`structured_outputs`, and calls that a `tool_choice` forces."""

from __future__ import annotations

from typing import Any

from rvllm.api.generate.generation import Service
from rvllm.api.generate.output_parser import ToolPlan
from rvllm.api.http.errors import blaming, invalid
from rvllm.api.schemas.requests import GenerationRequest
from rvllm.engine.sampling_params import StructuredOutputsParams
from rvllm.errors import LimitError, UsageError
from rvllm.text.grammar.grammar import check_tokenizer
from rvllm.text.worker.tasks import Calls
from rvllm.text.worker.tasks import answer_grammar as answer
from rvllm.text.worker.work import LARGE

_GUIDED = {
    "guided_json": "json",
    "guided_regex": "regex",
    "guided_choice": "choice",
    "guided_grammar": "grammar",
    "structural_tag": "structural_tag",
    "json_schema": "json",
    "regex": "regex",
    "grammar": "grammar",
    "ebnf": "grammar",
}

_TEXT_FORMS = {"grammar": ("grammar",), "regex": ("pattern", "regex")}


async def answer_grammar(
    service: Service, request: GenerationRequest, plan: ToolPlan | None = None, thinks: bool | None = None
) -> str | None:
    """The grammar that the answer must follow, checked and ready to be followed; None for a free one.

    With tools, the form is that of an answer that calls none of them, as OpenAI has it.
    plan: the tools the answer may use, see `ToolPlan`. thinks: whether the prompt has opened the
    model's thoughts; None when it has none. Raises a 400 naming the field and what is wrong with it.
    """
    asked = asked_form(request)
    forced = plan is not None and plan.forced is not None
    if asked is None and not forced and not (plan and any(f.strict for f in plan.functions)):
        return None
    if asked is not None and forced and asked[0] != "response_format":
        raise invalid(f"{asked[0]} excludes a tool_choice that forces a call", asked[0])
    with blaming(asked[0] if asked else "tool_choice"):
        check_tokenizer(service.tokenizer if service.has_tokenizer else None)
    param, form = (asked[0], asked[1]) if asked else ("tools", None)
    calls = None if plan is None else Calls(plan.known, plan.functions, plan.forced, plan.parallel)
    marks, thoughts = service.reasoning, None
    if thinks is not None and marks is not None:
        thoughts = (marks.begin, marks.end, thinks)
    try:
        found = await service.work.run(answer, param, LARGE, form, calls, thoughts)
    except UsageError as error:
        message = str(error)
        known = next((name for name in ("tools", param) if message.startswith(f"{name}: ")), None)
        code = "too_complex" if isinstance(error, LimitError) else None
        raise invalid(message if known else f"{param}: {message}", known or param, code) from None
    if found is not None:
        await service.prepare_grammars()
    return found


def asked_form(request: GenerationRequest) -> tuple[str, StructuredOutputsParams] | None:
    """(the field that asks for a form, the form); None when no field does. Raises a 400 when two do."""
    found: list[tuple[str, dict[str, Any]]] = []
    if request.response_format is not None:
        form = _response_format(request.response_format)
        found += [("response_format", form)] if form else []
    for name, ours in _GUIDED.items():
        if getattr(request, name) not in (None, ""):  # llama.cpp's clients send an empty grammar for none
            found.append((name, {ours: getattr(request, name)}))
    body = request.structured_outputs
    if body is not None:
        values = {name: getattr(body, name) for name in body.__struct_fields__}
        found.append(("structured_outputs", {k: v for k, v in values.items() if v is not None}))
    if not found:
        return None
    if len(found) > 1:
        raise invalid(f"{found[0][0]} and {found[1][0]} exclude each other", found[1][0])
    name, values = found[0]
    if request.guided_whitespace_pattern is not None:
        values.setdefault("whitespace_pattern", request.guided_whitespace_pattern)
    try:
        params = StructuredOutputsParams(**values)
    except UsageError as error:
        raise invalid(f"{name}: {error}", name) from None
    return (name, params) if params.given() is not None else None


def _response_format(value: dict[str, Any]) -> dict[str, Any]:
    """OpenAI's `response_format` under StructuredOutputsParams' names; {} for free text."""
    kind = value.get("type")
    if kind == "text":
        return {}
    if kind == "json_object" and value.get("schema") is not None:  # llama.cpp's, Together's, Fireworks' way
        if not isinstance(value["schema"], dict | bool):
            raise invalid("response_format.schema must be a JSON schema", "response_format")
        return {"json": value["schema"]}
    if kind == "json_object":
        return {"json_object": True}
    if kind in _TEXT_FORMS:
        text = next((value[key] for key in _TEXT_FORMS[kind] if isinstance(value.get(key), str)), None)
        if text is None:
            raise invalid(f"response_format.{_TEXT_FORMS[kind][0]} must be a string", "response_format")
        return {kind: text}
    if kind == "json_schema":
        holder = value.get("json_schema") or {"schema": value.get("schema")}  # llama.cpp takes both
        if not isinstance(holder, dict) or not isinstance(holder.get("schema"), dict | bool):
            raise invalid("response_format.json_schema.schema must be a JSON schema", "response_format")
        return {"json": holder["schema"]}
    if kind == "structural_tag":
        return {"structural_tag": {k: v for k, v in value.items() if k != "type"}}
    raise invalid(
        "response_format.type must be text, json_object, json_schema, structural_tag, grammar or regex, "
        f"got {str(kind)[:40]!r}",
        "response_format",
    )

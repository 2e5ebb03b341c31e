"""The bodies of OpenAI's `/v1/responses`: the request, the response, and the request as a conversation."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import msgspec

from rvllm.api.http.body import MAX_TOOLS, check_count
from rvllm.api.http.errors import invalid
from rvllm.api.schemas.answers import CompletionDetails
from rvllm.api.schemas.items import HOSTED, Item, chat_messages
from rvllm.api.schemas.requests import ChatRequest


class Reasoning(msgspec.Struct, kw_only=True):
    """How hard to think; thoughts are given whole, never summarised."""

    effort: str | None = None
    summary: str | None = None


class TextFormat(msgspec.Struct, kw_only=True, omit_defaults=True):
    """text, json_object, or json_schema with a schema."""

    type: str
    name: str | None = None
    schema: dict[str, Any] | None = None
    strict: bool | None = None
    description: str | None = None


class TextConfig(msgspec.Struct, kw_only=True):
    """The form of the answer's text; verbosity is not acted upon."""

    format: TextFormat = msgspec.field(default_factory=lambda: TextFormat(type="text"))
    verbosity: str | None = None


class FunctionTool(msgspec.Struct, kw_only=True):
    """A function that the client runs, or a custom tool, which is given a text of the form of `format`."""

    type: str
    name: str | None = None
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None
    format: dict[str, Any] | None = None


class ConversationRef(msgspec.Struct):
    """A conversation by its id."""

    id: str


class ResponsesRequest(msgspec.Struct, kw_only=True):
    """The body of `POST /v1/responses`."""

    input: str | list[dict[str, Any]] = msgspec.field(default_factory=list)
    model: str | None = None
    instructions: str | None = None
    previous_response_id: str | None = None
    conversation: str | ConversationRef | None = None
    max_output_tokens: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_logprobs: int | None = None
    include: list[str] | None = None
    stream: bool | None = None
    store: bool | None = None
    background: bool | None = None
    tools: list[FunctionTool] | None = None
    tool_choice: str | dict[str, Any] | None = None
    parallel_tool_calls: bool | None = None
    max_tool_calls: int | None = None
    reasoning: Reasoning | None = None
    text: TextConfig | None = None
    truncation: str | None = None
    metadata: dict[str, str] | None = None
    user: str | None = None
    service_tier: str | None = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None
    priority: int | None = None
    prompt: Any = None  # a prompt kept at OpenAI; refused


class InputDetails(msgspec.Struct):
    """Of the tokens read, how many came from the prefix cache."""

    cached_tokens: int = 0
    cache_write_tokens: int = 0


class ResponseUsage(msgspec.Struct, kw_only=True):
    """Tokens read and written."""

    input_tokens: int
    input_tokens_details: InputDetails
    output_tokens: int
    output_tokens_details: CompletionDetails
    total_tokens: int


class ResponseError(msgspec.Struct):
    """Why a response failed."""

    code: str
    message: str


class IncompleteDetails(msgspec.Struct):
    """Why a response ends early."""

    reason: str


class ResponseAnswer(msgspec.Struct, kw_only=True):
    """A response.

    status: queued, in_progress, completed, incomplete, failed or cancelled.
    """

    id: str
    object: str = "response"
    created_at: int
    completed_at: int | None = None
    status: str
    background: bool
    error: ResponseError | None = None
    incomplete_details: IncompleteDetails | None = None
    instructions: str | None
    max_output_tokens: int | None
    max_tool_calls: int | None
    model: str
    output: list[Item]
    parallel_tool_calls: bool
    previous_response_id: str | None
    conversation: ConversationRef | None = None
    reasoning: Reasoning
    service_tier: str = "default"
    store: bool
    temperature: float | None
    text: TextConfig
    tool_choice: str | dict[str, Any]
    tools: list[FunctionTool]
    top_logprobs: int
    top_p: float | None
    truncation: str
    usage: ResponseUsage | None = None
    user: str | None = None
    metadata: dict[str, str]


TOOLS = ("function", "custom")  # what clients run
INPUT = {
    "type": "object", "properties": {"input": {"type": "string"}}, "required": ["input"],
    "additionalProperties": False,
}  # fmt: skip  # a custom tool's parameters, as models see them
LEFT_OUT = "rvllm_tools_left_out"  # in a response's metadata
LOGPROBS = "message.output_text.logprobs"
_INCLUDES = (
    LOGPROBS, "reasoning.encrypted_content", "file_search_call.results", "web_search_call.results",
    "web_search_call.action.sources", "message.input_image.image_url",
    "computer_call_output.output.image_url", "code_interpreter_call.outputs",
)  # fmt: skip
CHAT_NAMES = {
    "messages": "input", "max_tokens": "max_output_tokens", "max_completion_tokens": "max_output_tokens",
    "response_format": "text.format",
}  # fmt: skip


def check_request(request: ResponsesRequest) -> None:
    """Raises a 400 for combinations that make no sense and for what this server does not have."""
    if request.prompt is not None:
        raise invalid("prompt is not supported by this server", "prompt", "unsupported_parameter")
    if request.previous_response_id is not None and request.conversation is not None:
        raise invalid("previous_response_id and conversation exclude each other", "previous_response_id")
    if request.background and request.store is False:
        raise invalid("background needs store to be true", "background")
    if request.truncation not in (None, "auto", "disabled"):
        raise invalid("truncation must be auto or disabled", "truncation")
    for name in request.include or ():
        if name not in _INCLUDES:
            raise invalid(f"include: {name[:60]!r} is not known", "include")
    check_metadata(request.metadata)
    check_count(request.tools or (), MAX_TOOLS, "tools")
    for i, tool in enumerate(request.tools or ()):
        if tool.type in TOOLS and not tool.name:
            raise invalid(f"tools[{i}].name is required", f"tools[{i}].name")


def left_out(request: ResponsesRequest) -> str:
    """The kinds of the tools that clients do not run, which nobody here takes up, and of their calls."""
    kinds = [tool.type[:64] for tool in request.tools or () if tool.type not in TOOLS]
    if not isinstance(request.input, str):
        kinds += [str(item["type"]) for item in request.input or () if item.get("type") in HOSTED]
    return ", ".join(dict.fromkeys(kinds))[:512]


def check_metadata(metadata: dict[str, str] | None) -> None:
    """OpenAI's limits: 16 pairs, keys of 64 characters, values of 512."""
    if metadata is not None and (
        len(metadata) > 16 or any(len(k) > 64 or len(v) > 512 for k, v in metadata.items())
    ):
        raise invalid("metadata holds at most 16 pairs, keys of 64 characters and values of 512", "metadata")


def new_response(request: ResponsesRequest, name: str, model: str, created: int) -> ResponseAnswer:
    """The response of a request before anything has been generated."""
    reference = request.conversation
    if isinstance(reference, str):
        reference = ConversationRef(reference)
    return ResponseAnswer(
        id=name, created_at=created, status="in_progress", background=bool(request.background),
        instructions=request.instructions, max_output_tokens=request.max_output_tokens,
        max_tool_calls=request.max_tool_calls, model=model, output=[],
        parallel_tool_calls=request.parallel_tool_calls is not False,
        previous_response_id=request.previous_response_id, conversation=reference,
        reasoning=request.reasoning or Reasoning(), store=request.store is not False,
        temperature=request.temperature, text=request.text or TextConfig(),
        tool_choice=request.tool_choice or "auto", tools=request.tools or [],
        top_logprobs=request.top_logprobs or 0, top_p=request.top_p,
        truncation=request.truncation or "disabled", user=request.user,
        metadata={**(request.metadata or {}), **({LEFT_OUT: out} if (out := left_out(request)) else {})},
    )  # fmt: skip


def conversation(request: ResponsesRequest, items: Sequence[Item]) -> ChatRequest:
    """The request, with all items of its context. Raises ApiError for what a chat has no word for."""
    body: dict[str, Any] = {"messages": chat_messages(items, request.instructions)}
    for ours, theirs in (
        ("temperature", "temperature"), ("top_p", "top_p"), ("parallel_tool_calls", "parallel_tool_calls"),
        ("max_output_tokens", "max_completion_tokens"), ("priority", "priority"),
    ):  # fmt: skip
        value = getattr(request, ours)
        if value is not None:
            body[theirs] = value
    if LOGPROBS in (request.include or ()) or request.top_logprobs is not None:
        body["logprobs"], body["top_logprobs"] = True, request.top_logprobs or 0
    if request.reasoning is not None and request.reasoning.effort is not None:
        body["reasoning_effort"] = request.reasoning.effort
    if request.text is not None:
        body["response_format"] = _format(request.text.format)
    tools, choice = _tools(request)
    if tools:
        body["tools"] = tools
        if choice is not None:
            body["tool_choice"] = choice
    elif choice not in (None, "auto", "none"):
        raise invalid("tool_choice needs tools", "tool_choice")
    return msgspec.convert(body, ChatRequest)


def _format(wanted: TextFormat) -> dict[str, Any]:
    if wanted.type != "json_schema":
        return {"type": wanted.type}
    if wanted.schema is None:
        raise invalid("text.format.schema is required", "text.format.schema")
    schema = {"name": wanted.name or "answer", "schema": wanted.schema, "strict": wanted.strict is not False}
    return {"type": "json_schema", "json_schema": schema}


def _tools(request: ResponsesRequest) -> tuple[list[dict[str, Any]], Any]:
    """(tools, tool_choice) in the chat's words; allowed_tools leaves out the others."""
    tools = [tool for tool in request.tools or () if tool.type in TOOLS]
    choice = request.tool_choice
    if isinstance(choice, dict):
        if choice.get("type") == "allowed_tools":
            allowed = {tool.get("name") for tool in choice.get("tools") or () if isinstance(tool, dict)}
            tools = [tool for tool in tools if tool.name in allowed]
            choice = choice.get("mode") or "auto"
        elif choice.get("type") in TOOLS and isinstance(choice.get("name"), str):
            choice = {"type": "function", "function": {"name": choice["name"]}}
        else:
            raise invalid("tool_choice must be auto, none, required, a function or allowed_tools",
                          "tool_choice")  # fmt: skip
    found = []
    for tool in tools:
        function: dict[str, Any] = {"name": tool.name}  # in the order that models learnt
        if description := _description(tool):
            function["description"] = description
        function["parameters"] = INPUT if tool.type == "custom" else tool.parameters or {"type": "object"}
        if tool.strict is not None:
            function["strict"] = tool.strict
        found.append({"type": "function", "function": function})
    return found, choice


def _description(tool: FunctionTool) -> str | None:
    """A tool's own; the grammar of a custom one's input is told to the model, which is not held to it."""
    form = tool.format or {}
    if tool.type != "custom" or form.get("type") != "grammar":
        return tool.description
    rules = f"The input follows this {form.get('syntax')} grammar:\n{form.get('definition')}"
    return f"{tool.description}\n{rules}" if tool.description else rules

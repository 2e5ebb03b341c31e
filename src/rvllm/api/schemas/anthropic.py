"""The bodies of Anthropic's `/v1/messages`: requests, answers, events and errors, in Anthropic's shapes.

Here is what a request looks like on the wire, and how it reads as a conversation.
"""

from __future__ import annotations

from typing import Any

import msgspec

from rvllm.api.http.body import MAX_MESSAGES, MAX_TOOLS, check_count
from rvllm.api.http.errors import ApiError, invalid
from rvllm.api.schemas.anthropic_tools import typed_tool
from rvllm.api.schemas.requests import ChatRequest


class TextBlock(msgspec.Struct, tag_field="type", tag="text"):
    """Text."""

    text: str


class ThinkingBlock(msgspec.Struct, tag_field="type", tag="thinking"):
    """What the model thought before it answered; we sign nothing."""

    thinking: str
    signature: str = ""


class RedactedThinkingBlock(msgspec.Struct, tag_field="type", tag="redacted_thinking"):
    """Thoughts that only the service which wrote them can read; left out."""

    data: str = ""


class ToolUseBlock(msgspec.Struct, tag_field="type", tag="tool_use"):
    """The model asks for a tool."""

    id: str
    name: str
    input: dict[str, Any]


class ToolResultBlock(msgspec.Struct, tag_field="type", tag="tool_result"):
    """What a tool answered."""

    tool_use_id: str
    content: str | list[TextBlock] | None = None
    is_error: bool = False


Block = TextBlock | ThinkingBlock | RedactedThinkingBlock | ToolUseBlock | ToolResultBlock
AnswerBlock = TextBlock | ThinkingBlock | ToolUseBlock


class Turn(msgspec.Struct):
    """A message of the conversation."""

    role: str
    content: str | list[Block]


class Tool(msgspec.Struct):
    """A tool that the client runs; those with a `type` are Anthropic's, see `anthropic_tools.py`."""

    name: str
    description: str | None = None
    input_schema: dict[str, Any] | None = None
    type: str | None = None


class ToolChoice(msgspec.Struct):
    """auto, any, none, or a tool by name."""

    type: str
    name: str | None = None
    disable_parallel_tool_use: bool = False


class Thinking(msgspec.Struct):
    """enabled, disabled or adaptive; the budget is a hint that is not enforced."""

    type: str
    budget_tokens: int | None = None


class OutputFormat(msgspec.Struct):
    """A schema that the answer follows."""

    type: str
    schema: dict[str, Any] | None = None


class OutputConfig(msgspec.Struct):
    """How much effort, and in which format."""

    effort: str | None = None
    format: OutputFormat | None = None


class CountTokensRequest(msgspec.Struct, kw_only=True):
    """The body of `/v1/messages/count_tokens`."""

    model: str
    messages: list[Turn]
    system: str | list[TextBlock] | None = None
    tools: list[Tool] | None = None
    tool_choice: ToolChoice | None = None
    thinking: Thinking | None = None


class MessagesRequest(CountTokensRequest, kw_only=True):
    """The body of `/v1/messages`."""

    max_tokens: int
    stop_sequences: list[str] | None = None
    stream: bool = False
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    output_config: OutputConfig | None = None
    container: Any = None
    mcp_servers: list[Any] | None = None


class MessageUsage(msgspec.Struct):
    """Tokens; `input_tokens` are those that did not come from the prefix cache."""

    input_tokens: int = 0
    output_tokens: int = 0
    cache_read_input_tokens: int = 0
    cache_creation_input_tokens: int = 0


class MessageAnswer(msgspec.Struct, kw_only=True):
    """The answer of `/v1/messages`."""

    id: str
    type: str = "message"
    role: str = "assistant"
    model: str
    content: list[AnswerBlock]
    stop_reason: str | None = None
    stop_sequence: str | None = None
    usage: MessageUsage


class TokenCount(msgspec.Struct):
    """The answer of `/v1/messages/count_tokens`."""

    input_tokens: int


CHAT_NAMES = {"stop": "stop_sequences", "response_format": "output_config.format"}
_KINDS = {
    400: "invalid_request_error", 401: "authentication_error", 403: "permission_error",
    404: "not_found_error", 408: "timeout_error", 413: "request_too_large", 429: "rate_limit_error",
    503: "overloaded_error",
}  # fmt: skip


class MessageErrorDetail(msgspec.Struct):
    """Anthropic's words for what went wrong."""

    type: str
    message: str


class MessageError(msgspec.Struct, kw_only=True):
    """The JSON body of every answer that is not a success, in Anthropic's shape."""

    type: str = "error"
    error: MessageErrorDetail


def failure(error: ApiError) -> tuple[str | None, Any]:
    """Anthropic's error object, under the event name `error`."""
    kind = _KINDS.get(error.status, "api_error" if error.status >= 500 else "invalid_request_error")
    return "error", MessageError(error=MessageErrorDetail(kind, str(error)))


def conversation(request: CountTokensRequest) -> ChatRequest:
    """The conversation and its tools. Raises ApiError for what has no counterpart."""
    check_count(request.messages, MAX_MESSAGES, "messages")
    check_count(request.tools or (), MAX_TOOLS, "tools")
    body: dict[str, Any] = {"messages": _messages(request)}
    last = request.messages[-1] if request.messages else None
    if last is not None and last.role == "assistant":
        body["continue_final_message"], body["add_generation_prompt"] = True, False
    if request.tools:
        tools = [_tool(tool, i) for i, tool in enumerate(request.tools)]
        body["tools"] = [tool for tool in tools if tool is not None] or None
    if request.tool_choice is not None:
        body["tool_choice"] = _choice(request.tool_choice)
        if request.tool_choice.disable_parallel_tool_use:
            body["parallel_tool_calls"] = False
    if request.thinking is not None:
        if request.thinking.type not in ("enabled", "disabled", "adaptive"):
            raise invalid("thinking.type must be enabled, disabled or adaptive", "thinking.type")
        if request.thinking.type != "adaptive":
            body["chat_template_kwargs"] = {"enable_thinking": request.thinking.type == "enabled"}
    return msgspec.convert(body, ChatRequest)


def generation(request: MessagesRequest) -> ChatRequest:
    """The whole request as a conversation to be answered. Raises ApiError for what has no counterpart."""
    for name in ("container", "mcp_servers"):
        if getattr(request, name):
            raise invalid(f"{name} is not supported by this server", name, "unsupported_parameter")
    chat = conversation(request)
    chat.max_tokens, chat.temperature = request.max_tokens, request.temperature
    chat.top_p, chat.top_k = request.top_p, request.top_k
    chat.stop = request.stop_sequences or None
    config = request.output_config
    if config is not None and config.effort is not None:
        chat.reasoning_effort = config.effort
    if config is not None and config.format is not None:
        if config.format.type != "json_schema" or config.format.schema is None:
            raise invalid("output_config.format must be a json_schema with a schema", "output_config.format")
        chat.response_format = {
            "type": "json_schema",
            "json_schema": {"name": "answer", "schema": config.format.schema, "strict": True},
        }
    return chat


def _tool(tool: Tool, index: int) -> dict[str, Any] | None:
    """A tool as a function; None for one that only Anthropic's service can run."""
    description, schema = tool.description, tool.input_schema
    if tool.type not in (None, "custom"):
        found = typed_tool(tool.type, f"tools[{index}]")
        if found is None:
            return None
        description, schema = description or found[0], schema or found[1]
    function: dict[str, Any] = {"name": tool.name}  # in the order that models learnt
    if description is not None:
        function["description"] = description
    function["parameters"] = schema or {"type": "object", "properties": {}}
    return {"type": "function", "function": function}


def _choice(choice: ToolChoice) -> Any:
    if choice.type == "tool":
        return {"type": "function", "function": {"name": choice.name or ""}}
    plain = {"auto": "auto", "any": "required", "none": "none"}
    if choice.type not in plain:
        raise invalid("tool_choice.type must be auto, any, tool or none", "tool_choice.type")
    return plain[choice.type]


def _messages(request: CountTokensRequest) -> list[dict[str, Any]]:
    """Turns as chat messages; neighbours of the same role become one, as Anthropic does."""
    found: list[dict[str, Any]] = []
    if request.system:
        found.append({"role": "system", "content": _text(request.system)})
    for i, turn in enumerate(request.messages):
        if turn.role not in ("user", "assistant", "system"):
            raise invalid(f"messages[{i}].role must be user or assistant", f"messages[{i}].role")
        blocks = [TextBlock(turn.content)] if isinstance(turn.content, str) else turn.content
        if turn.role == "assistant":
            _add_assistant(found, blocks)
        else:
            _add_others(found, blocks, turn.role)
    return found


def _add_others(found: list[dict[str, Any]], blocks: list[Any], role: str) -> None:
    for block in blocks:
        if isinstance(block, ToolResultBlock):
            content = _text(block.content or "")
            found.append({"role": "tool", "tool_call_id": block.tool_use_id, "content": content})
        elif isinstance(block, TextBlock):
            if found and found[-1]["role"] == role and isinstance(found[-1]["content"], list):
                found[-1]["content"].append({"type": "text", "text": block.text})
            else:
                found.append({"role": role, "content": [{"type": "text", "text": block.text}]})
        else:
            raise invalid("tool_use and thinking blocks belong to the assistant", "messages")


def _add_assistant(found: list[dict[str, Any]], blocks: list[Any]) -> None:
    if found and found[-1]["role"] == "assistant":
        message = found[-1]
    else:
        message = {"role": "assistant", "content": ""}
        found.append(message)
    for block in blocks:
        if isinstance(block, TextBlock):
            message["content"] += block.text
        elif isinstance(block, ThinkingBlock):
            message["reasoning_content"] = message.get("reasoning_content", "") + block.thinking
        elif isinstance(block, ToolUseBlock):
            arguments = msgspec.json.encode(block.input).decode()
            call = {"id": block.id, "type": "function",
                    "function": {"name": block.name, "arguments": arguments}}  # fmt: skip
            message.setdefault("tool_calls", []).append(call)
        elif isinstance(block, ToolResultBlock):
            raise invalid("tool_result blocks belong to the user", "messages")


def _text(content: str | list[TextBlock]) -> str:
    return content if isinstance(content, str) else "\n".join(block.text for block in content)

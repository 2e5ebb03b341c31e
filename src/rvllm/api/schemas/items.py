"""The items that OpenAI's responses and conversations consist of, and how they read as chat messages.

An item is kept as the JSON object that clients see. Input items are checked and completed here: each gets
an id, and a message's text becomes a list of parts.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any
from uuid import uuid4

import msgspec

from rvllm.api.http.body import MAX_MESSAGES, check_count, wrong_field
from rvllm.api.http.errors import ApiError, invalid

Item = dict[str, Any]
CALLS = ("function_call", "custom_tool_call")
OUTPUTS = ("function_call_output", "custom_tool_call_output")


class TextPart(msgspec.Struct, kw_only=True):
    """A part of a message: input_text, output_text, text, refusal or reasoning_text."""

    type: str
    text: str | None = None
    refusal: str | None = None


class MessageItem(msgspec.Struct, kw_only=True):
    """A message of any role; `type` may be left out."""

    role: str
    content: str | list[TextPart]
    id: str | None = None
    type: str = "message"
    status: str | None = None


class FunctionCallItem(msgspec.Struct, kw_only=True):
    """The model asked for a function."""

    call_id: str
    name: str
    arguments: str
    id: str | None = None
    type: str = "function_call"
    status: str | None = None


class CustomCallItem(msgspec.Struct, kw_only=True):
    """The model gave a custom tool a text."""

    call_id: str
    name: str
    input: str
    id: str | None = None
    type: str = "custom_tool_call"
    status: str | None = None


class FunctionOutputItem(msgspec.Struct, kw_only=True):
    """What a function answered."""

    call_id: str
    output: str | list[TextPart]
    id: str | None = None
    type: str = "function_call_output"
    status: str | None = None


class ReasoningItem(msgspec.Struct, kw_only=True):
    """What the model thought."""

    summary: list[TextPart] = []
    content: list[TextPart] | None = None
    id: str | None = None
    type: str = "reasoning"
    status: str | None = None
    encrypted_content: str | None = None


class ReferenceItem(msgspec.Struct, kw_only=True):
    """An item that the server has kept."""

    id: str
    type: str = "item_reference"


_KINDS: dict[str, tuple[type[msgspec.Struct], str]] = {
    "message": (MessageItem, "msg"),
    "function_call": (FunctionCallItem, "fc"),
    "function_call_output": (FunctionOutputItem, "fco"),
    "custom_tool_call": (CustomCallItem, "ctc"),
    "custom_tool_call_output": (FunctionOutputItem, "ctco"),
    "reasoning": (ReasoningItem, "rs"),
    "item_reference": (ReferenceItem, ""),
}
HOSTED = ("web_search_call", "file_search_call", "mcp_list_tools")
"""Records of what another server did: they hold no result, and are left out of a history."""
_TEXT_PARTS = ("input_text", "output_text", "text", "refusal", "reasoning_text", "summary_text")
_ROLES = ("user", "assistant", "system", "developer")


def checked_items(
    given: str | Sequence[Mapping[str, Any]], find: Callable[[str], Item | None], where: str = "input"
) -> list[Item]:
    """A request's input as items.

    find: the item that a reference names. where: the field's name, for errors.
    Raises ApiError 400 naming the item and the field that is wrong, or of a kind that is not supported.
    """
    if isinstance(given, str):
        given = [{"role": "user", "content": given}]
    check_count(given, MAX_MESSAGES, where)
    return [
        _checked(item, find, f"{where}[{i}]")
        for i, item in enumerate(given)
        if item.get("type") not in HOSTED
    ]


def _checked(given: Mapping[str, Any], find: Callable[[str], Item | None], where: str) -> Item:
    kind = given.get("type") or "message"
    if "type" not in given and set(given) == {"id"}:
        kind = "item_reference"
    if not isinstance(kind, str) or kind not in _KINDS:
        raise invalid(f"{where}: items of type {str(kind)[:40]!r} are not supported", f"{where}.type",
                      "unsupported_parameter")  # fmt: skip
    struct, prefix = _KINDS[kind]
    try:
        item = msgspec.convert({key: value for key, value in given.items() if value is not None}, struct)
    except msgspec.ValidationError as error:
        raise wrong_field(str(error), where) from None
    if isinstance(item, ReferenceItem):
        found = find(item.id)
        if found is None:
            raise ApiError(404, f"{where}: there is no item {item.id[:80]!r}", param=f"{where}.id")
        return found
    plain: Item = msgspec.to_builtins(item)
    plain = {key: value for key, value in plain.items() if value is not None}
    plain.setdefault("id", f"{prefix}_{uuid4().hex}")
    plain.setdefault("status", "completed")
    if isinstance(item, MessageItem):
        if item.role not in _ROLES:
            raise invalid(f"{where}.role must be one of {', '.join(_ROLES)}", f"{where}.role")
        plain["content"] = _parts(item, where)
    elif isinstance(item, FunctionOutputItem) and not isinstance(item.output, str):
        plain["output"] = _text(item.output, f"{where}.output")
    elif isinstance(item, ReasoningItem):
        _text([*item.summary, *(item.content or ())], where)
    return plain


def _parts(item: MessageItem, where: str) -> list[Item]:
    kind = "output_text" if item.role == "assistant" else "input_text"
    if isinstance(item.content, str):
        texts = [item.content]
    else:
        texts = [_text([part], f"{where}.content[{i}]") for i, part in enumerate(item.content)]
    extra: Item = {"annotations": [], "logprobs": []} if kind == "output_text" else {}
    return [{"type": kind, "text": text, **extra} for text in texts]


def _text(parts: Sequence[TextPart], where: str) -> str:
    texts = []
    for part in parts:
        if part.type not in _TEXT_PARTS:
            raise invalid(
                f"{where}: parts of type {part.type[:40]!r} are not supported", where, "unsupported_parameter"
            )
        text = part.refusal if part.type == "refusal" else part.text
        if text is None:
            raise invalid(f"{where}: the text is required", where)
        texts.append(text)
    return "\n".join(texts)


def chat_messages(items: Sequence[Item], instructions: str | None) -> list[dict[str, Any]]:
    """Items as chat messages; a call and the thoughts before it belong to the assistant's message."""
    messages: list[dict[str, Any]] = []
    if instructions:
        messages.append({"role": "system", "content": instructions})
    thoughts: list[str] = []
    for item in items:
        kind = item["type"]
        if kind == "reasoning":
            thoughts += [part["text"] for part in item.get("content") or item.get("summary") or ()]
        elif kind in OUTPUTS:
            messages.append({"role": "tool", "tool_call_id": item["call_id"], "content": item["output"]})
        elif kind in CALLS:
            custom = kind == "custom_tool_call"
            arguments = json.dumps({"input": item["input"]}) if custom else item["arguments"]
            call = {"id": item["call_id"], "type": "function",
                    "function": {"name": item["name"], "arguments": arguments}}  # fmt: skip
            if not messages or messages[-1]["role"] != "assistant" or thoughts:
                messages.append(_assistant("", thoughts))
            messages[-1].setdefault("tool_calls", []).append(call)
        else:
            text = "\n".join(part["text"] for part in item["content"])
            if item["role"] == "assistant":
                messages.append(_assistant(text, thoughts))
            else:
                messages.append({"role": item["role"], "content": text})
    return messages


def _assistant(text: str, thoughts: list[str]) -> dict[str, Any]:
    message = {"role": "assistant", "content": text}
    if thoughts:
        message["reasoning_content"] = "\n".join(thoughts)
        thoughts.clear()
    return message

"""Chat templates: Jinja in a sandbox, rendering what Transformers' `apply_chat_template` renders.

A template is code from whoever published the model, so it runs in Jinja's immutable sandbox and is handed
plain JSON values only.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import TYPE_CHECKING, Any

from rvllm.errors import UsageError

if TYPE_CHECKING:
    from jinja2 import Template

_END_MARK = "CONTINUE_FINAL_MESSAGE_TAG "
_REASONING = ("reasoning_content", "thinking", "reasoning")
_TEXT_PARTS = ("text", "input_text", "output_text", "refusal")


def render_chat(
    template: str,
    messages: Sequence[Mapping[str, Any]],
    *,
    tools: Sequence[Mapping[str, Any]] | None = None,
    documents: Sequence[Mapping[str, Any]] | None = None,
    add_generation_prompt: bool = True,
    continue_final_message: bool = False,
    variables: Mapping[str, Any] | None = None,
) -> str:
    """The prompt text of a conversation.

    messages: in OpenAI's form; content is a string or a list of text parts.
    continue_final_message: the prompt ends within the last message, for the model to go on with it.
    variables: what else the template may name (bos_token, enable_thinking ...).
    Raises UsageError naming what is wrong with the template or the messages.
    """
    if not messages:
        raise UsageError("messages must not be empty")
    if add_generation_prompt and continue_final_message:
        raise UsageError("add_generation_prompt and continue_final_message exclude each other")
    compiled, takes_parts = _compile(template)
    try:
        chat = [_message(message, index, takes_parts) for index, message in enumerate(messages)]
        values = {
            **_plain(dict(variables or {})),
            "messages": chat,
            "tools": _plain(list(tools)) if tools else None,
            "documents": _plain(list(documents)) if documents is not None else None,
            "add_generation_prompt": add_generation_prompt,
        }
    except RecursionError:
        raise UsageError("messages, tools or documents are nested too deeply") from None
    final = _mark_end(chat) if continue_final_message else ""
    text = _render(compiled, values)
    return _cut_at_mark(text, final) if continue_final_message else text


def check_template(template: str) -> None:
    """Raises UsageError when a template does not compile."""
    _compile(template)


def _render(compiled: Template, values: Mapping[str, Any]) -> str:
    from jinja2 import TemplateError

    try:
        return compiled.render(values)
    except TemplateError as error:  # raise_exception, undefined names, what the sandbox forbids
        raise UsageError(f"chat template: {error.message or type(error).__name__}") from None
    except RecursionError:
        raise UsageError("chat template: nested too deeply") from None
    except Exception as error:  # the template's own mistakes: adding None to a string, a missing key ...
        raise UsageError(f"chat template: {type(error).__name__}: {error}") from None


@lru_cache(maxsize=32)
def _compile(template: str) -> tuple[Template, bool]:
    """The compiled template, and whether it handles content given as a list of parts."""
    from jinja2 import TemplateSyntaxError

    from rvllm.text.chat.jinja import environment

    env = environment()
    try:
        return env.from_string(template), _loops_over_content(env.parse(template))
    except TemplateSyntaxError as error:
        raise UsageError(f"chat template: line {error.lineno}: {error.message}") from None
    except RecursionError:
        raise UsageError("chat template: nested too deeply") from None


def _loops_over_content(tree: Any) -> bool:
    """Whether the template iterates over some message's content, so that it may stay a list."""
    from jinja2 import nodes

    def names_content(node: Any) -> bool:
        candidates = [node, *node.find_all((nodes.Getattr, nodes.Getitem))]
        return any(
            (isinstance(n, nodes.Getattr) and n.attr == "content")
            or (isinstance(n, nodes.Getitem) and isinstance(n.arg, nodes.Const) and n.arg.value == "content")
            for n in candidates
        )

    held = {
        a.target.name
        for a in tree.find_all(nodes.Assign)
        if isinstance(a.target, nodes.Name) and names_content(a.node)
    }
    for loop in tree.find_all(nodes.For):
        if names_content(loop.iter) or (isinstance(loop.iter, nodes.Name) and loop.iter.name in held):
            return True
    return False


def _plain(value: Any) -> Any:
    """The value rebuilt out of plain JSON types; anything else becomes its type's name in brackets."""
    if value is None or type(value) in (str, int, float, bool):
        return value
    if isinstance(value, str):
        return str.__str__(value)
    if isinstance(value, Mapping):
        return {_plain(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    if isinstance(value, (bool, int, float)):
        return int(value) if isinstance(value, int) else float(value)
    return f"<{type(value).__name__}>"


def _message(message: Mapping[str, Any], index: int, takes_parts: bool) -> dict[str, Any]:
    """One message as templates expect it: no null fields, text content, tool arguments as objects."""
    where = f"messages[{index}]"
    if not isinstance(message, Mapping):
        raise UsageError(f"{where} must be an object with role and content")
    plain: dict[str, Any] = {k: v for k, v in _plain(message).items() if v is not None}
    if not isinstance(plain.get("role"), str):
        raise UsageError(f"{where}.role must be a string")
    if "content" in plain:
        plain["content"] = _content(plain["content"], f"{where}.content", takes_parts)
    for call in plain.get("tool_calls") or ():
        _parse_arguments(call, f"{where}.tool_calls")
    reasoning = next((plain[key] for key in _REASONING if plain.get(key) is not None), None)
    if reasoning is not None:
        plain = {"thinking": reasoning, **plain, "reasoning_content": reasoning}
    return plain


def _content(content: Any, where: str, takes_parts: bool) -> str | list[dict[str, Any]]:
    """Strings stay; parts stay for templates that loop over them, else their texts are joined by newlines."""
    if isinstance(content, str):
        return content
    if not isinstance(content, list):
        raise UsageError(f"{where} must be a string or a list of text parts")
    parts: list[dict[str, Any]] = []
    for i, part in enumerate(content):
        if isinstance(part, str):
            part = {"type": "text", "text": part}
        if not isinstance(part, dict):
            raise UsageError(f"{where}[{i}] must be an object with type and text")
        kind = part.get("type", "text")
        if kind not in _TEXT_PARTS:
            raise UsageError(f"{where}[{i}]: parts of type {kind!r} are not supported, only text")
        text = part.get("refusal" if kind == "refusal" else "text")
        if not isinstance(text, str):
            raise UsageError(f"{where}[{i}].text must be a string")
        parts.append({**part, "type": "text", "text": text})
    return parts if takes_parts else "\n".join(part["text"] for part in parts)


def _parse_arguments(call: Any, where: str) -> None:
    """OpenAI sends a call's arguments as JSON text, templates expect the object."""
    function = call.get("function", call) if isinstance(call, dict) else None
    if not isinstance(function, dict):
        raise UsageError(f"{where} must hold objects with a function")
    if not isinstance(function.get("arguments"), str):
        return
    try:
        function["arguments"] = json.loads(function["arguments"]) if function["arguments"].strip() else {}
    except ValueError:
        raise UsageError(f"{where}: arguments of {function.get('name')!r} are not valid JSON") from None


def _mark_end(chat: list[dict[str, Any]]) -> str:
    """Appends a mark to the last message's text and returns that text."""
    last = chat[-1]
    content = last.get("content")
    if isinstance(content, str):
        last["content"] = content + _END_MARK
        return content
    for part in reversed(content or []):
        text: str = part["text"]
        part["text"] = text + _END_MARK
        return text
    raise UsageError("continue_final_message: the last message has no text to continue")


def _cut_at_mark(text: str, final: str) -> str:
    """The text up to the mark, without the space that a template trimmed after it."""
    mark = _END_MARK.strip()
    if mark not in text or final.strip() not in text:
        raise UsageError("continue_final_message: the chat template changes or drops the last message's text")
    at = text.rindex(mark)
    kept_spacing = text[at : at + len(_END_MARK)] == _END_MARK
    return text[:at] if kept_spacing else text[:at].rstrip()

"""Chat templates: Jinja in a sandbox, rendering what Transformers' `apply_chat_template` renders.

A template is code from whoever published the model, so it runs in Jinja's immutable sandbox and is handed
plain JSON values only.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import lru_cache, partial
from typing import TYPE_CHECKING, Any

from rvllm.errors import UsageError
from rvllm.text.chat.arguments import as_text, mended, parsed
from rvllm.text.chat.traits import ABSENT, TemplateTraits

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
    compiled, traits = _compile(template)
    try:
        chat = [_message(message, index, traits) for index, message in enumerate(messages)]
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


def template_traits(template: str) -> TemplateTraits:
    """What a template makes of messages. Raises UsageError when it does not compile."""
    return _compile(template)[1]


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
def _compile(template: str) -> tuple[Template, TemplateTraits]:
    """The compiled template, and what it makes of messages."""
    from jinja2 import TemplateSyntaxError

    from rvllm.text.chat.jinja import environment

    env = environment()
    try:
        compiled = env.from_string(template)
        return compiled, TemplateTraits(partial(_tried, compiled), _loops_over_content(env.parse(template)))
    except TemplateSyntaxError as error:
        raise UsageError(f"chat template: line {error.lineno}: {error.message}") from None
    except RecursionError:
        raise UsageError("chat template: nested too deeply") from None
    except MemoryError:
        raise
    except Exception as error:  # what Jinja writes need not be Python: two arguments of one name ...
        raise UsageError(f"chat template: {type(error).__name__}: {error}") from None


def _tried(compiled: Template, values: Mapping[str, Any]) -> str | None:
    """A trial rendering; None where the template fails."""
    try:
        return _render(compiled, values)
    except UsageError:
        return None


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


def _message(message: Mapping[str, Any], index: int, traits: TemplateTraits) -> dict[str, Any]:
    """One message as this template takes it; fields that are null are left out, as Transformers does.

    An assistant's content that is null, absent or empty stays what it is, unless the template fails on it
    or loses the calls beside it (`TemplateTraits.content`).
    """
    where = f"messages[{index}]"
    if not isinstance(message, Mapping):
        raise UsageError(f"{where} must be an object with role and content")
    given = _plain(message)
    plain: dict[str, Any] = {k: v for k, v in given.items() if v is not None}
    if not isinstance(plain.get("role"), str):
        raise UsageError(f"{where}.role must be a string")
    if "content" in plain:
        plain["content"] = _content(plain["content"], f"{where}.content", traits)
    calls = plain.get("tool_calls") or ()
    for call in calls:
        _give_arguments(call, f"{where}.tool_calls", traits)
    if not plain.get("content") and plain["role"] == "assistant":
        content = given.get("content", ABSENT)
        plain = _with_content(given, plain, traits.content(content, with_calls=bool(calls)))
    reasoning = next((plain[key] for key in _REASONING if plain.get(key) is not None), None)
    if reasoning is not None:
        plain = {"thinking": reasoning, **plain, "reasoning_content": reasoning}
    return plain


def _with_content(given: Mapping[str, Any], plain: Mapping[str, Any], content: Any) -> dict[str, Any]:
    """The message with this content, its fields in the order in which they were given."""
    names = [name for name in given if name in plain or name == "content"]
    if "content" not in names:
        names.insert(1, "content")
    values = {**plain, "content": content}
    return {name: values[name] for name in names if values[name] is not ABSENT}


def _content(content: Any, where: str, traits: TemplateTraits) -> str | list[dict[str, Any]]:
    """Strings and parts stay for templates that take them; else each becomes the other.

    Texts of parts are joined by newlines.
    """
    if isinstance(content, str):
        return [{"type": "text", "text": content}] if content and traits.wants_parts else content
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
    return parts if traits.loops_over_content else "\n".join(part["text"] for part in parts)


def _give_arguments(call: Any, where: str, traits: TemplateTraits) -> None:
    """Makes a call's arguments what the template wants: JSON text, or the object that it stands for.

    Text that is broken JSON stays text for a template that shows it; others get the object that it begins.
    """
    function = call.get("function", call) if isinstance(call, dict) else None
    if not isinstance(function, dict):
        raise UsageError(f"{where} must hold objects with a function")
    arguments = function.get("arguments")
    if traits.wants_text_arguments:
        if arguments is not None:
            function["arguments"] = as_text(arguments)
        return
    if not isinstance(arguments, str):
        return
    try:
        function["arguments"] = parsed(arguments)
    except ValueError:
        function["arguments"] = arguments if traits.takes_text_arguments else mended(arguments)


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

"""Arguments of `LLM`'s methods as lists and settings, checked."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar, cast

from rvllm.config import EngineConfig
from rvllm.errors import UsageError
from rvllm.settings import build
from rvllm.text.requests import Prompt
from rvllm.vllm.flags import VLLM_FLAGS, VLLM_VALUES, settle

T = TypeVar("T")
JSON_SETTINGS = ("hf_overrides", "pooler_config")  # which take objects, as text on a command line


def engine_config(model: str, revision: str | None, settings: Mapping[str, Any]) -> EngineConfig:
    """EngineConfig of LLM's arguments, ours and vLLM's (`vllm/flags.py`).

    Raises UsageError naming one that is unknown or asks for what is not done, with what to use instead.
    """
    known = set(EngineConfig.__dataclass_fields__)
    given: dict[str, Any] = {}
    for name, value in settings.items():
        if value is None:  # vLLM's own word for a default
            continue
        if isinstance(value, Mapping) and name in JSON_SETTINGS:
            given[name] = json.dumps(value)
        elif callable(value):
            raise UsageError(f"LLM: {name}: a function is not supported; give a dict of what it changes")
        elif name in known:
            translated = VLLM_VALUES.get(name, {})
            given[name] = translated.get(value, value) if isinstance(value, str | int) else value
        elif name not in VLLM_FLAGS:
            raise UsageError(f"LLM: unknown argument {name!r}; known are {', '.join(sorted(known))}")
        elif (found := settle(name, value, f"LLM: {name}=")) is not None and found[0] in known:
            given[found[0]] = json.dumps(found[1]) if isinstance(found[1], Mapping) else found[1]
    return build(EngineConfig, {**given, "model": model, "revision": revision})


def refuse(**given: Any) -> None:
    """Raises UsageError naming an argument of vLLM's that asks for what is not done."""
    for name, value in given.items():
        if value:
            raise UsageError(f"{name} is not supported")


def prompt_list(prompts: Prompt | Sequence[Prompt]) -> list[Prompt]:
    """A list of prompts, of one prompt or of many; a flat list of whole numbers is one prompt."""
    if isinstance(prompts, (str, Mapping)):
        return [prompts]
    items: list[Any] = list(prompts)
    return [items] if items and isinstance(items[0], int) else items


def one_each(
    name: str, given: T | Sequence[T] | None, kind: type[T], count: int, default: Callable[[], T]
) -> list[T]:
    """One for each of `count` prompts, of one for all of them or of a list; None: the default.

    Raises UsageError naming the argument `name` when there are more or fewer.
    """
    if given is None:
        given = default()
    if isinstance(given, kind):
        return [given] * count
    many = list(cast("Sequence[T]", given))
    if len(many) != count:
        raise UsageError(f"{name} has {len(many)} entries for {count} prompts")
    return many

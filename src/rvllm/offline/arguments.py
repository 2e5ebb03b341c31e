"""Arguments of `LLM`'s methods as lists and settings, checked."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from rvllm.config import EngineConfig
from rvllm.engine.sampling_params import SamplingParams
from rvllm.errors import UsageError
from rvllm.settings import build
from rvllm.text.embedding import PoolingParams
from rvllm.text.requests import Prompt
from rvllm.vllm.flags import VLLM_FLAGS, VLLM_VALUES, settle

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


def params_list(
    params: SamplingParams | Sequence[SamplingParams] | None,
    count: int,
    default: Callable[[], SamplingParams],
) -> list[SamplingParams]:
    if params is None:
        params = default()
    if isinstance(params, SamplingParams):
        return [params] * count
    if len(params) != count:
        raise UsageError(f"sampling_params has {len(params)} entries for {count} prompts")
    return list(params)


def pooling_list(params: PoolingParams | Sequence[PoolingParams] | None, count: int) -> list[PoolingParams]:
    if params is None or isinstance(params, PoolingParams):
        return [params or PoolingParams()] * count
    if len(params) != count:
        raise UsageError(f"pooling_params has {len(params)} entries for {count} prompts")
    return list(params)

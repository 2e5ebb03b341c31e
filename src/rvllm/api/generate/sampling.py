"""From a request's fields to sampling parameters: what is given, then the model's defaults, then OpenAI's."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rvllm.api.http.body import check_count
from rvllm.api.http.errors import invalid
from rvllm.api.schemas.requests import (
    NEUTRAL,
    OTHER_NAMES,
    ChatRequest,
    CompletionRequest,
    GenerationRequest,
    Refused,
)
from rvllm.backends.base import MAX_BIASES
from rvllm.engine.sampling_params import SamplingParams
from rvllm.errors import UsageError

_SAME_NAME = (
    "n", "temperature", "top_p", "top_k", "min_p", "repetition_penalty", "presence_penalty",
    "frequency_penalty", "seed", "stop", "stop_token_ids", "include_stop_str_in_output", "ignore_eos",
    "min_tokens", "prompt_logprobs", "bad_words", "allowed_token_ids", "skip_special_tokens",
    "spaces_between_special_tokens",
)  # fmt: skip
_MAX_STOPS = 64
_MAX_STOP_IDS = 4096
_MAX_ALLOWED = 1 << 18


def refuse_unsupported(request: Refused) -> None:
    """Raises a 400 naming the first field that asks for something we do not do."""
    for name, neutral in NEUTRAL.items():
        value = getattr(request, name)
        if value is not None and value not in neutral:
            raise invalid(f"{name} is not supported by this server", name, "unsupported_parameter")


def take_other_names(request: GenerationRequest) -> None:
    """Moves values that stand under a neighbouring server's names to ours; ours come first."""
    for theirs, ours in OTHER_NAMES.items():
        value = getattr(request, theirs)
        if value is not None and getattr(request, ours) is None:
            unlimited = ours == "max_tokens" and value == -1  # llama.cpp's word for it
            setattr(request, ours, None if unlimited else value)


def chat_params(request: ChatRequest, defaults: Mapping[str, Any]) -> SamplingParams:
    """A chat's parameters; without max_tokens the answer may fill the context."""
    if request.top_logprobs is not None and not request.logprobs:
        raise invalid("top_logprobs needs logprobs to be true", "top_logprobs")
    top = request.top_logprobs or 0
    if not 0 <= top <= 20:
        raise invalid(f"top_logprobs must be in [0, 20], got {top}", "top_logprobs")
    take_other_names(request)
    limit = request.max_tokens if request.max_completion_tokens is None else request.max_completion_tokens
    name = "max_tokens" if request.max_completion_tokens is None else "max_completion_tokens"
    if limit is not None and limit < 1:
        raise invalid(f"{name} must be at least 1, got {limit}", name)
    if limit is None:
        limit = defaults.get("max_tokens")
    return _params(request, defaults, max_tokens=limit, logprobs=top if request.logprobs else None)


def completion_params(request: CompletionRequest, defaults: Mapping[str, Any]) -> SamplingParams:
    """A plain completion's parameters; max_tokens is 16 by default; 0 (with echo) draws one to drop."""
    take_other_names(request)
    limit = request.max_tokens
    if limit is None:
        limit = defaults.get("max_tokens", 16)
    if limit == 0 and request.echo:
        limit = 1
    params = _params(request, defaults, max_tokens=limit, logprobs=request.logprobs)
    if request.echo and request.logprobs is not None and params.prompt_logprobs is None:
        params.prompt_logprobs = request.logprobs
    return params


def _params(request: GenerationRequest, defaults: Mapping[str, Any], **values: Any) -> SamplingParams:
    values = {**{key: value for key, value in defaults.items() if key != "max_tokens"}, **values}
    for name in _SAME_NAME:
        given = getattr(request, name)
        if given is not None:
            values[name] = given
    values["logit_bias"] = _biases(request.logit_bias)
    if len(values.get("stop") or ()) > _MAX_STOPS and not isinstance(values["stop"], str):
        raise invalid(f"stop takes at most {_MAX_STOPS} strings", "stop")
    check_count(values.get("stop_token_ids") or (), _MAX_STOP_IDS, "stop_token_ids")
    check_count(values.get("allowed_token_ids") or (), _MAX_ALLOWED, "allowed_token_ids")
    if request.seed is not None and not -(1 << 63) <= request.seed < 1 << 64:
        raise invalid("seed must fit in 64 bits", "seed")
    if request.stream_options is not None and not request.stream:
        raise invalid("stream_options needs stream to be true", "stream_options")
    try:
        return SamplingParams(**values)
    except UsageError as error:
        name = str(error).partition(" ")[0]
        if name == "max_tokens" and getattr(request, "max_completion_tokens", None) is not None:
            name = "max_completion_tokens"
        raise invalid(str(error), name) from None


def _biases(given: Mapping[str, float] | None) -> dict[int, float] | None:
    if not given:
        return None
    if len(given) > MAX_BIASES:
        raise invalid(f"logit_bias takes at most {MAX_BIASES} tokens", "logit_bias")
    biases = {}
    for key, bias in given.items():
        if not (key.isascii() and key.isdigit() and len(key) < 10):
            raise invalid(f"logit_bias: keys must be token ids, got {key[:40]!r}", "logit_bias")
        if not -100 <= bias <= 100:
            raise invalid(f"logit_bias: values must be in [-100, 100], got {bias:g}", "logit_bias")
        biases[int(key)] = bias
    return biases

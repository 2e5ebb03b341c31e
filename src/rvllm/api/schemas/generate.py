"""Bodies of `/inference/v1/generate`, and the answers of it and of `/generate`."""

from __future__ import annotations

from typing import Any

import msgspec
from msgspec import UNSET, UnsetType

from rvllm.api.schemas.answers import ChatLogprobs, PromptLogprobs, Usage
from rvllm.api.schemas.requests import StreamOptions


class TokenRequest(msgspec.Struct, kw_only=True):
    """The body of `/inference/v1/generate`. sampling_params: as the fields of `/v1/completions`."""

    token_ids: list[int]
    sampling_params: dict[str, Any] = {}
    model: str | None = None
    request_id: str | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    priority: int | None = None
    cache_salt: str | None = None
    features: dict[str, Any] | None = None
    kv_transfer_params: dict[str, Any] | None = None


class GeneratedChoice(msgspec.Struct, kw_only=True):
    """Token ids that follow the prompt."""

    index: int
    token_ids: list[int] = []
    finish_reason: str | None = None
    logprobs: ChatLogprobs | None = None


class GeneratedTokens(msgspec.Struct):
    """The answer of `/inference/v1/generate`, or an event of it."""

    request_id: str
    choices: list[GeneratedChoice]
    prompt_logprobs: PromptLogprobs | None = None
    usage: Usage | UnsetType | None = UNSET


class GeneratedTexts(msgspec.Struct):
    """The answer of `/generate`: by choice, the prompt and what follows it so far."""

    text: list[str]

"""What the types of fields do not tell: ranges of numbers, lists that must not be empty, words."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rvllm.api.batches.lines import ENDPOINTS
from rvllm.api.generate.conversation import ROLES
from rvllm.engine.sampling_params import RANGES

# Other surfaces' names of sampling parameters.
_SAME = {"max_completion_tokens": "max_tokens", "max_output_tokens": "max_tokens", "top_logprobs": "logprobs"}
_FILLED = {"minItems": 1}
# By struct and field; these go before the ranges.
_BOUNDS: dict[tuple[str, str], dict[str, Any]] = {
    ("Message", "role"): {"enum": list(ROLES)},
    ("Turn", "role"): {"enum": ["user", "assistant"]},
    ("ChatRequest", "messages"): _FILLED,
    ("MessagesRequest", "messages"): _FILLED,
    ("CountTokensRequest", "messages"): _FILLED,
    ("CompletionRequest", "prompt"): {"minLength": 1, **_FILLED},
    ("CompletionRequest", "max_tokens"): {"minimum": 0},  # 0 with echo
    ("EmbeddingRequest", "input"): _FILLED,
    ("EmbeddingRequest", "dimensions"): {"minimum": 1},
    ("EmbeddingRequest", "encoding_format"): {"enum": ["float", "base64", None]},
    ("ClassifyRequest", "input"): _FILLED,
    ("PoolingRequest", "input"): _FILLED,
    ("PoolingRequest", "dimensions"): {"minimum": 1},
    ("PoolingRequest", "encoding_format"): {"enum": ["float", "base64", None]},
    ("PoolingRequest", "task"): {"enum": ["embed", "classify", None]},
    ("ChatRequest", "allowed_token_ids"): _FILLED,
    ("CompletionRequest", "allowed_token_ids"): _FILLED,
    ("ScoreRequest", "text_1"): _FILLED,
    ("ScoreRequest", "text_2"): _FILLED,
    ("RerankRequest", "documents"): _FILLED,
    ("RerankRequest", "top_n"): {"minimum": 0},
    ("DetokenizeRequest", "tokens"): {"items": {"type": "integer", "minimum": 0}},
    ("BatchRequest", "completion_window"): {"enum": ["24h"]},
    ("BatchRequest", "endpoint"): {"enum": [*ENDPOINTS]},
}


def add_bounds(components: Mapping[str, dict[str, Any]]) -> None:
    """Adds the bounds to the schemas of requests and their parts."""
    for kind, schema in components.items():
        for name, field in schema.get("properties", {}).items():
            ranged = _range(name, field) if kind.endswith("Request") else {}
            field.update(_BOUNDS.get((kind, name), ranged))


def _range(name: str, field: Mapping[str, Any]) -> dict[str, Any]:
    """The range of a sampling parameter, in JSON Schema's words; nothing for what is no number."""
    allowed = RANGES.get(_SAME.get(name, name))
    kinds = {one.get("type") for one in field.get("anyOf", [field])}
    if allowed is None or not kinds & {"integer", "number"}:
        return {}
    low = -1 if name == "top_k" else allowed.low  # -1: all, as 0
    return {"exclusiveMinimum" if allowed.above else "minimum": low, "maximum": allowed.high}

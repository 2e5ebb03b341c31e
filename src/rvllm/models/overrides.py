"""A checkpoint's config with what flags change of it: --hf-overrides, --runner, --pooler-config."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from rvllm.config import EngineConfig
from rvllm.errors import UsageError
from rvllm.models.config import ModelConfig
from rvllm.weights.checkpoint import Checkpoint


def read_config(checkpoint: Checkpoint, config: EngineConfig) -> ModelConfig:
    """The model's config as the engine is to read it. Raises UsageError for a flag that is no JSON object."""
    values: dict[str, Any] = dict(checkpoint.config)
    values.pop("runner", None)
    values = merged(values, json_object("--hf-overrides", config.hf_overrides))
    if config.runner != "auto":
        values["runner"] = config.runner
    if config.pooler_config is not None:
        values["pooler_config"] = json_object("--pooler-config", config.pooler_config)
    tokens = values.get("classifier_from_token")
    if isinstance(tokens, list):
        values["classifier_from_token"] = [_token_id(checkpoint, token) for token in tokens]
    return ModelConfig(values, checkpoint.config_origin)


def json_object(flag: str, text: str | None) -> dict[str, Any]:
    """A flag's JSON object; empty for None. Raises UsageError."""
    try:
        value = json.loads(text) if text else {}
    except (ValueError, RecursionError):
        value = None
    if not isinstance(value, dict):
        raise UsageError(f"{flag}: expected a JSON object, got {str(text)[:60]!r}")
    return value


def merged(values: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """`values` with `changes`, objects within objects alike."""
    found = dict(values)
    for name, value in changes.items():
        old = found.get(name)
        found[name] = merged(old, value) if isinstance(old, dict) and isinstance(value, dict) else value
    return found


def _token_id(checkpoint: Checkpoint, token: Any) -> Any:
    """A token's id by the vocabulary beside the weights; what is no text or not found stays as it is."""
    file = checkpoint.path / "tokenizer.json"
    if not isinstance(token, str) or not file.is_file():
        return token
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
        vocab = found["model"]["vocab"]
        ids = vocab if isinstance(vocab, dict) else {entry[0]: i for i, entry in enumerate(vocab)}
        added = {entry["content"]: entry["id"] for entry in found.get("added_tokens") or []}
    except (OSError, ValueError, KeyError, TypeError, IndexError, RecursionError):
        return token
    return {**ids, **added}.get(token, token)

"""What a sentence-transformers directory says around its model: pooling, longest text, prompts.

`modules.json` lists the modules that a text passes through; `1_Pooling/config.json` says how tokens become
one vector, `sentence_bert_config.json` how many tokens of a text count, `config_sentence_transformers.json`
what is put before a text.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from rvllm.errors import ModelError
from rvllm.weights.mapped import read_json, shown

KNOWN = ("Transformer", "Pooling", "Normalize")
_LENGTH_FILES = ("sentence_bert_config.json", "sentence_roberta_config.json", "sentence_xlnet_config.json")
_MODES = {
    "pooling_mode_mean_tokens": "mean",
    "pooling_mode_cls_token": "cls",
    "pooling_mode_lasttoken": "last",
    "pooling_mode_max_tokens": "max",
    "pooling_mode_mean_sqrt_len_tokens": "mean_sqrt_len",
    "pooling_mode_weightedmean_tokens": "weightedmean",
}


def read_sentence(path: Path) -> dict[str, Any] | None:
    """{"pooling": name, "normalise": bool, "max_seq_length": tokens or None, "prompts": texts by name,
    "default_prompt_name": name or None} of a model directory.

    None where it has no modules.json. Raises ModelError naming file and field for modules or combinations of
    pooling that are not supported.
    """
    file = path / "modules.json"
    if not file.is_file():
        return None
    found: dict[str, Any] = {"pooling": "mean", "normalise": False, "max_seq_length": None}
    for entry in _modules(file):
        kind = str(entry.get("type", "")).rpartition(".")[2]
        folder = path / str(entry.get("path", ""))
        if kind not in KNOWN:
            raise ModelError(f"{file}: module {shown(kind)} is not supported; supported: {', '.join(KNOWN)}")
        if kind == "Pooling":
            found["pooling"] = _pooling(folder / "config.json")
        elif kind == "Normalize":
            found["normalise"] = True
        else:
            found["max_seq_length"] = _max_seq_length(folder)
    return found | _prompts(path / "config_sentence_transformers.json")


def _prompts(file: Path) -> dict[str, Any]:
    if not file.is_file():
        return {}
    config = read_json(file)
    prompts, default = config.get("prompts") or {}, config.get("default_prompt_name")
    if not isinstance(prompts, dict) or not all(isinstance(text, str) for text in prompts.values()):
        raise ModelError(f"{file}: prompts must be an object of texts")
    if default is not None and default not in prompts:
        raise ModelError(f"{file}: default_prompt_name {shown(str(default))} is none of its prompts")
    return {"prompts": prompts, "default_prompt_name": default}


def _modules(file: Path) -> list[dict[str, Any]]:
    """The list in modules.json; it is the one JSON file here that holds no object."""
    import json

    try:
        value = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        raise ModelError(f"{file}: not readable as JSON") from None
    if not isinstance(value, list) or not all(isinstance(entry, dict) for entry in value):
        raise ModelError(f"{file}: must hold a list of modules")
    return value


def _pooling(file: Path) -> str:
    config = read_json(file)
    mode = config.get("pooling_mode")
    if isinstance(mode, str):  # newer files name it; older ones have a switch for each
        return {"lasttoken": "last"}.get(mode, mode)
    chosen = [name for switch, name in _MODES.items() if config.get(switch) is True]
    if len(chosen) != 1:
        raise ModelError(f"{file}: one pooling mode must be set, got {', '.join(chosen) or 'none'}")
    return chosen[0]


def _max_seq_length(folder: Path) -> int | None:
    for name in _LENGTH_FILES:
        if (folder / name).is_file():
            value = read_json(folder / name).get("max_seq_length")
            if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < 1):
                raise ModelError(f"{folder / name}: max_seq_length must be a number of tokens, got {value!r}")
            return value
    return None

"""Writes tests/golden/tiny.npz: Transformers' logits and greedy tokens for the cases of support.models.tiny.

Needs the extra `oracle`. Run it again when a case is added: python scripts/make_golden_tiny.py
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "tests"))

from support.models import tiny  # noqa: E402

GREEDY = 32  # tokens that follow the first 8 of the prompt
ROWS = slice(3, None, 4)  # rows of the prompt whose logits are kept


def oracle(config: Mapping[str, Any]) -> Any:
    """The case's model in Transformers, its weights loaded strictly."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    fields = {k: v for k, v in config.items() if k != "model_type"}
    known = AutoConfig.for_model(config["model_type"], **fields)
    model = AutoModelForCausalLM.from_config(known, attn_implementation="eager", dtype=torch.float32).eval()
    weights = {k: torch.from_numpy(v) for k, v in tiny.weights_of(tiny.program_of(config)).items()}
    missing, unexpected = model.load_state_dict(weights, strict=False)
    allowed = {"lm_head.weight"} if config["tie_word_embeddings"] else set()
    if set(missing) - allowed or unexpected:
        raise RuntimeError(f"weight maps differ: missing {missing}, unexpected {unexpected}")
    model.tie_weights()
    return model


def logits(model: Any, tokens: np.ndarray) -> np.ndarray:
    """Logits [T, vocab] of a whole prompt."""
    import torch

    with torch.no_grad():
        out: np.ndarray = model(torch.from_numpy(tokens.astype(np.int64))[None]).logits[0].numpy()
    return out


def greedy(model: Any, tokens: np.ndarray, count: int) -> np.ndarray:
    """The next `count` tokens by arg max, each from a fresh pass over the whole text."""
    ids = tokens.tolist()
    for _ in range(count):
        ids.append(int(logits(model, np.array(ids, dtype=np.int32))[-1].argmax()))
    return np.array(ids[len(tokens) :], dtype=np.int32)


def main() -> None:
    """Writes the file."""
    found: dict[str, np.ndarray] = {}
    for name, config in tiny.CASES.items():
        model, prompt = oracle(config), tiny.prompt_of(config)
        found[f"{name}/logits"] = logits(model, prompt)[ROWS]
        found[f"{name}/greedy"] = greedy(model, prompt[:8], GREEDY)
        ours = tiny.logits_of(tiny.load(config), prompt)[ROWS]
        print(f"{name}: largest difference {np.abs(ours - found[f'{name}/logits']).max():.1e}")
    np.savez_compressed(ROOT / "tests" / "golden" / "tiny.npz", **found)


if __name__ == "__main__":
    main()

"""Writes tests/golden/archs/nemotron_h*.json: what Transformers computes for the tiny checkpoints.

Needs torch and transformers (the oracle extra). Run from the repository's root:

    python scripts/make_golden_nemotron.py
"""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "tests"))

from support.models import archs_tiny as tiny  # noqa: E402
from support.models import nemotron_tiny as nemotron  # noqa: E402


def golden(name: str, directory: Path) -> dict[str, Any]:
    """Logits at `tiny.GOLDEN_ROWS` of the prompt and the tokens that follow it."""
    tensors = nemotron.random_tensors(name)
    tiny.save(directory, nemotron.CASES[name].config, tensors)
    model = transformers.AutoModelForCausalLM.from_pretrained(
        directory, dtype=torch.float32, attn_implementation="eager"
    ).eval()
    tokens = torch.from_numpy(tiny.prompt_of(name))[None].long()
    with torch.no_grad():
        rows = model(tokens, use_cache=False).logits[0, list(tiny.GOLDEN_ROWS)].numpy()
        for _ in range(tiny.GREEDY):  # without a cache: its one-token step leaves out time_step_min
            best = model(tokens, use_cache=False).logits[:, -1].argmax(-1, keepdim=True)
            tokens = torch.cat([tokens, best], dim=1)
    return {
        "transformers": transformers.__version__,
        "weights_sha256": tiny.digest(tensors),
        "greedy": tokens[0, tiny.PROMPT :].tolist(),
        "logits": [[float(f"{x:.7g}") for x in row] for row in rows.astype(np.float64).tolist()],
    }


def main() -> None:
    transformers.logging.set_verbosity_error()
    for name in nemotron.CASES:
        with tempfile.TemporaryDirectory() as directory:
            found = golden(name, Path(directory))
        (ROOT / "tests" / "golden" / "archs" / f"{name}.json").write_text(json.dumps(found) + "\n")
        print(f"{name}: {found['greedy'][:8]} ...")


if __name__ == "__main__":
    main()

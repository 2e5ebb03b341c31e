"""Writes tests/golden/archs: what Transformers computes for the tiny checkpoints of the tests.

Phi-3-small, which Transformers lacks, comes from a model of its own (support/models/oracle_phi3small.py).
Needs torch and transformers (the oracle extra). Weights and prompts come from seeds, so a file holds only
results: logits of a few positions, and the greedy tokens. Run from the repository's root:

    python scripts/make_golden_archs.py [CASE ...]
"""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path

import numpy as np
import torch
import transformers

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "tests"))

from support.models import archs_moe_tiny, nemotron_tiny  # noqa: E402
from support.models import archs_tiny as tiny  # noqa: E402
from support.models.oracle_phi3small import Phi3Small  # noqa: E402

CASES = tiny.CASES | archs_moe_tiny.CASES | nemotron_tiny.CASES


def golden(case: tiny.Case, directory: Path) -> dict[str, object]:
    """Logits at `tiny.GOLDEN_ROWS` of the prompt and the tokens that follow it."""
    tensors = tiny.random_tensors(case.name, case.config)
    prompt = tiny.prompt_of(case.name)
    if case.config["architectures"] == ["Phi3SmallForCausalLM"]:
        model = Phi3Small(case.config, tensors, case.max_model_len)
        rows, drawn = model.logits(prompt)[list(tiny.GOLDEN_ROWS)], model.greedy(prompt, tiny.GREEDY)
    else:
        tiny.save(directory, case.config, tensors)
        rows, drawn = from_transformers(directory, torch.from_numpy(prompt)[None].long())
    return {
        "transformers": transformers.__version__,
        "weights_sha256": tiny.digest(tensors),
        "greedy": drawn,
        "logits": [[float(f"{x:.7g}") for x in row] for row in rows.astype(np.float64).tolist()],
    }


def from_transformers(directory: Path, tokens: torch.Tensor) -> tuple[np.ndarray, list[int]]:
    """Transformers' logits and greedy tokens."""
    model = transformers.AutoModelForCausalLM.from_pretrained(
        directory, dtype=torch.float32, attn_implementation="eager", experts_implementation="eager"
    ).eval()
    with torch.no_grad():
        rows = model(tokens, use_cache=False).logits[0, list(tiny.GOLDEN_ROWS)].numpy()
        for _ in range(tiny.GREEDY):  # without a cache: Mamba-2's one-token step leaves out time_step_min
            best = model(tokens, use_cache=False).logits[:, -1].argmax(-1, keepdim=True)
            tokens = torch.cat([tokens, best], dim=1)
    return rows, tokens[0, tiny.PROMPT :].tolist()


def main() -> None:
    transformers.logging.set_verbosity_error()
    target = ROOT / "tests" / "golden" / "archs"
    target.mkdir(parents=True, exist_ok=True)
    for name in sys.argv[1:] or CASES:
        with tempfile.TemporaryDirectory() as directory:
            found = golden(CASES[name], Path(directory))
        (target / f"{name}.json").write_text(json.dumps(found) + "\n")
        print(f"{name}: {found['greedy'][:8]} ...")


if __name__ == "__main__":
    main()

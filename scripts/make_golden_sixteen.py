"""Writes tests/golden/sixteen_bits.json: how far Transformers' own 16-bit logits are from its float32 ones.

    python scripts/make_golden_sixteen.py smollm2-135m=FILE.gguf qwen2.5-coder-0.5b=FILE.gguf

For every prompt of tests/golden/greedy_NAME.json and both 16-bit types: the largest difference of a logit at
the 64 positions whose tokens are drawn, and the first of them whose token changes (null: none). It says how
close two leading logits must be before 16 bits cannot tell them apart; `scripts/gpu/real_models.py` measures
our gaps by it.
"""

from __future__ import annotations

import copy
import json
import sys
from pathlib import Path
from typing import Any

GOLDEN = Path(__file__).parents[1] / "tests" / "golden"


def errors(name: str, path: Path) -> dict[str, list[dict[str, Any]]]:
    """Of each dtype, a record a prompt: `error` and `first`."""
    import torch
    from transformers import AutoModelForCausalLM

    full = AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=torch.float32).eval()
    cases = json.loads((GOLDEN / f"greedy_{name}.json").read_text())["cases"]
    found: dict[str, list[dict[str, Any]]] = {}
    for dtype in (torch.bfloat16, torch.float16):
        model = copy.deepcopy(full).to(dtype)
        records = found.setdefault(str(dtype).removeprefix("torch."), [])
        for case in cases:
            first, drawn = len(case["prompt_token_ids"]), torch.tensor(case["output_token_ids"])
            tokens = torch.cat([torch.tensor(case["prompt_token_ids"]), drawn])[None]
            with torch.no_grad():
                got, wanted = (m(tokens).logits[0, first - 1 : -1].float() for m in (model, full))
            changed = (got.argmax(-1) != drawn).nonzero().flatten().tolist()
            error = round(float((got - wanted).abs().max()), 3)
            records.append({"error": error, "first": changed[0] if changed else None})
    return found


def main() -> None:
    """Writes the file for every NAME=FILE."""
    pairs = [argument.split("=", 1) for argument in sys.argv[1:]]
    value = {name: errors(name, Path(path)) for name, path in pairs}
    (GOLDEN / "sixteen_bits.json").write_text(json.dumps(value, indent=1) + "\n")


if __name__ == "__main__":
    main()

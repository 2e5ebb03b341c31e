"""Writes tests/golden/sixteen_bits.json: how far Transformers' own 16-bit logits are from its float32 ones.

    python scripts/make_golden_sixteen.py smollm2-135m=FILE.gguf qwen2.5-coder-0.5b=FILE.gguf

For every prompt of tests/golden/greedy_NAME.json: `margins`, how far the best float32 logit is above the
second at the 64 positions whose tokens are drawn. For both 16-bit types a record a prompt: `leading`, the
largest error of the distance between the best logit and one of the next four; `error`, the largest of any
logit; `first`, where the first token changes (null: nowhere). So 16 bits cannot tell two leading logits apart
that are closer than `leading`; `scripts/gpu/real_models.py` measures our first differences by it.
"""

from __future__ import annotations

import copy
import json
import sys
from pathlib import Path
from typing import Any

GOLDEN = Path(__file__).parents[1] / "tests" / "golden"


LEADING = 5  # logits that count as leading


def measure(name: str, path: Path) -> dict[str, list[Any]]:
    """A model's entry of the file."""
    import torch
    from transformers import AutoModelForCausalLM

    def logits(model: Any, case: dict[str, Any]) -> torch.Tensor:
        """float32 [64, vocab] of the positions whose tokens are drawn."""
        tokens = torch.tensor([[*case["prompt_token_ids"], *case["output_token_ids"]]])
        with torch.no_grad():
            return model(tokens).logits[0, len(case["prompt_token_ids"]) - 1 : -1].float()

    full = AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=torch.float32).eval()
    cases = json.loads((GOLDEN / f"greedy_{name}.json").read_text())["cases"]
    wanted = [logits(full, case) for case in cases]
    best = [w.topk(LEADING) for w in wanted]
    found: dict[str, list[Any]] = {
        "margins": [[round(float(m), 3) for m in values[:, 0] - values[:, 1]] for values, _ in best]
    }
    for dtype in (torch.bfloat16, torch.float16):
        model = copy.deepcopy(full).to(dtype)
        records = found.setdefault(str(dtype).removeprefix("torch."), [])
        for case, w, (values, ids) in zip(cases, wanted, best, strict=True):
            got = logits(model, case)
            given = got.gather(1, ids)
            leading = ((given - given[:, :1]) - (values - values[:, :1])).abs().max()
            changed = (got.argmax(-1) != torch.tensor(case["output_token_ids"])).nonzero().flatten().tolist()
            records.append(
                {
                    "leading": round(float(leading), 3),
                    "error": round(float((got - w).abs().max()), 3),
                    "first": changed[0] if changed else None,
                }
            )
    return found


def main() -> None:
    """Writes the file for every NAME=FILE."""
    pairs = [argument.split("=", 1) for argument in sys.argv[1:]]
    value = {name: measure(name, Path(path)) for name, path in pairs}
    (GOLDEN / "sixteen_bits.json").write_text(json.dumps(value) + "\n")


if __name__ == "__main__":
    main()

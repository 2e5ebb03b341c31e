"""How near a quantised model's log probabilities on the GPU are to float32's, kept as stored and expanded.

    PYTHONPATH=src python scripts/gpu/kept_weights.py MODEL TEXT [--positions 2000] [--emulate]

Prints, for weights as they are stored and expanded to bfloat16, the perplexity of the text, the mean KL
divergence from float32 on the CPU over its 20 likeliest tokens (and one bin for all others), and how often
the likeliest token is the same. --emulate: kernels in the emulator of the tests (PYTHONPATH=tests too),
where there is no GPU.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path

import numpy as np

from rvllm import LLM, SamplingParams
from rvllm.backends import load

WINDOW = 128
Rows = list[tuple[float, dict[int, float]]]  # of each position: the text's token, the likeliest ones


def windows(llm: LLM, text: str, positions: int) -> Iterator[list[int]]:
    ids = llm.get_tokenizer().encode(text)
    for start in range(0, positions, WINDOW):
        yield ids[start : start + WINDOW]


def rows_of(model: str, text: str, positions: int, **options: object) -> Rows:
    """The log probabilities that the model gives the text."""
    found: Rows = []
    with LLM(model, max_model_len=256, generation_config="none", **options) as llm:  # type: ignore[arg-type]
        params = SamplingParams(temperature=0, max_tokens=1, prompt_logprobs=20)
        asked = [{"prompt_token_ids": ids} for ids in windows(llm, text, positions)]
        for one, output in zip(asked, llm.generate(asked, params, use_tqdm=False), strict=True):
            for token, given in zip(one["prompt_token_ids"], output.prompt_logprobs or [], strict=True):
                if given is not None:
                    numbers = {t: lp.logprob for t, lp in given.items()}
                    found.append((numbers[token], numbers))
    return found


def report(name: str, exact: Rows, other: Rows) -> None:
    divergences, same = [], 0
    for (_, wanted), (_, given) in zip(exact, other, strict=True):
        common = [t for t in wanted if t in given]
        p, q = (np.exp([d[t] for t in common]) for d in (wanted, given))
        p, q = (np.append(a, max(1 - a.sum(), 1e-9)) for a in (p, q))
        divergences.append(float((p * np.log(p / q)).sum()))
        same += max(wanted, key=wanted.__getitem__) == max(given, key=given.__getitem__)
    perplexity = np.exp(-np.mean([lp for lp, _ in other]))
    divergence, share = np.mean(divergences), 100 * same / len(exact)
    print(f"{name:10s} perplexity {perplexity:.4f}  KL {divergence:.6f} over {len(exact)} positions  "
          f"same first token {share:.2f} %", flush=True)  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("model")
    parser.add_argument("text", type=Path)
    parser.add_argument("--positions", type=int, default=2000)
    parser.add_argument("--emulate", action="store_true")
    args = parser.parse_args()
    text = args.text.read_text()
    exact = rows_of(args.model, text, args.positions, device="cpu")
    report("float32", exact, exact)
    around: AbstractContextManager[object] = nullcontext()
    if args.emulate:
        from support.emulator.driver import emulated_driver

        load.gpu_present = lambda: True
        around = emulated_driver()
    with around:
        for name in ("auto", "none"):
            rows = rows_of(
                args.model, text, args.positions, device="cuda", dtype="bfloat16", quantization=name
            )
            report("as stored" if name == "auto" else "expanded", exact, rows)


if __name__ == "__main__":
    main()

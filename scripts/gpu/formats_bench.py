"""Tokens a second of a Llama-shaped model's configuration with random weights in a quantised format.

    PYTHONPATH=src python scripts/gpu/formats_bench.py FORMAT CONFIG_DIR [--sizes 1,8,32] [--output 128]

FORMAT: bf16, fp8, int4 (groups of 128), int8 (a scale a row, as W8A8 checkpoints are kept), q4_k_m (the kinds
that llama.cpp's quantize gives each matrix), fp8_cache. 12 tokens in, greedy, all requests at once to the
in-process engine, the median of 3; and prompts of 8 x 1,024 tokens, one token out, the median of 5. Exits 1
where a size gives 10 % fewer tokens a second than a smaller one.
"""

from __future__ import annotations

import argparse
import json
import random
import re
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from rvllm import LLM, SamplingParams
from rvllm.bench.cliffs import cliffs
from rvllm.program.formats import IntegerFormat, WeightFormat
from rvllm.program.ops.dense import Weight
from rvllm.weights import formats

OPTIONS: dict[str, dict[str, Any]] = {
    "fp8": {"quantization": "fp8"}, "int4": {"quantization": "int4"}, "fp8_cache": {"kv_cache_dtype": "fp8"},
}  # fmt: skip
TOLERANCE = 0.1


def q4_k_m(weight: Weight, head: bool, layers: int) -> IntegerFormat:
    """Q4_K, but Q6_K for the head and, in half of the layers, for values and the way down."""
    columns, found = weight.shape[-1], re.search(r"\d+", weight.name)
    layer, eighth = int(found.group()) if found else 0, layers // 8
    finer = layer < eighth or layer >= 7 * layers // 8 or (layer - eighth) % 3 == 2
    parts: list[tuple[int, str]] = []
    for i, part in enumerate(weight.parts):
        values_or_down = "down" in weight.name or (len(weight.parts) == 3 and i == 2)
        kind = "q6" if head or (finer and values_or_down) else "q4"
        rows = part.elements // columns
        if parts and parts[-1][1] == kind:
            parts[-1] = parts[-1][0] + rows, kind
        else:
            parts.append((rows, kind))
    return IntegerFormat(tuple(parts), "Q4_K_M")


def keep_as(name: str, layers: int) -> None:
    """Has every matrix kept in a format that no flag makes of 16 bits."""

    def chosen(weight: Weight, head: bool, *_: object) -> WeightFormat | None:
        if name == "q4_k_m":
            return q4_k_m(weight, head, layers)
        return None if head else IntegerFormat(((weight.shape[-2], "int8"),), "W8A8")

    formats._format_of = chosen  # type: ignore[assignment]


def median(work: Callable[[int], float], times: int) -> float:
    return statistics.median(work(seed) for seed in range(2, 2 + times))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("format", choices=["bf16", *OPTIONS, "int8", "q4_k_m"])
    parser.add_argument("config")
    parser.add_argument("--sizes", default="1,8,32,128,256,512")
    parser.add_argument("--output", type=int, default=128)
    args = parser.parse_args()
    if args.format in ("int8", "q4_k_m"):
        keep_as(args.format, json.loads((Path(args.config) / "config.json").read_text())["num_hidden_layers"])
    sizes = [int(size) for size in args.sizes.split(",")]
    llm = LLM(
        model=args.config, load_format="dummy", skip_tokenizer_init=True, dtype="bfloat16", device="cuda",
        gpu_memory_utilization=0.85, max_model_len=4096, max_num_seqs=max(512, *sizes),
        **OPTIONS.get(args.format, {}),
    )  # fmt: skip

    def seconds(size: int, prompt: int, output: int, seed: int) -> float:
        rng = random.Random(seed * 1000 + size)
        asked = [
            {"prompt_token_ids": [rng.randrange(1000, 100000) for _ in range(prompt)]} for _ in range(size)
        ]
        params = SamplingParams(temperature=0, max_tokens=output, ignore_eos=True, detokenize=False)
        started = time.perf_counter()
        llm.generate(asked, params, use_tqdm=False)
        return time.perf_counter() - started

    seconds(8, 1024, 1, 1)
    wall = median(lambda seed: seconds(8, 1024, 1, seed), 5)
    print(f"prompts of 8 x 1,024: {8192 / wall:9.0f} tok/s", flush=True)
    rates: dict[int, float] = {}
    for size in sizes:
        seconds(size, 12, 4, 1)  # captures the graphs
        wall = median(lambda seed, size=size: seconds(size, 12, args.output, seed), 3)  # type: ignore[misc]
        first = median(lambda seed, size=size: seconds(size, 12, 1, 99 + seed), 3)  # type: ignore[misc]
        rates[size] = size * args.output / wall
        step = (wall - first) / (args.output - 1)
        print(f"N {size:4} {rates[size]:9.0f} tok/s, a step {1e3 * step:7.3f} ms", flush=True)
    fallen = cliffs(rates, TOLERANCE)
    for size, shortfall in fallen:
        print(f"N {size}: {shortfall:.1%} fewer tokens a second than a smaller batch")
    return 1 if fallen else 0


if __name__ == "__main__":
    sys.exit(main())

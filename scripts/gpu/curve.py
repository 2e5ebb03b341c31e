"""The curve of N: tokens a second of N requests at once, and each N that falls behind a smaller one.

    PYTHONPATH=src python scripts/gpu/curve.py CONFIG_DIR [--sizes 1,2,4] [--input 12] [--output 64]

Random weights of the configuration, random prompts, greedy, `ignore_eos`, no detokenising, all requests
submitted at once to the in-process engine; the median of 3. Exits with 1 when a size gives more than
`--tolerance` fewer tokens a second than a smaller one.
"""

from __future__ import annotations

import argparse
import random
import statistics
import sys
import time

from rvllm import LLM, SamplingParams
from rvllm.bench.cliffs import cliffs

SIZES = "1,2,3,4,5,6,7,8,10,12,16,20,24,28,32,40,48,64,80,96,112,128,160,192,256,320,384,512"


def seconds(llm: LLM, size: int, prompt: int, output: int, seed: int) -> float:
    """Wall time of `size` requests."""
    rng = random.Random(seed)
    prompts = [{"prompt_token_ids": [rng.randrange(100, 30000) for _ in range(prompt)]} for _ in range(size)]
    params = SamplingParams(temperature=0, max_tokens=output, ignore_eos=True, detokenize=False)
    started = time.perf_counter()
    llm.generate(prompts, params, use_tqdm=False)
    return time.perf_counter() - started


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("config")
    parser.add_argument("--sizes", default=SIZES)
    parser.add_argument("--input", type=int, default=12)
    parser.add_argument("--output", type=int, default=64)
    parser.add_argument("--tolerance", type=float, default=0.1)
    args = parser.parse_args()
    sizes = [int(size) for size in args.sizes.split(",")]
    llm = LLM(
        model=args.config,
        load_format="dummy",
        skip_tokenizer_init=True,
        device="cuda",
        gpu_memory_utilization=0.9,
        max_model_len=max(1024, 2 * (args.input + args.output)),
        max_num_seqs=max(sizes),
    )
    rates: dict[int, float] = {}
    for size in sizes:
        seconds(llm, size, args.input, min(args.output, 8), 1)  # captures the graphs
        wall = statistics.median(seconds(llm, size, args.input, args.output, seed) for seed in (2, 3, 4))
        rates[size] = size * args.output / wall
        print(f"N {size:4} {rates[size]:9.1f} tok/s", flush=True)
    fallen = cliffs(rates, args.tolerance)
    for size, shortfall in fallen:
        print(f"N {size}: {shortfall:.1%} fewer tokens a second than a smaller batch")
    sys.exit(bool(fallen))


if __name__ == "__main__":
    main()

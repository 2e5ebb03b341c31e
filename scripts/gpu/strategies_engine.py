"""Every --gemm-strategy in an engine: tokens a second and milliseconds a step by batch size, and prompts.

    PYTHONPATH=src python scripts/gpu/strategies_engine.py CONFIG_DIR [--only native,auto] [--jobs 8:12:24,..]

Random weights, prompts of random ids, all at once, greedy; medians of three. A step is what 24 tokens take
longer than one, by 23. A second start with auto shows what it takes when all times are known.
"""

from __future__ import annotations

import argparse
import logging
import random
import sys
import time
from pathlib import Path
from statistics import median

from rvllm import LLM, SamplingParams
from rvllm.errors import RvllmError

STRATEGIES = "native,cublas,cutlass,hybrid,auto,auto"
JOBS = "1:12:24,8:12:24,32:12:24,64:12:24,128:12:24,256:12:24,512:12:24,8:1024:1"


def seconds(llm: LLM, count: int, length: int, tokens: int, seed: int) -> float:
    """Of `count` prompts with `tokens` drawn after each."""
    drawn = random.Random(seed)
    prompts = [
        {"prompt_token_ids": [drawn.randrange(1000, 100_000) for _ in range(length)]} for _ in range(count)
    ]
    params = SamplingParams(temperature=0, max_tokens=tokens, ignore_eos=True, detokenize=False)
    began = time.perf_counter()
    llm.generate(prompts, params, use_tqdm=False)
    return time.perf_counter() - began


def measure(llm: LLM, strategy: str, job: str) -> None:
    """Prints a line."""
    count, length, tokens = map(int, job.split(":"))
    seconds(llm, count, length, min(tokens, 4), 1)
    walls = [seconds(llm, count, length, tokens, 1000 * turn + count) for turn in range(2, 5)]
    whole = median(walls)
    line = f"{strategy:8} N {count:4} in {length:5} out {tokens:3}: "
    if tokens == 1:
        line += f"{count * length / whole:9,.0f} prompt tok/s"
    else:
        first = median(seconds(llm, count, length, 1, 9000 * turn + count) for turn in range(3))
        line += f"{count * tokens / whole:9,.0f} tok/s, {(whole - first) / (tokens - 1) * 1e3:7.3f} ms a step"
    print(f"{line}, spread {(max(walls) - min(walls)) / whole:.1%}", flush=True)


def main() -> int:
    """Runs the strategies; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("config", type=Path)
    parser.add_argument("--only", default=STRATEGIES, metavar="NAME,...")
    parser.add_argument("--jobs", default=JOBS)
    args = parser.parse_args()
    logging.basicConfig(format="%(message)s", stream=sys.stdout)
    for strategy in args.only.split(","):
        began = time.perf_counter()
        try:
            llm = LLM(
                model=str(args.config), load_format="dummy", skip_tokenizer_init=True, dtype="bfloat16",
                device="cuda", max_model_len=2048, max_num_seqs=512, gemm_strategy=strategy,
            )  # fmt: skip
        except RvllmError as error:
            print(f"{strategy}: {error}", flush=True)
            continue
        print(f"{strategy}: ready after {time.perf_counter() - began:.2f} s", flush=True)
        for job in args.jobs.split(","):
            measure(llm, strategy, job)
        llm.close()
    return 0


if __name__ == "__main__":
    raise SystemExit(main())

"""Decode on the CPU by the number of sequences at once, beside an earlier tree: does the curve rise?

    python scripts/bench_cpu_curve.py MODEL [--dummy] [--before /path/to/earlier/src]

MODEL is a .gguf file, a directory, or with --dummy a directory that has a config.json alone. Tokens a second
of all sequences together, best of the runs of all turns; the two trees run in turns, each in a process of
its own. By default one thread's processor time counts, which other work on the machine moves least; with
--clock wall --threads 2 it is what a user sees. A point below an earlier one is marked.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np

CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time}
SHORT = 2  # tokens out of the run that is taken off
PREFILL = 500
NOISE = 0.02  # a point this much below an earlier one is not marked


def measure(args: argparse.Namespace) -> dict[str, float]:
    """Tokens a second by N, and of a prompt as "prefill"."""
    from rvllm import LLM, SamplingParams

    weights = "dummy" if args.dummy else "auto"
    llm = LLM(
        args.model, device="cpu", cpu_kernels=args.kernels, threads=args.threads, max_model_len=1024,
        max_num_seqs=max(args.n), enable_prefix_caching=False, kv_cache_memory_gb=0.5, load_format=weights,
        skip_tokenizer_init=True,
    )  # fmt: skip
    now, source = CLOCKS[args.clock], np.random.default_rng(1)

    def seconds(sequences: int, length: int, out: int) -> float:
        prompts = [
            {"prompt_token_ids": ids} for ids in source.integers(1000, 8000, (sequences, length)).tolist()
        ]
        params = SamplingParams(temperature=0, max_tokens=out, ignore_eos=True)
        start = now()
        llm.generate(prompts, params, use_tqdm=False)
        return now() - start

    seconds(1, 12, 4)
    found: dict[str, float] = {}
    for _ in range(args.runs):
        for n in args.n:
            spent = seconds(n, 12, SHORT + args.tokens) - seconds(n, 12, SHORT)
            found[str(n)] = max(found.get(str(n), 0.0), n * args.tokens / spent)
        found["prefill"] = max(found.get("prefill", 0.0), PREFILL / seconds(1, PREFILL, 1))
    return found


def run(args: argparse.Namespace, tree: Path) -> dict[str, float]:
    """Measures a tree in a process of its own."""
    environ = {**os.environ, "PYTHONPATH": str(tree)}
    command = [sys.executable, __file__, *sys.argv[1:], "--only"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environ)
    if done.returncode:
        raise SystemExit(f"{' '.join(command)} failed:\n{done.stderr[-2000:]}")
    rates: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return rates


def main() -> None:
    """Runs both trees in turns and prints a table."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("model")
    parser.add_argument("--dummy", action="store_true", help="random weights")
    parser.add_argument("--before", type=Path, help="src of an earlier tree, with its kernels built")
    parser.add_argument(
        "--n", type=lambda text: [int(n) for n in text.split(",")], default=[1, 2, 3, 4, 8, 16]
    )
    parser.add_argument("--tokens", type=int, default=24)
    parser.add_argument("--runs", type=int, default=2, help="in each turn")
    parser.add_argument("--turns", type=int, default=2)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--clock", choices=CLOCKS, default="cpu")
    parser.add_argument("--kernels", default="compiled")
    parser.add_argument("--only", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.only:
        print(json.dumps(measure(args)))
        return
    trees = {"before": args.before} if args.before else {}
    trees["now"] = Path(__file__).resolve().parents[1] / "src"
    best: dict[str, dict[str, float]] = {name: {} for name in trees}
    for _ in range(args.turns):
        for name, tree in trees.items():
            for point, rate in run(args, tree).items():
                best[name][point] = max(best[name].get(point, 0.0), rate)
    points = [*map(str, args.n), "prefill"]
    print(f"| tok/s, {args.threads} threads, {args.clock} time | {' | '.join(points)} |")
    print(f"| --- |{' ---: |' * len(points)}")
    for name, rates in best.items():
        cells = [f"{rates[p]:.3g}" for p in points]
        for i in range(1, len(args.n)):
            if rates[points[i]] < (1 - NOISE) * max(rates[p] for p in points[:i]):
                cells[i] += " falls"
        print(f"| {name} | {' | '.join(cells)} |")


if __name__ == "__main__":
    main()

"""Decode and prefill on the CPU beside llama.cpp: same file, same prompt, same threads, in turns.

    python scripts/bench_cpu.py model.gguf --peer /path/to/python-with-llama-cpp-python

Each turn starts each contender in a process of its own, one after the other, so that a busy machine slows
all of them; the table has the median over the turns, and the best. Without --peer only our own are run.
--clock cpu counts the processor time that a contender used: with --threads 1 a fair comparison of the work
itself on a machine that others use as well.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

PROMPT = 512  # tokens of the prefill
SHORT = 16  # tokens before the decode
Rates = dict[str, float]
Clock = Callable[[], float]
CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time}


def prompt(length: int, vocab: int) -> list[int]:
    """Token ids from a seed, none of them special."""
    return [int(t) for t in np.random.default_rng(length).integers(1000, min(vocab, 40000), length)]


def measure_ours(path: str, kernels: str, threads: int, tokens: int, now: Clock) -> Rates:
    """Through rvllm.LLM, engine and sampler included."""
    from rvllm import LLM, SamplingParams

    began = now()
    llm = LLM(
        path, device="cpu", cpu_kernels=kernels, threads=threads, max_model_len=1024,
        max_num_batched_tokens=PROMPT, enable_prefix_caching=False,
    )  # fmt: skip
    vocab = 49152

    def seconds(length: int, count: int) -> float:
        params = SamplingParams(temperature=0, max_tokens=count, ignore_eos=True)
        start = now()
        llm.generate([{"prompt_token_ids": prompt(length, vocab)}], params, use_tqdm=False)
        return now() - start

    seconds(SHORT, 1)
    first = now() - began
    seconds(SHORT, 4)
    prefill = PROMPT / seconds(PROMPT, 1)
    short = seconds(SHORT, 1)
    decode = (tokens - 1) / (seconds(SHORT, tokens) - short)
    return {"prefill": prefill, "decode": decode, "first token (s)": first}


def measure_llama(path: str, threads: int, tokens: int, now: Clock) -> Rates:
    """llama.cpp through llama-cpp-python's plain eval and greedy choice."""
    from llama_cpp import Llama

    began = now()
    llm = Llama(path, n_ctx=1024, n_batch=PROMPT, n_threads=threads, n_threads_batch=threads, verbose=False)
    llm.eval(prompt(SHORT, 49152))
    llm.sample(temp=0.0)
    first = now() - began
    llm.reset()
    start = now()
    llm.eval(prompt(PROMPT, 49152))
    prefill = PROMPT / (now() - start)
    llm.reset()
    llm.eval(prompt(SHORT, 49152))
    token = llm.sample(temp=0.0)
    start = now()
    for _ in range(tokens - 1):
        llm.eval([token])
        token = llm.sample(temp=0.0)
    return {
        "prefill": prefill, "decode": (tokens - 1) / (now() - start), "first token (s)": first
    }  # fmt: skip


def run(python: str, arguments: list[str]) -> Rates:
    """Measures in a process of its own."""
    command = [python, __file__, *arguments]
    environ = {**os.environ, "OMP_WAIT_POLICY": os.environ.get("OMP_WAIT_POLICY", "active")}
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environ)
    if done.returncode:
        raise SystemExit(f"{' '.join(command)} failed:\n{done.stderr[-2000:]}")
    rates: Rates = json.loads(done.stdout.splitlines()[-1])
    return rates


def main() -> None:
    """Runs the contenders in turns and prints the table, or one measurement with --only."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("model", help="a .gguf file")
    parser.add_argument("--peer", help="a Python that has llama-cpp-python")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--tokens", type=int, default=65)
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--kernels", default="compiled,numpy")
    parser.add_argument(
        "--clock", choices=CLOCKS, default="wall", help="cpu: processor time, use --threads 1"
    )
    parser.add_argument("--only", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.only:
        measured = (
            measure_llama(args.model, args.threads, args.tokens, CLOCKS[args.clock])
            if args.only == "llama.cpp"
            else measure_ours(args.model, args.only, args.threads, args.tokens, CLOCKS[args.clock])
        )
        print(json.dumps(measured))
        return
    contenders = dict.fromkeys(args.kernels.split(","), sys.executable)
    if args.peer:
        contenders = {"llama.cpp": args.peer, **contenders}
    found: dict[str, list[Rates]] = {name: [] for name in contenders}
    for _ in range(args.turns):
        for name, python in contenders.items():
            options = ["--only", name, "--threads", str(args.threads), "--tokens", str(args.tokens)]
            options += ["--clock", args.clock]
            found[name].append(run(python, [args.model, *options]))
    what = f"{args.threads} threads, {args.turns} turns, {args.clock} time"
    print(f"{Path(args.model).name}, {what}: median (best)")
    print(
        "| | prefill of 512, tok/s | decode, tok/s | load to first token, s |\n| --- | ---: | ---: | ---: |"
    )
    for name, turns in found.items():
        cells = []
        for what, best in (("prefill", max), ("decode", max), ("first token (s)", min)):
            values = [t[what] for t in turns]
            cells.append(f"{statistics.median(values):.1f} ({best(values):.1f})")
        print(f"| {name} | {' | '.join(cells)} |")


if __name__ == "__main__":
    main()

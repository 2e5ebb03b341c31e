"""Texts per second of an encoder on the CPU beside sentence-transformers: same texts and threads, in turns.

    python scripts/bench_embeddings.py MODEL_DIRECTORY --peer /path/to/python-with-sentence-transformers

Each turn starts each contender in a process of its own, one after the other; the table has the median over
the turns, and the best. --clock cpu counts the processor time that a contender used: with --threads 1 a fair
comparison of the work itself on a machine that others use as well. The vectors of both are compared as well.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

WORDS = (
    "the a of and to in is was for on with as by at from it that this memory kernel river garden model token "
    "server weight letter music winter signal window market engine bridge ocean paper silver travel question"
)
RUNS = 3  # of each workload; the best counts
PEER = "sentence-transformers"
CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time}
Found = dict[str, Any]


def texts(count: int, shortest: int, longest: int) -> list[str]:
    """Texts of random words, the same on every machine."""
    source = random.Random(count * 1000 + longest)
    return [
        " ".join(source.choices(WORDS.split(), k=source.randint(shortest, longest))) for _ in range(count)
    ]


WORKLOADS: dict[str, tuple[list[str], bool]] = {  # and whether each text is a call of its own
    "50 texts of 3 to 250 words": (texts(50, 3, 250), False),
    "200 texts of 5 to 12 words": (texts(200, 5, 12), False),
    "40 of them one at a time": (texts(200, 5, 12)[:40], True),
}


def measure(embed: Callable[[list[str]], Any], clock: str) -> Found:
    """Texts per second of each workload, and the vectors of the first."""
    now = CLOCKS[clock]
    embed(texts(4, 5, 100))
    found: Found = {}
    for name, (batch, apart) in WORKLOADS.items():
        best = float("inf")
        for _ in range(RUNS):
            start = now()
            for piece in [[t] for t in batch] if apart else [batch]:
                embed(piece)
            best = min(best, now() - start)
        found[name] = len(batch) / best
    vectors = np.asarray(embed(next(iter(WORKLOADS.values()))[0]), dtype=np.float32)
    return {"rates": found, "vectors": vectors.tolist()}


def ours(path: str, kernels: str, threads: int) -> Callable[[list[str]], Any]:
    """Through rvllm.LLM.embed."""
    from rvllm import LLM

    llm = LLM(path, device="cpu", cpu_kernels=kernels, threads=threads)
    return lambda batch: [o.outputs.embedding for o in llm.embed(batch, use_tqdm=False)]


def theirs(path: str, threads: int) -> Callable[[list[str]], Any]:
    """Through sentence_transformers' encode, with its own batches of 32."""
    import torch
    from sentence_transformers import SentenceTransformer

    torch.set_num_threads(threads)
    model = SentenceTransformer(path, device="cpu")
    return lambda batch: model.encode(batch, normalize_embeddings=True, show_progress_bar=False)


def run(python: str, arguments: list[str], threads: int) -> Found:
    """Measures in a process of its own."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "found.json"
        command = [python, __file__, *arguments, "--out", str(out)]
        environ = {**os.environ, "OMP_NUM_THREADS": str(threads)}
        done = subprocess.run(command, capture_output=True, text=True, check=False, env=environ)
        if done.returncode:
            raise SystemExit(f"{' '.join(command)} failed:\n{done.stderr[-2000:]}")
        found: Found = json.loads(out.read_text())
        return found


def main() -> None:
    """Runs the contenders in turns and prints the table, or one measurement with --only."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("model", help="the directory of an encoder with modules.json")
    parser.add_argument("--peer", help="a Python that has sentence-transformers")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--kernels", default="compiled,numpy")
    parser.add_argument(
        "--clock", choices=CLOCKS, default="wall", help="cpu: processor time, use --threads 1"
    )
    parser.add_argument("--only", help=argparse.SUPPRESS)
    parser.add_argument("--out", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.only:
        peer = args.only == PEER
        embed = theirs(args.model, args.threads) if peer else ours(args.model, args.only, args.threads)
        Path(args.out).write_text(json.dumps(measure(embed, args.clock)))
        return
    contenders = dict.fromkeys(args.kernels.split(","), sys.executable)
    if args.peer:
        contenders = {PEER: args.peer, **contenders}
    found: dict[str, list[Found]] = {name: [] for name in contenders}
    for _ in range(args.turns):
        for name, python in contenders.items():
            options = ["--only", name, "--threads", str(args.threads), "--clock", args.clock]
            found[name].append(run(python, [args.model, *options], args.threads))
    what = f"{args.threads} threads, {args.turns} turns, {args.clock} time"
    print(f"{Path(args.model).name}, {what}: texts per second, median (best)")
    print(f"| | {' | '.join(WORKLOADS)} | largest difference of an element |")
    print(f"| --- | {'---: | ' * len(WORKLOADS)}---: |")
    wanted = np.asarray(next(iter(found.values()))[0]["vectors"])
    for name, turns in found.items():
        rates = [[t["rates"][w] for t in turns] for w in WORKLOADS]
        cells = [f"{statistics.median(r):.1f} ({max(r):.1f})" for r in rates]
        far = max(float(np.abs(np.asarray(t["vectors"]) - wanted).max()) for t in turns)
        print(f"| {name} | {' | '.join(cells)} | {far:.1e} |")


if __name__ == "__main__":
    main()

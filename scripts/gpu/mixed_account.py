"""Where the time of a mixed run goes: prompts and decodes of ShareGPT-shaped lengths, step by step.

    PYTHONPATH=src python scripts/gpu/mixed_account.py CONFIG_DIR [--requests 1000] [--max-num-seqs 256]

All requests are submitted at once to the in-process engine with random weights. A table of kinds of
steps follows: their tokens and padded tokens, the device's time in them and idle before them; then the
host's time, and steps by padded size.
"""

from __future__ import annotations

import argparse
import random
import time
from collections import defaultdict
from dataclasses import dataclass
from typing import Any

from rvllm import LLM, SamplingParams
from rvllm.backends.base import StepBatch, StepResult
from rvllm.backends.cuda.backend import CudaBackend
from rvllm.backends.cuda.buckets import bucket_of
from rvllm.backends.cuda.layout.metadata import leading_decodes


@dataclass
class Record:
    """A step: its kind, sizes, and seconds."""

    kind: str
    seqs: int
    prompts: int
    tokens: int
    padded: int
    device: float = 0.0
    idle: float = 0.0
    launch: float = 0.0
    wait: float = 0.0


class Account:
    """Stands between the engine and its backend and writes down every step."""

    def __init__(self, backend: CudaBackend) -> None:
        self.backend, self.records = backend, dict[int, Record]()
        self.done: list[Record] = []
        self._launch, self._collect = backend.launch, backend.collect
        self._before: Any = None
        backend.launch, backend.collect = self.launch, self.collect  # type: ignore[method-assign]

    def launch(self, batch: StepBatch) -> Any:
        """Launches a step and times the host in it."""
        planner = self.backend._planner
        decodes, seqs = leading_decodes(batch.query_lens), len(batch.slots)
        alone = batch.num_tokens == seqs == int(batch.sample.sum())
        sizes = planner.decode_sizes() if alone else planner.token_sizes()
        kind = "decodes" if alone else "mixed" if decodes else "prompts"
        began = time.perf_counter()
        handle = self._launch(batch)
        record = Record(kind, seqs, seqs - decodes, batch.num_tokens, bucket_of(sizes, batch.num_tokens))
        record.launch = time.perf_counter() - began
        self.records[id(handle)] = record
        return handle

    def collect(self, handle: Any) -> StepResult:
        """Collects a step; the device's idle time is between the end of the one before and its begin."""
        record = self.records.pop(id(handle))
        began = time.perf_counter()
        result = self._collect(handle)
        record.wait = time.perf_counter() - began
        record.device = result.device_seconds
        if self._before is not None:
            record.idle = handle.began.seconds_since(self._before.ended)
        self._before = handle
        self.done.append(record)
        return result


def requests(seed: int, count: int) -> tuple[list[dict[str, list[int]]], list[SamplingParams]]:
    """Prompts and parameters with lognormal lengths."""
    rng = random.Random(seed)
    prompts, params = [], []
    for _ in range(count):
        n = max(4, min(1024, int(rng.lognormvariate(4.7, 1.2))))
        m = max(4, min(1024, int(rng.lognormvariate(5.1, 0.9))))
        prompts.append({"prompt_token_ids": [rng.randrange(1000, 100000) for _ in range(n)]})
        params.append(SamplingParams(temperature=0, max_tokens=m, ignore_eos=True, detokenize=False))
    return prompts, params


def table(records: list[Record], wall: float, key: Any) -> None:
    """Prints sums of records by key."""
    groups: dict[Any, list[Record]] = defaultdict(list)
    for record in records:
        groups[key(record)].append(record)
    print(
        f"{'':>16} {'steps':>6} {'seqs':>6} {'tokens':>7} {'padded':>7} {'ms':>7} {'us/token':>8} {'s':>7} "
        f"{'%':>5} {'idle s':>7}"
    )
    for name in sorted(groups):
        rows = groups[name]
        n, device = len(rows), sum(r.device for r in rows)
        tokens = sum(r.tokens for r in rows)
        print(
            f"{name!s:>16} {n:6} {sum(r.seqs for r in rows) / n:6.0f} {tokens / n:7.0f} "
            f"{sum(r.padded for r in rows) / n:7.0f} {1e3 * device / n:7.2f} {1e6 * device / tokens:8.1f} "
            f"{device:7.2f} {100 * device / wall:5.1f} {sum(r.idle for r in rows):7.3f}",
            flush=True,
        )


def main() -> None:
    """Runs the workload and prints the tables."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("config")
    parser.add_argument("--requests", type=int, default=1000)
    parser.add_argument("--max-num-seqs", type=int, default=256)
    parser.add_argument("--seed", type=int, default=2)
    parser.add_argument("--max-num-batched-tokens", type=int, default=None)
    args = parser.parse_args()
    extra = (
        {} if args.max_num_batched_tokens is None else {"max_num_batched_tokens": args.max_num_batched_tokens}
    )
    llm = LLM(
        model=args.config, load_format="dummy", skip_tokenizer_init=True, dtype="bfloat16", device="cuda",
        gpu_memory_utilization=0.9, max_model_len=4096, max_num_seqs=args.max_num_seqs, **extra,
    )  # fmt: skip
    backend = llm.engine.backend
    assert isinstance(backend, CudaBackend)
    backend.capture_all()
    llm.generate(*requests(1, 60), use_tqdm=False)
    account = Account(backend)
    before = llm.engine.counters.host_seconds
    prompts, params = requests(args.seed, args.requests)
    began = time.perf_counter()
    llm.generate(prompts, params, use_tqdm=False)
    wall = time.perf_counter() - began
    out = sum(p.max_tokens or 0 for p in params)
    rows = account.done
    device, idle = sum(r.device for r in rows), sum(r.idle for r in rows)
    host = llm.engine.counters.host_seconds - before
    print(
        f"{args.requests} requests, {sum(r.tokens for r in rows)} tokens computed, {out} out: {wall:.2f} s, "
        f"{out / wall:.0f} tok/s\n"
        f"device {device:.2f} s, idle between steps {idle:.2f} s, rest {wall - device - idle:.2f} s; host: "
        f"scheduling and updating {host:.2f}, launching {sum(r.launch for r in rows):.2f}, waiting "
        f"{sum(r.wait for r in rows):.2f} s"
    )
    table(rows, wall, lambda r: r.kind)
    table(rows, wall, lambda r: (r.kind, r.padded))


if __name__ == "__main__":
    main()

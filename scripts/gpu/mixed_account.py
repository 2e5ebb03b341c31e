"""Where the time of a mixed run goes: prompts and decodes of ShareGPT-shaped lengths, step by step.

    PYTHONPATH=src python scripts/gpu/mixed_account.py CONFIG_DIR [--requests 1000] [--max-num-seqs 256]

All requests are submitted at once to the in-process engine with random weights. A table of kinds of
steps follows: their tokens and padded tokens, the device's time in them and idle before them; then the
host's time, and steps by padded size. --trace writes every step as JSON, one a line. --costs first times
steps of so many decodes and so many prompt tokens each, and every kernel of one of them.
"""

from __future__ import annotations

import argparse
import json
import random
import time
from collections import defaultdict
from dataclasses import asdict, dataclass
from statistics import median
from typing import Any

import numpy as np

from rvllm import LLM, SamplingParams
from rvllm.backends.base import SamplingSpec, SlotStart, StepBatch, StepResult
from rvllm.backends.cuda.backend import CudaBackend
from rvllm.backends.cuda.buckets import bucket_of
from rvllm.backends.cuda.device.launches import Counts
from rvllm.backends.cuda.layout.metadata import leading_decodes
from rvllm.backends.cuda.profile import profile_launches

CONTEXT, PROMPT = 352, 192  # tokens of a decode's context and of a prompt, in steps timed by themselves


@dataclass
class Record:
    """A step: its kind, sizes, and seconds."""

    kind: str
    seqs: int
    prompts: int
    tokens: int
    padded: int
    samples: int
    keys: int  # tokens that decodes attend to
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
        padded = bucket_of(sizes, batch.num_tokens)
        keys = int(batch.starts[:decodes].sum()) + decodes
        record = Record(kind, seqs, seqs - decodes, batch.num_tokens, padded, int(batch.sample.sum()), keys)
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


def step_of(decodes: int, prompt_tokens: int, vocab: int) -> StepBatch:
    """A step of so many decodes of CONTEXT tokens, and of prompts of PROMPT tokens, the last one shorter."""
    prompts = [PROMPT] * (prompt_tokens // PROMPT)
    prompts += [prompt_tokens % PROMPT] if prompt_tokens % PROMPT else []
    seqs, blocks = decodes + len(prompts), CONTEXT // 16
    slots = np.arange(seqs, dtype=np.int32)
    table: list[Any] = [np.repeat(slots, blocks), np.tile(np.arange(blocks), seqs), np.arange(seqs * blocks)]
    rng = np.random.default_rng(0)
    return StepBatch(
        step=0,
        slots=slots,
        query_lens=np.array([1] * decodes + prompts, dtype=np.int32),
        starts=np.array([CONTEXT - 1] * decodes + [0] * len(prompts), dtype=np.int32),
        tokens=rng.integers(0, vocab, decodes + prompt_tokens).astype(np.int32),
        sample=np.ones(seqs, dtype=np.bool_),
        started=[SlotStart(s, SamplingSpec(), np.zeros(1, dtype=np.int32), 1) for s in range(seqs)],
        new_blocks=np.stack(table, axis=1).astype(np.int32),
    )


def step_costs(backend: CudaBackend, vocab: int, most: int) -> None:
    """Prints device milliseconds of steps by decodes and prompt tokens."""
    prompts = [0, 32, 64, 128, 192, 256, 320, 384, 512, 640, 768, 1024, 1536, 1792, 2048, 3072, 4096]
    print("ms a step by decodes (lines) and prompt tokens")
    print(f"{'':>5}", *(f"{p:6}" for p in prompts))
    for decodes in [0, 1, 16, 32, 64, 96, 128, 160, 192, 224, 240, 248, 256]:
        cells = []
        for count in prompts:
            seqs = decodes + -(-count // PROMPT)
            if not seqs or seqs > most or (count > 1024 and decodes not in (0, 64, 192, 224, 240)):
                cells.append(f"{'':>6}")
                continue
            batch = step_of(decodes, count, vocab)
            again = StepBatch(1, batch.slots, batch.query_lens, batch.starts, batch.tokens, batch.sample)
            handles = [backend.launch(batch), backend.launch(again)]
            times = []
            for turn in range(4):
                times.append(backend.collect(handles.pop(0)).device_seconds)
                if turn < 2:
                    handles.append(backend.launch(again))
            cells.append(f"{1e3 * median(times[1:]):6.2f}")
        print(f"{decodes:5}", *cells, flush=True)


def kernel_costs(backend: CudaBackend, decodes: int, prompt_tokens: int, vocab: int) -> None:
    """Prints every kernel of one step with prompts; the head is a graph of its own."""
    batch = step_of(decodes, prompt_tokens, vocab)
    for _ in range(2):  # leaves the step's metadata and slots on the device
        backend.collect(backend.launch(batch))
    size = bucket_of(backend._planner.token_sizes(), batch.num_tokens)
    counts = Counts(size, backend._shape.seqs, 0)
    rows, step = profile_launches(
        backend._planner.body(size), {}, backend._catalog, backend._stream, counts, pdl=True
    )
    total = sum(r.count * r.seconds for r in rows)
    print(
        f"{decodes} decodes and {prompt_tokens} prompt tokens: {1e3 * step:.2f} ms, kernels {1e3 * total:.2f}"
    )
    for r in rows:
        all_of_them = 1e3 * r.count * r.seconds
        print(f"{r.op:>24} {r.kernel:<36} {r.count:4} x {1e6 * r.seconds:7.1f} us, {all_of_them:6.2f} ms")


def main() -> None:
    """Runs the workload and prints the tables."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("config")
    parser.add_argument("--requests", type=int, default=1000)
    parser.add_argument("--max-num-seqs", type=int, default=256)
    parser.add_argument("--seed", type=int, default=2)
    parser.add_argument("--max-num-batched-tokens", type=int, default=None)
    parser.add_argument("--orders", default="list,longest", help="in which requests begin, a run each")
    parser.add_argument("--trace", help="file for every step, one JSON object a line")
    parser.add_argument("--costs", action="store_true")
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
    if args.costs:
        vocab = llm.engine.facts.vocab_size
        step_costs(backend, vocab, args.max_num_seqs)
        kernel_costs(backend, 240, 256, vocab)
        kernel_costs(backend, 240, 1808, vocab)
    llm.generate(*requests(1, 60), use_tqdm=False)
    account = Account(backend)
    for ordered in [order == "list" for order in args.orders.split(",")]:
        print(f"--- begun {'in the order of the list' if ordered else 'longest first'}")
        run(llm, account, args, ordered)


def run(llm: LLM, account: Account, args: argparse.Namespace, ordered: bool) -> None:
    """Runs the workload once and prints its tables."""
    before = llm.engine.counted.host_seconds
    prompts, params = requests(args.seed, args.requests)
    priority = [0] * len(prompts) if ordered else None
    account.done, account._before = [], None
    began = time.perf_counter()
    llm.generate(prompts, params, use_tqdm=False, priority=priority)
    wall = time.perf_counter() - began
    out = sum(p.max_tokens or 0 for p in params)
    rows = account.done
    device, idle = sum(r.device for r in rows), sum(r.idle for r in rows)
    host = llm.engine.counted.host_seconds - before
    print(
        f"{args.requests} requests, {sum(r.tokens for r in rows)} tokens computed, {out} out: {wall:.2f} s, "
        f"{out / wall:.0f} tok/s\n"
        f"device {device:.2f} s, idle between steps {idle:.2f} s, rest {wall - device - idle:.2f} s; host: "
        f"scheduling and updating {host:.2f}, launching {sum(r.launch for r in rows):.2f}, waiting "
        f"{sum(r.wait for r in rows):.2f} s"
    )
    if args.trace:
        with open(f"{args.trace}.{'ordered' if ordered else 'longest'}", "w") as file:
            file.writelines(json.dumps(asdict(row)) + "\n" for row in rows)
    table(rows, wall, lambda r: r.kind)
    table(rows, wall, lambda r: (r.kind, r.padded))


if __name__ == "__main__":
    main()

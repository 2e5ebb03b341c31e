"""The mixed run of `mixed_account.py` without a GPU: the real scheduler, and steps of measured lengths.

    PYTHONPATH=src python scripts/gpu/mixed_simulate.py TRACE [--set max_num_batched_tokens=2048 ...]

TRACE is what `mixed_account.py --trace` or `step_costs.py --json` wrote, of the very model: which sizes of
steps are cheap differs from model to model. The host's time is left out. Requests come all at
once, or from `--clients`, each with the next one when it is answered.
"""

from __future__ import annotations

import argparse
import json
import random
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np

from rvllm.backends.base import LedgerLine, Limits, StepBatch, StepResult
from rvllm.backends.cuda.buckets import bucket_of, decode_buckets, token_buckets
from rvllm.backends.cuda.layout.metadata import leading_decodes
from rvllm.config import EngineConfig
from rvllm.engine.core import EngineCore
from rvllm.engine.ipc.messages import Generate, ModelFacts, Sampling
from rvllm.settings import build
from rvllm.telemetry.stats import StepKernel

KEY_SECONDS = 36e-9  # of a key that a decode attends to, over all layers of an 8B: 131 kB at 3.6 TB/s
CONTEXT = 2100  # of a decode in step_costs.py


@dataclass(frozen=True)
class Costs:
    """Seconds of steps by padded size, of decodes alone and of others, but for what decodes attend to."""

    decodes: tuple[list[int], list[float]]
    others: tuple[list[int], list[float]]
    key_seconds: float

    @staticmethod
    def read(path: Path, key_seconds: float) -> Costs:
        """From a trace or a table of costs; sizes that never came up are interpolated."""
        found: dict[bool, dict[int, list[float]]] = {True: {}, False: {}}
        lines = path.read_text().splitlines()
        if path.suffix == ".json":
            for decodes, tokens, padded, ms in json.loads(lines[0]):
                rest = ms / 1e3 - key_seconds * decodes * CONTEXT
                found[decodes == tokens].setdefault(padded, []).append(rest)
            lines = []
        for line in lines:
            step = json.loads(line)
            rest = step["device"] - key_seconds * step["keys"]
            found[step["kind"] == "decodes"].setdefault(step["padded"], []).append(rest)
        tables = [
            (sorted(sizes), [median(sizes[size]) for size in sorted(sizes)])
            for sizes in (found[True], found[False])
        ]
        return Costs(*tables, key_seconds)

    def seconds(self, alone: bool, padded: int, keys: int) -> float:
        """Of a step; keys: what its decodes attend to, all together."""
        return float(np.interp(padded, *(self.decodes if alone else self.others)) + self.key_seconds * keys)


@dataclass
class Simulated:
    """A backend whose steps do nothing and take what they cost; `now` is its clock."""

    costs: Costs
    limits: Limits
    now: float = 0.0
    kinds: dict[str, list[float]] = field(default_factory=dict)
    name: str = "simulated"

    def launch(self, batch: StepBatch) -> StepBatch:
        """The batch is its own handle."""
        return batch

    def collect(self, batch: StepBatch) -> StepResult:
        """Moves the clock on."""
        decodes, seqs = leading_decodes(batch.query_lens), len(batch.slots)
        keys = int(batch.starts[:decodes].sum()) + decodes
        alone = seqs == decodes == int(batch.sample.sum())
        sizes = (
            decode_buckets(self.limits.max_num_seqs)
            if alone
            else token_buckets(self.limits.max_num_batched_tokens)
        )
        seconds = self.costs.seconds(alone, bucket_of(sizes, batch.num_tokens), keys)
        self.now += seconds
        kind = "decodes" if seqs == decodes else "mixed" if decodes else "prompts"
        self.kinds.setdefault(kind, []).append(seconds)
        tokens = np.where(batch.sample, 1, -1).astype(np.int32)
        return StepResult(batch.step, tokens, device_seconds=seconds)

    def ledger(self) -> list[LedgerLine]:
        """No memory."""
        return []

    def last_kernels(self) -> list[StepKernel]:
        """No kernels."""
        return []

    def stats(self) -> dict[str, float]:
        """No figures."""
        return {}

    def decode_floor(self, seqs: int, context: int) -> None:
        """Unknown."""

    def close(self) -> None:
        """Nothing to give back."""


def sharegpt(seed: int, count: int) -> list[tuple[int, int]]:
    """Lengths (prompt, output) as `mixed_account.py` draws them."""
    rng = random.Random(seed)
    lengths = []
    for _ in range(count):
        n = max(4, min(1024, int(rng.lognormvariate(4.7, 1.2))))
        m = max(4, min(1024, int(rng.lognormvariate(5.1, 0.9))))
        for _ in range(n):
            rng.randrange(1000, 100000)
        lengths.append((n, m))
    return lengths


def main() -> None:
    """Runs the workload and prints what it took."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("trace", type=Path)
    parser.add_argument("--requests", type=int, default=1000)
    parser.add_argument("--max-num-seqs", type=int, default=256)
    parser.add_argument("--seed", type=int, default=2)
    parser.add_argument("--lengths", help="PROMPT:OUTPUT instead of ShareGPT's")
    parser.add_argument("--clients", type=int)
    parser.add_argument("--max-mixed-tokens", type=int, default=2048)
    parser.add_argument("--longest-first", action="store_true")
    parser.add_argument(
        "--key-seconds", type=float, default=KEY_SECONDS, help="of a key that a decode attends to"
    )
    parser.add_argument("--set", action="append", default=[], metavar="SETTING=VALUE")
    args = parser.parse_args()
    settings: dict[str, Any] = dict(pair.split("=") for pair in args.set)
    config = build(EngineConfig, {"model": "none", "max_num_seqs": args.max_num_seqs, **settings})
    limits = Limits(
        max_num_seqs=args.max_num_seqs, max_num_batched_tokens=config.max_num_batched_tokens or 8192,
        max_model_len=4096, block_size=16, num_blocks=52000, pipeline_depth=2,
        max_mixed_tokens=args.max_mixed_tokens,
    )  # fmt: skip
    backend = Simulated(Costs.read(args.trace, args.key_seconds), limits)
    facts = ModelFacts(architecture="none", model_path="", vocab_size=128256, max_model_len=4096)
    core = EngineCore(backend, facts, config)
    lengths = sharegpt(args.seed, args.requests)
    if args.lengths:
        lengths = [(int(args.lengths.split(":")[0]), int(args.lengths.split(":")[1]))] * args.requests
    if args.longest_first:
        lengths.sort(key=lambda pair: -pair[1])
    rng = random.Random(0)
    todo = [
        Generate(str(i), [rng.randrange(1000, 100000) for _ in range(n)], Sampling(max_tokens=m))
        for i, (n, m) in reversed(list(enumerate(lengths)))
    ]
    came: dict[str, float] = {}
    firsts, gaps, last = list[float](), list[float](), dict[str, float]()
    alive = 0
    while todo or alive:
        while todo and (args.clients is None or alive < args.clients):
            request = todo.pop()
            came[request.request_id] = backend.now
            core.add_request(request)
            alive += 1
        for output in core.step():
            name = output.request_id
            if name not in last:
                firsts.append(backend.now - came[name])
            else:
                gaps.append(backend.now - last[name])
            last[name] = backend.now
            alive -= output.finish_reason is not None
    out = sum(m for _, m in lengths)
    print(
        f"{out / backend.now:7.0f} tok/s, {backend.now:6.2f} s; "
        + "; ".join(f"{k} {len(v)} steps {sum(v):.2f} s" for k, v in sorted(backend.kinds.items()))
        + f"; TTFT p50 {1e3 * np.median(firsts):.0f} p99 {1e3 * np.percentile(firsts, 99):.0f} ms; ITL p50 "
        f"{1e3 * np.median(gaps):.1f} p99 {1e3 * np.percentile(gaps, 99):.0f} max {1e3 * max(gaps):.0f} ms"
    )


if __name__ == "__main__":
    main()

"""Checks and times attn_prefill_sm90 beside attn_prefill, on the Hopper GPU of this machine.

    PYTHONPATH=src python scripts/gpu/prefill_bench.py [--no-checks] [--cases 7000,8x1024,...]

Checks: outputs of ragged chunks, short and long, with and without windows, are compared bit for bit with
attn_prefill's and, some rows, with the formula in float32. Times: milliseconds a layer of Qwen2.5-7B's
attention (28 heads of 128 over 4 kv heads, bf16), medians over replays of a CUDA graph, and TFLOP/s of the
products that the causal mask leaves. A case is `tokens`, `sequences x tokens`, or `tokens@context`: the last
chunk of a longer prompt. Exits 1 where bits differ.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "tests"))
from rvllm.backends.cuda.ops.attention.plan import plan_prefill, prefill_tiles
from rvllm.kernels.attention.specs import (
    PREFILL_SM90_ROWS,
    PREFILL_SM90_THREADS,
    prefill_sm90_smem,
)
from rvllm.program.dtypes import DType
from support.kernels.attention_checks import Cache, Shape, common, queries, scale_of
from support.kernels.harness import BF16, F16, Array, Gpu

QWEN = Shape(128, 4, 7)
CASES = ("8x1024", "1024", "2x4096", "7000", "16000", "8192@16000", "30000", "8192@30000")


class Step:
    """A step of prompts: kv_lens[s] tokens of slot s, the last lens[s] of them computed now."""

    def __init__(self, gpu: Gpu, cache: Cache, lens: np.ndarray, kv_lens: np.ndarray, q: np.ndarray) -> None:
        self.gpu, self.cache, shape = gpu, cache, cache.shape
        self.tokens = int(lens.sum())
        width = shape.heads * shape.dim
        rows = np.full((self.tokens, width + 2 * shape.kv_heads * shape.dim), np.nan, np.float32)
        rows[:, :width] = q.reshape(-1, width)
        self.q = gpu.array(rows.astype(cache.dtype))
        self.slots, self.kv_lens = gpu.array(np.arange(len(lens)), np.int32), gpu.array(kv_lens, np.int32)
        self.offsets = gpu.array(np.concatenate([[0], np.cumsum(lens)]), np.int32)
        self.plan = plan_prefill(
            DType.parse(cache.dtype.name), shape.dim, smem_per_block=gpu.facts.smem_per_block
        )
        self.lists = {
            rows: gpu.array(prefill_tiles(lens, kv_lens, 0, shape.group, rows))
            for rows in {self.plan.rows, PREFILL_SM90_ROWS}
        }
        self.count = gpu.array([len(self.lists[PREFILL_SM90_ROWS].get())], np.int32)
        self.number = int(self.lists[PREFILL_SM90_ROWS].shape[0])
        self.numbers = common(shape, cache, rows.shape[1], width)
        self.maps = cache.maps()

    def empty(self) -> Array:
        """A poisoned output."""
        shape = self.cache.shape
        return self.gpu.empty((self.tokens, shape.heads * shape.dim), self.cache.dtype)

    def old(self, out: Array) -> None:
        """Queues attn_prefill."""
        cache, plan, tiles = self.cache, self.plan, self.lists[self.plan.rows]
        args = [out, self.q, cache.k_cache, cache.v_cache, cache.tables, self.slots, self.kv_lens,
                self.offsets, tiles, *self.numbers]  # fmt: skip
        self.gpu.launch(plan.kernel, (tiles.shape[0], cache.shape.kv_heads), plan.block, args, plan.smem)

    def new(self, out: Array) -> None:
        """Queues attn_prefill_sm90."""
        cache, tiles = self.cache, self.lists[PREFILL_SM90_ROWS]
        *pitches, _, window = self.numbers
        args = [out, self.q, *self.maps, cache.tables, self.slots, self.kv_lens, self.offsets, tiles,
                self.count, *pitches, window]  # fmt: skip
        tag = "bf16" if cache.dtype == BF16 else "f16"
        grid = min(self.gpu.facts.sm_count, self.number * cache.shape.kv_heads)
        name, smem = f"sm90_{tag}_attn_prefill_d{cache.shape.dim}", prefill_sm90_smem(cache.shape.dim)
        self.gpu.launch(name, grid, PREFILL_SM90_THREADS, args, smem)


def difference(step: Step) -> str:
    """Runs both kernels: '' where all bits agree, else how they differ."""
    first, second = step.empty(), step.empty()
    step.old(first)
    step.new(second)
    a, b = first.get(), second.get()
    wrong = a.view(np.uint16) != b.view(np.uint16)
    if not wrong.any():
        return ""
    a, b = a.astype(np.float64), b.astype(np.float64)
    rows = np.flatnonzero(wrong.any(axis=1))
    relative = np.linalg.norm(np.nan_to_num(a - b)) / np.linalg.norm(a)
    return (
        f"{wrong.sum()} of {wrong.size} differ, NaN {int(np.isnan(b).sum())}, relative {relative:.1e}, "
        f"rows {len(rows)} from {rows[0]}"
    )


def reference_error(step: Step, q: np.ndarray, rng: np.random.Generator) -> float:
    """The largest |out - float32 reference| over |reference| of a few rows of the new kernel."""
    out, cache, shape = step.empty(), step.cache, step.cache.shape
    step.new(out)
    got = out.get().astype(np.float32).reshape(step.tokens, shape.heads, shape.dim)
    kv_lens, offsets, worst = step.kv_lens.get(), step.offsets.get(), 0.0
    for s in range(len(kv_lens)):
        tokens = offsets[s + 1] - offsets[s]
        for r in {0, int(tokens) - 1, int(rng.integers(tokens)), int(rng.integers(tokens))}:
            end = kv_lens[s] - tokens + r + 1
            begin = max(0, end - shape.window) if shape.window else 0
            for h in range(shape.heads):
                k, v = (a[s][begin:end, h // shape.group] for a in (cache.k, cache.v))
                scores = k @ q[offsets[s] + r, h] * scale_of(shape)
                weights = np.exp(scores - scores.max())
                wanted = weights @ v / weights.sum()
                error = np.linalg.norm(got[offsets[s] + r, h] - wanted) / np.linalg.norm(wanted)
                worst = max(worst, float(error) if np.isfinite(error) else np.inf)
    return worst


def check(gpu: Gpu, rng: np.random.Generator) -> int:
    """Prints a line for each check; how many failed."""
    failed = 0
    shapes = [QWEN, Shape(128, 2, 1), Shape(128, 1, 32, window=100), Shape(128, 2, 5, window=300),
              Shape(64, 3, 3), Shape(64, 2, 16, window=64), Shape(96, 1, 20)]  # fmt: skip
    for dtype in (BF16, F16):
        for shape in shapes:
            kv_lens = np.array([1, 40, 300, 33, 200, 64, 531, 1300, 2100], np.int32)
            lens = np.array([1, 40, 299, 1, 130, 64, 37, 1300, 700], np.int32)
            cache = Cache(gpu, rng, dtype, shape, list(kv_lens))
            q = queries(rng, dtype, int(lens.sum()), shape)
            step = Step(gpu, cache, lens, kv_lens, q)
            text, worst = difference(step), reference_error(step, q, rng)
            failed += bool(text) or not worst < 1e-2
            print(f"{dtype.name:>9} {shape}: {text or 'bits equal'}; to float32 {worst:.1e}", flush=True)
            gpu.clear()
    return failed


def time_case(gpu: Gpu, rng: np.random.Generator, case: str, bits: bool) -> int:
    """Prints the times of a case; 1 where bits differ."""
    head, _, context = case.partition("@")
    count, _, tokens = head.rpartition("x")
    seqs, length = int(count or 1), int(tokens)
    kv = int(context or length)
    cache = Cache(gpu, rng, BF16, QWEN, [kv] * seqs)
    lens, kv_lens = np.full(seqs, length, np.int32), np.full(seqs, kv, np.int32)
    some = queries(rng, BF16, min(2048, seqs * length), QWEN)
    step = Step(gpu, cache, lens, kv_lens, np.resize(some, (seqs * length, *some.shape[1:])))
    pairs = seqs * length * (kv - (length - 1) / 2)
    flops = 4.0 * QWEN.heads * QWEN.dim * pairs
    out = step.empty()
    repeats = int(np.clip(2e13 / flops, 2, 20))
    times = [gpu.time(lambda i, run=run: run(out), repeats, 5) for run in (step.new, step.old)]
    shown = "  ".join(f"{1e3 * t:8.3f} ms {flops / t / 1e12:6.1f} TFLOP/s" for t in times)
    text = difference(step) if bits else "not compared"
    print(f"{case:>12}  {shown}  {times[1] / times[0]:5.2f}x  {text or 'bits equal'}", flush=True)
    gpu.clear()
    return int(bool(text) and bits)


def time_fp8(gpu: Gpu, rng: np.random.Generator, case: str) -> None:
    """Prints what a case takes over 16-bit keys and values, and over those in E4M3 by either kernel."""
    head, _, context = case.partition("@")
    count, _, tokens = head.rpartition("x")
    seqs, length = int(count or 1), int(tokens)
    cache = Cache(gpu, rng, BF16, QWEN, [int(context or length)] * seqs, True)
    lens, kv_lens = np.full(seqs, length, np.int32), np.full(seqs, int(context or length), np.int32)
    some = queries(rng, BF16, min(2048, seqs * length), QWEN)
    q = np.resize(some, (seqs * length, *some.shape[1:]))
    step = Step(gpu, cache.in_sixteen_bits(), lens, kv_lens, q)
    plan = plan_prefill(DType.BF16, QWEN.dim, smem_per_block=gpu.facts.smem_per_block, fp8=True)
    tiles = gpu.array(prefill_tiles(lens, kv_lens, 0, QWEN.group, plan.rows))
    out, (*pitches, _, window) = step.empty(), step.numbers
    places = [out, step.q, cache.k_cache, cache.v_cache, cache.tables, step.slots, step.kv_lens, step.offsets]
    persistent = [*places, step.lists[PREFILL_SM90_ROWS], step.count, *pitches, window]
    grid = min(gpu.facts.sm_count, step.number * QWEN.kv_heads)
    name, smem = f"sm90_bf16_attn_prefill_fp8_d{QWEN.dim}", prefill_sm90_smem(QWEN.dim, True)

    def new(_: int) -> None:
        gpu.launch(name, grid, PREFILL_SM90_THREADS, persistent, smem)

    def old(_: int) -> None:
        args = [*places, tiles, *step.numbers]
        gpu.launch(plan.kernel, (tiles.shape[0], QWEN.kv_heads), plan.block, args, plan.smem)

    times = [gpu.time(run, 4, 5) for run in (lambda _: step.new(out), new, old)]
    shown = ", ".join(f"{1e6 * t:.1f}" for t in times)
    print(f"{case:>12}  16 bits, E4M3 by wgmma, by mma.sync: {shown} us", flush=True)
    gpu.clear()


def main() -> int:
    """Prints checks and times."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--no-checks", action="store_true")
    parser.add_argument("--cases", default=",".join(CASES))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--fp8", action="store_true", help="times over a cache in E4M3, and nothing else")
    options = parser.parse_args()
    gpu, rng = Gpu(), np.random.default_rng(options.seed)
    if options.fp8:
        for case in filter(None, options.cases.split(",")):
            time_fp8(gpu, rng, case)
        return 0
    failed = 0 if options.no_checks else check(gpu, rng)
    print(f"{'case':>12}  {'attn_prefill_sm90':>27}  {'attn_prefill':>27}")
    for case in filter(None, options.cases.split(",")):
        failed += time_case(gpu, rng, case, not options.no_checks)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())

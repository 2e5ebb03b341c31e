"""Builds, checks and times every kernel that is not a matrix product, on the GPU of this machine.

    PYTHONPATH=src python scripts/gpu/kernels_check.py [--seed N] [--no-times]

Checks each against its NumPy reference on fresh random inputs and poisoned outputs, and attention bit for
bit against itself in other batches and chunks. Times are medians over replays of a CUDA graph that chains
each kernel 20 times with programmatic launches. Prints a table; exits 1 when a check fails.
"""

from __future__ import annotations

import argparse
import ctypes
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "tests"))
from rvllm.backends.base import SamplingSpec, SlotStart
from rvllm.backends.cuda.ops.attention.plan import plan_decode, plan_prefill, prefill_tiles, table_stride
from rvllm.kernels.attention import specs as attention
from rvllm.kernels.loading import specs as loading
from rvllm.kernels.rowwise import specs as rowwise
from rvllm.kernels.rowwise.specs import norm_kernel
from rvllm.kernels.sampling import specs as sampling
from rvllm.program.dtypes import DType
from support.kernels import attention_checks, harness, op_checks, sampling_checks
from support.kernels.harness import BF16, F16, Gpu

HEADS, KV_HEADS, DIM, WIDTH, VOCAB = 28, 4, 128, 3584, 152064  # Qwen2.5-7B


def run_checks(gpu: Gpu, seed: int) -> list[tuple[str, str, float]]:
    """(check, result or failure, seconds) of all checks."""
    results = []

    def one(name: str, check: Callable[..., object], *args: object) -> None:
        rng = np.random.default_rng([seed, len(results)])
        began = time.perf_counter()
        try:
            outcome = check(gpu, rng, *args)
            text = f"{outcome:.2e}" if isinstance(outcome, float) else str(outcome)
        except Exception as failure:
            text = f"FAILED {type(failure).__name__}: {failure}"[:400]
            if not isinstance(failure, AssertionError):
                traceback.print_exc()
        gpu.clear()
        results.append((name, text, time.perf_counter() - began))

    for dtype in (BF16, F16):
        for check in op_checks.ROW_CHECKS:
            one(f"{check.__name__[6:]} {dtype}", check, dtype)
    one("dequant", op_checks.check_dequant)
    one("fill", op_checks.check_fill)
    for vocab in (1000, 49152, 151936):
        one(f"sampling {vocab}", sampling_checks.check_sampling, vocab)
    for vocab in (503, 151936):
        one(f"logprobs {vocab}", sampling_checks.check_logprobs, vocab)
    for dtype in (BF16, F16):
        for shape in attention_checks.SHAPES:
            for check in ("decode", "prefill", "invariance"):
                what = f"{check} {dtype} d{shape.dim} {shape.heads}/{shape.kv_heads} w{shape.window}"
                one(what, getattr(attention_checks, f"check_{check}"), dtype, shape)
        if gpu.facts.capability >= 90:
            for shape, copies in (
                (attention_checks.Shape(128, 4, 7), 1),
                (attention_checks.Shape(128, 8, 4), 20),
            ):
                one(f"turning {dtype} x {copies}", attention_checks.check_turning, dtype, shape, copies)
    return results


class Bench:
    """Timings on Qwen2.5-7B's shapes, bf16."""

    def __init__(self, gpu: Gpu) -> None:
        self.gpu = gpu
        self.lines: list[str] = []

    def add(self, name: str, seconds: float, nbytes: float = 0, flops: float = 0) -> None:
        """A line of the table."""
        line = f"{name:40} {seconds * 1e6:10.2f} us"
        if nbytes:
            line += f" {nbytes / seconds / 1e9:8.0f} GB/s"
        if flops:
            line += f" {flops / seconds / 1e12:8.1f} TFLOP/s"
        self.lines.append(line)

    def cache(self, tokens: int) -> tuple[harness.Array, harness.Array]:
        """Random keys and values for `tokens` tokens."""
        shape = (-(-tokens // 16), KV_HEADS, 16, DIM)
        out = []
        for seed in (1, 2):
            array = self.gpu.empty(shape, BF16)
            n = int(np.prod(shape))
            args = [array, ctypes.c_uint64(n), ctypes.c_uint64(0), ctypes.c_uint(seed), 0.0, 1.0]
            self.gpu.launch("sm80_bf16_fill_random", 1024, 256, args, pdl=False)
            out.append(array)
        return out[0], out[1]

    def decode(self, seqs: int, context: int) -> None:
        """attn_decode of equal contexts."""
        gpu = self.gpu
        k, v = self.cache(seqs * (context + 16))
        stride = table_stride(max(context, 4096))
        tables = np.zeros((seqs, stride), np.int32)
        per = -(-context // 16)
        tables[:, :per] = np.random.default_rng(0).permutation(seqs * per).reshape(seqs, per)
        plan = plan_decode(
            DType.BF16, DIM, HEADS, KV_HEADS, max_seqs=seqs, max_model_len=max(context, 4096),
            num_blocks=10**6, sm_count=gpu.facts.sm_count, smem_per_block=gpu.facts.smem_per_block,
        )  # fmt: skip
        pitch = (HEADS + 2 * KV_HEADS) * DIM
        q = gpu.array(np.random.default_rng(0).standard_normal((seqs, pitch), np.float32).astype(BF16))
        out, partial = gpu.empty((seqs, HEADS * DIM), BF16), gpu.empty((plan.partial_bytes,), np.uint8)
        args = [out, q, k, v, gpu.array(tables), gpu.array(np.arange(seqs, dtype=np.int32)),
                gpu.array(np.full(seqs, context, np.int32)), gpu.array([seqs], np.int32), partial,
                gpu.zeros((plan.arrivals_bytes // 4,), np.int32), pitch, HEADS * DIM, stride, KV_HEADS,
                HEADS // KV_HEADS, 0.088, 0.0, 0, seqs]  # fmt: skip
        seconds = gpu.time(lambda _: gpu.launch(plan.kernel, plan.grid, plan.block, args, plan.smem))
        self.add(f"decode N={seqs} context {context}", seconds, seqs * context * KV_HEADS * DIM * 4)
        gpu.clear()

    def prefill(self, seqs: int, length: int, smem: int = 1 << 20) -> None:
        """attn_prefill of whole prompts."""
        gpu = self.gpu
        k, v = self.cache(seqs * (length + 16))
        stride, per = table_stride(length), -(-length // 16)
        tables = np.zeros((seqs, stride), np.int32)
        tables[:, :per] = np.arange(seqs * per).reshape(seqs, per)
        plan = plan_prefill(DType.BF16, DIM, smem_per_block=min(smem, gpu.facts.smem_per_block))
        pitch = (HEADS + 2 * KV_HEADS) * DIM
        q = gpu.empty((seqs * length, pitch), BF16)
        fill = [q, ctypes.c_uint64(seqs * length * pitch), ctypes.c_uint64(0), ctypes.c_uint(3), 0.0, 1.0]
        gpu.launch("sm80_bf16_fill_random", 1024, 256, fill, pdl=False)
        lens = np.full(seqs, length, np.int32)
        tiles = prefill_tiles(lens, lens, 0, HEADS // KV_HEADS, plan.rows)
        args = [gpu.empty((seqs * length, HEADS * DIM), BF16), q, k, v, gpu.array(tables),
                gpu.array(np.arange(seqs, dtype=np.int32)), gpu.array(lens),
                gpu.array(np.arange(seqs + 1, dtype=np.int32) * np.int32(length)), gpu.array(tiles), pitch,
                HEADS * DIM, stride, KV_HEADS, HEADS // KV_HEADS, 0.088, 0.0, 0]  # fmt: skip
        grid = (len(tiles), KV_HEADS)
        seconds = gpu.time(lambda _: gpu.launch(plan.kernel, grid, plan.block, args, plan.smem), 5)
        flops = seqs * 4.0 * HEADS * DIM * length * (length + 1) / 2
        self.add(f"prefill {seqs} x {length}, {plan.rows} rows", seconds, flops=flops)
        gpu.clear()

    def rows(self, rows: int) -> None:
        """Norm with residual, rope with the cache write, gated activation, embedding."""
        gpu, rng = self.gpu, np.random.default_rng(0)
        random = lambda *s: gpu.array(rng.standard_normal(s, np.float32).astype(BF16))  # noqa: E731
        repeats = 20 if rows < 1000 else 5
        x, y, out = random(rows, WIDTH), random(rows, WIDTH), gpu.empty((rows, WIDTH), BF16)
        weight = gpu.array(np.ones(WIDTH, np.float32))
        name, threads = norm_kernel("bfloat16", "rms", WIDTH, True)
        args = [out, x, y, weight, None, WIDTH, 1e-6, 1e-3]
        seconds = gpu.time(lambda _: gpu.launch(name, rows, threads, args), repeats)
        self.add(f"norm_rms_add rows {rows}", seconds, rows * WIDTH * 8)
        heads = HEADS + 2 * KV_HEADS
        k, v = self.cache(rows + 16)
        tables = gpu.array(np.arange(table_stride(max(rows, 64)), dtype=np.int32)[None])
        table = gpu.array(np.ones((max(rows, 64), DIM // 2), np.float32))
        count = gpu.array([rows], np.int32)
        zeros = gpu.zeros((rows,), np.int32)
        positions = gpu.array(np.arange(rows, dtype=np.int32))
        turn = [random(rows, heads * DIM), k, v, table, table, tables, positions, zeros, count, heads * DIM,
                tables.shape[1], HEADS, KV_HEADS, DIM, DIM]  # fmt: skip
        seconds = gpu.time(lambda _: gpu.launch("sm80_bf16_rope_kv", (heads // 4, rows), 128, turn), repeats)
        self.add(f"rope_kv rows {rows}", seconds, rows * heads * DIM * 4)
        act = [gpu.empty((rows, 18944), BF16), random(rows, 2 * 18944), 18944]
        grid = (-(-18944 // 8 // 256), rows)
        seconds = gpu.time(lambda _: gpu.launch("sm80_bf16_gated_silu", grid, 256, act), repeats)
        self.add(f"gated_silu rows {rows}", seconds, rows * 18944 * 6)
        gpu.clear()

    def sampling(self, rows: int, spec: SamplingSpec, label: str) -> None:
        """Scan and pick of one step."""
        gpu, rng = self.gpu, np.random.default_rng(0)
        sampler = sampling_checks.Sampler(gpu, rows, VOCAB)
        sampler.start([SlotStart(s, spec, np.arange(30, dtype=np.int32), 20) for s in range(rows)])
        one = rng.standard_normal((1, VOCAB), np.float32) * 2
        a = sampler.arrays(np.repeat(one, rows, axis=0), np.arange(rows, dtype=np.int32), 0, {})
        a[5] = None  # no masks
        seconds = gpu.time(lambda _: sampler.step(a))
        self.add(f"sample N={rows} {label}", seconds, rows * VOCAB * 4)
        gpu.clear()

    def loading(self) -> None:
        """Random fill and dequantisation, by bytes written."""
        gpu, n = self.gpu, 1 << 29
        out = gpu.empty((n,), BF16)
        args = [out, ctypes.c_uint64(n), ctypes.c_uint64(0), ctypes.c_uint(1), 0.0, 0.02]
        launch = lambda _: gpu.launch("sm80_bf16_fill_random", gpu.facts.sm_count * 8, 256, args, pdl=False)  # noqa: E731
        self.add("fill_random bf16", gpu.time(launch, 5), 2 * n)
        for kind, per in (("q4_1", 20 / 32), ("q4_k", 144 / 256), ("q6_k", 210 / 256), ("q8_0", 34 / 32)):
            size = 1 << 27
            blocks = gpu.zeros((int(size * per),), np.uint8)
            cells = [out, blocks, ctypes.c_uint64(size)]
            name, grid = f"sm80_bf16_dequant_{kind}", size // 1024
            seconds = gpu.time(lambda _, n=name, g=grid, c=cells: gpu.launch(n, g, 128, c, pdl=False), 5)
            self.add(f"dequant {kind}", seconds, 2 * size)
        gpu.clear()

    def run(self) -> None:
        """All of it."""
        for context in (12, 64, 150, 1024, 4096, 32768):
            self.decode(1, context)
        for seqs, context in ((32, 150), (128, 150), (128, 1024), (256, 150), (32, 8192)):
            self.decode(seqs, context)
        for seqs, length in ((1, 12), (1, 1024), (8, 1024), (1, 8192), (4, 2048)):
            self.prefill(seqs, length)
            self.prefill(seqs, length, 101376)
        for rows in (1, 128, 8192):
            self.rows(rows)
        some = SamplingSpec(temperature=0.8, top_k=50, top_p=0.9, seed=7)
        for rows in (1, 128):
            self.sampling(rows, SamplingSpec(), "greedy")
            self.sampling(rows, SamplingSpec(temperature=0.8, seed=7), "temperature")
            self.sampling(rows, some, "top_k 50, top_p 0.9")
        self.loading()


def main() -> int:
    """Runs checks and timings; 1 when a check fails."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seed", type=int, default=int(time.time()))
    parser.add_argument("--no-times", action="store_true", help="checks only")
    args = parser.parse_args()
    gpu = Gpu()
    began = time.perf_counter()
    specs = [spec for family in (attention, rowwise, sampling, loading) for spec in family.SPECS]
    gpu.build([spec.name for spec in specs])
    built = time.perf_counter() - began
    print(f"{gpu.facts.name}: built {len(specs)} kernels in {built:.1f} s; seed {args.seed}")
    results = run_checks(gpu, args.seed)
    failed = [r for r in results if r[1].startswith("FAILED")]
    for name, text, seconds in results:
        print(f"{name:44} {text}  ({seconds:.2f} s)")
    print(f"{len(results) - len(failed)} of {len(results)} checks passed", flush=True)
    if not args.no_times:
        bench = Bench(gpu)
        try:
            bench.run()
        finally:
            print("\n".join(bench.lines))
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())

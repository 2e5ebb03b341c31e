"""Times decode attention over batch sizes and contexts, and checks that both kernels give the same bits.

    PYTHONPATH=src python scripts/gpu/decode_bench.py [--budget SECONDS]

Microseconds of attention in a chain of (rope_kv, attention) launches, less the chain of rope_kv alone; each
layer of the chain has its own cache, so that keys and values come from memory. The floor is the bytes of keys
and values over `--rate`.
"""

from __future__ import annotations

import argparse
import ctypes
import sys
import time
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "tests"))
from rvllm.backends.cuda.device.driver import TensorMap
from rvllm.backends.cuda.ops.attention.plan import DecodePlan, plan_decode, plan_decode_ring, table_stride
from rvllm.program.dtypes import DType
from support.kernels import harness
from support.kernels.harness import BF16, Gpu

POOL = 9 << 30  # bytes of keys, and of values
DIM = 128
MODELS = ((28, 4), (32, 8))  # query and key heads of Qwen2.5-7B and Llama-3.1-8B
FIRST = [
    (128, 1040),
    (128, 76),
    (32, 4160),
    (32, 1040),
    (512, 76),
    (1, 1040),
    (8, 1040),
    (256, 1040),
    (8, 16000),
]
SIZES = [(n, c) for n in (1, 8, 32, 64, 128, 256, 512) for c in (16, 140, 500, 1040, 4160, 16000)]


class Case:
    """Sequences of given lengths, in as many layers as keep the L2 cache out of it."""

    def __init__(self, gpu: Gpu, pools: list[int], lens: np.ndarray, heads: int, kv_heads: int) -> None:
        self.gpu, self.heads, self.kv_heads = gpu, heads, kv_heads
        self.seqs, rng = len(lens), np.random.default_rng(0)
        per = -(-lens // 16)
        blocks = int(per.sum())
        layer = blocks * kv_heads * 16 * DIM * 2
        self.layers = int(min(POOL // layer, max(2, -(-400_000_000 // (2 * layer))), 28))
        self.caches = [[p + i * layer for p in pools] for i in range(self.layers)]
        rows = blocks * kv_heads * 16
        self.maps = [
            [TensorMap.matrix(p, rows, DIM, 2 * DIM, 16, 64, True) for p in two] for two in self.caches
        ]
        self.longest = max(int(lens.max()), 4096)
        self.stride = table_stride(self.longest)
        tables = np.zeros((self.seqs, self.stride), np.int32)
        order, ends = rng.permutation(blocks).astype(np.int32), np.cumsum(per)
        for s in range(self.seqs):
            tables[s, : per[s]] = order[ends[s] - per[s] : ends[s]]
        self.tables = gpu.array(tables)
        self.pitch = (heads + 2 * kv_heads) * DIM
        self.q = gpu.array(rng.standard_normal((self.seqs, self.pitch), np.float32).astype(BF16))
        self.out = gpu.empty((self.seqs, heads * DIM), BF16)
        self.slots = gpu.array(np.arange(self.seqs, dtype=np.int32))
        self.lens = gpu.array(lens.astype(np.int32))
        self.positions = gpu.array((lens - 1).astype(np.int32))
        self.count = gpu.array([self.seqs], np.int32)
        angles = (self.longest + 1, DIM // 2)  # rope_kv writes where it reads: it may change nothing
        self.cos, self.sin = gpu.array(np.ones(angles, np.float32)), gpu.zeros(angles, np.float32)
        self.nbytes = 4 * int(lens.sum()) * kv_heads * DIM
        shape, facts = (DType.BF16, DIM, heads, kv_heads), gpu.facts
        sizes = {"max_seqs": self.seqs, "max_model_len": self.longest, "num_blocks": blocks,
                 "sm_count": facts.sm_count, "smem_per_block": facts.smem_per_block}  # fmt: skip
        both = [plan_decode(*shape, **sizes), plan_decode_ring(*shape, **sizes)]
        self.plans = [plan for plan in both if plan is not None]
        self.partial = gpu.empty((max(p.partial_bytes for p in self.plans) // 4,), np.float32)
        self.arrivals = gpu.zeros((max(p.arrivals_bytes for p in self.plans) // 4,), np.int32)

    def attend(self, plan: DecodePlan, i: int) -> None:
        """Queues attention of a layer."""
        k, v = self.caches[i % self.layers]
        args = [self.out, self.q, ctypes.c_void_p(k), ctypes.c_void_p(v), self.tables, self.slots, self.lens,
                self.count, self.partial, self.arrivals, self.pitch, self.heads * DIM, self.stride,
                self.kv_heads, self.heads // self.kv_heads, 0.088, 0.0, 0, self.seqs]  # fmt: skip
        args += self.maps[i % self.layers] if plan.ring else []
        self.gpu.launch(plan.kernel, plan.grid, plan.block, args, plan.smem)

    def rope(self, i: int) -> None:
        """Queues what comes before attention."""
        k, v = self.caches[i % self.layers]
        all_heads = self.heads + 2 * self.kv_heads
        args = [
            *(self.q, ctypes.c_void_p(k), ctypes.c_void_p(v), self.cos, self.sin, self.tables),
            *(self.positions, self.slots, self.count, self.pitch, self.stride, self.heads, self.kv_heads),
            *(DIM, DIM),
        ]
        self.gpu.launch("sm80_bf16_rope_kv", (-(-all_heads // 4), self.seqs), 128, args)

    def result(self, plan: DecodePlan) -> np.ndarray:
        """The output of the first layer, as bits."""
        harness.call("cuMemsetD8", self.out.address, 0xFF, self.out.nbytes)
        self.attend(plan, 0)
        out = self.out.get().view(np.uint16)
        assert not self.arrivals.get().any(), "arrival counters are not back at zero"
        return out

    def time(self, plan: DecodePlan | None) -> float:
        """Microseconds of rope_kv and attention."""

        def chain(i: int) -> None:
            self.rope(i)
            if plan is not None:
                self.attend(plan, i)

        return 1e6 * self.gpu.time(chain, max(2, min(28, self.layers * 2)), 5)


def mixes() -> dict[str, np.ndarray]:
    """Sequences of different lengths."""
    share = np.clip(np.random.default_rng(1).lognormal(5.6, 0.9, 256), 16, 4000).astype(np.int64)
    return {
        "sharegpt 256": share,
        "sharegpt 128": share[:128],
        "120x140+8x16000": np.array([140] * 120 + [16000] * 8),
        "ramp 12-140 x128": np.linspace(12, 140, 128).astype(np.int64),
        "ramp 12-140 x512": np.linspace(12, 140, 512).astype(np.int64),
    }


def run(case: Case, label: str, rate: float) -> None:
    """Prints one line."""
    rope = case.time(None)
    bits = [case.result(plan) for plan in case.plans]
    times = [case.time(plan) - rope for plan in case.plans]
    wrong = int((bits[0] != bits[-1]).sum())
    shown = " ".join(f"{t:8.2f}" for t in times) + ("" if times[1:] else f"{'':9}")
    note = f"  {wrong} of {bits[0].size} DIFFER" if wrong else ""
    print(
        f"{label:18} {case.kv_heads:2} {1e6 * case.nbytes / rate:7.1f} {rope:6.2f} {shown} "
        f"{case.nbytes / times[-1] / 1e6:6.2f}{note}",
        flush=True,
    )


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rate", type=float, default=4.25e12)
    parser.add_argument("--budget", type=float, default=1e9, help="seconds after which nothing new is begun")
    args = parser.parse_args()
    started, gpu = time.perf_counter(), Gpu()
    names = [
        "sm90_bf16_attn_decode_d128",
        "sm80_bf16_attn_decode_d128",
        "sm80_bf16_rope_kv",
        "sm80_bf16_fill_random",
    ]
    gpu.build(names)
    pools = [int(harness.call("cuMemAlloc", POOL)) for _ in range(2)]
    for seed, pool in enumerate(pools, start=1):
        many = ctypes.c_uint64(POOL // 2)
        fill = [ctypes.c_void_p(pool), many, ctypes.c_uint64(0), ctypes.c_uint(seed), 0.0, 1.0]
        gpu.launch("sm80_bf16_fill_random", 4096, 256, fill, pdl=False)
    gpu.stream.sync()
    print(f"{gpu.facts.name}: ready after {time.perf_counter() - started:.1f} s", flush=True)
    print(
        f"{'':18} {'kv':>2} {'floor':>7} {'rope':>6} {'decode':>8} {'ring':>8}   TB/s",
        flush=True,
    )
    cases = (
        {f"{n} x {c}": np.full(n, c) for n, c in FIRST}
        | mixes()
        | {f"{n} x {c}": np.full(n, c) for n, c in SIZES}
    )
    for heads, kv_heads in MODELS:
        for label, lens in cases.items():
            if time.perf_counter() - started > args.budget:
                return print("out of time")
            if int((-(-lens // 16)).sum()) * kv_heads * 16 * DIM * 2 <= POOL:
                run(Case(gpu, pools, lens, heads, kv_heads), label, args.rate)
                gpu.clear()
    return None


if __name__ == "__main__":
    main()

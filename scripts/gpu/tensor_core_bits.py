"""Compares wgmma's sums with those of mma.sync bit for bit, on the Hopper GPU of this machine.

    PYTHONPATH=src python scripts/gpu/tensor_core_bits.py [--inputs N] [--seed N]

Attention promises a token's bits whichever kernel computes it, so a kernel of another tensor-core
instruction has to round as the present ones do. Each case sums products of [64, 128] and [64 or 128, 128]
matrices over 1, 4 or 8 steps of 16 onto a start, in all kinds of wgmma: both operands in shared memory
(`ss`), A in registers (`rs`), and that with B stored along N (`mn`). Printed: how many elements differ in
their bits, and the largest relative difference. Exits 1 where any differ.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import ml_dtypes
import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "tests"))
from rvllm.backends.cuda.device.driver import Launch, Module
from rvllm.kernels import build
from support.kernels.harness import Gpu

SOURCE = Path(__file__).with_suffix(".cu")
TYPES = {"bf16": np.dtype(ml_dtypes.bfloat16), "f16": np.dtype(np.float16)}
KINDS = ("ss", "rs", "mn")


def values(rng: np.random.Generator, case: str, shape: tuple[int, ...], f16: bool) -> np.ndarray:
    """float32 inputs of a case; what is odd about each says its name."""
    x = rng.standard_normal(shape, np.float32)
    if case == "wide":
        return x * np.exp2(rng.integers(-12, 13, shape) if f16 else rng.integers(-30, 31, shape))
    if case == "wider":
        return x * np.exp2(rng.integers(-24, 7, shape) if f16 else rng.integers(-60, 61, shape))
    if case == "denormal":
        return x * np.float32(2.0**-15 if f16 else 2.0**-64)
    if case == "weights":
        return np.exp2(-np.abs(8 * x)) * (rng.random(shape) < 0.8)
    if case == "integers":
        return np.round(x * 100)
    if case == "sparse":
        return x * (rng.random(shape) < 0.2)
    return x


def case_inputs(
    rng: np.random.Generator, case: str, count: int, n: int, f16: bool
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """a [count, 64, 128], b [count, n, 128] and start [count, 64, n] in float32."""
    a = values(rng, case, (count, 64, 128), f16)
    b = values(rng, "normal" if case == "weights" else case, (count, n, 128), f16)
    start = np.zeros((count, 64, n), np.float32)
    if case == "cancel":  # each product meets its negative in another place of the sum
        order = rng.permutation(64)
        a[..., 64:] = a[..., order]
        b[..., 64:] = -b[..., order] * (1 + (rng.random((count, n, 64)) < 0.1) * 2.0**-6)
    if case in ("started", "cancel"):
        start = rng.standard_normal(start.shape, np.float32) * np.exp2(rng.integers(-20, 21, start.shape))
    return a, b, start.astype(np.float32)


CASES = ("normal", "weights", "started", "wide", "wider", "cancel", "denormal", "integers", "sparse")


def main() -> int:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--inputs", type=int, default=64)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    rng = np.random.default_rng(options.seed)
    gpu = Gpu()
    symbols = tuple(f"compare<{t}, {n}>" for t in TYPES for n in (64, 128))
    cubin = build.compile_unit(build.Unit(str(SOURCE), symbols, build.target_of(gpu.facts.capability)))
    module = Module(cubin.code)
    different = 0
    print(f"{'case':>10} {'type':>5} {'n':>4} {'steps':>5}  " + "".join(f"{kind:>22}" for kind in KINDS))
    for case in CASES:
        for name, dtype in TYPES.items():
            for n in (64, 128):
                smem = 2 * 128 * (64 + 2 * n)
                function = module.function(cubin.names[f"compare<{name}, {n}>"], "compare", smem)
                a, b, start = case_inputs(rng, case, options.inputs, n, name == "f16")
                v = np.ascontiguousarray(b.transpose(0, 2, 1))
                arrays = [gpu.array(x.astype(dtype)) for x in (a, b, v)] + [gpu.array(start)]
                for steps in (1, 4, 8):
                    counts, worst = gpu.zeros((4,), np.uint32), gpu.zeros((3,), np.float32)
                    arguments = gpu.cells([*arrays, steps, counts, worst])
                    Launch(function, 128, smem, arguments, pdl=False).run(gpu.stream, (options.inputs, 1, 1))
                    wrong, most = counts.get(), worst.get()
                    different += int(wrong[:3].sum())
                    cells = "".join(f"{w:>12} {m:9.1e}" for w, m in zip(wrong[:3], most, strict=True))
                    print(f"{case:>10} {name:>5} {n:>4} {steps:>5}  {cells}  of {wrong[3]}", flush=True)
                gpu.clear()
    print("all bits equal" if not different else f"{different} elements differ")
    return 1 if different else 0


if __name__ == "__main__":
    sys.exit(main())

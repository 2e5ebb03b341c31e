"""E4M3 kernels that run everywhere: packing, quantising, and products with widened weights, against NumPy."""

from __future__ import annotations

import ctypes
from typing import Any

import ml_dtypes
import numpy as np

from rvllm.backends.cuda.formats import fp8_plan as fp8
from rvllm.backends.cuda.ops.gemm.common import Kind
from rvllm.backends.cuda.ops.gemm.plan import interleave_gate_up
from rvllm.kernels.gemm.fp8.specs import QUANTISE_GROUPS, QUANTISE_THREADS, SM80_TOKENS
from rvllm.kernels.rowwise.specs import norm_kernel, quantised_norm_kernel
from support.kernels.harness import SHORT, Machine, expect, rounded

E4M3 = np.dtype(ml_dtypes.float8_e4m3fn)
SHAPES = [(203, 72), (64, 8), (130, 392)]  # (rows, columns) of the weight
GUARD = 5  # poisoned rows behind the output
LARGEST = np.float32(448)


def inverse_and_scale(amax: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """What numbers are multiplied with and what their codes are worth, float32: the largest becomes 448."""
    amax = np.maximum(amax.astype(np.float32), np.float32(1e-30))
    return LARGEST / amax, amax * np.float32(1 / 448)


def codes_of(numbers: np.ndarray) -> np.ndarray:
    """float32 to E4M3 bytes, ties to even."""
    return np.clip(numbers, -LARGEST, LARGEST).astype(E4M3).view(np.uint8)


def random_codes(rng: np.random.Generator, n: int, k: int) -> np.ndarray:
    """Every number of E4M3 but NaN, subnormals and both zeros among them."""
    codes = rng.integers(0, 254, (n, k)).astype(np.uint8)
    return codes + (codes >= 127).astype(np.uint8)


def check_fp8_pack(gpu: Machine, rng: np.random.Generator) -> None:
    """E4M3 bytes into tiles, in two parts and as gates and ups; padding is zeros."""

    def run(codes: np.ndarray, out: object, first: int, padded: int, interleave: int = 0) -> None:
        n, k = codes.shape
        args = [gpu.array(codes), out, ctypes.c_int64(n), ctypes.c_int64(padded), k, -(-k // 128)]
        gpu.launch("sm80_fp8_pack", 3, 64, [*args, ctypes.c_int64(first), interleave], pdl=False)

    for n, k in SHAPES:
        codes = random_codes(rng, n, k)
        wanted = fp8.pack_codes(codes)
        out = gpu.empty(wanted.shape, np.uint8)
        run(codes[:40], out, 0, 40)
        run(codes[40:], out, 40, -(-n // 64) * 64 - 40)
        assert (out.get() == wanted).all(), (n, k)
    gate, up = (random_codes(rng, 64, 200) for _ in range(2))
    wanted = fp8.pack_codes(interleave_gate_up(gate, up))
    out = gpu.empty(wanted.shape, np.uint8)
    run(gate, out, 0, 64, 1)
    run(up, out, 0, 64, 2)
    assert (out.get() == wanted).all()


def check_fp8_quantise_rows(gpu: Machine, rng: np.random.Generator) -> None:
    """Weights to E4M3 with a scale a row, from each type; a row of zeros among them."""
    for source in (np.dtype(np.float32), np.dtype(ml_dtypes.bfloat16), np.dtype(np.float16)):
        for n, k in SHAPES:
            weight = (rng.standard_normal((n, k)) * np.exp2(rng.integers(-8, 4, (n, 1)))).astype(source)
            weight[3] = 0
            numbers = weight.astype(np.float32)
            inverse, scale = inverse_and_scale(np.abs(numbers).max(axis=1, keepdims=True))
            codes = codes_of(numbers * inverse)
            wanted, whole = fp8.pack_codes(codes), -(-n // 64) * 64
            out, scales = gpu.empty(wanted.shape, np.uint8), gpu.empty((whole,), np.float32)
            args = [gpu.array(weight), out, scales, ctypes.c_int64(n), ctypes.c_int64(whole), k, -(-k // 128)]
            name = f"sm80_fp8_quantise_{SHORT[source.name]}"
            gpu.launch(name, 3, 256, [*args, ctypes.c_int64(0), 0], pdl=False)
            assert (out.get() == wanted).all(), (source, n, k)
            assert (scales.get()[:n] == scale[:, 0]).all() and (scales.get()[n:] == 0).all()


def check_fp8_quantise(gpu: Machine, rng: np.random.Generator, dtype: np.dtype) -> None:
    """Activations to E4M3 with a scale a token and 256 columns; columns behind the last are zeros."""
    for rows, k, x_pitch in ((5, 200, 208), (3, 128, 128), (2, 384, 384), (1, 1032, 1032)):
        x = rounded(rng.standard_normal((rows, x_pitch), np.float32) * 3, dtype)
        pitch, capacity = fp8.activation_pitch(k), 256
        groups = -(-pitch // 256)
        padded = np.zeros((rows, groups * 256), np.float32)
        padded[:, :k] = x[:, :k]
        grouped = padded.reshape(rows, groups, 256)
        inverse, scale = inverse_and_scale(np.abs(grouped).max(axis=2))
        q, scales = gpu.empty((rows + 1, pitch), np.uint8), gpu.empty((groups + 1, capacity), np.float32)
        args = [gpu.array(x.astype(dtype)), q, scales, k, x_pitch, pitch, capacity]
        launch_quantise(gpu, dtype, rows, args)
        codes = codes_of(grouped * inverse[:, :, None]).reshape(rows, -1)[:, :pitch]
        assert (q.get()[:rows] == codes).all()
        assert (q.get()[rows:] == 255).all()
        assert (scales.get()[:groups, :rows] == scale.T).all()
        assert np.isnan(scales.get()[groups:]).all()


def launch_quantise(gpu: Machine, dtype: np.dtype, rows: int, args: list[Any]) -> None:
    """The quantiser of activations; the last but one of its arguments is their pitch."""
    grid = -(-args[-2] // (256 * QUANTISE_GROUPS)), rows
    gpu.launch(f"sm80_{SHORT[dtype.name]}_fp8_quantise", grid, QUANTISE_THREADS, args)


def check_fp8_norm(gpu: Machine, rng: np.random.Generator, dtype: np.dtype) -> None:
    """Norms that write E4M3: the bits of the norm and the quantiser in turn, and the same sums in x."""
    rows = 3
    for width in (72, 256, 1000):
        pitch, capacity = fp8.activation_pitch(width), 256
        x, y = (
            rounded(rng.standard_normal((rows, width), np.float32), dtype).astype(dtype) for _ in range(2)
        )
        weight, bias = (gpu.array(rng.standard_normal(width).astype(np.float32)) for _ in range(2))
        for kind in ("rms", "layer"):
            for add in (False, True):
                found = []
                for find in (norm_kernel, quantised_norm_kernel):
                    kernel, threads = find(dtype.name, kind, width, add)
                    residual = gpu.array(x)
                    tail = [residual, gpu.array(y) if add else None, weight, bias, width, 1e-5, 0.5]
                    q = gpu.empty((rows, pitch), np.uint8)
                    scales = gpu.empty((-(-pitch // 256), capacity), np.float32)
                    if find is norm_kernel:
                        out = gpu.empty((rows, width), dtype)
                        gpu.launch(kernel, rows, threads, [out, *tail])
                        args = [out, q, scales, width, width, pitch, capacity]
                        launch_quantise(gpu, dtype, rows, args)
                    else:
                        gpu.launch(kernel, rows, threads, [q, scales, *tail, pitch, capacity])
                    found.append((residual.get().tobytes(), q.get().tobytes(), scales.get().tobytes()))
                assert found[0] == found[1], (width, kind, add)


class Widened:
    """A weight in E4M3 and inputs, on the machine."""

    def __init__(self, gpu: Machine, rng: np.random.Generator, dtype: np.dtype, n: int, k: int, scales: str):
        self.gpu, self.dtype, self.n, self.k, self.scales = gpu, dtype, n, k, scales
        self.x = rounded(rng.standard_normal((70, k), np.float32), dtype)
        codes = random_codes(rng, n, k)
        factors = rng.uniform(0.5, 1.5, fp8.scales_shape(n, k, scales)).astype(np.float32)
        whole = np.full(fp8.packed_nbytes(n, k, scales), 255, np.uint8)
        packed = fp8.pack_codes(codes)
        whole[: packed.size] = packed
        whole[fp8.scales_offset(n, k) :] = factors.reshape(-1).view(np.uint8)
        self.packed = gpu.array(whole)
        numbers = codes.view(E4M3).astype(np.float64)
        if scales == "row":
            self.weight = numbers * factors[:n, None]
        else:
            rows, columns = np.arange(n)[:, None], np.arange(k)[None]
            self.weight = numbers * factors[columns // 128, rows // 64, rows % 64 // 8]

    def run(self, tokens: int, tile: int, kind: Kind, **options: object) -> np.ndarray:
        """Outputs [tokens, n]; what lies behind them is left alone."""
        gpu, pitch = self.gpu, self.n + 4
        plan = fp8.plan_widened(self.n, self.k, tokens, SHORT[self.dtype.name], tile)
        out_type = np.dtype(np.float32) if kind == Kind.LOGITS else self.dtype
        out = gpu.empty((tokens + GUARD, pitch), out_type)
        x = gpu.array(self.x[:tokens].astype(self.dtype))
        args = fp8.widened_arguments(
            plan, x.address, self.packed.address, out.address, pitch,
            k=self.k, x_pitch=self.k, scales=self.scales, kind=kind, **options,
        )  # fmt: skip
        args = [ctypes.c_void_p(a) if isinstance(a, int) else a for a in args]
        gpu.launch(plan.kernel, plan.grid, plan.block, args, plan.smem)
        result = out.get()
        raw = result.view(np.uint8).reshape(tokens + GUARD, pitch, -1)
        assert (raw[tokens:] == 255).all() and (raw[:, self.n :] == 255).all(), "wrote outside its rows"
        return result[:tokens, : self.n]


def check_fp8_widened(gpu: Machine, rng: np.random.Generator, dtype: np.dtype) -> float:
    """Sums against float64 for both kinds of scales, with the same bits at every size and tile."""
    worst = 0.0
    for n, k in SHAPES:
        for scales in ("row", "block"):
            product = Widened(gpu, rng, dtype, n, k, scales)
            sums = product.run(70, SM80_TOKENS[-1], Kind.LOGITS)
            size = np.abs(product.x.astype(np.float64)) @ np.abs(product.weight).T
            exact = product.x.astype(np.float64) @ product.weight.T
            worst = max(worst, float((np.abs(sums - exact) / size).max()))
            for tokens in (1, 7, 33):
                for tile in SM80_TOKENS:
                    again = product.run(tokens, tile, Kind.LOGITS)
                    same = again.view(np.uint32) == sums[:tokens].view(np.uint32)
                    assert same.all(), (n, k, tokens, tile)
            assert (product.run(9, SM80_TOKENS[0], Kind.STORE) == sums[:9].astype(dtype)).all()
    expect("widened E4M3 products", worst, 1e-6)
    return worst

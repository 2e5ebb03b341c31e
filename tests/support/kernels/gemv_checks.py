"""One token's products have the bits of the other matrix kernels: alone, behind a norm, in a chain."""

from __future__ import annotations

import ctypes

import numpy as np

from rvllm.backends.cuda.device.launches import Counts
from rvllm.backends.cuda.ops.decode import step as decode
from rvllm.backends.cuda.ops.decode.one import one_token_launch
from rvllm.backends.cuda.ops.gemm import plan as gemm
from rvllm.backends.cuda.ops.gemm.common import Kind
from rvllm.kernels.rowwise.specs import norm_kernel
from support.kernels.harness import SHORT, Array, Machine, rounded

LONG = {"bf16": "bfloat16", "f16": "float16"}


class Layer:
    """A weight [n, k] with a bias, packed on the machine; gated: of n / 2 gates and as many ups."""

    def __init__(
        self, gpu: Machine, rng: np.random.Generator, dtype: np.dtype, n: int, k: int, kind: Kind = Kind.STORE
    ) -> None:
        self.gpu, self.dtype, self.n, self.k, self.kind = gpu, dtype, n, k, kind
        weight = rounded(rng.standard_normal((n, k), np.float32) / np.float32(k**0.5), dtype).astype(dtype)
        self.packed = gpu.array(gemm.pack_matrix(weight))
        self.bias = gpu.array(rounded(rng.standard_normal(n, np.float32), dtype).astype(dtype))
        self.width = n // 2 if kind == Kind.GATED_SILU else n

    def out(self) -> Array:
        """Poisoned memory for one row of its outputs, in a pitch of their width, and a guard behind it."""
        return self.gpu.empty((self.width + 8,), np.float32 if self.kind == Kind.LOGITS else self.dtype)

    def step(self, x: Array, out: Array, residual: bool = False) -> decode.Step:
        """The product as a step of `chain`."""
        return decode.Step(
            self.packed.address, x.address, out.address, self.n, self.k,
            gemm.segments_of(self.n, self.k), self.width, self.bias.address,
            out.address if residual else 0, self.kind, 0.75 if residual else 1.0,
        )  # fmt: skip

    def reference(self, x: Array, out: Array, residual: bool = False) -> None:
        """The same by the kernel for several tokens."""
        plan = gemm.variant(self.n, self.k, 1, SHORT[self.dtype.name], "sm80", 16, 132)
        args = plan.arguments(
            x, self.packed, out, self.width, bias=self.bias, residual=out if residual else None,
            kind=self.kind, scale=0.75 if residual else 1.0, x_width=self.k, x_pitch=self.k,
        )  # fmt: skip
        self.gpu.launch(plan.kernel, plan.grid, plan.block, args, plan.smem)


def launch(
    gpu: Machine, steps: list[decode.Step], dtype: np.dtype, blocks: int, room: int | None = None
) -> None:
    """Runs the steps as one launch of that many blocks."""
    plan = decode.plan_chain(steps, SHORT[dtype.name], blocks, room or gpu.facts.smem_per_block)
    arrivals = gpu.zeros((1,), np.uint64)
    words, _ = plan.arguments(arrivals.address)
    gpu.launch(plan.kernel, plan.grid, plan.block, [words, arrivals], plan.smem)


def bits(array: Array) -> np.ndarray:
    """What an array holds, as integers."""
    return array.get().view(f"u{array.dtype.itemsize}")


def check_alone(gpu: Machine, rng: np.random.Generator, dtype: np.dtype, n: int, k: int, kind: Kind) -> None:
    """One product, on several grids and ring sizes: the bits of the kernel for several tokens."""
    layer = Layer(gpu, rng, dtype, n, k, kind)
    x = gpu.array(rounded(rng.standard_normal(k, np.float32), dtype).astype(dtype))
    plain = kind == Kind.STORE
    start = rounded(rng.standard_normal(layer.width + 8, np.float32), dtype).astype(dtype)
    wanted = layer.out()
    if plain:
        wanted.put(start)
    layer.reference(x, wanted, residual=plain)
    for blocks, room in ((1, 60 << 10), (3, None), (7, 99 << 10)):
        found = layer.out()
        if plain:
            found.put(start)
        launch(gpu, [layer.step(x, found, residual=plain)], dtype, blocks, room)
        assert (bits(found) == bits(wanted)).all(), (n, k, kind, blocks)


def normed(gpu: Machine, x: Array, width: int, kind: str, weight: Array, bias: Array | None) -> Array:
    """The row, normalised by the kernel of norms."""
    out = gpu.empty((width,), x.dtype)
    kernel, threads = norm_kernel(x.dtype.name, kind, width, False)
    args = [out, x, None, weight, bias, width, ctypes.c_float(1e-5), ctypes.c_float(1.0)]
    gpu.launch(kernel, 1, threads, args)
    return out


def check_norm(gpu: Machine, rng: np.random.Generator, dtype: np.dtype, k: int, kind: str) -> None:
    """A norm in front: the bits of the two kernels, and its result is there for others."""
    layer = Layer(gpu, rng, dtype, 80, k)
    x = gpu.array(rounded(3 * rng.standard_normal(k, np.float32) + 1, dtype).astype(dtype))
    weight = gpu.array(rng.standard_normal(k, np.float32))
    bias = gpu.array(rng.standard_normal(k, np.float32)) if kind == "layer" else None
    row, wanted = normed(gpu, x, k, kind, weight, bias), layer.out()
    layer.reference(row, wanted)
    found, copy = layer.out(), gpu.empty((k,), dtype)
    front = decode.NormFront(
        x.address, weight.address, bias.address if bias else 0, copy.address, k, 1e-5, kind == "layer"
    )
    launch(gpu, [layer.step(copy, found).normed(front)], dtype, 3)
    assert (bits(copy) == bits(row)).all(), (k, kind)
    assert (bits(found) == bits(wanted)).all(), (k, kind)


def check_one_token(
    gpu: Machine, rng: np.random.Generator, dtype: np.dtype, n: int, k: int, kind: Kind, norm: str = ""
) -> None:
    """Hopper's launch of one product, behind a norm or not: the bits of the kernel for several tokens."""
    layer = Layer(gpu, rng, dtype, n, k, kind)
    x = gpu.array(rounded(3 * rng.standard_normal(k, np.float32) + 1, dtype).astype(dtype))
    weight = gpu.array(rng.standard_normal(k, np.float32))
    bias = gpu.array(rng.standard_normal(k, np.float32)) if norm == "layer" else None
    row = normed(gpu, x, k, norm, weight, bias) if norm else x
    plain = kind == Kind.STORE
    start = rounded(rng.standard_normal(layer.width + 8, np.float32), dtype).astype(dtype)
    wanted, found, copy = layer.out(), layer.out(), gpu.empty((k,), dtype)
    if plain:
        wanted.put(start)
        found.put(start)
    layer.reference(row, wanted, residual=plain)
    step = layer.step(copy if norm else x, found, residual=plain)
    if norm:
        at = bias.address if bias else 0
        step = step.normed(
            decode.NormFront(x.address, weight.address, at, copy.address, k, 1e-5, norm == "layer")
        )
    one = one_token_launch("one", step, SHORT[dtype.name], gpu.facts.sm_count)
    args = [ctypes.c_void_p(p) if isinstance(p, int) else p for p in one.parameters]
    gpu.launch(one.kernel, one.grid(Counts(1, 1, 1)), one.block, args, one.smem, cluster=one.cluster)
    assert (bits(found) == bits(wanted)).all(), (n, k, kind, norm)
    assert not norm or (bits(copy) == bits(row)).all(), (n, k, kind, norm)


def check_chain(
    gpu: Machine, rng: np.random.Generator, dtype: np.dtype, blocks: int, width: int, inner: int
) -> None:
    """An attention's output through o, a gated MLP with its norm, and the next layer's qkv: one launch."""
    o = Layer(gpu, rng, dtype, width, width)
    up = Layer(gpu, rng, dtype, 2 * inner, width, Kind.GATED_SILU)
    down, qkv = Layer(gpu, rng, dtype, width, inner), Layer(gpu, rng, dtype, width + 48, width)
    attended = gpu.array(rounded(rng.standard_normal(width, np.float32), dtype).astype(dtype))
    weight = gpu.array(rng.standard_normal(width, np.float32))
    start = rounded(rng.standard_normal(width + 8, np.float32), dtype).astype(dtype)

    stream, h, out = gpu.array(start), up.out(), qkv.out()
    o.reference(attended, stream, residual=True)
    up.reference(normed(gpu, stream, width, "rms", weight, None), h)
    down.reference(h, stream, residual=True)
    qkv.reference(normed(gpu, stream, width, "rms", weight, None), out)

    stream2, h2, out2, row = gpu.array(start), up.out(), qkv.out(), gpu.empty((width,), dtype)
    front = decode.NormFront(stream2.address, weight.address, 0, row.address, width, 1e-5, False)
    steps = [
        o.step(attended, stream2, residual=True),
        up.step(row, h2).normed(front),
        down.step(h2, stream2, residual=True),
        qkv.step(row, out2).normed(front),
    ]
    launch(gpu, steps, dtype, blocks)
    for found, wanted in ((stream2, stream), (h2, h), (out2, out)):
        assert (bits(found) == bits(wanted)).all()

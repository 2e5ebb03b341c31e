"""Experts whose weights keep their format, by the launches that the backend plans, against NumPy."""

from __future__ import annotations

import zlib
from dataclasses import replace

import ml_dtypes
import numpy as np
import pytest

from rvllm.backends.cuda.device.driver import device_count
from rvllm.backends.cuda.formats import fp8_plan
from rvllm.backends.cuda.formats.fp8 import arrange_scales
from rvllm.backends.cuda.ops.gemm import integer
from rvllm.backends.cuda.ops.gemm.plan import interleave_gate_up
from rvllm.kernels.gemm.integer.specs import LAYOUTS
from rvllm.kernels.manifest import MANIFEST
from rvllm.kernels.moe.specs import QUANTISED_TOKENS, QUANTISED_WIDE
from rvllm.program.formats import Fp8Format, IntegerFormat, WeightFormat
from rvllm.program.ops.dense import Weight
from support.emulator import Emulator
from support.kernels.experts_checks import LIMIT, Bench, Mixed, assign, normal
from support.kernels.harness import BF16, F16, Array, Gpu, Machine, error, expect
from support.kernels.integer_checks import random_matrix

MIXED = Mixed(5, 2, 264, 136, 72)
PLAIN = Mixed(4, 3, 136, 264, 72, "relu2", False, always=1)


def format_named(name: str, rows: int) -> WeightFormat:
    if name in LAYOUTS:
        return IntegerFormat(((rows, name),), name)
    return Fp8Format("row" if name == "e4m3, a scale a row" else "block")


def random_weight(
    rng: np.random.Generator, name: str, rows: int, k: int, dtype: np.dtype, gated: bool
) -> tuple[np.ndarray, np.ndarray]:
    """A matrix in a format: its numbers, and its bytes on the device, gates and ups interleaved."""
    if name in LAYOUTS:
        layout = LAYOUTS[name]
        levels, words = random_matrix(rng, layout, rows, k, dtype)
        numbers = integer.multiplied(levels, words, layout, dtype)
        if gated:
            levels, words = (interleave_gate_up(*np.split(a, 2)) for a in (levels, words))
        return numbers, integer.pack_levels(levels, words, layout)
    codes = rng.integers(0, 256, (rows, k), dtype=np.uint8)
    codes[codes & 0x7F == 0x7F] = 0
    row = name == "e4m3, a scale a row"
    groups = np.arange(rows) if row else np.arange(rows) // 8
    grid = rng.uniform(0.5, 1.5, (groups[-1] + 1, 1 if row else -(-k // 128))) / 200 / k**0.5
    scales = grid.astype(np.float32)[groups]
    spread = scales if row else scales[:, np.arange(k) // 128]
    numbers = codes.view(ml_dtypes.float8_e4m3fn).astype(np.float32) * spread
    kind: fp8_plan.Scales = "row" if row else "block"
    packed = fp8_plan.pack_codes(interleave_gate_up(*np.split(codes, 2)) if gated else codes)
    behind = arrange_scales(scales, rows, kind, gated)
    return numbers, np.concatenate([packed.reshape(-1), behind.view(np.uint8).reshape(-1)])


class Quantised(Bench):
    """Experts on the machine with up and down matrices in the formats given; None: the 16-bit type."""

    def __init__(
        self, gpu: Machine, rng: np.random.Generator, dtype: np.dtype, mixed: Mixed, most: int,
        up: str | None, down: str | None,
    ) -> None:  # fmt: skip
        super().__init__(gpu, rng, dtype, mixed, most)
        if up is not None:
            self.up, self._up, weight = self._stack(rng, self.op.up, up, mixed.gated)
            self.op = replace(self.op, up=weight)
        if down is not None:
            self.down, self._down, weight = self._stack(rng, self.op.down, down, False)
            self.op = replace(self.op, down=weight)

    def _stack(
        self, rng: np.random.Generator, weight: Weight, name: str, gated: bool
    ) -> tuple[np.ndarray, Array, Weight]:
        count, rows, k = weight.shape
        found = [random_weight(rng, name, rows, k, self.dtype, gated) for _ in range(count)]
        packed = self.gpu.array(np.concatenate([data for _, data in found]))
        kept = replace(weight, format=format_named(name, rows))
        return np.stack([numbers for numbers, _ in found]), packed, kept


def check(
    gpu: Machine, dtype: np.dtype, mixed: Mixed, up: str | None, down: str | None, few: bool = True
) -> None:
    """Sums against the reference; a token's bits alone, in company and with either tile.

    few: also by the kernels for few tokens.
    """
    rng = np.random.default_rng(zlib.crc32(f"{up} {down}".encode()))
    bench = Quantised(gpu, rng, dtype, mixed, 40, up, down)
    x = normal(rng, dtype, 19, mixed.k)
    ids, shares = assign(rng, mixed, 19, "spread")
    ids[:, 0] = np.where(np.arange(19) < 18, ids[0, 0], ids[:, 0]) if mixed.always == 0 else ids[:, 0]
    together = bench.run(x, ids, shares, 20)
    expect("experts", error(together, bench.wanted(x, ids, shares)), LIMIT[dtype.name])
    residual = normal(rng, dtype, 3, mixed.n)
    alone = bench.run(x[:3], ids[:3], shares[:3], 3, residual, 0.75)
    wanted = residual + np.float32(0.75) * together[:3]
    expect("with a residual", error(alone, wanted), LIMIT[dtype.name])
    for tile in (*QUANTISED_TOKENS, *[QUANTISED_WIDE] * (gpu.facts.capability == 90)):
        assert (bench.run(x[:1], ids[:1], shares[:1], 1, how=("quantised", tile)) == together[:1]).all()
        assert (bench.run(x, ids, shares, 19, how=("quantised", tile)) == together).all()
    for tokens, padded in (((1, 1), (2, 3)) if up and down else ((1, 1),)) if few else ():
        own = bench.run(x[:tokens], ids[:tokens], shares[:tokens], padded, how=("one", 0))
        assert (own == together[:tokens]).all()
        added = bench.run(
            x[:tokens], ids[:tokens], shares[:tokens], padded, residual[:tokens], 0.75, ("one", 0)
        )
        assert (added == alone[:tokens]).all()


@pytest.mark.gpu
def test_experts_in_a_format_on_a_gpu() -> None:
    if not device_count():
        pytest.skip("no NVIDIA GPU, or the cuda extra is not installed")
    gpu = Gpu()
    wanted = [f"_f16_{kind}_e4m3_" for kind in ("experts", "moe")]
    wanted += [f"_bf16_{kind}_int4_" for kind in ("experts", "moe")]
    specs = [s for s in MANIFEST.values() if any(w in s.name for w in wanted)]
    gpu.build([s.name for s in specs if s.runs_on(gpu.facts.capability)])  # side by side
    check(gpu, F16, MIXED, "e4m3, a scale a row", "e4m3, a scale a row")
    check(gpu, BF16, MIXED, "int4", "int4")
    gpu.clear()


# What is summed in different ways; the rest differs in decoders alone, which dense products test.
NAMES = {"int4": BF16, "int4g32": F16, "q6": BF16, "e4m3, a scale a row": F16, "e4m3, scales of blocks": F16}


@pytest.mark.parametrize("name", NAMES)
def test_experts_in_a_format(emulator: Emulator, name: str) -> None:
    check(
        emulator, NAMES[name], MIXED, name, name, few=name != "int4"
    )  # which has one scale a chunk, as E4M3


@pytest.mark.parametrize(("up", "down"), [("int4", "q6"), ("q6", None)])
def test_stacks_in_different_formats(emulator: Emulator, up: str | None, down: str | None) -> None:
    check(emulator, BF16, PLAIN, up, down, few=down is None)

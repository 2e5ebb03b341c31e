"""Times the kernels of mixtures of experts at real models' sizes, on the GPU of this machine.

    PYTHONPATH=src python scripts/gpu/experts_bench.py [--only NAME] [--tokens 1,8,64,4096] [--paths few,many]

Each figure is a median over replays of a CUDA graph that chains the launches with programmatic dependence.
Every layer of a chain chooses other experts at random, so that weights come from memory, not from a cache.
A row has the time of each launch, of all of them together (the router's among them), and the floor: the
weights of the experts that were hit, once each, at the rate of a plain read, or the products at 750 TFLOP/s,
whichever is longer.
--paths: by these kernels too, besides those planned; `grouped:32` with tiles of 32 entries.
--format: weights in that format, e4m3 (a scale a row), int4, ...; paths `quantised:16`, `quantised:96`.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import cast

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "tests"))
from rvllm.backends.cuda.device.driver import Launch
from rvllm.backends.cuda.device.launches import Counts, Planned
from rvllm.backends.cuda.ops.gemm.plan import gated_rows, packed_nbytes
from rvllm.backends.cuda.ops.moe import plan as moe
from rvllm.backends.cuda.ops.moe.quantised import stack_product
from rvllm.backends.cuda.ops.moe.router import RouteAt, plan_route
from rvllm.backends.cuda.profile import READ_KERNEL
from rvllm.kernels.moe.specs import QUANTISED
from rvllm.program.formats import Fp8Format, IntegerFormat
from support.kernels.experts_checks import Mixed, Routing, chip, mapped
from support.kernels.harness import BF16, Array, Gpu

MODELS = {
    "mixtral-8x7b": (Mixed(8, 2, 4096, 14336, 4096), Routing(8, 4096, 2, renormalise=True)),
    "qwen3-30b-a3b": (Mixed(128, 8, 2048, 768, 2048), Routing(128, 2048, 8, renormalise=True)),
    "deepseek-v2-lite": (Mixed(66, 8, 2048, 1408, 2048, always=2), Routing(64, 2048, 6, always=2)),
    "nemotron-3-nano": (
        Mixed(128, 6, 2688, 1856, 2688, "relu2", False),
        Routing(128, 2688, 6, "sigmoid", True, renormalise=True, scale=2.5),
    ),
}
LAYERS = 16  # of a chain
MAX_RATE = 750e12  # FLOP/s of bf16 on an H200 under load


class Weights:
    """One mixture's weights, random bytes; op: its experts, whose weights may have a format."""

    def __init__(self, gpu: Gpu, mixed: Mixed, kept: str = "") -> None:
        rows, op = gated_rows(mixed.width) if mixed.gated else mixed.width, mixed.op(BF16)
        self.up_bytes, self.down_bytes = packed_nbytes(rows, mixed.k), packed_nbytes(mixed.n, mixed.width)
        if kept:
            up, down = (
                Fp8Format("row") if kept == "e4m3" else IntegerFormat(((n, kept),), kept)
                for n in (rows, mixed.n)
            )
            op = replace(op, up=replace(op.up, format=up), down=replace(op.down, format=down))
            self.up_bytes = stack_product(up, rows, mixed.k).stride
            self.down_bytes = stack_product(down, mixed.n, mixed.width).stride
        self.op = op
        self.up = random(gpu, mixed.experts * self.up_bytes)
        self.down = random(gpu, mixed.experts * self.down_bytes)
        self.gate = random(gpu, 2 * mixed.experts * mixed.k)
        self.bias = gpu.zeros((mixed.experts,), np.float32)


def random(gpu: Gpu, nbytes: int) -> Array:
    """So many bytes of bf16 numbers."""
    array = gpu.empty((nbytes // 2,), BF16)
    args = [array, ctypes.c_uint64(nbytes // 16 * 8), ctypes.c_uint64(0), ctypes.c_uint(7), 0.0, 0.02]
    gpu.launch("sm80_bf16_fill_random", 1056, 256, args)
    return array


class Layer:
    """A mixture in steps of `tokens` tokens: scratch memory, inputs and choices."""

    def __init__(self, gpu: Gpu, mixed: Mixed, routing: Routing, weights: Weights, tokens: int) -> None:
        self.gpu, self.mixed, self.weights, self.tokens = gpu, mixed, weights, tokens
        self.op, self.route_op = weights.op, routing.op(BF16)
        entries = tokens * mixed.top_k
        self.x = random(gpu, 2 * tokens * mixed.k)
        self.out = gpu.empty((tokens, mixed.n), BF16)
        self.inner, self.parts = random(gpu, 2 * entries * mixed.width), random(gpu, 2 * entries * mixed.n)
        self.order, self.num_tiles = gpu.empty((entries,), np.int32), gpu.empty((1,), np.int32)
        self.places = gpu.empty((entries,), np.int32)
        self.tiles = gpu.empty((moe.most_tiles(entries, mixed.experts, 8), 4), np.int32)
        self.logits = gpu.empty((tokens, mixed.experts), np.float32)
        self.arrivals = gpu.zeros((tokens,), np.int32)
        self.count = gpu.array([tokens], np.int32)
        rng, routed = np.random.default_rng(1), mixed.experts - mixed.always
        self.choices = []
        for _ in range(LAYERS):
            chosen = np.argsort(rng.random((tokens, routed)))[:, : mixed.top_k - mixed.always]
            common = np.broadcast_to(np.arange(routed, mixed.experts), (tokens, mixed.always))
            self.choices.append(np.concatenate([chosen, common], axis=1).astype(np.int32))
        self.ids = [gpu.array(c) for c in self.choices]
        self.chosen = gpu.empty((tokens, mixed.top_k), np.int32)
        self.shares = gpu.array(np.full((tokens, mixed.top_k), 1 / mixed.top_k, np.float32))

    def planned(self, layer: int, path: str) -> list[Planned]:
        """The router's launch, and those of the experts that `layer` hits."""
        g, w = self, self.weights
        route = plan_route(
            self.route_op, self.tokens, "bf16",
            RouteAt(g.x.address, g.chosen.address, g.shares.address, w.gate.address, w.bias.address,
                    g.logits.address, g.arrivals.address, g.count.address),
            chip(self.gpu),
        )  # fmt: skip
        at = moe.ExpertsAt(
            x=g.x.address, ids=g.ids[layer].address, shares=g.shares.address, out=g.out.address, residual=0,
            up=w.up.address, down=w.down.address, inner=g.inner.address, parts=g.parts.address,
            order=g.order.address, places=g.places.address, tiles=g.tiles.address,
            num_tiles=g.num_tiles.address, num_tokens=g.count.address,
        )  # fmt: skip
        plan = moe.ExpertsPlan(self.op, "experts", self.tokens, "bf16", chip(self.gpu), at)
        kind, _, tile = path.partition(":")
        if kind:
            plan.path = cast(moe.Path, kind)
        if tile and kind == "quantised":
            plan.set_tile(int(tile))
        elif tile:
            plan.tile = int(tile)
        return [route, *plan.launches()]

    def hit(self) -> float:
        """Experts hit, in the mean over layers."""
        return float(np.mean([len(np.unique(c)) for c in self.choices]))


def bound(gpu: Gpu, planned: Planned) -> tuple[Launch, tuple[int, int, int]]:
    """A launch record, made once so that capturing is quick."""
    gpu.build([planned.kernel])
    function = gpu._functions[planned.kernel]
    given = [mapped(p) for p in planned.parameters]
    launch = Launch(function, planned.block, planned.smem, given, pdl=True, cluster=planned.cluster)
    return launch, planned.grid(Counts(0, 0, 0))


def measure(gpu: Gpu, name: str, layer: Layer, path: str, rate: float) -> dict[str, object]:
    """Microseconds of each launch and of all together, printed as a row."""
    mixed, weights, tokens = layer.mixed, layer.weights, layer.tokens
    plans = [layer.planned(i, path) for i in range(LAYERS)]
    launches = [[bound(gpu, p) for p in plan] for plan in plans]
    for launch, grid in launches[0][1:]:  # once in order, so that each finds what it reads
        launch.run(gpu.stream, grid)

    def time(which: range) -> float:
        def work(i: int) -> None:
            for j in which:
                launch, grid = launches[i % LAYERS][j]
                launch.run(gpu.stream, grid)

        return 1e6 * gpu.time(work, repeats=LAYERS, replays=5)

    flops = 2.0 * tokens * mixed.top_k * mixed.width * (mixed.k * (1 + mixed.gated) + mixed.n)
    nbytes = layer.hit() * (weights.up_bytes + weights.down_bytes) + 2 * mixed.experts * mixed.k
    floor = 1e6 * max(nbytes / rate, flops / MAX_RATE)
    each = {p.kernel.split("_", 1)[1] + " " + p.why.split(",")[0]: time(range(i, i + 1))
            for i, p in enumerate(plans[0])}  # fmt: skip
    everything = time(range(len(plans[0])))
    parts = "  ".join(f"{what.removeprefix('bf16_')} {us:.1f}" for what, us in each.items())
    of_all = f"all {everything:8.1f} us, floor {floor:7.1f} ({100 * floor / everything:3.0f} %)"
    done = f"{flops / everything / 1e6:5.0f} TFLOP/s"
    print(f"{name} {tokens:5} {path or 'planned':10} {of_all}, {done}: {parts}", flush=True)
    return {"model": name, "tokens": tokens, "path": path, "us": everything, "floor": floor, "each": each}


def main() -> int:
    """Runs the table; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", choices=MODELS)
    parser.add_argument("--tokens", default="1,2,3,4,5,6,7,8,9,12,16,24,32,64,128,256,512,8192")
    parser.add_argument("--paths", default="")
    parser.add_argument("--format", default="", choices=("", *QUANTISED))
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    gpu = Gpu()
    print(f"{gpu.facts.name}, {gpu.facts.sm_count} SMs", flush=True)
    memory, sink = gpu.empty((4 << 30,), np.uint8), gpu.empty((16,), np.uint8)
    rows: list[dict[str, object]] = []
    grid, size = 4 * gpu.facts.sm_count, ctypes.c_uint64((4 << 30) // 16)
    seconds = gpu.time(
        lambda i: gpu.launch(READ_KERNEL, grid, 512, [memory, size, sink]), repeats=4, replays=3
    )
    rate = (4 << 30) / seconds
    print(f"plain read {rate / 1e9:.0f} GB/s", flush=True)
    gpu.clear()
    for name in [args.only] if args.only else MODELS:
        mixed, routing = MODELS[name]
        weights = Weights(gpu, mixed, args.format)
        for tokens in map(int, args.tokens.split(",")):
            layer = Layer(gpu, mixed, routing, weights, tokens)
            for path in ["", *filter(None, args.paths.split(","))]:
                try:
                    rows.append(measure(gpu, name, layer, path, rate))
                except Exception as error:  # one row must not stop the others
                    print(f"{name} {tokens} {path}: {type(error).__name__}: {error}", flush=True)
        gpu.clear()
    if args.json:
        args.json.write_text(json.dumps(rows))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())

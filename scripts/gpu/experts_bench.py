"""Times the kernels of mixtures of experts at real models' sizes, on the GPU of this machine.

    PYTHONPATH=src python scripts/gpu/experts_bench.py [--only NAME] [--tokens 1,8,64,4096]

Each row is a median over replays of a CUDA graph that chains the launches with programmatic dependence. Every
layer of a chain chooses other experts at random, so that weights come from memory, not from a cache. Rates
count the weights of the experts that were hit, once each. The last row of a model is a whole layer's mixture.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import sys
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "tests" / "cuda"))
from experts_checks import Mixed, Routing, chip
from harness import BF16, Array, Gpu

from rvllm.backends.cuda.device.driver import Launch
from rvllm.backends.cuda.device.launches import Counts, Planned
from rvllm.backends.cuda.ops.gemm.plan import gated_rows, packed_nbytes
from rvllm.backends.cuda.ops.moe.plan import ExpertsAt, ExpertsPlan, RouteAt, most_tiles, plan_route
from rvllm.backends.cuda.profile import READ_KERNEL

MODELS = {
    "mixtral-8x7b": (Mixed(8, 2, 4096, 14336, 4096), Routing(8, 4096, 2, renormalise=True)),
    "qwen3-30b-a3b": (Mixed(128, 8, 2048, 768, 2048), Routing(128, 2048, 8, renormalise=True)),
    "deepseek-v2-lite": (Mixed(64, 6, 2048, 1408, 2048), Routing(64, 2048, 6)),
    "nemotron-3-nano": (
        Mixed(128, 6, 2688, 1856, 2688, "relu2", False),
        Routing(128, 2688, 6, "sigmoid", True, renormalise=True, scale=2.5),
    ),
}
LAYERS = 16  # of a chain


class Layer:
    """One mixture's weights, and scratch for `tokens` tokens."""

    def __init__(self, gpu: Gpu, mixed: Mixed, routing: Routing, tokens: int) -> None:
        self.gpu, self.mixed, self.tokens = gpu, mixed, tokens
        self.op, self.route_op = mixed.op(BF16), routing.op(BF16)
        rows = gated_rows(mixed.width) if mixed.gated else mixed.width
        self.up_bytes, self.down_bytes = packed_nbytes(rows, mixed.k), packed_nbytes(mixed.n, mixed.width)
        entries = tokens * mixed.top_k
        self.up, self.down = (
            self._random(mixed.experts * self.up_bytes),
            self._random(mixed.experts * self.down_bytes),
        )
        self.gate, self.x = self._random(2 * mixed.experts * mixed.k), self._random(2 * tokens * mixed.k)
        self.out = gpu.empty((tokens, mixed.n), BF16)
        self.inner, self.parts = gpu.empty((entries, mixed.width), BF16), gpu.empty((entries, mixed.n), BF16)
        self.order, self.num_tiles = gpu.empty((entries,), np.int32), gpu.empty((1,), np.int32)
        self.tiles = gpu.empty((most_tiles(entries, mixed.experts, 16), 4), np.int32)
        self.logits = gpu.empty((tokens, mixed.experts), np.float32)
        self.arrivals = gpu.zeros((tokens,), np.int32)
        self.count = gpu.array([tokens], np.int32)
        self.bias = gpu.zeros((mixed.experts,), np.float32)
        rng = np.random.default_rng(1)
        self.choices = [
            np.argsort(rng.random((tokens, mixed.experts)))[:, : mixed.top_k].astype(np.int32)
            for _ in range(LAYERS)
        ]
        self.ids = [gpu.array(c) for c in self.choices]
        self.chosen = gpu.empty((tokens, mixed.top_k), np.int32)
        self.shares = gpu.array(np.full((tokens, mixed.top_k), 1 / mixed.top_k, np.float32))

    def _random(self, nbytes: int) -> Array:
        array = self.gpu.empty((nbytes // 2,), BF16)
        args = [array, ctypes.c_uint64(nbytes // 16 * 8), ctypes.c_uint64(0), ctypes.c_uint(7), 0.0, 0.02]
        self.gpu.launch("sm80_bf16_fill_random", 1056, 256, args)
        return array

    def planned(self, layer: int) -> tuple[Planned, list[Planned]]:
        """The router's launch, and those of the experts that `layer` hits."""
        g = self
        route = plan_route(
            self.route_op, self.tokens, "bf16",
            RouteAt(g.x.address, g.chosen.address, g.shares.address, g.gate.address, g.bias.address,
                    g.logits.address, g.arrivals.address, g.count.address),
        )  # fmt: skip
        at = ExpertsAt(
            x=g.x.address, ids=g.ids[layer].address, shares=g.shares.address, out=g.out.address, residual=0,
            up=g.up.address, down=g.down.address, inner=g.inner.address, parts=g.parts.address,
            order=g.order.address, tiles=g.tiles.address, num_tiles=g.num_tiles.address,
            num_tokens=g.count.address,
        )  # fmt: skip
        return route, ExpertsPlan(self.op, "experts", self.tokens, "bf16", chip(self.gpu), at).launches()

    def hit(self) -> float:
        """Experts hit, in the mean over layers."""
        return float(np.mean([len(np.unique(c)) for c in self.choices]))


def bound(gpu: Gpu, planned: Planned) -> tuple[Launch, tuple[int, int, int]]:
    """A launch record, made once so that capturing is quick."""
    gpu.build([planned.kernel])
    launch = Launch(gpu._functions[planned.kernel], planned.block, planned.smem, planned.parameters, pdl=True)
    return launch, planned.grid(Counts(0, 0, 0))


def measure(gpu: Gpu, name: str, tokens: int) -> list[dict[str, object]]:
    """Seconds and rates of each launch, and of all together."""
    mixed, routing = MODELS[name]
    layer = Layer(gpu, mixed, routing, tokens)
    plans = [layer.planned(i) for i in range(LAYERS)]
    launches = [[bound(gpu, p) for p in (route, *rest)] for route, rest in plans]
    rows: list[dict[str, object]] = []

    def time(what: str, which: range, nbytes: float, flops: float) -> None:
        def work(i: int) -> None:
            for j in which:
                launch, grid = launches[i % LAYERS][j]
                launch.run(gpu.stream, grid)

        seconds = gpu.time(work, repeats=LAYERS, replays=5)
        rows.append(
            {"model": name, "tokens": tokens, "what": what, "us": seconds * 1e6,
             "gbs": nbytes / seconds / 1e9, "tflops": flops / seconds / 1e12}
        )  # fmt: skip
        last = rows[-1]
        print(f"{name:18} {tokens:6} {what:28} {last['us']:10.2f} us {last['gbs']:8.0f} GB/s "
              f"{last['tflops']:7.1f} TFLOP/s", flush=True)  # fmt: skip

    up, down = layer.hit() * layer.up_bytes, layer.hit() * layer.down_bytes
    flops = 2.0 * tokens * mixed.top_k
    up_flops, down_flops = flops * mixed.k * mixed.width * (1 + mixed.gated), flops * mixed.n * mixed.width
    for i in range(len(plans[0][1])):  # once all of them in order, so that each finds what it reads
        launches[0][1 + i][0].run(gpu.stream, launches[0][1 + i][1])
    gate = 2.0 * mixed.experts * mixed.k
    kernels = [plans[0][0], *plans[0][1]]
    for i, planned in enumerate(kernels):
        which = planned.why.split(",")[0]
        nbytes = gate if i == 0 else {"up": up, "down": down, "down and sum": down}.get(which, 0.0)
        works = {"up": up_flops, "down": down_flops, "down and sum": down_flops}.get(which, 0.0)
        short = planned.kernel.removeprefix("sm80_").removeprefix("bf16_")
        time(f"{short} {which}"[:28], range(i, i + 1), nbytes, works)
    time("all", range(len(kernels)), gate + up + down, up_flops + down_flops)
    gpu.clear()
    return rows


def main() -> int:
    """Runs the table; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", choices=MODELS)
    parser.add_argument("--tokens", default="1,4,8,16,64,256,4096")
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
    print(f"plain read {(4 << 30) / seconds / 1e9:.0f} GB/s", flush=True)
    gpu.clear()
    for name in [args.only] if args.only else MODELS:
        for tokens in map(int, args.tokens.split(",")):
            try:
                rows += measure(gpu, name, tokens)
            except Exception as error:  # one model must not stop the others
                print(f"{name} {tokens}: {type(error).__name__}: {error}", flush=True)
                gpu.clear()
    if args.json:
        args.json.write_text(json.dumps(rows))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())

"""Checks and times the kernels for integer weights on this GPU, on the products of a 7B model.

    PYTHONPATH=src:scripts/gpu:tests python scripts/gpu/integer_bench.py [--tokens 1,8] [--only check]

check: every layout, mode and token tile against float64 products of the same numbers; bits equal across
modes, batch sizes and instruction sets. shapes: each product of a layer alone, 28 different weights in one
graph, for each layout asked for. Beside them the fastest plain read.
"""

from __future__ import annotations

import argparse
import os
import time
from pathlib import Path

import ml_dtypes
import numpy as np
import torch
from gemm_bed import Bed, Work

from rvllm.backends.cuda.device.driver import Launch, Module, TensorMap
from rvllm.backends.cuda.ops.gemm import integer
from rvllm.kernels import build
from rvllm.kernels.gemm.integer.specs import (
    LAYOUTS,
    SM80_TOKENS,
    SPECS,
    SPLIT_TOKENS,
    WALK_TOKENS,
    IntegerLayout,
)
from support.kernels.integer_checks import random_matrix

CACHE = Path(os.environ.get("RVLLM_CUBINS", "build/cubins"))
LAYERS, HIDDEN, FFN, QKV = 28, 3584, 18944, 4608
SHAPES = {"qkv": (QKV, HIDDEN), "o": (HIDDEN, HIDDEN), "gate_up": (2 * FFN, HIDDEN), "down": (HIDDEN, FFN)}


class Integers:
    """The kernels, and launches of them."""

    def __init__(self, bed: Bed, wanted: list[tuple[str, str]]) -> None:
        """wanted: (name of a kernel, tag of its definitions)."""
        self.bed, self.functions = bed, {}
        started = time.perf_counter()
        by_name = {spec.name: spec for spec in SPECS}
        units = {
            build.Unit(by_name[name].source, (by_name[name].symbol,), "sm_90a"): (name, tag)
            for name, tag in wanted
        }
        for cubin in build.load(list(units), CACHE):
            name, tag = units[cubin.unit]
            mangled = cubin.names[by_name[name].symbol]
            self.functions[name, tag] = Module(cubin.code).function(mangled, name, by_name[name].smem)
        print(f"built {len(units)} in {time.perf_counter() - started:.1f} s", flush=True)

    def launch(self, plan, weights, x, out, *, tag="", pdl=True, **options):
        k = x.shape[1]
        source = x.data_ptr()
        if plan.mode != "sm80":
            source = TensorMap.matrix(
                source, x.shape[0], k, x.stride(0) * 2, plan.token_tile, 64, x.dtype == torch.bfloat16
            )
        options = {"x_width": k, "x_pitch": x.stride(0), **options}
        arguments = plan.arguments(source, weights, out.data_ptr(), out.stride(0), **options)
        launch = Launch(
            self.functions[plan.kernel, tag], plan.block, plan.smem, arguments, pdl=pdl, cluster=plan.cluster
        )
        launch.keep = (x, out)
        return launch, plan.grid


def check(bed: Bed, layouts: list[IntegerLayout]) -> None:
    wanted = []
    for dtype in ("bf16", "f16"):
        for layout in layouts:
            if dtype == "f16" and layout.name not in ("int4", "int8g32", "q4", "q6"):
                continue
            names = [f"sm90_{dtype}_integer_{layout.name}_split_n{t}" for t in SPLIT_TOKENS]
            names += [f"sm90_{dtype}_integer_{layout.name}_walk_n{t}" for t in WALK_TOKENS]
            names += [f"sm80_{dtype}_integer_{layout.name}_n{t}" for t in SM80_TOKENS]
            wanted += [(name, "") for name in names]
    ints = Integers(bed, wanted)
    rng = np.random.default_rng(1)
    for dtype, kind in (("bf16", ml_dtypes.bfloat16), ("f16", np.float16)):
        for layout in layouts:
            if (f"sm80_{dtype}_integer_{layout.name}_n16", "") not in ints.functions:
                continue
            wrong, worst = [], 0.0
            for n, k in ((200, 1160), (3584, 3584)) if layout.name in ("int4", "q4") else ((200, 1160),):
                wrong_here, error = check_shape(ints, rng, dtype, np.dtype(kind), layout, n, k)
                wrong += wrong_here
                worst = max(worst, error)
            print(
                f"{dtype} {layout.name:8s} error {worst:.1e} {'WRONG ' + str(wrong[:6]) if wrong else 'ok'}",
                flush=True,
            )


def check_shape(ints, rng, dtype: str, kind: np.dtype, layout: IntegerLayout, n: int, k: int):
    levels, words = random_matrix(rng, layout, n, k, kind)
    weight = integer.multiplied(levels, words, layout, kind).astype(np.float64)
    packed = torch.from_numpy(integer.pack_levels(levels, words, layout)).cuda()
    x = torch.randn(300, k, device="cuda").to({"bf16": torch.bfloat16, "f16": torch.float16}[dtype])
    exact = x.double() @ torch.from_numpy(weight).cuda().T
    first, wrong, worst = None, [], 0.0
    segments = integer.segments_of(n, k)
    modes = [("walk", t, 1) for t in WALK_TOKENS] + [("sm80", t, 1) for t in SM80_TOKENS]
    for cluster in {segments, segments // 2} - {0, 1}:
        modes += [("split", t, cluster) for t in SPLIT_TOKENS]
    for mode, size, cluster in modes:
        for tokens in (300, size, max(1, size - 3)):
            short = dtype
            if mode == "sm80":
                plan = integer.variant(n, k, tokens, short, layout, "sm80", size, 132)
            else:
                plan = integer.variant(n, k, tokens, short, layout, mode, size, 132, cluster)
            out = torch.full((303, n), float("nan"), device="cuda")
            if plan.smem > 232448:
                continue
            launch, grid = ints.launch(plan, packed.data_ptr(), x, out, kind=1, pdl=False)
            torch.cuda.synchronize()
            launch.run(ints.bed.stream, grid)
            ints.bed.stream.sync()
            first = out[:300].clone() if first is None else first
            same = torch.equal(out[:tokens].view(torch.int32), first[:tokens].view(torch.int32))
            error = float((out[:tokens].double() - exact[:tokens]).abs().max() / exact.abs().mean())
            worst = max(worst, error)
            if not same or not error < 1e-4 or not out[tokens:].isnan().all():
                wrong.append((mode, size, cluster, tokens, round(error, 6), same))
    return wrong, worst


class Model:
    """Random packed weights of 28 layers in one layout."""

    def __init__(self, layout: IntegerLayout) -> None:
        self.layout, self.weights = layout, {}
        rng = np.random.default_rng(2)
        for name, (n, k) in SHAPES.items():
            shape = (layout.nbytes(n, k) // layout.chunk_bytes, layout.chunk_bytes)
            one = torch.randint(0, 256, shape, dtype=torch.uint8, device="cuda")
            _, words = random_matrix(rng, layout, 64, 128, np.dtype(ml_dtypes.bfloat16))
            head = torch.from_numpy(np.ascontiguousarray(words.T).view(np.uint8).reshape(-1)).cuda()
            one[:, : layout.runs * 256] = head
            self.weights[name] = one.view(-1).repeat(LAYERS).view(LAYERS, -1)


def variants(layout: IntegerLayout, name: str, tokens: int, full: bool):
    """The plan, and with `full` others."""
    n, k = SHAPES[name]
    segments = integer.segments_of(n, k)
    plans = [integer.plan_integer(n, k, tokens, "bf16", layout, 132)]
    if full and tokens > integer.WARP_TOKENS:
        plans += [integer.variant(n, k, tokens, "bf16", layout, "walk", t, 132) for t in (64, 96, 128, 192)]
        for t in (64, 128) if segments > 1 and tokens <= 256 else ():
            plans += [
                integer.variant(n, k, tokens, "bf16", layout, "split", t, 132, c)
                for c in {segments, segments // 2}
            ]
    elif full and segments > 1:
        size = plans[0].token_tile
        plans.append(integer.variant(n, k, tokens, "bf16", layout, "split", size, 132, max(1, segments // 2)))
    found = {plan: 0 for plan in plans if plan.smem <= 232448}
    return [(plan, "", f"x{plan.cluster}") for plan in found]


def shapes(bed: Bed, layout: IntegerLayout, sizes: list[int], full: bool) -> None:
    todo = {(t, name): variants(layout, name, t, full) for t in sizes for name in SHAPES}
    ints = Integers(bed, list({(plan.kernel, tag): 0 for found in todo.values() for plan, tag, _ in found}))
    model = Model(layout)
    flat = model.weights["gate_up"].view(-1)
    print(f"{layout.name}: fastest plain read {bed.read_limit(flat) / 1e9:.0f} GB/s", flush=True)
    for tokens in sizes:
        total = 0.0
        for name, (n, k) in SHAPES.items():
            x = torch.randn(max(tokens, 8), k, device="cuda").bfloat16()
            gated = name == "gate_up"
            out = torch.zeros(max(tokens, 8), FFN if gated else n, dtype=torch.bfloat16, device="cuda")
            line = []
            for plan, tag, what in todo[tokens, name]:
                work: Work = [
                    ints.launch(
                        plan, model.weights[name][i].data_ptr(), x, out, tag=tag, kind=2 if gated else 0
                    )
                    for i in range(LAYERS)
                ]
                seconds = bed.graph_seconds(work, 3 if tokens > 1000 else 5) / LAYERS
                line.append((seconds, f"{plan.mode}{plan.token_tile}{tag} {what}"))
            line.sort()
            s = line[0][0]
            total += s
            rate = model.weights[name][0].numel() / s / 1e9
            texts = "; ".join(f"{1e6 * t:.1f} {what}" for t, what in line)
            print(
                f"  {tokens:5d} {name:8s} {rate:5.0f} GB/s {2 * n * k * tokens / s / 1e12:4.0f} TF | {texts}",
                flush=True,
            )
        print(
            f"{layout.name} {tokens:5d} tokens: {1e6 * total:.1f} us a layer, {28e3 * total:.3f} ms for 28",
            flush=True,
        )


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--tokens", default="1,8,16,32,64,128,256,512,8192")
    parser.add_argument("--only", default="check,shapes")
    parser.add_argument("--layouts", default="int4,q4,q6")
    args = parser.parse_args()
    bed = Bed()
    sizes = [int(t) for t in args.tokens.split(",")]
    if "shapes" in args.only:
        for name in args.layouts.split(","):
            few = sizes if name in ("int4", "q4") else [t for t in sizes if t in (1, 32, 128, 512)]
            shapes(bed, LAYOUTS[name], few, name == "int4")
            torch.cuda.empty_cache()
    if "check" in args.only:
        check(
            bed,
            list(LAYOUTS.values())
            if args.layouts == "all"
            else [LAYOUTS[n] for n in args.layouts.split(",")],
        )


if __name__ == "__main__":
    main()

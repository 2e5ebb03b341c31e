"""Checks and times the E4M3 matrix kernels on this GPU, at a 7B model's shapes and at odd ones.

    PYTHONPATH=src:scripts/gpu python scripts/gpu/fp8_bench.py [--only check,shapes,chain] [--tokens 1,8,...]

Needs one sm_90 GPU and torch, which holds the memory and computes the references in float64. Outputs are
poisoned before each launch. The chain is 28 layers of qkv, o, gate_up and down in one CUDA graph, each
product reading the one before, beside the time that reading the weights takes at the memory's rate in the
same run.
"""

from __future__ import annotations

import argparse
import ctypes
import math
import os
import sys
import time
from dataclasses import replace
from pathlib import Path

import ml_dtypes
import numpy as np
import torch

from rvllm.backends.cuda.device.driver import Device, Event, Launch, Module, Stream, TensorMap
from rvllm.backends.cuda.formats import fp8_plan as fp8
from rvllm.backends.cuda.ops.gemm.common import Kind
from rvllm.kernels import build
from rvllm.kernels.gemm.fp8.specs import MAX_PAIR_SEGMENTS, MODES, QUANTISE_GROUPS, SPECS
from rvllm.kernels.manifest import MANIFEST

LAYERS, HIDDEN, FFN, QKV = 28, 3584, 18944, 4608
SHAPES = {"qkv": (QKV, HIDDEN), "o": (HIDDEN, HIDDEN), "gate_up": (2 * FFN, HIDDEN), "down": (HIDDEN, FFN)}
CAPACITY = 8192 + 256


class Bed:
    """The kernels, loaded, and one stream."""

    def __init__(self) -> None:
        torch.zeros(1, device="cuda")
        self.device = Device()
        self.facts = self.device.facts()
        specs = [*(s for s in SPECS if "f16" not in s.name.replace("bf16", "")), MANIFEST["sm80_stream_read"]]
        cache = Path(os.environ.get("RVLLM_CUBINS", "build/cubins"))
        started = time.perf_counter()
        self.functions = {}
        for cubin in build.load(build.units(specs, build.target_of(self.facts.capability)), cache):
            module = Module(cubin.code)
            for spec in specs:
                if spec.source == cubin.unit.source and spec.symbol in cubin.names:
                    self.functions[spec.name] = module.function(
                        cubin.names[spec.symbol], spec.name, spec.smem
                    )
        print(f"built in {time.perf_counter() - started:.1f} s", flush=True)
        self.stream = Stream()
        self.q = torch.empty(CAPACITY * 19072, dtype=torch.uint8, device="cuda")
        self.s = torch.empty(CAPACITY * 160, dtype=torch.float32, device="cuda")

    def seconds(self, launches, repeats: int = 9) -> float:
        """Median time of a replay of a graph of the launches."""
        torch.cuda.synchronize()
        self.stream.begin_capture()
        for launch, grid in launches:
            launch.run(self.stream, grid)
        graph = self.stream.end_capture()
        for _ in range(2):
            graph.launch(self.stream)
        times = []
        for _ in range(repeats):
            begin, end = Event(), Event()
            begin.record(self.stream)
            graph.launch(self.stream)
            end.record(self.stream)
            end.wait()
            times.append(end.seconds_since(begin))
        graph.close()
        return sorted(times)[len(times) // 2]

    def rate(self, memory: torch.Tensor) -> float:
        """Bytes a second of a plain read."""
        sink = torch.zeros(1, dtype=torch.int32, device="cuda")
        args = [memory.data_ptr(), ctypes.c_uint64(memory.numel() // 16), sink.data_ptr()]
        launch = Launch(self.functions["sm80_stream_read"], 512, 0, args, pdl=False)
        return memory.numel() / self.seconds([(launch, (132 * 4, 1, 1))], 5)

    def product(self, plan, x, weights, out, scales, quantise=True, **options):
        """The launches of one product: x is 16-bit; quantised first unless the kernel does it."""
        k = x.shape[1]
        pitch, work = fp8.activation_pitch(k), []
        if not plan.quantises and quantise:
            args = [
                x.data_ptr(),
                self.q.data_ptr(),
                self.s.data_ptr(),
                ctypes.c_int(k),
                ctypes.c_int(x.stride(0)),
                ctypes.c_int(pitch),
                ctypes.c_int(CAPACITY),
            ]
            work.append(
                (
                    Launch(self.functions["sm80_bf16_fp8_quantise"], 128, 0, args),
                    (-(-pitch // (256 * QUANTISE_GROUPS)), plan.tokens, 1),
                )
            )
        x_map = TensorMap.matrix(self.q.data_ptr(), plan.tokens, pitch // 2, pitch, plan.box_rows, 64, True)
        args = fp8.fp8_arguments(
            plan,
            x_map,
            x.data_ptr() if plan.quantises else self.q.data_ptr(),
            0 if plan.quantises else self.s.data_ptr(),
            weights,
            out.data_ptr(),
            out.stride(0),
            k=k,
            scales=scales,
            x_pitch=x.stride(0) if plan.quantises else CAPACITY,
            **options,
        )
        work.append(
            (
                Launch(self.functions[plan.kernel], plan.block, plan.smem, args, cluster=plan.cluster),
                plan.grid,
            )
        )
        work[-1][0].keep = (x, out)
        return work

    def run(self, work) -> None:
        torch.cuda.synchronize()
        for launch, grid in work:
            launch.run(self.stream, grid)
        self.stream.sync()


def quantised(x: torch.Tensor):
    """(numbers [T, blocks, 128], scales [T, blocks]) of x as fp8.cuh says, float64; NumPy divides well."""
    t, k = x.shape
    blocks = -(-k // 128)
    padded = np.pad(x.float().cpu().numpy(), ((0, 0), (0, -k % 256))).reshape(t, -1, 256)
    amax = np.maximum(np.abs(padded).max(-1), np.float32(1e-30))
    codes = np.clip(padded * (np.float32(448) / amax)[..., None], -448, 448).astype(ml_dtypes.float8_e4m3fn)
    codes = codes.astype(np.float64).reshape(t, -1, 128)[:, :blocks]
    scales = np.repeat(amax * np.float32(1 / 448), 2, axis=1)[:, :blocks].astype(np.float64)
    return torch.from_numpy(codes).cuda(), torch.from_numpy(scales).cuda()


def check_quantiser(bed: Bed) -> None:
    """The quantiser's bytes and scales against torch's."""
    x = torch.randn(300, 328, device="cuda").bfloat16()
    q, s = quantised(x)
    args = [x.data_ptr(), bed.q.data_ptr(), bed.s.data_ptr(), *map(ctypes.c_int, (328, 328, 384, CAPACITY))]
    bed.run([(Launch(bed.functions["sm80_bf16_fp8_quantise"], 128, 0, args), (1, 300, 1))])
    got = bed.q[: 300 * 384].view(torch.float8_e4m3fn).view(300, 3, 128).double()
    scales = bed.s[: 2 * CAPACITY].view(2, CAPACITY)[:, :300].T.double()[:, [0, 0, 1]]
    wrong = (got != q).nonzero()
    print(
        f"quantiser: {len(wrong)} of {got.numel()} codes differ, {(scales != s).sum().item()} scales",
        flush=True,
    )
    for t, b, k in wrong[:6].tolist():
        print(
            t,
            b,
            k,
            got[t, b, k].item(),
            q[t, b, k].item(),
            x[t, b * 128 + k].item(),
            s[t, b].item(),
            scales[t, b].item(),
        )


def runs(mode: str, n: int, k: int) -> bool:
    """Whether a mode's kernels multiply with a weight of so many rows and columns."""
    if mode == "sum" or mode.endswith("_sum"):
        return True
    if mode == "square_pair":
        return 1 < fp8.segments_of(n, k) <= MAX_PAIR_SEGMENTS
    return mode.startswith("split") != (fp8.segments_of(n, k) == 1)


SUM_ERROR = 2**-11  # of the sum of |products|: the tensor cores add e4m3's products with 14 bits
CLOSE = 0.02  # of what an epilogue's own roundings may give


class Checker:
    def __init__(self, bed: Bed) -> None:
        self.bed, self.failures, self.launches, self.worst = bed, [], 0, 0.0

    def weight(self, n: int, k: int, scales: str):
        """(packed with scales, float64 [n, blocks, 128])."""
        codes = (torch.randn(n, k, device="cuda") * 60).clamp(-448, 448).to(torch.float8_e4m3fn)
        packed = torch.from_numpy(fp8.pack_codes(codes.view(torch.uint8).cpu().numpy())).cuda()
        shape = fp8.scales_shape(n, k, scales)
        factors = (torch.rand(shape, device="cuda") + 0.5) / (60 * k**0.5)
        whole = torch.full((fp8.packed_nbytes(n, k, scales),), 255, dtype=torch.uint8, device="cuda")
        whole[: packed.numel()] = packed
        whole[fp8.scales_offset(n, k) :] = factors.reshape(-1).view(torch.uint8)
        numbers = torch.nn.functional.pad(codes.double(), (0, -k % 128)).view(n, -1, 128)
        if scales == "row":
            return whole, numbers * factors[:n, None, None].double()
        by_row = factors.repeat_interleave(8, 2).reshape(factors.shape[0], -1)[:, :n]
        return whole, numbers * by_row.T[..., None].double()

    def shape(self, n: int, k: int, scales: str, sizes) -> None:
        packed, w = self.weight(n, k, scales)
        top = max(sizes)
        x = torch.randn(top, k, device="cuda").bfloat16() * torch.exp2(
            torch.randint(-6, 7, (top, 1), device="cuda")
        )
        x = x.bfloat16()
        q, s = quantised(x)
        want = torch.einsum("tbk,tb,nbk->tn", q, s, w)
        size = torch.einsum("tbk,tb,nbk->tn", q.abs(), s, w.abs())
        bits = None
        for tokens in sorted(sizes, reverse=True):
            for mode, tiles in MODES.items():
                if not runs(mode, n, k):
                    continue
                for tile in tiles:
                    if tokens > 4 * tile or tile > 8 * tokens or not fp8._fits(mode, n, k, tile):
                        continue
                    if mode.endswith("resident") and tokens > tile:
                        continue
                    plan = fp8.variant(n, k, tokens, "bf16", mode, tile, self.bed.facts.sm_count)
                    if tokens % 2:  # both ways of the resident ones
                        plan = replace(plan, quantises=plan.resident)
                    out = torch.full((top, n), float("nan"), device="cuda")
                    self.bed.s.fill_(float("nan"))
                    self.bed.run(
                        self.bed.product(plan, x[:tokens], packed.data_ptr(), out, scales, kind=Kind.LOGITS)
                    )
                    self.launches += 1
                    got = out[:tokens].double()
                    error = ((got - want[:tokens]).abs() / size[:tokens].clamp_min(1e-30)).max().item()
                    self.worst = max(self.worst, 9e9 if math.isnan(error) else error)
                    bits = out.clone() if bits is None else bits
                    same = torch.equal(out[:tokens].view(torch.int32), bits[:tokens].view(torch.int32))
                    if not error < SUM_ERROR or not same or not out[tokens:].isnan().all():
                        self.failures.append(
                            f"{plan.kernel} {n}x{k} {scales} t={tokens}: error {error:.1e} same={same}"
                        )
        self.epilogues(n, k, scales, packed, x, want, size, sizes)

    def epilogues(self, n, k, scales, packed, x, want, size, sizes) -> None:
        """Bias, residual and SiLU * up, against the formula in float64."""
        bias = torch.randn(n, device="cuda").bfloat16()
        for tokens in sizes:
            plan = fp8.plan_fp8(n, k, tokens, "bf16", self.bed.facts.sm_count, False)
            added = torch.randn(tokens, n, device="cuda").bfloat16()
            out = torch.full((tokens, n), float("nan"), dtype=torch.bfloat16, device="cuda")
            self.bed.run(
                self.bed.product(
                    plan,
                    x[:tokens],
                    packed.data_ptr(),
                    out,
                    scales,
                    bias=bias.data_ptr(),
                    residual=added.data_ptr(),
                    scale=0.5,
                )
            )
            ref = added.double() + 0.5 * (want[:tokens] + bias.double())
            self.close(out, ref, size[:tokens] / 8, f"{plan.kernel} {n}x{k} t={tokens} bias, residual")
            if n % 16 == 0:
                gated = torch.full((tokens, n // 2), float("nan"), dtype=torch.bfloat16, device="cuda")
                self.bed.run(
                    self.bed.product(plan, x[:tokens], packed.data_ptr(), gated, scales, kind=Kind.GATED_SILU)
                )
                halves = want[:tokens].view(tokens, n // 16, 2, 8)
                gate, up = halves[:, :, 0].reshape(tokens, -1), halves[:, :, 1].reshape(tokens, -1)
                spread = size[:tokens].view(tokens, n // 16, 2, 8) * SUM_ERROR  # what the sums may be off by
                off_gate, off_up = spread[:, :, 0].reshape(tokens, -1), spread[:, :, 1].reshape(tokens, -1)
                self.close(
                    gated,
                    torch.nn.functional.silu(gate) * up,
                    # The slope of SiLU is at most 1.1.
                    (gate.abs() + 1) * (up.abs() + 1) * 2
                    + (1.1 * off_gate * (up.abs() + off_up) + (gate.abs() + 1) * off_up) / CLOSE,
                    f"{plan.kernel} {n}x{k} t={tokens} gated",
                )

    def close(self, got, ref, scale, what) -> None:
        self.launches += 1
        error = ((got.double() - ref).abs() / (scale.abs() + ref.abs() + 1)).max().item()
        if not error < CLOSE:
            self.failures.append(f"{what}: error {error:.2e}")


def check(bed: Bed) -> None:
    check_quantiser(bed)
    checker = Checker(bed)
    for n, k in ((200, 328), (64, 8), (1000, 136), (130, 4096), (4608, 3584), (3584, 3584), (20000, 512)):
        for scales in ("row", "block"):
            print(
                f"{n} x {k} {scales}: {checker.launches} launches, {len(checker.failures)} failures",
                flush=True,
            )
            try:
                checker.shape(n, k, scales, (1, 2, 7, 8, 9, 16, 17, 33, 64, 65, 128, 129, 300))
            except Exception as error:  # a wedged context ends the run, with what was found so far
                print(f"{n}x{k} {scales}: {error}", flush=True)
                print("\n".join(checker.failures[:20]), flush=True)
                raise
    print(
        f"{checker.launches} launches checked, worst error over sum of |products| {checker.worst:.1e}, "
        f"{len(checker.failures)} failures",
        flush=True,
    )
    kinds: dict[str, list[str]] = {}
    for failure in checker.failures:
        kinds.setdefault(failure.split()[0] + " " + failure.split()[1] + failure.split()[2][:5], []).append(
            failure
        )
    for failures in list(kinds.values())[:60]:
        print(len(failures), failures[0], flush=True)


class Bench:
    def __init__(self, bed: Bed) -> None:
        self.bed = bed
        self.each = {
            name: -(-fp8.packed_nbytes(n, k, "block") // 256) * 256 for name, (n, k) in SHAPES.items()
        }
        total = LAYERS * sum(self.each.values())
        numbers = torch.empty(1 << 27, device="cuda").normal_(0, 60).to(torch.float8_e4m3fn).view(torch.uint8)
        self.weights = numbers.repeat(-(-total // numbers.numel()))[:total]
        # Scales must be numbers: fill each weight's with ones.
        for layer in range(LAYERS):
            for name, (n, k) in SHAPES.items():
                at = self.offset(name, layer) + fp8.scales_offset(n, k)
                count = 4 * int(np.prod(fp8.scales_shape(n, k, "block")))
                self.weights[at : at + count].view(torch.float32).fill_(1e-4)
        self.rate = bed.rate(self.weights)
        print(f"plain read {self.rate / 1e12:.2f} TB/s", flush=True)

    def offset(self, name: str, layer: int) -> int:
        at = layer * sum(self.each.values())
        for other, nbytes in self.each.items():
            if other == name:
                return at
            at += nbytes
        raise KeyError(name)

    def address(self, name: str, layer: int) -> int:
        return self.weights.data_ptr() + self.offset(name, layer)

    def chain(self, tokens: int, scales: str, quantise: bool) -> float:
        def empty(width):
            return torch.zeros(tokens, width, dtype=torch.bfloat16, device="cuda")

        x, qkv, h = empty(HIDDEN), empty(QKV), empty(FFN)
        x.normal_()
        work = []

        def add(name, layer, source, out, **options):
            normed = quantise and name in ("qkv", "gate_up")  # whose activations a norm has quantised
            plan = fp8.plan_fp8(*SHAPES[name], tokens, "bf16", self.bed.facts.sm_count, normed)
            address = self.address(name, layer)
            work.extend(
                self.bed.product(plan, source, address, out, scales, quantise and not normed, **options)
            )

        for layer in range(LAYERS):
            add("qkv", layer, x, qkv)
            add("o", layer, qkv[:, :HIDDEN], x, residual=x.data_ptr())
            add("gate_up", layer, x, h, kind=Kind.GATED_SILU)
            add("down", layer, h, x, residual=x.data_ptr())
        return self.bed.seconds(work)

    def shapes(self, sizes) -> None:
        for name, (n, k) in SHAPES.items():
            for tokens in sizes:
                x = torch.randn(tokens, k, device="cuda").bfloat16()
                gated = name == "gate_up"
                out = torch.zeros(tokens, n // 2 if gated else n, dtype=torch.bfloat16, device="cuda")
                count = min(LAYERS, max(4, 20000 // tokens))
                plans = {"chosen": fp8.plan_fp8(n, k, tokens, "bf16", self.bed.facts.sm_count, False)}
                for mode in MODES:
                    for tile in MODES[mode] if runs(mode, n, k) else ():
                        near = tokens <= tile <= 8 * tokens or (tokens > tile >= 128)
                        if near and fp8._fits(mode, n, k, tile) and tokens // tile < 100:
                            plan = fp8.variant(n, k, tokens, "bf16", mode, tile, self.bed.facts.sm_count)
                            plans.setdefault(f"{mode}{tile}", plan)
                if tokens > 1000:
                    plans = {label: p for label, p in plans.items() if p.mode != "split"}
                line = []
                for label, plan in plans.items():
                    work = []
                    for layer in range(count):
                        work += self.bed.product(
                            plan,
                            x,
                            self.address(name, layer),
                            out,
                            "row",
                            False,
                            kind=Kind.GATED_SILU if gated else Kind.STORE,
                        )
                    took = self.bed.seconds(work, 5) / count
                    shown = plan.kernel[19:] if label == "chosen" else label
                    rate, work_done = n * k / took / 1e12, 2 * n * k * tokens / took / 1e12
                    line.append(f"{shown} {took * 1e6:.1f}us {rate:.2f}TB/s {work_done:.0f}TF")
                print(f"{name:8} {tokens:5} | " + " | ".join(line), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tokens", default="1,8,32,64,128,256,512,8192")
    parser.add_argument("--only", default="check,chain,shapes")
    args = parser.parse_args()
    sizes = [int(n) for n in args.tokens.split(",")]
    torch.manual_seed(time.time_ns() % 2**31)
    bed = Bed()
    if "check" in args.only:
        check(bed)
    bench = Bench(bed)
    weights = sum(n * k for n, k in SHAPES.values()) * LAYERS
    if "chain" in args.only:
        for tokens in sizes:
            if tokens > 1000:
                continue
            row, block, bare = (
                bench.chain(tokens, *way) for way in (("row", True), ("block", True), ("row", False))
            )
            print(
                f"chain {tokens:4}: {row * 1e3:.3f} ms, block scales {block * 1e3:.3f}, "
                f"without any quantising {bare * 1e3:.3f}; "
                f"reading {weights / bench.rate * 1e3:.3f}; {2 * weights * tokens / row / 1e12:.0f} TFLOP/s",
                flush=True,
            )
    if "shapes" in args.only:
        bench.shapes(sizes)


if __name__ == "__main__":
    main()
    sys.exit(0)

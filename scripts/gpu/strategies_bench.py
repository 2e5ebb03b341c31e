"""Checks and times the strategies of --gemm-strategy on this GPU, shape by shape: native, cuBLASLt, CUTLASS.

    PYTHONPATH=src:scripts/gpu python scripts/gpu/strategies_bench.py [--only check,times,tiles]

check: CUTLASS kernels against float64 (fresh random inputs, poisoned outputs, every tile, ragged sizes), and
the same bits from every tile and batch. times: a 7B's matrices, the strategies in turns, weights of several
layers so that none stays in L2; cuBLASLt computes gate_up without SiLU * up. tiles: every tile of CUTLASS's.
"""

from __future__ import annotations

import argparse
import sys

import torch
from gemm_bed import TORCH, Bed, Work

from rvllm.backends.cuda.device.driver import Launch, Module, TensorMap
from rvllm.backends.cuda.ops.gemm import cublas, cutlass
from rvllm.backends.cuda.ops.gemm import plan as gemm
from rvllm.backends.cuda.ops.gemm.common import Kind
from rvllm.config import kernel_cache_dir
from rvllm.kernels import build
from rvllm.kernels.gemm.cutlass.specs import SPECS, TILES

SHAPES = {"qkv": (4608, 3584), "o": (3584, 3584), "gate_up": (37888, 3584), "down": (3584, 18944)}
TOKENS = (1, 8, 16, 32, 64, 96, 128, 192, 256, 384, 512, 1024, 2048, 8192)
CHECKED = (1, 2, 7, 8, 9, 31, 64, 65, 127, 128, 129, 200, 256, 300, 513)
WEIGHTS_OF_LAYERS = 300 << 20  # bytes that a measurement passes over, several times L2


class Cutlass:
    """The CUTLASS kernels, loaded beside the bed's."""

    def __init__(self, bed: Bed, dtypes: list[str]) -> None:
        self.bed = bed
        specs = [spec for spec in SPECS if spec.name.split("_")[1] in dtypes]
        by_symbol = {spec.symbol: spec for spec in specs}
        for cubin in build.load(build.units(specs, "sm_90a"), kernel_cache_dir()):
            module = Module(cubin.code)
            for symbol, mangled in cubin.names.items():
                spec = by_symbol[symbol]
                bed.functions[spec.name] = module.function(mangled, spec.name, spec.smem)

    def launch(self, plan: cutlass.CutlassPlan, x: torch.Tensor, packed: int, out: torch.Tensor, dtype: str,
               **options: object) -> Launch:  # fmt: skip
        source = TensorMap.matrix(x.data_ptr(), *x.shape, x.stride(0) * 2, plan.box_rows, 64, dtype == "bf16")
        arguments = plan.arguments(source, packed, out.data_ptr(), out.stride(0), **options)
        launch = Launch(
            self.bed.functions[plan.kernel], plan.block, plan.smem, arguments, cluster=plan.cluster
        )
        launch.keep = (x, out)  # type: ignore[attr-defined]  # torch frees what nobody holds
        return launch


def check(bed: Bed, theirs: Cutlass, dtype: str) -> int:
    """Failures over shapes, tiles, batches and epilogues."""
    failures, launches, kind, sms = 0, 0, TORCH[dtype], bed.facts.sm_count

    def run(plan: cutlass.CutlassPlan, width: int, raw: torch.dtype, **options: object) -> torch.Tensor:
        nonlocal launches, failures
        launches += 1
        out = torch.full((plan.tokens + 64, width), -1, dtype=raw, device="cuda")
        view = out.view(torch.float32 if raw == torch.int32 else kind)
        torch.cuda.synchronize()
        theirs.launch(plan, x, packed.data_ptr(), view, dtype, **options).run(bed.stream, plan.grid)
        bed.stream.sync()
        if (out[plan.tokens :] != -1).any() or (out[: plan.tokens] == -1).any():
            failures += 1
            print(
                "FAIL wrote outside, or not all",
                plan.kernel,
                plan.tokens,
                plan.rows,
                options.get("kind"),
                flush=True,
            )
        return view[: plan.tokens]

    def expect(good: bool, *what: object) -> None:
        nonlocal failures
        if not good:
            failures += 1
            print("FAIL", *what, flush=True)

    worst = 0.0
    for n, k in ((64, 8), (208, 72), (1003, 264), (896, 4864), (4608, 3584), (3584, 3584)):
        x = torch.randn(1100, k, device="cuda").to(kind)
        w = (torch.randn(n, k, device="cuda") * k**-0.5).to(kind)
        packed = bed.pack(w, dtype)
        exact = x.double() @ w.double().T
        plan = cutlass.variant(n, k, 1024, dtype, TILES[-1], sms)
        sums = run(plan, n, torch.int32, kind=Kind.LOGITS)
        error = float((sums.double() - exact[:1024]).norm() / exact[:1024].norm())
        worst = max(worst, error)
        expect(error < 2e-5, "error", n, k, error)
        for tokens in CHECKED:
            for tile in TILES:
                plan = cutlass.variant(n, k, tokens, dtype, tile, sms)
                got = run(plan, n, torch.int32, kind=Kind.LOGITS)
                same = torch.equal(got.view(torch.int32), sums[:tokens].view(torch.int32))
                expect(same, "bits", plan.kernel, tokens, n, k)
        for tokens in (5, 70, 300):
            row = sums[:tokens]
            bias, residual = (
                torch.randn(n, device="cuda").to(kind),
                torch.randn(tokens, n, device="cuda").to(kind),
            )
            summed = (residual.float() + (row + bias.float()).to(kind).float() * 0.5).to(kind)
            for tile in cutlass.ways_of(tokens):
                plan = cutlass.variant(n, k, tokens, dtype, tile, sms)
                expect(torch.equal(run(plan, n, torch.int16), row.to(kind)), "store", plan.kernel, tokens, n)
                got = run(plan, n, torch.int16, bias=bias.data_ptr(), residual=residual.data_ptr(), scale=0.5)
                expect(torch.equal(got, summed), "residual", plan.kernel, tokens, n)
                if n % 16 == 0:
                    got = run(plan, n // 2, torch.int16, kind=Kind.GATED_SILU).double()
                    both = row.to(kind).double().view(tokens, -1, 2, 8)
                    want = (torch.nn.functional.silu(both[:, :, 0]) * both[:, :, 1]).reshape(tokens, -1)
                    off = float((got - want).norm() / want.norm())
                    expect(off < 4e-3, "gated", plan.kernel, tokens, n, off)
    print(
        f"check {dtype}: {launches} launches, {failures} failures, worst error of sums {worst:.1e}",
        flush=True,
    )
    return failures


class Times:
    """Weights of a 7B's matrices, several layers of each, and launches over them."""

    def __init__(self, bed: Bed, theirs: Cutlass) -> None:
        self.bed, self.theirs, self.sms = bed, theirs, bed.facts.sm_count
        self.memory = (torch.randn(1 << 29, device="cuda") * 0.02).bfloat16()
        self.workspace = torch.empty(cublas.WORKSPACE, dtype=torch.uint8, device="cuda")

    def layers(self, name: str) -> list[int]:
        n, k = SHAPES[name]
        count = max(2, WEIGHTS_OF_LAYERS // (2 * n * k))
        return [self.memory.data_ptr() + 2 * n * k * i for i in range(count)]

    def tensors(self, name: str, tokens: int) -> tuple[torch.Tensor, torch.Tensor]:
        n, k = SHAPES[name]
        x = torch.randn(tokens, k, device="cuda").bfloat16()
        return x, torch.zeros(tokens, n, dtype=torch.bfloat16, device="cuda")

    def kind(self, name: str) -> Kind:
        return Kind.GATED_SILU if name == "gate_up" else Kind.STORE

    def native(self, name: str, tokens: int) -> Work:
        x, out = self.tensors(name, tokens)
        plan = gemm.plan_gemm(*SHAPES[name], tokens, "bf16", self.sms)
        return [
            (self.bed.launch(plan, x, at, out, "bf16", kind=self.kind(name)), plan.grid)
            for at in self.layers(name)
        ]

    def cutlass(self, name: str, tokens: int, plan: cutlass.CutlassPlan | None = None) -> Work:
        x, out = self.tensors(name, tokens)
        plan = plan or cutlass.plan_cutlass(*SHAPES[name], tokens, "bf16", self.sms, 90)
        return [
            (self.theirs.launch(plan, x, at, out, "bf16", kind=self.kind(name)), plan.grid)
            for at in self.layers(name)
        ]

    def cublas(self, name: str, tokens: int) -> Work:
        n, k = SHAPES[name]
        x, out = self.tensors(name, tokens)
        launches: Work = []
        for at in self.layers(name):
            memory = x.data_ptr(), at, out.data_ptr(), 0, 0
            product = cublas.Matmul(*memory, tokens, n, k, n, 1.0, True, False, self.workspace.data_ptr())
            launch = cublas.MatmulLaunch(product)
            launch.keep = (x, out)  # type: ignore[attr-defined]
            launches.append((launch, (1, 1, 1)))  # type: ignore[arg-type]
        return launches

    def table(self, sizes: list[int]) -> None:
        print("matrix   tokens   native  cublas  cutlass us", flush=True)
        for name, shape in SHAPES.items():
            count = len(self.layers(name))
            for tokens in sizes:
                works = {w: getattr(self, w)(name, tokens) for w in ("native", "cublas", "cutlass")}
                found = {w: s / count * 1e6 for w, s in self.bed.turns(works, 5).items()}
                chosen = cutlass.plan_cutlass(*shape, tokens, "bf16", self.sms, 90).kernel
                times = "  ".join(f"{us:7.1f}" for us in found.values())
                print(f"{name:8} {tokens:6}  {times}  {chosen.rpartition('cutlass_')[2]}", flush=True)

    def tiles(self, sizes: list[int]) -> None:
        for name, (n, k) in SHAPES.items():
            count = len(self.layers(name))
            for tokens in sizes:
                plans = {
                    t: cutlass.variant(n, k, tokens, "bf16", t, self.sms) for t in cutlass.ways_of(tokens)
                }
                works = {
                    f"r{t.rows}n{t.tokens}": self.cutlass(name, tokens, plan) for t, plan in plans.items()
                }
                found = {w: s / count * 1e6 for w, s in self.bed.turns(works, 3).items()}
                tile = cutlass.plan_cutlass(n, k, tokens, "bf16", self.sms, 90).tile
                chosen = f"r{tile.rows}n{tile.tokens}"
                best = min(found, key=found.__getitem__)
                print(f"{name:8} {tokens:6} chosen {chosen} best {best} {found[chosen] / found[best]:.2f}: "
                      + "  ".join(f"{w} {us:.1f}" for w, us in found.items()), flush=True)  # fmt: skip


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", default="check,times,tiles")
    parser.add_argument("--dtypes", default="bf16,f16")
    parser.add_argument("--tokens", default=",".join(map(str, TOKENS)))
    args = parser.parse_args()
    dtypes, sizes = args.dtypes.split(","), [int(t) for t in args.tokens.split(",")]
    bed = Bed(tuple(dtypes))
    theirs, failures = Cutlass(bed, dtypes), 0
    print(f"{bed.facts.name}; kernels in {bed.build_seconds:.1f} s", flush=True)
    if "check" in args.only:
        failures = sum(check(bed, theirs, dtype) for dtype in dtypes)
    if "times" in args.only or "tiles" in args.only:
        times = Times(bed, theirs)
        if "times" in args.only:
            times.table(sizes)
        if "tiles" in args.only:
            times.tiles(sizes)
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())

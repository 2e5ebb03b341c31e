"""Times the matrix kernels on this GPU: the products of a 7B model as one decode chain, and prefill.

    PYTHONPATH=src:scripts/gpu python scripts/gpu/gemm_bench.py [--tokens 1,8] [--only chain,turns]

The chain is 28 layers of qkv, o (+ residual), gate_up (+ SiLU * up), down (+ residual) and the head, each
product reading the one before, in one CUDA graph with programmatic dependent launch. Beside it, from the
same run: the fastest plain read of the weights, and cuBLAS (through torch) for the same matrices. Above 500
tokens power sets the clock, so kernels compare only in `turns`.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable

import torch
from gemm_bed import Bed, Work

from rvllm.backends.cuda.ops.gemm import cost, cublas
from rvllm.backends.cuda.ops.gemm import plan as gemm
from rvllm.backends.cuda.ops.gemm.common import Kind

LAYERS, HIDDEN, FFN, QKV, VOCAB = 28, 3584, 18944, 4608, 152064
SHAPES = {"qkv": (QKV, HIDDEN), "o": (HIDDEN, HIDDEN), "gate_up": (2 * FFN, HIDDEN), "down": (HIDDEN, FFN),
          "lm_head": (VOCAB, HIDDEN)}  # fmt: skip
LAYER_BYTES = sum(2 * n * k for name, (n, k) in SHAPES.items() if name != "lm_head")


class Bench:
    def __init__(self, bed: Bed) -> None:
        self.bed = bed
        total = LAYERS * LAYER_BYTES + 2 * VOCAB * HIDDEN
        self.weights = torch.empty(total // 2, dtype=torch.bfloat16, device="cuda")
        for part in self.weights.split(1 << 29):
            part.normal_(0, 0.01)
        self.limit = bed.read_limit(self.weights)

    def address(self, name: str, layer: int) -> int:
        """Where a weight lies; every tile is full, so any 16-bit values are a valid packed matrix."""
        base = self.weights.data_ptr()
        if name == "lm_head":
            return base + LAYERS * LAYER_BYTES
        offset = 0
        for other, (n, k) in SHAPES.items():
            if other == name:
                break
            offset += 2 * n * k
        return base + layer * LAYER_BYTES + offset

    def chain(self, tokens: int) -> float:
        """Seconds of one decode step's products."""
        rows = max(tokens, 8)

        def empty(width: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
            return torch.zeros(rows, width, dtype=dtype, device="cuda")

        x, qkv, h, logits = empty(HIDDEN), empty(QKV), empty(FFN), empty(VOCAB, torch.float32)
        x.normal_()
        launches: Work = []

        def add(name: str, layer: int, source: torch.Tensor, out: torch.Tensor, **options: object) -> None:
            plan = gemm.plan_gemm(*SHAPES[name], tokens, "bf16", self.bed.facts.sm_count)
            weight = self.address(name, layer)
            launch = self.bed.launch(plan, source, weight, out, "bf16", **options)
            launches.append((launch, plan.grid))

        for layer in range(LAYERS):
            add("qkv", layer, x, qkv)
            add("o", layer, qkv[:, :HIDDEN], x, residual=x.data_ptr())
            add("gate_up", layer, x, h, kind=Kind.GATED_SILU)
            add("down", layer, h, x, residual=x.data_ptr())
        add("lm_head", 0, x, logits, kind=Kind.LOGITS)
        return self.bed.graph_seconds(launches)

    def shape(self, name: str, tokens: int, plan: gemm.GemmPlan | None = None) -> float:
        """Seconds of one matrix, from a graph over all layers' weights."""
        n, k = SHAPES[name]
        plan = plan or gemm.plan_gemm(n, k, tokens, "bf16", self.bed.facts.sm_count)
        return self.bed.graph_seconds(self.ours(name, tokens, plan), 7) / self.count(name, tokens)

    def ours(self, name: str, tokens: int, plan: gemm.GemmPlan) -> Work:
        """Launches of one matrix over all layers' weights."""
        n, k = SHAPES[name]
        x = torch.randn(tokens, k, device="cuda").bfloat16()
        gated, head = name == "gate_up", name == "lm_head"
        kind = Kind.GATED_SILU if gated else Kind.LOGITS if head else Kind.STORE
        out_type = torch.float32 if head else torch.bfloat16
        out = torch.zeros(tokens, n // 2 if gated else n, dtype=out_type, device="cuda")
        return [
            (self.bed.launch(plan, x, self.address(name, layer), out, "bf16", kind=kind), plan.grid)
            for layer in range(self.count(name, tokens))
        ]

    def theirs(self, name: str, tokens: int) -> Work:
        """The same through cuBLASLt as the engine calls it, without SiLU * up."""
        n, k = SHAPES[name]
        x = torch.randn(tokens, k, device="cuda").bfloat16()
        head = name == "lm_head"
        out = torch.zeros(tokens, n, dtype=torch.float32 if head else torch.bfloat16, device="cuda")
        workspace = torch.empty(cublas.WORKSPACE, dtype=torch.uint8, device="cuda")
        launches: Work = []
        for layer in range(self.count(name, tokens)):
            memory = x.data_ptr(), self.address(name, layer), out.data_ptr(), 0, 0
            product = cublas.Matmul(*memory, tokens, n, k, n, 1.0, True, head, workspace.data_ptr())
            launch = cublas.MatmulLaunch(product)
            launch.keep = (x, out, workspace)  # type: ignore[attr-defined]  # torch frees what nobody holds
            launches.append((launch, (1, 1, 1)))
        return launches

    def count(self, name: str, tokens: int) -> int:
        """How many layers' weights a measurement passes over."""
        return 1 if name == "lm_head" else min(LAYERS, max(4, 20000 // tokens))

    def cublas(self, name: str, tokens: int) -> float:
        """The same through torch.matmul in a CUDA graph, without SiLU * up."""
        n, k = SHAPES[name]
        x = torch.randn(tokens, k, device="cuda").bfloat16()
        out = torch.empty(tokens, n, dtype=torch.bfloat16, device="cuda")
        count = self.count(name, tokens)
        base = self.weights.data_ptr()
        views = [
            self.weights[(self.address(name, i) - base) // 2 :][: n * k].view(n, k) for i in range(count)
        ]

        def work() -> None:
            for view in views:
                torch.matmul(x, view.T, out=out)

        return torch_graph_seconds(work) / count


def torch_graph_seconds(work: Callable[[], None], repeats: int = 7) -> float:
    """Median time of a replay of torch work captured in a graph."""
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        work()
    side.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        work()
    graph.replay()
    times = []
    for _ in range(repeats):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end) / 1e3)
    return sorted(times)[len(times) // 2]


def compare(bench: Bench, sizes: list[int]) -> None:
    """What is chosen, what could be, and cuBLASLt, in turns, shape by shape: TFLOP/s (microseconds)."""
    sms = bench.bed.facts.sm_count
    for name, (n, k) in SHAPES.items():
        segments = gemm.segments_of(n, k)
        for tokens in sizes:
            plans = {"chosen": gemm.plan_gemm(n, k, tokens, "bf16", sms)}
            work = cost.Work(n, tokens, plans["chosen"].blocks, segments, sms)
            others = sorted(gemm.ways_of(segments, tokens), key=lambda way: cost.cycles(*way, work))[:6]
            for mode, tile in others:
                plan = gemm.variant(n, k, tokens, "bf16", mode, tile, sms)
                if (mode, tile) != (plans["chosen"].mode, plans["chosen"].token_tile):
                    plans[f"{mode}{tile}"] = plan
            works = {label: bench.ours(name, tokens, plan) for label, plan in plans.items()}
            found = bench.bed.turns(works | {"cublas": bench.theirs(name, tokens)})
            work, count = 2.0 * n * k * tokens, bench.count(name, tokens)
            line = "  ".join(
                f"{label} {work * count / s / 1e12:.0f} ({s / count * 1e6:.1f})" for label, s in found.items()
            )
            way = f"{plans['chosen'].mode}{plans['chosen'].token_tile}"
            print(f"{name:8} {tokens:5} {way:9} {line}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tokens", default="1,8,16,32,64,96,128,256,512")
    parser.add_argument("--shape-tokens", default="1,32,64,128,256")
    parser.add_argument("--prefill-tokens", default="1024,8192")
    turns = "64,96,128,129,144,160,192,224,256,257,288,320,384,448,512,2048,8192"
    parser.add_argument("--turn-tokens", default=turns)
    parser.add_argument("--only", default="chain,shapes,prefill", help="also: turns")
    args = parser.parse_args()
    bench = Bench(Bed())
    nbytes, limit = bench.weights.numel() * 2, bench.limit
    print(
        f"{bench.bed.facts.name}: plain read {limit / 1e12:.2f} TB/s, {nbytes / 1e9:.2f} GB of weights "
        f"in {nbytes / limit * 1e3:.2f} ms"
    )
    if "chain" in args.only:
        print("chain    tokens   ms      TB/s  of read limit   TFLOP/s", flush=True)
        for tokens in map(int, args.tokens.split(",")):
            seconds = bench.chain(tokens)
            rate, work = nbytes / seconds, nbytes * tokens / seconds / 1e12
            print(
                f"chain    {tokens:6} {seconds * 1e3:7.3f}  {rate / 1e12:5.2f}  "
                f"{rate / limit:8.1%}  {work:12.0f}",
                flush=True,
            )
    if "turns" in args.only:
        compare(bench, [int(t) for t in args.turn_tokens.split(",")])
    head = "matrix  tokens  kernel                         us  cuBLAS us  TFLOP/s  cuBLAS  floor us"
    for section, sizes in (("shapes", args.shape_tokens), ("prefill", args.prefill_tokens)):
        if section not in args.only:
            continue
        print(f"{section:8} {head}", flush=True)
        for tokens in map(int, sizes.split(",")):
            for name, (n, k) in SHAPES.items():
                if section == "prefill" and name == "lm_head":
                    continue
                plan = gemm.plan_gemm(n, k, tokens, "bf16", bench.bed.facts.sm_count)
                flops = 2.0 * n * k * tokens
                ours, theirs = bench.shape(name, tokens), bench.cublas(name, tokens)
                floor = max(2 * n * k / limit, flops / 790e12)
                print(
                    f"{section:8} {name:8} {tokens:5}  {plan.kernel:24} {ours * 1e6:8.1f} "
                    f"{theirs * 1e6:9.1f} {flops / ours / 1e12:8.0f} {flops / theirs / 1e12:8.0f} "
                    f"{floor * 1e6:8.1f}",
                    flush=True,
                )


if __name__ == "__main__":
    main()

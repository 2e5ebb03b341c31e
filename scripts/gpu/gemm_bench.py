"""Times the matrix kernels on this GPU: the products of a 7B model as one decode chain, and prefill.

    PYTHONPATH=src:scripts/gpu python scripts/gpu/gemm_bench.py [--tokens 1,8] [--only chain,shapes,prefill]

The chain is 28 layers of qkv, o (+ residual), gate_up (+ SiLU * up), down (+ residual) and the head, each
product reading the one before, in one CUDA graph with programmatic dependent launch. Beside it, from the
same run: the fastest plain read of the weights, and cuBLAS (through torch) for the same matrices.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable

import torch
from gemm_bed import Bed

from rvllm.backends.cuda import gemm
from rvllm.backends.cuda.driver import Launch

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
        launches: list[tuple[Launch, tuple[int, int, int]]] = []

        def add(name: str, layer: int, source: torch.Tensor, out: torch.Tensor, **options: object) -> None:
            plan = gemm.plan_gemm(*SHAPES[name], tokens, "bf16", self.bed.facts.sm_count)
            weight = self.address(name, layer)
            launch = self.bed.launch(plan, source, weight, out, "bf16", **options)
            launches.append((launch, plan.grid))

        for layer in range(LAYERS):
            add("qkv", layer, x, qkv)
            add("o", layer, qkv[:, :HIDDEN], x, residual=x.data_ptr())
            add("gate_up", layer, x, h, kind=gemm.Kind.GATED_SILU)
            add("down", layer, h, x, residual=x.data_ptr())
        add("lm_head", 0, x, logits, kind=gemm.Kind.LOGITS)
        return self.bed.graph_seconds(launches)

    def shape(self, name: str, tokens: int, plan: gemm.GemmPlan | None = None) -> float:
        """Seconds of one matrix, from a graph over all layers' weights."""
        n, k = SHAPES[name]
        plan = plan or gemm.plan_gemm(n, k, tokens, "bf16", self.bed.facts.sm_count)
        x = torch.randn(tokens, k, device="cuda").bfloat16()
        gated = name == "gate_up"
        kind = gemm.Kind.GATED_SILU if gated else gemm.Kind.STORE
        out = torch.zeros(tokens, n // 2 if gated else n, dtype=torch.bfloat16, device="cuda")
        count = 1 if name == "lm_head" else min(LAYERS, max(4, 20000 // tokens))
        launches = [
            (self.bed.launch(plan, x, self.address(name, layer), out, "bf16", kind=kind), plan.grid)
            for layer in range(count)
        ]
        return self.bed.graph_seconds(launches, 7) / count

    def cublas(self, name: str, tokens: int) -> float:
        """The same through torch.matmul in a CUDA graph, without SiLU * up."""
        n, k = SHAPES[name]
        x = torch.randn(tokens, k, device="cuda").bfloat16()
        out = torch.empty(tokens, n, dtype=torch.bfloat16, device="cuda")
        count = 1 if name == "lm_head" else min(LAYERS, max(4, 20000 // tokens))
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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tokens", default="1,8,16,32,64,96,128,256,512")
    parser.add_argument("--shape-tokens", default="1,32,64,128,256")
    parser.add_argument("--prefill-tokens", default="1024,8192")
    parser.add_argument("--only", default="chain,shapes,prefill")
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

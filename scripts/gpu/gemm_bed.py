"""What the GPU scripts for the matrix kernels share: kernels built and loaded, weights packed, launches.

Torch holds the memory and computes references; it is no part of rvllm. Needs one GPU and, from the
repository's root, `PYTHONPATH=src`.
"""

from __future__ import annotations

import ctypes
import os
import time
from pathlib import Path

import torch

from rvllm.backends.cuda.device.driver import Device, Event, Function, Launch, Module, Stream, TensorMap
from rvllm.backends.cuda.ops.gemm import plan as gemm
from rvllm.kernels import build
from rvllm.kernels.gemm.specs import SPECS

Work = list[tuple[Launch, tuple[int, int, int]]]  # launches with their grids
TORCH = {"bf16": torch.bfloat16, "f16": torch.float16}
CACHE = Path(os.environ.get("RVLLM_CUBINS", "build/cubins"))


class Bed:
    """Every matrix kernel of these types that this GPU runs, loaded, and one stream."""

    def __init__(self, dtypes: tuple[str, ...] = ("bf16", "f16")) -> None:
        torch.cuda.init()
        torch.zeros(1, device="cuda")
        self.device = Device()
        self.facts = self.device.facts()
        started = time.perf_counter()
        named = [spec for spec in SPECS if not {"bf16", "f16"} & set(spec.name.split("_")[1:2]) - set(dtypes)]
        specs = [spec for spec in named if spec.runs_on(self.facts.capability)]
        cubins = build.load(build.units(specs, build.target_of(self.facts.capability)), CACHE)
        self.functions: dict[str, Function] = {}
        for cubin in cubins:
            module = Module(cubin.code)
            for spec in specs:
                if spec.source == cubin.unit.source and spec.symbol in cubin.names:
                    mangled = cubin.names[spec.symbol]
                    self.functions[spec.name] = module.function(mangled, spec.name, spec.smem)
        self.build_seconds = time.perf_counter() - started
        self.compile_seconds = sum(cubin.seconds for cubin in cubins)
        self.stream = Stream()
        self.partials = torch.zeros(0, dtype=torch.uint8, device="cuda")  # counters are left at zero

    def pack(self, weight: torch.Tensor, dtype: str) -> torch.Tensor:
        """A row-major weight [N, K] packed by the kernel, padding and all."""
        n, k = weight.shape
        packed = torch.full((gemm.packed_nbytes(n, k),), 255, dtype=torch.uint8, device="cuda")
        padded = -(-n // 64) * 64
        self.pack_part(weight, packed, dtype, padded_rows=padded)
        return packed

    def pack_part(self, weight: torch.Tensor, packed: torch.Tensor, dtype: str, **where: object) -> None:
        """Packs one part of a weight."""
        n, k = weight.shape
        source = {torch.float32: "f32", torch.bfloat16: "bf16", torch.float16: "f16"}[weight.dtype]
        where.setdefault("row_stride", weight.stride(0))
        where.setdefault("column_stride", weight.stride(1))
        arguments = gemm.pack_arguments(weight.data_ptr(), packed.data_ptr(), n, k, **where)
        function = self.functions[f"sm80_{dtype}_gemm_pack_{source}"]
        torch.cuda.synchronize()
        Launch(function, 256, 0, arguments, pdl=False).run(self.stream, (1024, 1, 1))
        self.stream.sync()

    def x_argument(self, plan: gemm.GemmPlan, x: torch.Tensor, dtype: str) -> TensorMap | int:
        """What a plan's kernel takes as x [rows, K] (rows may be more than the batch)."""
        if not plan.box_rows:
            return x.data_ptr()
        pitch = x.stride(0) * 2
        return TensorMap.matrix(
            x.data_ptr(), x.shape[0], x.shape[1], pitch, plan.box_rows, 64, dtype == "bf16"
        )

    def launch(
        self,
        plan: gemm.GemmPlan,
        x: torch.Tensor,
        packed: int,
        out: torch.Tensor,
        dtype: str,
        **options: object,
    ) -> Launch:
        """A launch of a plan over torch's memory."""
        pdl = bool(options.pop("pdl", True))
        if plan.partials > self.partials.numel():
            self.stream.sync()
            self.partials = torch.zeros(plan.partials, dtype=torch.uint8, device="cuda")
            torch.cuda.synchronize()
        options["partials"] = self.partials.data_ptr()
        arguments = plan.arguments(
            self.x_argument(plan, x, dtype), packed, out.data_ptr(), out.stride(0),
            x_width=x.shape[1], x_pitch=x.stride(0), **options,
        )  # fmt: skip
        launch = Launch(
            self.functions[plan.kernel], plan.block, plan.smem, arguments, pdl=pdl, cluster=plan.cluster
        )
        launch.keep = (x, out)  # type: ignore[attr-defined]  # torch frees what nobody holds
        return launch

    def turns(self, works: dict[str, Work], rounds: int = 7) -> dict[str, float]:
        """Median seconds of one replay of each graph, in turns: each meets the clocks the others leave."""
        torch.cuda.synchronize()
        graphs = {}
        times: dict[str, list[float]] = {name: [] for name in works}
        for name, launches in works.items():
            self.stream.begin_capture()
            for launch, grid in launches:
                launch.run(self.stream, grid)
            graphs[name] = self.stream.end_capture()
            graphs[name].launch(self.stream)
        for _ in range(rounds):
            for name, graph in graphs.items():
                begin, end = Event(), Event()
                begin.record(self.stream)
                graph.launch(self.stream)
                end.record(self.stream)
                end.wait()
                times[name].append(end.seconds_since(begin))
        for graph in graphs.values():
            graph.close()
        return {name: sorted(found)[rounds // 2] for name, found in times.items()}

    def graph_seconds(self, launches: Work, repeats: int = 15) -> float:
        """Median time of one replay of a graph of the launches."""
        torch.cuda.synchronize()
        self.stream.begin_capture()
        for launch, grid in launches:
            launch.run(self.stream, grid)
        graph = self.stream.end_capture()
        for _ in range(3):
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

    def read_limit(self, memory: torch.Tensor) -> float:
        """Bytes a second of the fastest plain read of `memory`."""
        sink = torch.zeros(1, dtype=torch.int32, device="cuda")
        nbytes = memory.numel() * memory.element_size()
        best = 0.0

        for blocks, threads in ((132 * 4, 512), (132 * 8, 256), (132 * 2, 1024), (132 * 16, 256)):
            arguments = [memory.data_ptr(), ctypes.c_uint64(nbytes // 16), sink.data_ptr()]
            launch = Launch(self.functions["sm80_stream_read"], threads, 0, arguments, pdl=False)
            best = max(best, nbytes / self.graph_seconds([(launch, (blocks, 1, 1))], 7))
        return best

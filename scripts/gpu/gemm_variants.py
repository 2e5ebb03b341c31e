"""Matrix kernels that are no part of the catalog yet, for gemm_bench.py and gemm_check.py to compare."""

from __future__ import annotations

from dataclasses import dataclass, replace

from gemm_bed import CACHE, Bed

from rvllm.backends.cuda import gemm
from rvllm.backends.cuda.driver import Module
from rvllm.kernels import build
from rvllm.kernels.gemm_manifest import sm90_smem
from rvllm.kernels.spec import KernelSpec

SAFE = ("RVLLM_GEMM_TRAP",)  # a wait that never ends becomes an error


@dataclass(frozen=True)
class Variant:
    """A kernel beside the catalog's; all but SUM are for weights with one segment."""

    label: str
    defines: tuple[str, ...] = ()
    cluster: int = 2
    mode: str = "FLOW"
    tile: int = 256

    def spec(self, dtype: str) -> KernelSpec:
        """Its kernel, as the catalog would hold it."""
        template = f"rvllm::{dtype}, {self.tile}, rvllm::gemm::{self.mode}, {self.cluster}"
        smem = 229632 if self.mode == "FLOW" else sm90_smem(self.mode.lower(), self.tile)
        return KernelSpec(
            name=f"{dtype}_{self.label}",
            source="gemm_sm90.cu",
            symbol=f"rvllm::gemm::gemm<{template}>",
            arch=90,
            exact=True,
            defines=self.defines,
            smem=smem,
            unit=self.label,
        )

    def plan(self, n: int, k: int, tokens: int, dtype: str, sms: int) -> gemm.GemmPlan:
        """How it is launched."""
        mode: gemm.Mode = "sum" if self.mode == "SUM" else "split" if self.mode == "SPLIT" else "flow"
        like = gemm.variant(n, k, tokens, dtype, mode, self.tile, sms)
        spec = self.spec(dtype)
        if mode == "split":
            return replace(like, kernel=spec.name)
        pairs, token_tiles = -(-n // 128), -(-tokens // self.tile)
        clusters = min(sms // self.cluster, -(-pairs * token_tiles // self.cluster))
        grid = (self.cluster * clusters, 1, 1)
        box = 64 if self.mode == "FLOW" else self.tile // 2
        launch = replace(like, kernel=spec.name, smem=spec.smem, cluster=self.cluster)
        return replace(launch, grid=grid, box_rows=box)


DEEP = (*SAFE, "RVLLM_GEMM_DEEP")
VARIANTS = (Variant("flow_deep", DEEP),)
VARIANTS_SUM = (Variant("split256_held4", (*SAFE, "RVLLM_GEMM_HELD=4"), mode="SPLIT", cluster=1),)
TRACED = (
    Variant("flow_traced", (*SAFE, "RVLLM_GEMM_TRACE")),
    Variant("flow_deep_traced", (*DEEP, "RVLLM_GEMM_TRACE")),
)
TRACED_SPLIT = (
    *(Variant(f"split{n}_traced", ("RVLLM_GEMM_TRACE",), 1, "SPLIT", n) for n in (64, 128, 256)),
    Variant("split256_held4_traced", ("RVLLM_GEMM_TRACE", "RVLLM_GEMM_HELD=4"), 1, "SPLIT"),
)
TRACED_SUM = (Variant("sum128_traced", ("RVLLM_GEMM_TRACE",), mode="SUM", tile=128),)


def add(bed: Bed, variants: tuple[Variant, ...], dtypes: tuple[str, ...] = ("bf16",)) -> None:
    """Builds and loads kernels beside the catalog's."""
    specs = [variant.spec(dtype) for variant in variants for dtype in dtypes]
    for cubin in build.load(build.units(specs, "sm_90a"), CACHE):
        module = Module(cubin.code)
        for spec in specs:
            mine = spec.defines == cubin.unit.defines and spec.symbol in cubin.names
            if mine:
                bed.functions[spec.name] = module.function(cubin.names[spec.symbol], spec.name, spec.smem)

"""What a kernel of the catalog is: a name, a source file and the C++ expression that instantiates it."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class KernelSpec:
    """One kernel.

    name: `arch_dtype_op[_variant]`, unique: `sm90_bf16_gemm_n16_store`, `sm80_f16_norm_rms`. The arch in
    the name is the lowest it runs on.
    source: file in `kernels/`.
    symbol: a name expression (`gemm<bf16, 16, 0>`) or the name of an extern "C" function in it.
    arch: lowest compute capability as 80, 90, ...; `exact` says it runs on that one alone (wgmma: sm_90a).
    defines: preprocessor definitions, `("HEAD_DIM=128",)`.
    smem: dynamic shared memory in bytes the kernel may be launched with at most; less where a GPU has less.
    static_smem: what it declares besides, at most, if it is launched with any.
    extra: whose headers it is compiled with, see `external.HEADERS`; none for sources of ours alone.
    Specs with equal (source, defines, unit) compile as one translation unit.
    """

    name: str
    source: str
    symbol: str
    arch: int = 80
    exact: bool = False
    defines: tuple[str, ...] = ()
    smem: int = 0
    static_smem: int = 1024
    unit: str = ""
    extra: str = ""

    def runs_on(self, capability: int) -> bool:
        """Whether a GPU of compute capability `capability` (90 for 9.0) can run it."""
        return capability == self.arch if self.exact else capability >= self.arch

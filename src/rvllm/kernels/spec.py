"""What a kernel of the catalog is: a name, a source file and the C++ expression that instantiates it."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class KernelSpec:
    """One kernel.

    name: `arch_dtype_op[_variant]`, unique: `sm90_bf16_gemm_n16_store`, `sm80_f16_norm_rms`. The arch in
    the name is the lowest it runs on.
    source: file in `kernels/`; one with `sm90` in its name uses wgmma and runs on sm_90a alone.
    symbol: a name expression (`gemm<bf16, 16, 0>`) or the name of an extern "C" function in it.
    smem: dynamic shared memory in bytes the kernel may be launched with at most; less where a GPU has less.
    static_smem: what it declares besides, at most, if it is launched with any.
    unit: specs with equal (source, unit, extra) compile as one translation unit.
    extra: whose headers it is compiled with, see `external.HEADERS`; none for sources of ours alone.
    """

    name: str
    source: str
    symbol: str
    smem: int = 0
    static_smem: int = 1024
    unit: str = ""
    extra: str = ""

    @property
    def arch(self) -> int:
        """The lowest compute capability it runs on, as 80, 90, ..."""
        return int(self.name[2 : self.name.index("_")])

    @property
    def exact(self) -> bool:
        """Whether it runs on that one alone."""
        return "sm90" in self.source

    def runs_on(self, capability: int) -> bool:
        """Whether a GPU of compute capability `capability` (90 for 9.0) can run it."""
        return capability == self.arch if self.exact else capability >= self.arch


@dataclass(frozen=True)
class Folder:
    """A folder of `kernels/`, and what stands before the symbols of its kernels."""

    name: str
    namespace: str = ""

    def kernel(
        self, name: str, source: str, symbol: str, smem: int = 0, static_smem: int = 1024, unit: str = ""
    ) -> KernelSpec:
        """The kernel `symbol` of the file `source`, which is named without folder and suffix."""
        source, symbol = f"{self.name}/{source}.cu", f"{self.namespace}{symbol}"
        return KernelSpec(name, source, symbol, smem, static_smem, unit)

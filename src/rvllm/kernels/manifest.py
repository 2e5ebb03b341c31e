"""All kernels there are, by name."""

from __future__ import annotations

from rvllm.kernels import build
from rvllm.kernels.attention import specs as attention
from rvllm.kernels.decode import specs as decode
from rvllm.kernels.encoder import specs as encoder
from rvllm.kernels.gemm import specs as gemm
from rvllm.kernels.gemm.cutlass import specs as cutlass
from rvllm.kernels.gemm.fp8 import specs as fp8
from rvllm.kernels.gemm.integer import specs as integer
from rvllm.kernels.loading import specs as loading
from rvllm.kernels.mamba2 import specs as mamba2
from rvllm.kernels.mla import specs as mla
from rvllm.kernels.moe import specs as moe
from rvllm.kernels.rowwise import specs as rowwise
from rvllm.kernels.sampling import specs as sampling
from rvllm.kernels.spec import KernelSpec

_STEP = (
    KernelSpec("sm80_begin_step", "common/begin_step.cu", "begin_step"),
    KernelSpec("sm80_copy_words", "common/copy_words.cu", "copy_words"),
)
_FAMILIES = (
    gemm, cutlass, fp8, integer, attention, rowwise, sampling, moe, mla, mamba2, encoder, decode, loading,
)  # fmt: skip


def _collect() -> dict[str, KernelSpec]:
    found: dict[str, KernelSpec] = {}
    for spec in (*_STEP, *(spec for family in _FAMILIES for spec in family.SPECS)):
        if spec.name in found:
            raise ValueError(f"kernel {spec.name!r} listed twice")
        found[spec.name] = spec
    return found


MANIFEST: dict[str, KernelSpec] = _collect()


def released(wanted: list[build.Unit], capability: int) -> list[build.Unit]:
    """These units; where a release came with cubins, in place of each the one of all the kernels that compile
    with it, as the release has it."""
    if not (build.PREBUILT / build.MANIFEST_FILE).exists():
        return wanted
    specs = [spec for spec in MANIFEST.values() if spec.runs_on(capability)]
    everything = build.units(specs, build.target_of(capability))
    found = []
    for unit in wanted:
        whole = next(
            (
                other
                for other in everything
                if (other.source, other.extra) == (unit.source, unit.extra)
                and set(unit.symbols) <= set(other.symbols)
                and (build.PREBUILT / f"{other.key}.cubin").exists()
            ),
            unit,
        )
        found.append(whole)
    return list(dict.fromkeys(found))

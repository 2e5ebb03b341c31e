"""All kernels there are, by name."""

from __future__ import annotations

from rvllm.kernels.encoder_manifest import SPECS as ENCODER
from rvllm.kernels.experts_manifest import SPECS as EXPERTS
from rvllm.kernels.gemm_manifest import KERNELS
from rvllm.kernels.latent_manifest import SPECS as LATENT
from rvllm.kernels.ops_manifest import SPECS
from rvllm.kernels.recurrent_manifest import SPECS as RECURRENT
from rvllm.kernels.spec import KernelSpec

_STEP = KernelSpec("sm80_begin_step", "step.cu", "begin_step")


def _collect() -> dict[str, KernelSpec]:
    found: dict[str, KernelSpec] = {}
    for spec in (_STEP, *KERNELS, *SPECS, *EXPERTS, *LATENT, *RECURRENT, *ENCODER):
        if spec.name in found:
            raise ValueError(f"kernel {spec.name!r} listed twice")
        found[spec.name] = spec
    return found


MANIFEST: dict[str, KernelSpec] = _collect()

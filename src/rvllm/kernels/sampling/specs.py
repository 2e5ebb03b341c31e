"""Sampling and log-probabilities: their kernels."""

from __future__ import annotations

from rvllm.kernels.spec import KernelSpec

SPECS: list[KernelSpec] = [
    *(
        KernelSpec(name=f"sm80_{name}", source="sampling/sample.cu", symbol=name)
        for name in ("sample_scan", "sample_pick", "slot_start")
    ),
    KernelSpec(name="sm80_logprobs", source="sampling/logprobs.cu", symbol="logprobs"),
]

"""Mamba-2: the short convolution, the scan and the gated norm: their kernels."""

from __future__ import annotations

from rvllm.kernels.spec import KernelSpec

SPECS: list[KernelSpec] = []

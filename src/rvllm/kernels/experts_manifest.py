"""Mixtures of experts: routing and grouped products: their kernels."""

from __future__ import annotations

from rvllm.kernels.spec import KernelSpec

SPECS: list[KernelSpec] = []

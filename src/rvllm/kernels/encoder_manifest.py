"""Encoders, block-sparse attention and small ops of single architectures: their kernels."""

from __future__ import annotations

from rvllm.kernels.spec import KernelSpec

SPECS: list[KernelSpec] = []

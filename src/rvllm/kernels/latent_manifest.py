"""MLA: latents in the cache and the products that absorb its projections: their kernels."""

from __future__ import annotations

from rvllm.kernels.spec import KernelSpec

SPECS: list[KernelSpec] = []

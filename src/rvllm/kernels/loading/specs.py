"""Weights on their way to the device: dequantising, random filling, checksums."""

from __future__ import annotations

from rvllm.kernels.spec import Folder, KernelSpec
from rvllm.kernels.types import SHORT, TYPES

FORMATS = (
    "F32", "F16", "BF16", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "Q4_K", "Q5_K", "Q6_K", "Q2_K", "Q3_K",
    "IQ4_NL", "IQ4_XS", "MXFP4",
)  # fmt: skip


_kernel = Folder("loading").kernel
SPECS: list[KernelSpec] = [
    _kernel("sm80_checksum", "fill", "checksum"),
    *(_kernel(f"sm80_{SHORT[d]}_fill_random", "fill", f"fill_random<{t}>") for d, t in TYPES.items()),
    *(
        _kernel(f"sm80_{SHORT[d]}_dequant_{kind.lower()}", "dequant", f"dequant<{kind}, {t}>")
        for d, t in TYPES.items()
        for kind in FORMATS
    ),
]

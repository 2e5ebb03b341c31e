"""Weights on their way to the device: dequantising, random filling, checksums."""

from __future__ import annotations

from rvllm.kernels.spec import KernelSpec
from rvllm.kernels.types import SHORT, TYPES

FORMATS = (
    "F32", "F16", "BF16", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "Q4_K", "Q5_K", "Q6_K", "Q2_K", "Q3_K",
    "IQ4_NL", "IQ4_XS", "MXFP4",
)  # fmt: skip


def _loading(dtype: str) -> list[KernelSpec]:
    t, short = TYPES[dtype], SHORT[dtype]
    fill = KernelSpec(name=f"sm80_{short}_fill_random", source="loading/fill.cu", symbol=f"fill_random<{t}>")
    return [fill] + [
        KernelSpec(
            name=f"sm80_{short}_dequant_{kind.lower()}",
            source="loading/dequant.cu",
            symbol=f"dequant<{kind}, {t}>",
        )
        for kind in FORMATS
    ]


SPECS: list[KernelSpec] = [
    KernelSpec(name="sm80_checksum", source="loading/fill.cu", symbol="checksum"),
    *(spec for dtype in TYPES for spec in _loading(dtype)),
]

"""GPUs by name, for planning without one: what decides between kernels, and how much memory there is.

Sources: NVIDIA's data sheets and the CUDA programming guide's table of compute capabilities; memory is what
the driver reports, which is a little less than the name says.
"""

from __future__ import annotations

from dataclasses import replace

from rvllm.backends.cuda.device.driver import DeviceFacts
from rvllm.errors import UsageError

MIB = 1 << 20
CONTEXT_BYTES = 512 * MIB  # what the driver and a context take before us: 430 to 520 MiB were seen

KNOWN = {
    "b200": DeviceFacts("B200", 100, 148, 183_359 * MIB, 232_448, 8.0e12),
    "h200": DeviceFacts("H200", 90, 132, 143_771 * MIB, 232_448, 4.8e12),
    "h100-80gb": DeviceFacts("H100 80GB", 90, 132, 81_559 * MIB, 232_448, 3.35e12),
    "a100-80gb": DeviceFacts("A100 80GB", 80, 108, 81_920 * MIB, 166_912, 2.04e12),
    "a100-40gb": DeviceFacts("A100 40GB", 80, 108, 40_960 * MIB, 166_912, 1.56e12),
    "l40s": DeviceFacts("L40S", 89, 142, 46_068 * MIB, 101_376, 0.86e12),
    "l4": DeviceFacts("L4", 89, 58, 23_034 * MIB, 101_376, 0.30e12),
    "a10": DeviceFacts("A10", 86, 72, 23_028 * MIB, 101_376, 0.60e12),
    "rtx-3090": DeviceFacts("RTX 3090", 86, 82, 24_576 * MIB, 101_376, 0.94e12),
    "rtx-4090": DeviceFacts("RTX 4090", 89, 128, 24_564 * MIB, 101_376, 1.01e12),
    "rtx-5090": DeviceFacts("RTX 5090", 120, 170, 32_607 * MIB, 101_376, 1.79e12),
    "rtx-pro-6000": DeviceFacts("RTX PRO 6000", 120, 188, 97_887 * MIB, 101_376, 1.79e12),
}


def known_gpu(name: str, vram_gb: float | None) -> DeviceFacts:
    """The GPU of that name, with `vram_gb` GB (10^9 bytes) of memory instead of its own where given.

    Raises UsageError for a name that is not known.
    """
    found = KNOWN.get(name.lower())
    if found is None:
        raise UsageError(f"--gpu: {name[:40]!r} is not one of {', '.join(KNOWN)}")
    return found if vram_gb is None else replace(found, memory=int(vram_gb * 1e9))

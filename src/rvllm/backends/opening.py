"""The GPU opened by a thread while this one still imports modules and reads the checkpoint.

The driver takes a quarter of a second to make a context, and leaves the interpreter alone meanwhile. Whatever
goes wrong here is met again, and told, where the context is wanted.
"""

from __future__ import annotations

import ctypes
import os
import threading
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rvllm.config import EngineConfig

LIBRARY = "libcuda.so.1"


def gpu_present() -> bool:
    """Whether the NVIDIA driver shows a GPU that CUDA_VISIBLE_DEVICES leaves us; imports nothing of CUDA."""
    if os.environ.get("CUDA_VISIBLE_DEVICES") in ("", "-1"):  # the usual ways to hide all of them
        return False
    return any(Path("/proc/driver/nvidia/gpus").glob("*")) or any(Path("/dev").glob("nvidia[0-9]*"))


class _Opening:
    """A thread that retains the first GPU's primary context. retained: whether it did."""

    def __init__(self) -> None:
        self.retained = False
        self.thread = threading.Thread(target=self._open, name="open-gpu")
        self.thread.start()

    def _open(self) -> None:
        try:
            driver = ctypes.CDLL(LIBRARY)
            device, context = ctypes.c_int(), ctypes.c_void_p()
            self.retained = (
                driver.cuInit(0) == 0
                and driver.cuDeviceGet(ctypes.byref(device), 0) == 0
                and driver.cuDevicePrimaryCtxRetain(ctypes.byref(context), device) == 0
            )
        except (OSError, AttributeError):  # no such library, or one without these functions
            return


_under_way: list[_Opening] = []


def begin(config: EngineConfig) -> None:
    """Begins to open the GPU, where there is one that may be used and nobody has begun yet."""
    if not _under_way and config.device != "cpu" and gpu_present():
        _under_way.append(_Opening())


def abandon() -> None:
    """Gives back what was begun and is not wanted any more."""
    if finish():
        device = ctypes.c_int()
        driver = ctypes.CDLL(LIBRARY)
        if driver.cuDeviceGet(ctypes.byref(device), 0) == 0:
            driver.cuDevicePrimaryCtxRelease(device)


def finish() -> bool:
    """Waits for what was begun. Whether the caller has a reference to the primary context to give back."""
    if not _under_way:
        return False
    opening = _under_way.pop()
    opening.thread.join()
    return opening.retained

"""Our CUDA kernels on the CPU, for checks that need no GPU. See README.md in this folder."""

from __future__ import annotations

import ctypes
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

from rvllm.backends.cuda.device.driver import DeviceFacts
from rvllm.kernels import build
from rvllm.kernels.manifest import MANIFEST
from rvllm.kernels.spec import KernelSpec
from support.kernels.harness import Array, Machine

from . import compiler
from .compiler import EmulatorError
from .launcher import SMEM, Launcher, pointers_to

__all__ = ["EMULATED", "Emulator", "EmulatorError", "available", "needs_emulator"]


def available() -> bool:
    """Whether there is a g++."""
    return compiler.compiler() is not None


needs_emulator = pytest.mark.skipif(not available(), reason="the emulator needs g++")
EMULATED = [pytest.mark.emulated, needs_emulator]  # marks of tests that take minutes


class _Stream:
    """Launches have happened when they return; waiting for them makes what they wrote safe to read."""

    def __init__(self, launcher: Launcher) -> None:
        self._launcher = launcher

    def sync(self) -> None:
        """Ends a chain."""
        self._launcher.chain.cut()


class Emulator(Machine):
    """The surface of `harness.Gpu` over g++ and host memory: few multiprocessors, capability 8.0.

    order, seconds: see Launcher.
    sources, catalog: other kernels than the project's, for tests of the emulator itself.
    """

    def __init__(
        self,
        order: int | None = None,
        sources: Path = build.SOURCES,
        catalog: Mapping[str, KernelSpec] = MANIFEST,
        sm_count: int = 4,
        seconds: int = 60,
    ) -> None:
        self.facts = DeviceFacts("emulator", 80, sm_count, 1 << 34, SMEM)
        self.launcher = Launcher(order, seconds)
        self.stream = _Stream(self.launcher)
        self._sources, self._catalog = sources, catalog
        self._kernels: dict[str, compiler.Kernel] = {}

    def take(self, nbytes: int) -> int:
        """Poisoned memory between guards."""
        return self.launcher.memory.take(nbytes)

    def clear(self) -> None:
        """Frees all arrays."""
        self.launcher.memory.clear()
        self.launcher.chain.forget()

    def upload(self, address: int, host: Any) -> None:
        """Copies a host array to an address."""
        ctypes.memmove(address, host.ctypes.data, host.nbytes)
        self.launcher.chain.host_wrote(address, host.nbytes)

    def download(self, host: Any, address: int) -> None:
        """Fills a host array from an address."""
        ctypes.memmove(host.ctypes.data, address, host.nbytes)

    def build(self, names: Sequence[str]) -> None:
        """Builds kernels, and all that compile with them."""
        missing = [name for name in names if name not in self._kernels]
        self._kernels.update(compiler.kernels_of(missing, self._catalog, self._sources))

    def launch(
        self,
        name: str,
        grid: Any,
        block: int,
        args: Sequence[Any],
        smem: int = 0,
        pdl: bool = True,
        cluster: int = 1,
    ) -> None:
        """Runs a kernel; arguments as for `Gpu.launch`. Raises EmulatorError for what a GPU would punish."""
        if cluster > 1:
            raise EmulatorError(f"{name}: clusters are not emulated")
        self.build([name])
        kernel = self._kernels[name]
        cells = [ctypes.c_void_p(c) if isinstance(c, int) else c for c in self.cells(args)]
        given = [ctypes.sizeof(cell) for cell in cells]
        if given != kernel.sizes:
            raise EmulatorError(f"{name} takes arguments of {kernel.sizes} bytes, got {given}")

        def argument_at(address: int) -> str:
            for i, arg in enumerate(args):
                if isinstance(arg, Array) and arg.address == address:
                    return f" (argument {i}, {arg.dtype}{list(arg.shape)})"
            return ""

        pointers = pointers_to(cells)
        self.launcher.run(kernel, self.grid(grid), block, smem, ctypes.addressof(pointers), pdl, argument_at)

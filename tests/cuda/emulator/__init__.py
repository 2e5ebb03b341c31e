"""Our CUDA kernels on the CPU, for checks that need no GPU. See README.md in this folder."""

from __future__ import annotations

import ctypes
import os
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from harness import Array, Machine

from rvllm.backends.cuda.driver import DeviceFacts
from rvllm.kernels import build
from rvllm.kernels.manifest import MANIFEST
from rvllm.kernels.spec import KernelSpec

from . import compiler
from .compiler import EmulatorError
from .memory import Memory

__all__ = ["Emulator", "EmulatorError", "available"]
_LIMIT = 60  # seconds of processor time a launch may take


def available() -> bool:
    """Whether there is a g++."""
    return compiler.compiler() is not None


class _Stream:
    """Launches have happened when they return."""

    def sync(self) -> None:
        """Nothing to wait for."""


class Emulator(Machine):
    """The surface of `harness.Gpu` over g++ and host memory: few multiprocessors, capability 8.0.

    order: who goes first among blocks, threads and lanes: 0 ascending, 1 descending, larger numbers shuffle;
    None takes another one at every launch.
    sources, catalog: other kernels than the project's, for tests of the emulator itself.
    """

    def __init__(
        self,
        order: int | None = None,
        sources: Path = build.SOURCES,
        catalog: Mapping[str, KernelSpec] = MANIFEST,
        sm_count: int = 4,
    ) -> None:
        self.facts = DeviceFacts("emulator", 80, sm_count, 1 << 34, 1 << 25, 166912)
        self.stream = _Stream()
        self.order, self.launches, self._seconds = order, 0, _LIMIT
        self._memory = Memory()
        self._sources, self._catalog = sources, dict(catalog)
        self._kernels: dict[str, tuple[compiler.Library, KernelSpec]] = {}

    def take(self, nbytes: int) -> int:
        """Poisoned memory between guards."""
        return self._memory.take(nbytes)

    def clear(self) -> None:
        """Frees all arrays."""
        self._memory.clear()

    def upload(self, address: int, host: Any) -> None:
        """Copies a host array to an address."""
        ctypes.memmove(address, host.ctypes.data, host.nbytes)

    def download(self, host: Any, address: int) -> None:
        """Fills a host array from an address."""
        ctypes.memmove(host.ctypes.data, address, host.nbytes)

    def build(self, names: Sequence[str]) -> None:
        """Builds kernels, and all that compile with them."""
        units = {}
        for name in names:
            if name not in self._kernels:
                unit = compiler.unit_of(self._catalog[name], self._catalog)
                units[unit.source, unit.defines, unit.symbols] = unit
        wanted = list(units.values())
        for unit, library in zip(wanted, compiler.load(wanted, self._sources), strict=True):
            for spec in self._catalog.values():
                if (spec.source, spec.defines) == (
                    unit.source,
                    unit.defines,
                ) and spec.symbol in library.index:
                    self._kernels[spec.name] = (library, spec)

    def launch(
        self, name: str, grid: Any, block: int, args: Sequence[Any], smem: int = 0, pdl: bool = True
    ) -> None:
        """Runs a kernel; arguments as for `Gpu.launch`. Raises EmulatorError for what a GPU would punish."""
        self.build([name])
        library, spec = self._kernels[name]
        cells = [ctypes.c_void_p(c) if isinstance(c, int) else c for c in self.cells(args)]
        given = [ctypes.sizeof(cell) for cell in cells]
        if given != library.sizes[spec.symbol]:
            raise EmulatorError(f"{name} takes arguments of {library.sizes[spec.symbol]} bytes, got {given}")
        if smem > max(spec.smem, 48 * 1024):
            raise EmulatorError(
                f"{name} may have {spec.smem} bytes of shared memory, the launch asks for {smem}"
            )
        order = self.order if self.order is not None else self._next_order(name)
        self.launches += 1
        told = f"{name}, grid {grid}, block {block}, order {order}: "
        pointers = (ctypes.c_void_p * max(1, len(cells)))(*(ctypes.addressof(c) for c in cells))
        launch = compiler.Launch(
            (*self.grid(grid),), (block, 1, 1), smem, self._seconds, order, ctypes.addressof(pointers)
        )
        if library.run(library.index[spec.symbol], ctypes.byref(launch)):
            raise EmulatorError(told + launch.message.decode() + self._place(launch.fault, args))
        damaged = self._memory.damaged()
        if damaged:
            raise EmulatorError(told + f"wrote beside an array{self._argument(damaged.address, args)}")

    def _next_order(self, name: str) -> int:
        seed = int(os.environ.get("RVLLM_TEST_SEED", "0"))
        return (
            self.launches % 2 if self.launches < 2 else zlib.crc32(f"{seed} {name} {self.launches}".encode())
        )

    def _argument(self, address: int, args: Sequence[Any]) -> str:
        for i, arg in enumerate(args):
            if isinstance(arg, Array) and arg.address == address:
                return f" (argument {i}, {arg.dtype}{list(arg.shape)})"
        return ""

    def _place(self, address: int, args: Sequence[Any]) -> str:
        if not address:
            return ""
        near = self._memory.near(address)
        if near is None:
            return f" of address {address:#x}, far from every array"
        region, past = near
        return f", {past} bytes past the end of an array{self._argument(region.address, args)}"

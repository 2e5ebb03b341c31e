"""What kernel checks share: poisoned arrays on the GPU, kernels by name, timing by graph replay."""

from __future__ import annotations

import ctypes
import os
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from rvllm.backends.cuda.device import driver
from rvllm.backends.cuda.device.driver import (
    Device,
    DeviceFacts,
    Event,
    Function,
    Launch,
    Module,
    Stream,
    call,
)
from rvllm.kernels import build
from rvllm.kernels.manifest import MANIFEST

BF16 = np.dtype(ml_dtypes.bfloat16)
F16 = np.dtype(np.float16)
DTYPES = {"bfloat16": BF16, "float16": F16}
SHORT = {"bfloat16": "bf16", "float16": "f16", "float32": "f32"}
BY_NAME = MANIFEST


class Array:
    """A device array with the shape and dtype of a host one."""

    def __init__(self, gpu: Machine, shape: tuple[int, ...], dtype: Any) -> None:
        self.shape, self.dtype = shape, np.dtype(dtype)
        self.nbytes = max(16, int(np.prod(shape)) * self.dtype.itemsize)
        self.address = gpu.take(self.nbytes)
        self.gpu = gpu

    def put(self, values: np.ndarray) -> Array:
        """Uploads `values`."""
        host = np.ascontiguousarray(values.astype(self.dtype, copy=False))
        assert host.shape == self.shape, (host.shape, self.shape)
        if host.nbytes:
            self.gpu.upload(self.address, host)
        return self

    def get(self) -> np.ndarray:
        """The contents, after all work is done."""
        self.gpu.stream.sync()
        host = np.empty(self.shape, self.dtype)
        if host.nbytes:
            self.gpu.download(host, self.address)
        return host


class Machine:
    """What checks run on: a GPU, or the emulator in `emulator/`. Arrays, and arguments of launches."""

    facts: DeviceFacts
    stream: Any

    def take(self, nbytes: int) -> int:
        """Poisoned memory: every byte 0xff, so that floats are NaN and integers -1."""
        raise AssertionError("a machine has memory")

    def upload(self, address: int, host: np.ndarray) -> None:
        """Copies a host array to an address."""
        raise AssertionError("a machine has memory")

    def download(self, host: np.ndarray, address: int) -> None:
        """Fills a host array from an address."""
        raise AssertionError("a machine has memory")

    def array(self, values: Any, dtype: Any = None) -> Array:
        """A copy of `values` on the machine."""
        host = np.asarray(values, dtype)
        return Array(self, host.shape, host.dtype).put(host)

    def empty(self, shape: tuple[int, ...], dtype: Any) -> Array:
        """A poisoned array."""
        return Array(self, shape, dtype)

    def zeros(self, shape: tuple[int, ...], dtype: Any) -> Array:
        """An array of zeros."""
        return self.array(np.zeros(shape, dtype))

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
        """Runs a kernel. Arrays go as pointers, None as null, ints as int32, floats as float32."""
        raise AssertionError("a machine launches kernels")

    @staticmethod
    def cells(args: Sequence[Any]) -> list[Any]:
        """Arguments as addresses (int) and ctypes cells."""
        cells: list[Any] = []
        for arg in args:
            if isinstance(arg, Array):
                cells.append(arg.address)
            elif arg is None:
                cells.append(0)
            elif isinstance(arg, float):
                cells.append(ctypes.c_float(arg))
            elif isinstance(arg, (int, np.integer)):
                cells.append(ctypes.c_int(int(arg)))
            else:
                cells.append(arg)
        return cells

    @staticmethod
    def grid(grid: Any) -> tuple[int, int, int]:
        """A grid given as a number or a tuple, in three numbers."""
        return (grid, 1, 1) if isinstance(grid, int) else (*grid, 1, 1)[:3]


class Gpu(Machine):
    """One GPU: kernels are built on first use, memory is given back by `clear`."""

    def __init__(self) -> None:
        self.device = Device(0)
        self.facts = self.device.facts()
        self.stream = Stream()
        self._functions: dict[str, Function] = {}
        self._modules: list[Module] = []
        self._memory: list[int] = []
        self.log: list[str] = []
        self._cache = Path(os.environ.get("RVLLM_TEST_CUBINS", tempfile.mkdtemp()))

    def take(self, nbytes: int) -> int:
        """Poisoned device memory: every byte 0xff, so that floats are NaN and integers -1."""
        address = int(call("cuMemAlloc", nbytes))
        call("cuMemsetD8", address, 0xFF, nbytes)
        call("cuCtxSynchronize")  # kernels run in another stream, which does not wait for the poison
        self._memory.append(address)
        return address

    def clear(self) -> None:
        """Frees all arrays."""
        self.stream.sync()
        while self._memory:
            call("cuMemFree", self._memory.pop())

    def upload(self, address: int, host: np.ndarray) -> None:
        """Copies a host array to the device."""
        call("cuMemcpyHtoD", address, host.ctypes.data, host.nbytes)
        call("cuCtxSynchronize")  # the copy of pageable memory may return while its last part is under way

    def download(self, host: np.ndarray, address: int) -> None:
        """Fills a host array from the device."""
        call("cuMemcpyDtoH", host.ctypes.data, address, host.nbytes)

    def build(self, names: Sequence[str]) -> None:
        """Builds and loads kernels."""
        wanted = [BY_NAME[name] for name in names if name not in self._functions]
        if not wanted:
            return
        by_symbol = {(s.source, s.symbol): s for s in wanted}
        target = build.target_of(self.facts.capability)
        for cubin in build.load(build.units(wanted, target), self._cache):
            module = Module(cubin.code)
            self._modules.append(module)
            for symbol, mangled in cubin.names.items():
                spec = by_symbol[cubin.unit.source, symbol]
                function = module.function(mangled, spec.name, spec.smem)
                attributes = driver.api().CUfunction_attribute
                carveout = attributes.CU_FUNC_ATTRIBUTE_PREFERRED_SHARED_MEMORY_CARVEOUT
                if spec.smem:
                    call("cuFuncSetAttribute", function.handle, carveout, 100)
                self._functions[spec.name] = function

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
        """Queues a kernel. Arrays go as pointers, None as null, ints as int32, floats as float32."""
        self.build([name])
        function = self._functions[name]
        Launch(function, block, smem, self.cells(args), pdl=pdl, cluster=cluster).run(
            self.stream, self.grid(grid)
        )

    def time(self, work: Callable[[int], None], repeats: int = 20, replays: int = 7) -> float:
        """Median seconds of one `work(i)` inside a graph of `repeats` of them in a chain."""
        work(0)
        self.stream.sync()
        self.stream.begin_capture()
        for i in range(repeats):
            work(i)
        graph = self.stream.end_capture()
        times = []
        for _ in range(replays):
            begin, end = Event(), Event()
            begin.record(self.stream)
            graph.launch(self.stream)
            end.record(self.stream)
            end.wait()
            times.append(end.seconds_since(begin) / repeats)
        graph.close()
        return float(np.median(times))


def rounded(values: np.ndarray, dtype: np.dtype) -> np.ndarray:
    """float32 values as the 16-bit type holds them."""
    return values.astype(dtype).astype(np.float32)


def error(out: np.ndarray, reference: np.ndarray) -> float:
    """|out - reference| / |reference| in float64; infinite when anything is not a number."""
    a, b = out.astype(np.float64), reference.astype(np.float64)
    value = float(np.linalg.norm(a - b) / max(np.linalg.norm(b), 1e-30))
    return value if np.isfinite(value) else float("inf")


def expect(what: str, value: float, limit: float) -> None:
    """Raises AssertionError unless value <= limit (NaN fails)."""
    assert value <= limit, f"{what}: {value:.3g} exceeds {limit:.3g}"

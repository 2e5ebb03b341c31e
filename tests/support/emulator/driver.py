"""The CUDA driver as the backend calls it, over the emulator: whole models run where there is no GPU.

`emulated_driver()` puts it in place of the bindings. Everything happens when it is queued, or, while a stream
captures, when its graph is launched. With `streams` it happens as late as the driver's rules allow, so that
work which does not wait for what it needs is found out.
"""

from __future__ import annotations

import ctypes
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Literal
from unittest.mock import patch

import numpy as np

from rvllm.backends.cuda.device import driver
from rvllm.kernels import build
from rvllm.kernels.manifest import MANIFEST

from . import compiler
from .compiler import EmulatorError, Kernel
from .launcher import SMEM, Launcher, pointers_to

OK = SimpleNamespace(value=0, name="CUDA_SUCCESS")
INVALID_VALUE = SimpleNamespace(value=1, name="CUDA_ERROR_INVALID_VALUE")
NOT_READY = SimpleNamespace(value=600, name="CUDA_ERROR_NOT_READY")
Work = Callable[[], None]
Streams = Literal["at once", "late", "first late"]


class _Names:
    """An enumeration whose members are their own names."""

    def __getattr__(self, name: str) -> str:
        return name


@dataclass
class _Function:
    kernel: Kernel
    smem: int = 0  # bytes it may have, once the driver has been told


class _Stream:
    """late: what is queued waits until somebody waits for it."""

    def __init__(self, late: bool) -> None:
        self.captured: list[Work] | None = None
        self.late = late
        self.pending: deque[Work] = deque()

    def queue(self, work: Work) -> None:
        if self.captured is not None:
            self.captured.append(work)
        elif self.late:
            self.pending.append(work)
        else:
            work()

    def drain(self) -> None:
        while self.pending:
            self.pending.popleft()()


class _Event:
    """How often it was recorded, and how often that has happened."""

    def __init__(self) -> None:
        self.recorded = self.happened = 0
        self.at = 0.0
        self.stream: _Stream | None = None

    def record(self, stream: _Stream) -> None:
        self.recorded += 1
        self.stream = stream
        stream.queue(self.happen)

    def happen(self) -> None:
        self.happened += 1
        self.at = time.perf_counter()

    def reach(self, count: int) -> None:
        """Has it happen so often."""
        while self.happened < count:
            assert self.stream is not None
            self.stream.pending.popleft()()


ATTRIBUTES = {
    "MULTIPROCESSOR_COUNT": 4,
    "COMPUTE_CAPABILITY_MAJOR": 8,
    "COMPUTE_CAPABILITY_MINOR": 0,
    "L2_CACHE_SIZE": 32 << 20,
    "MAX_SHARED_MEMORY_PER_BLOCK_OPTIN": SMEM,
    "MEMORY_CLOCK_RATE": 1000,
    "GLOBAL_MEMORY_BUS_WIDTH": 64,
}
_TOTAL = 8 << 30  # bytes of device memory


class EmulatedDriver:
    """`cuda.bindings.driver`, as far as backends/cuda/device/driver.py and arena.py call it."""

    CU_MEMHOSTALLOC_DEVICEMAP = 2
    CUdevice_attribute = CUstream_flags = CUstreamCaptureMode = CUevent_flags = _Names()
    CUfunction_attribute = CUlaunchAttributeID = CUmemorytype = _Names()
    CUmemAllocationType = CUmemLocationType = CUmemAllocationGranularity_flags = CUmemAccess_flags = _Names()
    CUlaunchConfig = SimpleNamespace

    def __init__(self, order: int | None = None, streams: Streams = "at once") -> None:
        self.launcher = Launcher(order)
        self._how = streams
        self._streams: list[_Stream] = []
        self._pinned: dict[int, Any] = {}
        self._modules: list[dict[str, Kernel]] = []

    # ---- modules: `load` stands in for build.load, and its "machine code" is a number
    def load(
        self,
        wanted: Sequence[build.Unit],
        cache_dir: Path,
        compile_missing: bool = True,
        progress: Any = None,
    ) -> list[build.Cubin]:
        """Builds units for the emulator."""
        cubins = []
        for unit in wanted:
            names = {s.symbol: s.name for s in MANIFEST.values() if s.source == unit.source}
            found = compiler.kernels_of([names[symbol] for symbol in unit.symbols], MANIFEST)
            self._modules.append({names[symbol]: found[names[symbol]] for symbol in unit.symbols})
            code = str(len(self._modules) - 1).encode()
            cubins.append(build.Cubin(unit, code, {symbol: names[symbol] for symbol in unit.symbols}, 0.0))
        return cubins

    def cuModuleLoadData(self, code: bytes) -> tuple[Any, ...]:
        return OK, self._modules[int(code)]

    def cuModuleUnload(self, module: dict[str, Kernel]) -> tuple[Any, ...]:
        return (OK,)

    def cuModuleGetFunction(self, module: dict[str, Kernel], name: bytes) -> tuple[Any, ...]:
        return OK, _Function(module[name.decode()])

    def cuFuncGetAttribute(self, attribute: str, function: _Function) -> tuple[Any, ...]:
        assert attribute == "CU_FUNC_ATTRIBUTE_SHARED_SIZE_BYTES"
        return OK, function.kernel.spec.static_smem

    def cuFuncSetAttribute(self, function: _Function, attribute: str, value: int) -> tuple[Any, ...]:
        if attribute == "CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES":
            if value + function.kernel.spec.static_smem > SMEM:
                return (INVALID_VALUE,)
            function.smem = value
        return (OK,)

    @staticmethod
    def CUlaunchAttribute() -> SimpleNamespace:
        return SimpleNamespace(id=None, value=SimpleNamespace(clusterDim=SimpleNamespace(x=1)))

    def cuLaunchKernelEx(
        self, config: Any, function: _Function, parameters: int, extra: int
    ) -> tuple[Any, ...]:
        kernel, block, smem = function.kernel, config.blockDimX, config.sharedMemBytes
        grid = (config.gridDimX, config.gridDimY, config.gridDimZ)
        if any(attribute.value.clusterDim.x > 1 for attribute in config.attrs):
            raise EmulatorError(f"{kernel.spec.name} is launched in clusters, which the emulator lacks")
        given = (ctypes.c_void_p * len(kernel.sizes)).from_address(parameters)
        cells = [
            ctypes.create_string_buffer(ctypes.string_at(address, size), size)
            for address, size in zip(given, kernel.sizes, strict=True)
        ]
        pointers = pointers_to(cells)

        # The backend's graphs are chains of programmatic launches on GPUs that have them.
        pdl = config.hStream.captured is not None

        def work(keep: Any = cells) -> None:
            self.launcher.run(
                kernel, grid, block, smem, ctypes.addressof(pointers), pdl, allowed=function.smem
            )

        config.hStream.queue(work)
        return (OK,)

    # ---- the device
    def cuDriverGetVersion(self) -> tuple[Any, ...]:
        return OK, 13000

    def cuDeviceGetCount(self) -> tuple[Any, ...]:
        return OK, 1

    def cuDeviceGet(self, ordinal: int) -> tuple[Any, ...]:
        return OK, ordinal

    def cuDeviceGetName(self, size: int, device: int) -> tuple[Any, ...]:
        return OK, b"emulator"

    def cuDeviceGetAttribute(self, name: str, device: int) -> tuple[Any, ...]:
        return OK, ATTRIBUTES[name.removeprefix("CU_DEVICE_ATTRIBUTE_")]

    def cuCtxGetDevice(self) -> tuple[Any, ...]:
        return OK, 0

    def cuDevicePrimaryCtxRetain(self, device: int) -> tuple[Any, ...]:
        return OK, device

    def cuDevicePrimaryCtxRelease(self, device: int) -> tuple[Any, ...]:
        return (OK,)

    def cuCtxSetCurrent(self, context: int) -> tuple[Any, ...]:
        return (OK,)

    def cuCtxSynchronize(self) -> tuple[Any, ...]:
        self.launcher.chain.cut()
        return (OK,)

    # ---- memory
    def cuDeviceTotalMem(self, device: int) -> tuple[Any, ...]:
        return OK, _TOTAL

    def cuMemGetInfo(self) -> tuple[Any, ...]:
        return OK, _TOTAL - sum(region.nbytes for region in self.launcher.memory.regions), _TOTAL

    def cuMemAlloc(self, nbytes: int) -> tuple[Any, ...]:
        return OK, self.launcher.memory.take(-(-nbytes // 256) * 256)

    def cuMemFree(self, address: int) -> tuple[Any, ...]:
        self._drain()
        self.launcher.memory.give_back(address)
        self.launcher.chain.forget()
        return (OK,)

    @staticmethod
    def CUmemAllocationProp() -> SimpleNamespace:
        return SimpleNamespace(location=SimpleNamespace())

    CUmemAccessDesc = SimpleNamespace

    def cuMemGetAllocationGranularity(self, kind: Any, which: str) -> tuple[Any, ...]:
        return OK, 1 << 16

    def cuMemAddressReserve(self, nbytes: int, alignment: int, at: int, flags: int) -> tuple[Any, ...]:
        return OK, self.launcher.memory.take(nbytes)

    def cuMemAddressFree(self, address: int, nbytes: int) -> tuple[Any, ...]:
        return self.cuMemFree(address)

    def cuMemCreate(self, nbytes: int, kind: Any, flags: int) -> tuple[Any, ...]:
        return OK, nbytes

    def cuMemMap(self, address: int, nbytes: int, offset: int, pages: int, flags: int) -> tuple[Any, ...]:
        assert pages == nbytes and offset == 0
        return (OK,)

    def cuMemSetAccess(self, address: int, nbytes: int, access: Any, count: int) -> tuple[Any, ...]:
        return (OK,)

    def cuMemUnmap(self, address: int, nbytes: int) -> tuple[Any, ...]:
        self._drain()
        return self.cuMemsetD8(address, 0xFF, nbytes)  # other pages come in their place

    def cuMemRelease(self, pages: int) -> tuple[Any, ...]:
        return (OK,)

    def cuMemHostAlloc(self, nbytes: int, flags: int) -> tuple[Any, ...]:
        array = np.empty(nbytes + 256, np.uint8)
        address = -(-array.ctypes.data // 256) * 256
        self._pinned[address] = array
        return OK, address

    def cuMemHostGetDevicePointer(self, address: int, flags: int) -> tuple[Any, ...]:
        return OK, address

    def cuMemFreeHost(self, address: int) -> tuple[Any, ...]:
        self._drain()
        del self._pinned[address]
        return (OK,)

    CU_MEMHOSTREGISTER_DEVICEMAP = 2

    def cuMemHostRegister(self, address: int, nbytes: int, flags: int) -> tuple[Any, ...]:
        return (OK,)

    def cuMemHostUnregister(self, address: int) -> tuple[Any, ...]:
        self._drain()
        return (OK,)

    def _write(self, target: int, nbytes: int, how: Callable[[], object]) -> None:
        how()
        self.launcher.chain.cut()  # copies wait for kernels, and kernels for copies
        self.launcher.chain.host_wrote(target, nbytes)

    def _drain(self) -> None:
        for stream in self._streams:
            stream.drain()

    def cuMemcpyHtoD(self, target: int, source: int, nbytes: int) -> tuple[Any, ...]:
        self._write(target, nbytes, lambda: ctypes.memmove(target, source, nbytes))
        return (OK,)

    cuMemcpyDtoH = cuMemcpyHtoD

    def cuMemsetD8(self, target: int, value: int, nbytes: int) -> tuple[Any, ...]:
        self._write(target, nbytes, lambda: ctypes.memset(target, value, nbytes))
        return (OK,)

    def cuMemcpyHtoDAsync(self, target: int, source: int, nbytes: int, stream: _Stream) -> tuple[Any, ...]:
        stream.queue(lambda: self._write(target, nbytes, lambda: ctypes.memmove(target, source, nbytes)))
        return (OK,)

    cuMemcpyDtoHAsync = cuMemcpyDtoDAsync = cuMemcpyHtoDAsync

    def cuMemsetD8Async(self, target: int, value: int, nbytes: int, stream: _Stream) -> tuple[Any, ...]:
        stream.queue(lambda: self._write(target, nbytes, lambda: ctypes.memset(target, value, nbytes)))
        return (OK,)

    @staticmethod
    def CUDA_MEMCPY2D() -> SimpleNamespace:
        return SimpleNamespace()

    def cuMemcpy2DAsync(self, copy: SimpleNamespace, stream: _Stream) -> tuple[Any, ...]:
        def rows() -> None:
            for row in range(copy.Height):
                target, source = copy.dstDevice + row * copy.dstPitch, copy.srcDevice + row * copy.srcPitch
                ctypes.memmove(target, source, copy.WidthInBytes)

        assert copy.srcMemoryType == copy.dstMemoryType == "CU_MEMORYTYPE_UNIFIED"
        assert max(copy.srcPitch, copy.dstPitch) < 1 << 31
        nbytes = (copy.Height - 1) * copy.dstPitch + copy.WidthInBytes
        stream.queue(lambda: self._write(copy.dstDevice, nbytes, rows))
        return (OK,)

    # ---- streams and graphs
    def cuStreamCreate(self, flags: str) -> tuple[Any, ...]:
        late = self._how == "late" or (self._how == "first late" and not self._streams)
        self._streams.append(_Stream(late))
        return OK, self._streams[-1]

    def cuStreamSynchronize(self, stream: _Stream) -> tuple[Any, ...]:
        stream.drain()
        return (OK,)

    def cuStreamWaitEvent(self, stream: _Stream, event: _Event, flags: int) -> tuple[Any, ...]:
        count = event.recorded
        stream.queue(lambda: event.reach(count))
        return (OK,)

    def cuStreamDestroy(self, stream: _Stream) -> tuple[Any, ...]:
        return (OK,)

    def cuStreamBeginCapture(self, stream: _Stream, mode: str) -> tuple[Any, ...]:
        stream.captured = []
        return (OK,)

    def cuStreamEndCapture(self, stream: _Stream) -> tuple[Any, ...]:
        captured, stream.captured = stream.captured, None
        return OK, captured

    def cuGraphInstantiate(self, captured: list[Work], flags: int) -> tuple[Any, ...]:
        return OK, captured

    def cuGraphGetNodes(self, captured: list[Work], count: int) -> tuple[Any, ...]:
        return OK, [], len(captured)

    def cuGraphDestroy(self, captured: list[Work]) -> tuple[Any, ...]:
        return (OK,)

    cuGraphExecDestroy = cuGraphDestroy

    def cuGraphUpload(self, graph: list[Work], stream: _Stream) -> tuple[Any, ...]:
        return (OK,)

    def cuGraphLaunch(self, graph: list[Work], stream: _Stream) -> tuple[Any, ...]:
        stream.queue(self.launcher.chain.cut)
        for work in graph:
            stream.queue(work)
        return (OK,)

    # ---- events
    def cuEventCreate(self, flags: str) -> tuple[Any, ...]:
        return OK, _Event()

    def cuEventRecord(self, event: _Event, stream: _Stream) -> tuple[Any, ...]:
        event.record(stream)
        return (OK,)

    def cuEventSynchronize(self, event: _Event) -> tuple[Any, ...]:
        event.reach(event.recorded)
        return (OK,)

    def cuEventQuery(self, event: _Event) -> tuple[Any, ...]:
        return (OK if event.happened == event.recorded else NOT_READY,)

    def cuEventDestroy(self, event: _Event) -> tuple[Any, ...]:
        return (OK,)

    def cuEventElapsedTime(self, earlier: _Event, later: _Event) -> tuple[Any, ...]:
        assert later.happened == later.recorded and earlier.happened == earlier.recorded
        return OK, 1e3 * (later.at - earlier.at)


@contextmanager
def emulated_driver(order: int | None = None, streams: Streams = "at once") -> Iterator[EmulatedDriver]:
    """Within it the CUDA backend runs on the emulator.

    streams: when queued work happens: at once; late, when somebody waits for it; or late on the first stream
    there is, and on others as soon as what they wait for has happened.
    """
    emulated = EmulatedDriver(order, streams)
    with patch.object(driver, "api", lambda: emulated), patch.object(build, "load", emulated.load):
        yield emulated

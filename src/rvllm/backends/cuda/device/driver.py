"""The CUDA driver, called through NVIDIA's own bindings: contexts, memory, modules, streams, graphs.

A thin layer: every call's return code is checked and named, handles stay the driver's own. Nothing here
knows models or kernels.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from rvllm.backends import opening
from rvllm.backends.cuda.device.info import DeviceInfo
from rvllm.errors import RvllmError
from rvllm.extras import install_command


class CudaError(RvllmError):
    """A driver call failed; the message names the call and the driver's own word for it."""


@cache
def api() -> Any:
    """The bindings' driver module; raises CudaError when it or the driver library is absent."""
    try:
        from cuda.bindings import driver
    except ImportError:
        raise CudaError(f"NVIDIA's bindings are not installed: {install_command('cuda')}") from None
    try:
        (status,) = driver.cuInit(0)
    except RuntimeError as error:  # the bindings' way to say that libcuda.so is not there
        raise CudaError(f"no CUDA driver on this machine ({error})") from None
    if status.value != 0:
        raise CudaError(f"the CUDA driver does not start: {status.name}; check `nvidia-smi`")
    return driver


def call(name: str, *args: Any) -> Any:
    """Calls a driver function, checks its status and returns what is left: nothing, a value or a tuple."""
    status, *rest = getattr(api(), name)(*args)
    if status.value != 0:
        raise CudaError(f"{name}: {status.name}")
    if not rest:
        return None
    return rest[0] if len(rest) == 1 else tuple(rest)


def device_count() -> int:
    """GPUs the driver shows; 0 where there is no driver or no bindings."""
    try:
        return int(call("cuDeviceGetCount"))
    except CudaError:
        return 0


@dataclass(frozen=True)
class DeviceFacts:
    """What the driver says of a GPU."""

    name: str
    capability: int  # 90 for compute capability 9.0
    sm_count: int
    memory: int  # bytes
    smem_per_block: int  # bytes a block may opt in to
    memory_rate: float = 0.0  # bytes a second at the peak; 0: the driver does not tell

    @property
    def info(self) -> DeviceInfo:
        """What of it decides between kernels."""
        return DeviceInfo(self.capability, self.sm_count, self.smem_per_block)


class Device:
    """A GPU with its primary context made current on the calling thread."""

    opened: ClassVar[list[Device]] = []  # by this process, and not closed

    def __init__(self, ordinal: int = 0) -> None:
        self.handle = call("cuDeviceGet", ordinal)
        begun = opening.finish()
        self.context = call("cuDevicePrimaryCtxRetain", self.handle)
        if begun:  # its reference kept the context until ours did
            call("cuDevicePrimaryCtxRelease", self.handle)
        Device.opened.append(self)
        call("cuCtxSetCurrent", self.context)

    def make_current(self) -> None:
        """Makes the context current on this thread too (loader threads)."""
        call("cuCtxSetCurrent", self.context)

    def facts(self) -> DeviceFacts:
        """Name, compute capability, SM count, memory and limits."""
        attribute = api().CUdevice_attribute

        def get(name: str) -> int:
            return int(
                call("cuDeviceGetAttribute", getattr(attribute, f"CU_DEVICE_ATTRIBUTE_{name}"), self.handle)
            )

        name = call("cuDeviceGetName", 96, self.handle)
        return DeviceFacts(
            name=bytes(name).split(b"\0")[0].decode(),
            capability=10 * get("COMPUTE_CAPABILITY_MAJOR") + get("COMPUTE_CAPABILITY_MINOR"),
            sm_count=get("MULTIPROCESSOR_COUNT"),
            memory=int(call("cuDeviceTotalMem", self.handle)),
            smem_per_block=get("MAX_SHARED_MEMORY_PER_BLOCK_OPTIN"),
            # kHz, two transfers a clock, bits
            memory_rate=2e3 * get("MEMORY_CLOCK_RATE") * get("GLOBAL_MEMORY_BUS_WIDTH") / 8,
        )

    @staticmethod
    def free_memory() -> tuple[int, int]:
        """(free, total) bytes, as the driver counts them."""
        free, total = call("cuMemGetInfo")
        return int(free), int(total)

    def close(self) -> None:
        """Gives the primary context back."""
        Device.opened.remove(self)
        call("cuDevicePrimaryCtxRelease", self.handle)


class Pinned:
    """Page-locked host memory that the GPU can read and write too; `array` views it as bytes."""

    def __init__(self, nbytes: int, clear: bool = True) -> None:
        """clear: with zeros, which takes a while for gigabytes."""
        mapped = api().CU_MEMHOSTALLOC_DEVICEMAP
        self.nbytes = nbytes
        self.address = int(call("cuMemHostAlloc", nbytes, mapped))
        self.device_address = int(call("cuMemHostGetDevicePointer", self.address, 0))
        buffer = (ctypes.c_uint8 * nbytes).from_address(self.address)
        self.array: NDArray[np.uint8] = np.ctypeslib.as_array(buffer)
        if clear:
            self.array[:] = 0

    def close(self) -> None:
        """Frees the memory; `array` must not be used afterwards."""
        call("cuMemFreeHost", self.address)


class Stream:
    """A stream that does not wait for the default stream."""

    def __init__(self) -> None:
        self.handle = call("cuStreamCreate", api().CUstream_flags.CU_STREAM_NON_BLOCKING)

    def sync(self) -> None:
        call("cuStreamSynchronize", self.handle)

    def copy_to_device(self, target: int, source: int, nbytes: int) -> None:
        """Copies `nbytes` from a host address; asynchronous when the host memory is pinned."""
        call("cuMemcpyHtoDAsync", target, source, nbytes, self.handle)

    def copy_to_host(self, target: int, source: int, nbytes: int) -> None:
        """Copies `nbytes` to a host address; asynchronous when the host memory is pinned."""
        call("cuMemcpyDtoHAsync", target, source, nbytes, self.handle)

    def copy_on_device(self, target: int, source: int, nbytes: int) -> None:
        """Copies `nbytes` from one device address to another."""
        call("cuMemcpyDtoDAsync", target, source, nbytes, self.handle)

    def copy_rows(self, source: tuple[int, int], target: tuple[int, int], width: int, rows: int) -> None:
        """Copies rows of `width` bytes between device memory and pinned memory, whichever the addresses say.

        source, target: (address, bytes from row to row, at most 2^31 - 1).
        """
        copy = api().CUDA_MEMCPY2D()
        copy.srcMemoryType = copy.dstMemoryType = api().CUmemorytype.CU_MEMORYTYPE_UNIFIED
        copy.srcDevice, copy.srcPitch = source
        copy.dstDevice, copy.dstPitch = target
        copy.WidthInBytes, copy.Height = width, rows
        call("cuMemcpy2DAsync", copy, self.handle)

    def wait_for(self, event: Event) -> None:
        """What is queued from here on waits for an event as it was recorded last; this thread does not."""
        call("cuStreamWaitEvent", self.handle, event.handle, 0)

    def fill_bytes(self, target: int, value: int, nbytes: int) -> None:
        """Sets every byte of a range."""
        call("cuMemsetD8Async", target, value, nbytes, self.handle)

    def begin_capture(self) -> None:
        """Starts recording launches into a graph instead of running them."""
        call(
            "cuStreamBeginCapture", self.handle, api().CUstreamCaptureMode.CU_STREAM_CAPTURE_MODE_THREAD_LOCAL
        )

    def end_capture(self) -> Graph:
        """Ends recording and returns the graph, ready to launch."""
        captured = call("cuStreamEndCapture", self.handle)
        executable = call("cuGraphInstantiate", captured, 0)
        call("cuGraphDestroy", captured)
        call("cuGraphUpload", executable, self.handle)
        return Graph(executable)

    def close(self) -> None:
        call("cuStreamDestroy", self.handle)


@dataclass
class Graph:
    """An executable graph."""

    handle: Any

    def launch(self, stream: Stream) -> None:
        call("cuGraphLaunch", self.handle, stream.handle)

    def close(self) -> None:
        call("cuGraphExecDestroy", self.handle)


class Event:
    """A point in a stream that can be waited for and timed."""

    def __init__(self) -> None:
        self.handle = call("cuEventCreate", api().CUevent_flags.CU_EVENT_DEFAULT)

    def record(self, stream: Stream) -> None:
        """Marks the stream's present end."""
        call("cuEventRecord", self.handle, stream.handle)

    def wait(self) -> None:
        """Blocks this thread until the event has happened."""
        call("cuEventSynchronize", self.handle)

    def done(self) -> bool:
        """Whether it has happened; does not wait."""
        (status,) = api().cuEventQuery(self.handle)
        return bool(status.value == 0)

    def seconds_since(self, earlier: Event) -> float:
        """Device time between two events that have both happened."""
        return float(call("cuEventElapsedTime", earlier.handle, self.handle)) / 1e3

    def close(self) -> None:
        call("cuEventDestroy", self.handle)


Grid = tuple[int, int, int]


@dataclass(frozen=True)
class Function:
    """A kernel in a loaded module."""

    name: str
    handle: Any


class Module:
    """A loaded cubin."""

    def __init__(self, code: bytes) -> None:
        self._code = code  # the driver may read it lazily
        self.handle = call("cuModuleLoadData", code)

    def function(self, mangled: str, name: str, smem: int) -> Function:
        """A kernel by its mangled name, allowed `smem` bytes of dynamic shared memory or all there is."""
        handle = call("cuModuleGetFunction", self.handle, mangled.encode())
        if smem > 48 * 1024:
            attributes = api().CUfunction_attribute
            static = call("cuFuncGetAttribute", attributes.CU_FUNC_ATTRIBUTE_SHARED_SIZE_BYTES, handle)
            most = api().CUdevice_attribute.CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN
            room = call("cuDeviceGetAttribute", most, call("cuCtxGetDevice")) - static
            attribute = attributes.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
            call("cuFuncSetAttribute", handle, attribute, min(smem, room))
        return Function(name, handle)

    def close(self) -> None:
        call("cuModuleUnload", self.handle)


class TensorMap:
    """A tensor-map descriptor for the bulk copy engine, passed by value as a kernel parameter."""

    def __init__(self, descriptor: Any) -> None:
        self.descriptor = descriptor

    @classmethod
    def matrix(
        cls, address: int, rows: int, width: int, pitch: int, box_rows: int, box_width: int, bf16: bool
    ) -> TensorMap:
        """A row-major [rows, width] matrix of 16-bit elements, read in boxes with the 128-byte swizzle.

        address: device pointer; pitch: bytes from row to row. Elements outside read as zero.
        """
        driver = api()
        kind = driver.CUtensorMapDataType
        u64, u32 = driver.cuuint64_t, driver.cuuint32_t
        descriptor = call(
            "cuTensorMapEncodeTiled",
            kind.CU_TENSOR_MAP_DATA_TYPE_BFLOAT16 if bf16 else kind.CU_TENSOR_MAP_DATA_TYPE_FLOAT16,
            2,
            address,
            [u64(width), u64(rows)],
            [u64(pitch)],
            [u32(box_width), u32(box_rows)],
            [u32(1), u32(1)],
            driver.CUtensorMapInterleave.CU_TENSOR_MAP_INTERLEAVE_NONE,
            driver.CUtensorMapSwizzle.CU_TENSOR_MAP_SWIZZLE_128B,
            driver.CUtensorMapL2promotion.CU_TENSOR_MAP_L2_PROMOTION_L2_256B,
            driver.CUtensorMapFloatOOBfill.CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE,
        )
        return cls(descriptor)


class Launch:
    """A kernel call whose parameters stay in place, so that launching it again costs microseconds.

    arguments: device pointers as int, scalars as ctypes objects, tensor maps. Scalars may be shared
    between launches: change the value, and every launch after that sees it. The grid is given at each
    `run`.
    """

    def __init__(
        self,
        function: Function,
        block: int,
        smem: int,
        arguments: Sequence[Any],
        *,
        pdl: bool = True,
        cluster: int = 1,
    ) -> None:
        self.function = function
        self._keep: list[Any] = []
        addresses: list[int] = []
        for argument in arguments:
            if isinstance(argument, TensorMap):
                addresses.append(int(argument.descriptor.getPtr()))
                self._keep.append(argument)
                continue
            cell = ctypes.c_void_p(argument) if isinstance(argument, int) else argument
            addresses.append(ctypes.addressof(cell))
            self._keep.append(cell)
        self._parameters = (ctypes.c_void_p * max(1, len(addresses)))(*addresses)
        self._address = ctypes.addressof(self._parameters)
        driver = api()
        config = driver.CUlaunchConfig()
        config.blockDimX, config.blockDimY, config.blockDimZ = block, 1, 1
        config.sharedMemBytes = smem
        attributes = []
        if pdl:
            attribute = driver.CUlaunchAttribute()
            attribute.id = driver.CUlaunchAttributeID.CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION
            attribute.value.programmaticStreamSerializationAllowed = 1
            attributes.append(attribute)
        if cluster > 1:
            attribute = driver.CUlaunchAttribute()
            attribute.id = driver.CUlaunchAttributeID.CU_LAUNCH_ATTRIBUTE_CLUSTER_DIMENSION
            attribute.value.clusterDim.x = cluster
            attribute.value.clusterDim.y = 1
            attribute.value.clusterDim.z = 1
            attributes.append(attribute)
        config.attrs, config.numAttrs = attributes, len(attributes)
        self._config = config

    def run(self, stream: Stream, grid: Grid) -> None:
        """Queues the kernel (or records it, while the stream captures)."""
        config = self._config
        config.gridDimX, config.gridDimY, config.gridDimZ = grid
        config.hStream = stream.handle
        (status,) = api().cuLaunchKernelEx(config, self.function.handle, self._address, 0)
        if status.value != 0:
            raise CudaError(f"launch of {self.function.name} with grid {grid}: {status.name}")

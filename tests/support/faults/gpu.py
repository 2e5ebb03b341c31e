"""Faults of a GPU, brought about in an engine process from outside: nothing of the server knows of them.

A `sitecustomize` on the engine's path waits in a thread for an order, a file, and then launches a kernel in
the engine's own context: one that traps, one that writes where there is no memory (what the driver logs as an
XID), one that holds every multiprocessor for a while.
"""

from __future__ import annotations

import tempfile
from pathlib import Path

from rvllm.backends.cuda.device.driver import api, call
from rvllm.kernels.build import target_of

KERNELS = r"""
extern "C" __global__ void trapped(unsigned long long) { asm volatile("trap;"); }
extern "C" __global__ void astray(unsigned long long) { *(volatile int*)(16 + 4 * threadIdx.x) = 1; }
extern "C" __global__ void hung(unsigned long long nanoseconds) {
  unsigned long long began, now;
  asm volatile("mov.u64 %0, %globaltimer;" : "=l"(began));
  do asm volatile("mov.u64 %0, %globaltimer;" : "=l"(now));
  while (now - began < nanoseconds);
}
"""
HUNG_SECONDS = 25  # bounds what a drill that goes wrong can take

WAITING = """
import os, sys
if "rvllm.engine.ipc.process" in getattr(sys, "orig_argv", []):
    import threading
    def wait():
        import ctypes, time
        order = {order!r}
        while not os.path.exists(order):
            time.sleep(0.02)
        name = open(order).read()
        os.unlink(order)
        from cuda.bindings import driver
        def call(name, *args):
            status, *rest = getattr(driver, name)(*args)
            assert status.value == 0, (name, status)
            return rest[0] if rest else None
        call("cuCtxSetCurrent", call("cuDevicePrimaryCtxRetain", call("cuDeviceGet", 0)))
        module = call("cuModuleLoadData", open({cubin!r}, "rb").read())
        function = call("cuModuleGetFunction", module, name.encode())
        stream = call("cuStreamCreate", driver.CUstream_flags.CU_STREAM_NON_BLOCKING)
        arguments = (({nanoseconds},), (ctypes.c_ulonglong,))
        call("cuLaunchKernel", function, {blocks}, 1, 1, 1024, 1, 1, 0, stream, arguments, 0)
        print("fault:", name, "launched", file=sys.stderr, flush=True)
    threading.Thread(target=wait, daemon=True).start()
"""


class GpuFaults:
    """`environment` is for the server; `strike` for one fault of its engine."""

    def __init__(self) -> None:
        folder = Path(tempfile.mkdtemp(prefix="hostile-gpu-"))
        self._order = folder / "order"
        attribute, device = api().CUdevice_attribute, call("cuDeviceGet", 0)

        def get(name: str) -> int:
            return int(
                call("cuDeviceGetAttribute", getattr(attribute, f"CU_DEVICE_ATTRIBUTE_{name}"), device)
            )

        capability = 10 * get("COMPUTE_CAPABILITY_MAJOR") + get("COMPUTE_CAPABILITY_MINOR")
        (folder / "faults.cubin").write_bytes(compiled(target_of(capability)))
        (folder / "sitecustomize.py").write_text(
            WAITING.format(
                order=str(self._order),
                cubin=str(folder / "faults.cubin"),
                nanoseconds=HUNG_SECONDS * 10**9,
                blocks=2 * get("MULTIPROCESSOR_COUNT"),  # 1,024 threads each: nothing else has room
            )
        )
        self.environment = {"PYTHONPATH": str(folder)}

    def strike(self, kind: str) -> None:
        """Orders one launch of `trapped`, `astray` or `hung`."""
        written = self._order.with_suffix(".new")
        written.write_text(kind)
        written.replace(self._order)


def compiled(target: str) -> bytes:
    """The kernels' cubin."""
    from cuda.bindings import nvrtc

    _, program = nvrtc.nvrtcCreateProgram(KERNELS.encode(), b"faults.cu", 0, [], [])
    (status,) = nvrtc.nvrtcCompileProgram(program, 1, [f"-arch={target}".encode()])
    assert status.value == 0, status
    _, size = nvrtc.nvrtcGetCUBINSize(program)
    code = bytearray(size)
    nvrtc.nvrtcGetCUBIN(program, code)
    return bytes(code)

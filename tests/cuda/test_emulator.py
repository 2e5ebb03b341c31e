"""The emulator itself: what kernels get wrong is caught, in small kernels and in damaged copies of ours."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest

from rvllm.kernels import build
from rvllm.kernels.manifest import MANIFEST
from rvllm.kernels.spec import KernelSpec
from support.emulator import EMULATED, Emulator, EmulatorError
from support.kernels import attention_checks, harness, op_checks

pytestmark = EMULATED
SMALL = r"""
#include "common/common.cuh"
extern "C" __global__ void reversed(int* out, const int* in, int sync) {
  __shared__ int values[64];
  values[threadIdx.x] = in[threadIdx.x];
  if (sync) __syncthreads();
  out[threadIdx.x] = values[63 - threadIdx.x];
}
extern "C" __global__ void lanes(int* out, int sync) {
  __shared__ int values[32];
  values[threadIdx.x] = threadIdx.x;
  if (sync) __syncwarp();
  out[threadIdx.x] = values[threadIdx.x ^ 1];
}
extern "C" __global__ void past(int* out, int at) { out[at] = 1; }
extern "C" __global__ void misaligned(float4* out, int by) {
  *reinterpret_cast<float4*>(reinterpret_cast<char*>(out) + by) = make_float4(1.f, 2.f, 3.f, 4.f);
}
extern "C" __global__ void diverging(int* out, int limit) {
  if (threadIdx.x < limit) __syncthreads();
  out[threadIdx.x] = 1;
}
extern "C" __global__ void elsewhere(int* out, int limit) {
  if (threadIdx.x < limit) {
    __syncthreads();
    out[threadIdx.x] = 1;
  } else {
    __syncthreads();
    out[threadIdx.x] = 2;
  }
}
extern "C" __global__ void absent(int* out, int limit) {
  if (threadIdx.x >= limit) return;
  out[threadIdx.x] = __shfl_xor_sync(~0u, (int)threadIdx.x, 1);
}
extern "C" __global__ void copied(int4* out, const int4* in, int wait) {
  __shared__ int4 cell[32];
  cp_async16(smem(cell + threadIdx.x), in + threadIdx.x);
  cp_async_commit();
  if (wait) cp_async_wait<0>();
  out[threadIdx.x] = cell[threadIdx.x];
}
extern "C" __global__ void dynamic(int* out, int count) {
  extern __shared__ __align__(16) int values[];
  for (int i = threadIdx.x; i < count; i += blockDim.x) values[i] = i;
  out[threadIdx.x] = values[threadIdx.x];
}
extern "C" __global__ void endless(volatile int* out) {
  while (*out != 3) out[1] = 0;
}
extern "C" __global__ void warps(int* out, unsigned mask, int width) {
  const int lane = threadIdx.x % 32;
  int* const mine = out + threadIdx.x * 8;
  if (!(mask >> lane & 1)) return;
  mine[0] = __shfl_sync(mask, lane, 5, width);
  mine[1] = __shfl_up_sync(mask, lane, 3, width);
  mine[2] = __shfl_down_sync(mask, lane, 3, width);
  mine[3] = __shfl_xor_sync(mask, lane, 1, width);
  mine[4] = __ballot_sync(mask, lane % 3 == 0);
  mine[5] = __reduce_add_sync(mask, lane);
  mine[6] = __match_any_sync(mask, lane % 4);
  mine[7] = __any_sync(mask, lane == 7) + 2 * __all_sync(mask, lane < 31);
}
// out[i] = in[i] + 1; order: which of launching dependents, waiting and reading comes first.
extern "C" __global__ void linked(int* out, const int* in, int order) {
  int v = 0;
  if (order == 2) v = in[threadIdx.x];  // too early
  if (order == 3) out[threadIdx.x] = 0;  // likewise
  if (order != 1) griddep_launch();
  griddep_wait();
  if (order == 1) griddep_launch();
  if (order != 2) v = in[threadIdx.x];
  out[threadIdx.x] = v + 1;
}
extern "C" __global__ void arrivals(int* counter, int* last) {
  __threadfence();
  if (threadIdx.x == 0 && atomicAdd(counter, 1) + 1 == gridDim.x) *last = blockIdx.x;
}
"""


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of our kernels, with the small ones beside them."""
    folder = tmp_path_factory.mktemp("kernels")
    shutil.copytree(build.SOURCES, folder, dirs_exist_ok=True)
    (folder / "small.cu").write_text(SMALL)
    return folder


def small(sources: Path, order: int | None = 0) -> Emulator:
    names = [line.split("void ")[1].split("(")[0] for line in SMALL.splitlines() if "__global__" in line]
    return Emulator(order, sources, {n: KernelSpec(n, "small.cu", n) for n in names})


@pytest.mark.parametrize("order", [0, 1, 2, 3])
@pytest.mark.parametrize(("name", "threads"), [("reversed", 64), ("lanes", 32)])
def test_a_missing_barrier_shows(sources: Path, name: str, threads: int, order: int) -> None:
    gpu = small(sources, order)
    out = [gpu.empty((threads,), np.int32) for _ in range(2)]
    given = [gpu.array(np.arange(threads, dtype=np.int32))] if name == "reversed" else []
    for sync in (0, 1):
        gpu.launch(name, 1, threads, [out[sync], *given, sync], pdl=False)
    at = np.arange(threads)
    assert (out[1].get() == (63 - at if name == "reversed" else at ^ 1)).all()
    assert (out[0].get() == -1).any()


def refuses(gpu: Emulator, match: str, name: str, grid: int, block: int, args: list, smem: int = 0) -> None:
    with pytest.raises(EmulatorError, match=match):
        gpu.launch(name, grid, block, args, smem, pdl=False)


def test_accesses_past_an_array(sources: Path) -> None:
    gpu = small(sources)
    out = gpu.empty((64,), np.int32)
    gpu.launch("past", 1, 1, [out, 63], pdl=False)
    told = r"past.*block \(0, 0, 0\), thread 0 .*0 bytes past.*argument 0, int32\[64\]"
    refuses(gpu, told, "past", 1, 1, [out, 64])
    refuses(gpu, "wrote beside", "past", 1, 1, [out, -1])
    gpu.clear()
    odd = gpu.empty((5,), np.int32)
    refuses(gpu, r"wrote beside.*argument 0", "past", 1, 1, [odd, 6])
    gpu.clear()
    gpu.launch("misaligned", 1, 1, [gpu.empty((64,), np.int32), 16], pdl=False)
    refuses(gpu, "misaligned access", "misaligned", 1, 1, [gpu.empty((64,), np.int32), 8])


def test_threads_that_wait_for_nobody(sources: Path) -> None:
    gpu = small(sources)
    out = gpu.empty((64,), np.int32)
    gpu.launch("diverging", 1, 64, [out, 64], pdl=False)
    stuck = r"stuck: threads 0\.\.39 wait at __syncthreads.*line \d+; threads 40\.\.63 have ended"
    refuses(gpu, stuck, "diverging", 1, 64, [out, 40])
    elsewhere = r"at __syncthreads in line \d+ while others are at the one in line"
    refuses(gpu, elsewhere, "elsewhere", 1, 64, [out, 32])
    refuses(gpu, r"waits for lanes .* have ended|stuck", "absent", 1, 32, [out, 31])
    gpu.launcher.seconds = 1
    refuses(gpu, "still running after 1 seconds", "endless", 1, 1, [out])


def test_shared_memory(sources: Path) -> None:
    gpu = small(sources)
    given, out = gpu.array(np.arange(128, dtype=np.int32)), gpu.empty((128,), np.int32)
    gpu.launch("copied", 1, 32, [out, given, 1], pdl=False)
    assert (out.get() == np.arange(128)).all()
    gpu.launch("copied", 1, 32, [out, given, 0], pdl=False)
    assert (out.get() == -1).all()
    gpu.launch("dynamic", 1, 64, [out, 128], 512, pdl=False)
    refuses(gpu, "0 bytes past the end of the 512 bytes of dynamic", "dynamic", 1, 64, [out, 129], 512)
    refuses(gpu, "takes arguments of", "dynamic", 1, 64, [out, 1.0, 2], 512)
    gpu.launch("dynamic", 1, 64, [out, 8], 512, pdl=False)
    assert (out.get()[8:64] == -1).all()


@pytest.mark.parametrize("width", [32, 8])
@pytest.mark.parametrize("mask", [0xFFFFFFFF, 0x00FF00FF])
def test_operations_of_a_warp(sources: Path, mask: int, width: int) -> None:
    gpu = small(sources, None)
    out = gpu.empty((64, 8), np.int32)
    gpu.launch("warps", 1, 64, [out, np.uint32(mask).astype(np.int32), width], pdl=False)
    active = [i for i in range(32) if mask >> i & 1]
    result = out.get().reshape(2, 32, 8)
    for lane in active:
        base, source = lane // width * width, {}
        source[0] = base + 5
        source[1] = lane - 3 if lane - 3 >= base else lane
        source[2] = lane + 3 if lane + 3 < base + width else lane
        source[3] = lane ^ 1
        wanted = [source[k] if mask >> source[k] & 1 else -1 for k in range(4)]
        wanted.append(sum(1 << i for i in active if i % 3 == 0))
        wanted.append(sum(active))
        wanted.append(sum(1 << i for i in active if i % 4 == lane % 4))
        wanted.append((7 in active) + 2 * (31 not in active))
        signed = np.array(wanted, np.int64).astype(np.uint32).view(np.int32)
        assert (result[:, lane] == signed).all(), (lane, result[0, lane], signed)
    assert (result[:, [i for i in range(32) if i not in active]] == -1).all()


def test_blocks_run_in_other_orders(sources: Path) -> None:
    last = []
    for order in (0, 1, 5):
        gpu = small(sources, order)
        out = gpu.empty((1,), np.int32)
        gpu.launch("arrivals", 9, 64, [gpu.zeros((1,), np.int32), out], pdl=False)
        last.append(int(out.get()[0]))
    assert last[:2] == [8, 0] and 0 <= last[2] < 9


def test_dependents_that_do_not_wait(sources: Path) -> None:
    gpu = small(sources, 2)
    a, b, c, d = (gpu.empty((64,), np.int32) for _ in range(4))
    a.put(np.arange(64, dtype=np.int32))

    def chain(*orders: int) -> np.ndarray:
        gpu.stream.sync()
        for out, given, order in zip((b, c, d), (a, b, c), orders, strict=False):
            gpu.launch("linked", 1, 64, [out, given, order])
        return (b, c, d)[len(orders) - 1].get()

    assert (chain(0, 0, 0) == np.arange(64) + 3).all()
    for array in (b, c, d):
        array.put(np.full(64, -7, np.int32))
    assert (chain(0, 2) == 0).all()  # it read poison
    assert (chain(2) == np.arange(64) + 1).all()  # the first of a chain may read
    with pytest.raises(EmulatorError, match=r"was written before griddepcontrol\.wait"):
        b.put(np.full(64, -7, np.int32))
        gpu.launch("linked", 1, 64, [b, a, 0])
        gpu.launch("linked", 1, 64, [b, a, 3])
    gpu.stream.sync()
    with pytest.raises(EmulatorError, match="no thread waits for the predecessors"):
        gpu.launch("past", 1, 1, [b, 0])


def test_a_kernel_that_waits_first_makes_what_came_before_safe(sources: Path) -> None:
    gpu = small(sources, 2)
    a, b, c, d = (gpu.zeros((64,), np.int32) for _ in range(4))
    for middle, expected in ((1, 2), (0, 0)):
        b.put(np.full(64, -7, np.int32))
        c.put(np.full(64, -7, np.int32))
        gpu.stream.sync()
        gpu.launch("linked", 1, 64, [b, a, 0])
        gpu.launch("linked", 1, 64, [c, b, middle])
        gpu.launch("linked", 1, 64, [d, b, 2])  # reads what the first has written, before it waits
        assert (d.get() == expected).all()


def test_what_it_lacks_is_named(sources: Path) -> None:
    body = 'asm volatile("foo.bar.u32 %0;" : "=r"(*p));'
    text = f'#include "common/common.cuh"\nextern "C" __global__ void f(u32* p) {{ {body} }}\n'
    (sources / "lacking.cu").write_text(text)
    gpu = Emulator(0, sources, {"f": KernelSpec("f", "lacking.cu", "f")})
    with pytest.raises(EmulatorError, match=r"the emulator has no foo\.bar\.u32"):
        gpu.build(["f"])


DAMAGE = [
    ("norm", "common/common.cuh", "__syncthreads();\n  V total", "V total"),
    ("norm", "rowwise/row_norm.cuh", "if (i < vectors)", "if (i <= vectors)"),
    ("norm_groups", "rowwise/norm.cu", "griddep_wait();", ""),
    ("rope", "rowwise/rope.cu", "position % KV_BLOCK) * D", "position % KV_BLOCK) * D + 8"),
    ("prefill", "attention/prefill.cu", "cp_async_wait<0>();\n    __syncthreads();  // the values",
     "__syncthreads();  // the values"),
    ("prefill", "attention/prefill.cu", "cp_async_wait<0>();\n  __syncthreads();\n  if constexpr (FP8) exp",
     "cp_async_wait<0>();\n  if constexpr (FP8) exp"),
    ("decode", "attention/decode.cu", "__syncthreads();  // the exchange and the queries have been read", ""),
    ("decode", "attention/attention.cuh", "+ (lane / 16) * 8) * (DK + PAD) + ((lane / 8) % 2) * 8",
     "+ (lane / 16) * 8) * (DK + PAD)"),
]  # fmt: skip


@pytest.mark.parametrize(("check", "source", "good", "bad"), DAMAGE, ids=range(len(DAMAGE)))
def test_damaged_kernels_fail_their_checks(
    tmp_path: Path, check: str, source: str, good: str, bad: str
) -> None:
    shutil.copytree(build.SOURCES, tmp_path, dirs_exist_ok=True)
    text = (tmp_path / source).read_text()
    assert good in text, "the line has changed: choose another"
    (tmp_path / source).write_text(text.replace(good, bad))
    gpu = Emulator(None, tmp_path, {name: spec for name, spec in MANIFEST.items() if "_bf16_" in name})
    rng, shape = np.random.default_rng(3), attention_checks.Shape(64, 1, 4)
    with pytest.raises(AssertionError):
        for _ in range(3):
            if hasattr(op_checks, f"check_{check}"):
                getattr(op_checks, f"check_{check}")(gpu, rng, harness.BF16)
            else:
                getattr(attention_checks, f"check_{check}")(gpu, rng, harness.BF16, shape)
    gpu.clear()

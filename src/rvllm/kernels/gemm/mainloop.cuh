// The main loop of the wgmma kernels: a ring of stages that a producer fills and consumer warpgroups sum.
#pragma once

#include "gemm/gemm.cuh"
#include "ptx/wgmma.cuh"

namespace rvllm::gemm {

struct alignas(64) TensorMap {
  u64 opaque[16];
};

// The stages of loads in flight: where each has its weights and its tokens, and its two barriers.
struct Ring {
  int stages;
  u32 weights, x;
  int weights_pitch, x_pitch;
  u32 bars;
  int stage = 0;
  u32 phase = 0;
  __device__ void advance() {
    if (++stage == stages) stage = 0, phase ^= 1;
  }
  __device__ u32 weights_at() const { return weights + stage * weights_pitch; }
  __device__ u32 x_at() const { return x + stage * x_pitch; }
  __device__ u32 full(int s) const { return bars + 16 * s; }
  __device__ u32 empty(int s) const { return bars + 16 * s + 8; }
};

// A consumer warp has read a stage: said to every block of the cluster whose loads fill it.
template <int CLUSTER>
__device__ __forceinline__ void release(const Ring& ring, int stage, int lane) {
  if constexpr (CLUSTER > 1) {
    if (lane < CLUSTER) ptx::mbar_arrive_remote(ring.empty(stage), lane);
  } else {
    if (lane == 0) ptx::mbar_arrive(ring.empty(stage));
  }
}

// The same of a stage of which ordinary loads have read something, scales say, that this block's own producer fills. `seen`: bits
// of all that they have brought. The arrival's address depends on them, by a zero that the compiler does not know (blocks are
// one-dimensional): else it may be issued while a load still waits behind other warps' stores, and the copy engine is the first to reach
// the stage. The other block's loads bring what the tensor cores alone read.
template <int CLUSTER>
__device__ __forceinline__ void release_read(const Ring& ring, int stage, int lane, u32 seen) {
  static_assert(CLUSTER <= 2);
  const u32 bar = ring.empty(stage) + (seen & threadIdx.y);
  if (lane == 0) ptx::mbar_arrive(bar);
  if (CLUSTER == 2 && lane == 1) ptx::mbar_arrive_remote(bar, 1 - static_cast<int>(blockIdx.x) % 2);
}
__device__ __forceinline__ u32 bits_of(float2 v) { return __float_as_uint(v.x) | __float_as_uint(v.y); }

// Sums blocks [first, last) of K into acc, of as many tokens as it has columns. COPIED: x came by ordinary copies.
template <class T, int CLUSTER, bool COPIED = false, int REGS>
__device__ __forceinline__ void sum_blocks(float (&acc)[REGS], Ring& ring, int group, int lane, int first, int last) {
  using namespace ptx;
  int reading = -1;
  for (int k = first; k < last; k++) {
    mbar_wait(ring.full(ring.stage), ring.phase);
    if constexpr (COPIED) fence_async_shared();  // the tensor cores read like the copy engine
    const u32 a = ring.weights_at() + group * TILE_BYTES, b = ring.x_at();
    wgmma_pin(acc);
    wgmma_fence();
#pragma unroll
    for (int j = 0; j < TILE / 16; j++)
      wgmma<REGS * 2, T>(acc, wgmma_operand(a + 32 * j), wgmma_operand(b + 32 * j), j > 0 || k > first);
    wgmma_commit();
    wgmma_pin(acc);
    if (reading >= 0) {
      wgmma_wait<1>();
      release<CLUSTER>(ring, reading, lane);
    }
    reading = ring.stage;
    ring.advance();
  }
  wgmma_wait<0>();
  wgmma_pin(acc);
  if (reading >= 0) release<CLUSTER>(ring, reading, lane);
}

// sum(the first WIDTH columns of acc), for the one of WIDTHS that is `width`.
template <int... WIDTHS, int REGS, class Sum>
__device__ __forceinline__ void of_width(int width, float (&acc)[REGS], Sum sum) {
  ((width == WIDTHS ? sum(reinterpret_cast<float(&)[WIDTHS / 2]>(acc)) : void()), ...);
}

}  // namespace rvllm::gemm

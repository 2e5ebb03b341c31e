// The activations of a block of the kernel for few tokens, brought into shared memory: quantised on the way in, or copied.
#pragma once

#include "gemm/fp8/fp8.cuh"

namespace rvllm::fp8 {

using namespace gemm;
inline constexpr int CONSUMERS = 256;

// 16-bit x [tokens, width] from token0 and block k0 on, quantised into tiles of TOKENS rows of 128 bytes (128-byte swizzle)
// at `tiles`, scales [groups][TOKENS] at `scales`. k0 begins a group. Rows that do not exist were zeroed before.
template <class T, int TOKENS>
__device__ __forceinline__ void quantise_resident(const T* x, int width, int pitch, int count, int k0, int blocks,
                                                  u32 tiles, u32 scales, int warp, int lane) {
  constexpr int BATCH = 4;
  const int units = scale_groups(blocks) * count;  // a warp takes one token's 256 columns, eight a lane
  for (int first = warp; first < units; first += BATCH * (CONSUMERS / 32)) {
    uint4 in[BATCH];
    int group[BATCH], token[BATCH];
#pragma unroll
    for (int b = 0; b < BATCH; b++) {
      const int u = min(first + b * (CONSUMERS / 32), units - 1);
      group[b] = u / count, token[b] = u % count;
      const int column = k0 * BLOCK_K + group[b] * SCALE_K + lane * 8;
      in[b] = column < width ? ptx::load_l2(x + static_cast<size_t>(token[b]) * pitch + column) : make_uint4(0, 0, 0, 0);
    }
#pragma unroll
    for (int b = 0; b < BATCH; b++) {
      const auto* pack = reinterpret_cast<const Pack<T, 8>*>(&in[b]);
      float v[8], amax = 0.f;
#pragma unroll
      for (int i = 0; i < 8; i++) {
        v[i] = to_float(pack->v[i]);
        amax = fmaxf(amax, fabsf(v[i]));
      }
      amax = largest_of_group(amax);
      const int block = group[b] * SCALE_BLOCKS + lane / 16, piece = lane % 16;
      const u32 at = tiles + (block * TOKENS + token[b]) * BLOCK_K + ((piece / 2) ^ (token[b] % 8)) * 16 + piece % 2 * 8;
      const uint2 codes = codes_of(v, inverse_of(amax));
      if (block < blocks) asm volatile("st.shared.v2.u32 [%0], {%1, %2};" ::"r"(at), "r"(codes.x), "r"(codes.y) : "memory");
      if (lane == 0)
        asm volatile("st.shared.f32 [%0], %1;" ::"r"(scales + (group[b] * TOKENS + token[b]) * 4), "f"(scale_of(amax)) : "memory");
    }
  }
}

// The same of x that is quantised already: q [tokens, pitch] and scales [groups, capacity] from token0 on.
template <int TOKENS>
__device__ __forceinline__ void copy_resident(const u8* q, const float* x_scales, int pitch, int capacity, int count, int k0,
                                              int blocks, u32 tiles, u32 scales, int thread) {
  constexpr int BATCH = 4;
  const int chunks = blocks * TOKENS * 8;
  for (int first = thread; first < chunks; first += BATCH * CONSUMERS) {
    uint4 in[BATCH];
#pragma unroll
    for (int b = 0; b < BATCH; b++) {
      const int i = first + b * CONSUMERS, row = i / 8, token = row % TOKENS;
      if (i < chunks && token < count)
        in[b] = ptx::load_l2(q + static_cast<size_t>(token) * pitch + (k0 + row / TOKENS) * BLOCK_K + i % 8 * 16);
    }
#pragma unroll
    for (int b = 0; b < BATCH; b++) {
      const int i = first + b * CONSUMERS, row = i / 8, token = row % TOKENS;
      if (i < chunks && token < count)
        asm volatile("st.shared.v4.u32 [%0], {%1, %2, %3, %4};" ::"r"(tiles + row * BLOCK_K + (i % 8 ^ token % 8) * 16),
                     "r"(in[b].x), "r"(in[b].y), "r"(in[b].z), "r"(in[b].w) : "memory");
    }
  }
  for (int i = thread; i < scale_groups(blocks) * TOKENS; i += CONSUMERS)
    if (i % TOKENS < count)
      asm volatile("st.shared.f32 [%0], %1;" ::"r"(scales + i * 4),
                   "f"(__ldcg(x_scales + static_cast<size_t>(k0 / SCALE_BLOCKS + i / TOKENS) * capacity + i % TOKENS)) : "memory");
}

// Rows from `count` on, and their scales, become zero.
template <int TOKENS>
__device__ __forceinline__ void zero_resident(int count, int blocks, u32 tiles, u32 scales, int thread) {
  const int spare = TOKENS - count;
  for (int i = thread; i < blocks * spare * 8; i += CONSUMERS) {
    const int row = i / 8 / spare * TOKENS + count + i / 8 % spare;
    asm volatile("st.shared.v4.u32 [%0], {%1, %1, %1, %1};" ::"r"(tiles + row * BLOCK_K + i % 8 * 16), "r"(0) : "memory");
    if (i % 8 == 0) asm volatile("st.shared.u32 [%0], %1;" ::"r"(scales + row * 4), "r"(0) : "memory");
  }
}

}  // namespace rvllm::fp8

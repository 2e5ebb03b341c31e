// A small matrix product for each head: what its kernels share.
//
// out[t, h] = weight[h] @ x[t, h][:K]. A block of four warps takes rows of one head's matrix and 8 * NB tokens; weights
// are the M side of the tensor-core tile, tokens the N side. K is cut into segments of 128, one a warp, and a block has
// as many groups of 16 rows as segments leave warps for; an output is the sum of its segments in ascending order, so
// its bits do not depend on NB or on other tokens. Weights are on their way before the predecessor is done.
#pragma once

#include "mla/mla.cuh"

inline constexpr int SEGMENT = 128, ROW_WARPS = 4, BLOCK_THREADS = ROW_WARPS * 32;
inline constexpr int WEIGHT_PITCH = SEGMENT + PAD, SUMS_PITCH = 20;  // elements; floats of a token's 16 rows

// What a block of heads * chunks has to do: rows [row, row + 16 * groups) of the head, groups = 4 / segments.
struct Share {
  int head, row, segments, groups, group, segment, pitch;  // pitch: of a token's x in shared memory
  bool idle;                                               // a warp beyond groups * segments
};

__device__ __forceinline__ Share share_of(int block, int N, int K) {
  Share mine;
  mine.segments = (K + SEGMENT - 1) / SEGMENT;
  mine.groups = ROW_WARPS / mine.segments;
  const int chunks = (N + 16 * mine.groups - 1) / (16 * mine.groups), warp = threadIdx.x / 32;
  mine.head = block / chunks;
  mine.row = block % chunks * 16 * mine.groups;
  mine.group = warp / mine.segments;
  mine.segment = warp % mine.segments;
  mine.idle = mine.group >= mine.groups;
  mine.pitch = (K + 15) / 16 * 16 + PAD;
  return mine;
}

// Shared memory: the weights (later the sums), then the tokens' x.
template <typename T, int NB>
struct Shared {
  static constexpr int WEIGHTS = ROW_WARPS * 16 * WEIGHT_PITCH * 2, SUMS = ROW_WARPS * NB * 8 * SUMS_PITCH * 4;
  static constexpr int FRONT = WEIGHTS > SUMS ? WEIGHTS : SUMS;
  T* weights;
  float* sums;
  T* x;
  __device__ __forceinline__ explicit Shared(unsigned char* memory)
      : weights(reinterpret_cast<T*>(memory)), sums(reinterpret_cast<float*>(memory)), x(reinterpret_cast<T*>(memory + FRONT)) {}
};

// Sets each warp's weights on their way to shared memory, zeros where the matrix ends.
template <typename T>
__device__ __forceinline__ void load_weights(T* into, const T* weight, const Share& mine, int N, int K) {
  if (mine.idle) return;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, first = mine.row + mine.group * 16;
  for (int i = lane; i < 16 * (SEGMENT / 8); i += 32) {
    const int row = i / (SEGMENT / 8), column = i % (SEGMENT / 8) * 8, k = mine.segment * SEGMENT + column;
    const bool valid = first + row < N && k < K;
    const T* const source = valid ? weight + ((size_t)mine.head * N + first + row) * K + k : weight;
    cp_async16(smem(into + (warp * 16 + row) * WEIGHT_PITCH + column), source, valid ? 16 : 0);
  }
}

// Sets x of tokens first .. first + 8 * NB - 1 on its way; x [tokens, x_pitch], of which head h has the K + tail
// elements from h * (K + tail) on.
template <typename T, int NB>
__device__ __forceinline__ void load_x(T* into, const T* x, const Share& mine, int first, int tokens, size_t x_pitch,
                                       int K, int tail) {
  for (int token = threadIdx.x / 32; token < NB * 8; token += ROW_WARPS) {
    const bool valid = first + token < tokens;
    const T* const source = x + (first + token) * x_pitch + mine.head * (K + tail);
    for (int k = threadIdx.x % 32 * 8; k < mine.pitch - PAD; k += 256) {
      const bool in = valid && k < K;
      cp_async16(smem(into + token * mine.pitch + k), in ? source + k : x, in ? 16 : 0);
    }
  }
}

// The product of the block's rows and tokens, once weights and x are there. Every thread of the block calls it.
template <typename T, int NB>
__device__ __forceinline__ void multiply(T* out, const Shared<T, NB>& shared, const Share& mine, int first, int tokens,
                                         int heads, int N, int K, int tail) {
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int steps = mine.idle ? 0 : (min(SEGMENT, K - mine.segment * SEGMENT) + 15) / 16;
  const u32 a = smem(shared.weights + (warp * 16 + lane % 16) * WEIGHT_PITCH + lane / 16 * 8);
  const u32 b = smem(shared.x + lane % 8 * mine.pitch + mine.segment * SEGMENT + (lane / 8) % 2 * 8);
  float sum[NB][4] = {};
  for (int k = 0; k < steps; k++) {
    u32 w[4];
    ldmatrix_x4(w, a + k * 32);
#pragma unroll
    for (int n = 0; n < NB; n++) {
      if (first + n * 8 >= tokens) continue;
      u32 t[2];
      ldmatrix_x2(t, b + n * 8 * mine.pitch * 2 + k * 32);
      mma_16816(sum[n], w, t, T());
    }
  }
  __syncthreads();  // the weights have been read: sums lie where they were
  if (!mine.idle) {
#pragma unroll
    for (int n = 0; n < NB; n++)
#pragma unroll
      for (int i = 0; i < 4; i++) {
        const int token = n * 8 + lane % 4 * 2 + (i & 1), row = lane / 4 + i / 2 * 8;
        shared.sums[(warp * NB * 8 + token) * SUMS_PITCH + row] = sum[n][i];
      }
  }
  __syncthreads();
  const int pairs = mine.groups * 8;
  for (int e = threadIdx.x; e < pairs * NB * 8; e += BLOCK_THREADS) {
    const int token = e / pairs, row = e % pairs * 2;
    if (first + token >= tokens || mine.row + row >= N) continue;
    float2 total;
    for (int s = 0; s < mine.segments; s++) {
      const float* const part = shared.sums + ((row / 16 * mine.segments + s) * NB * 8 + token) * SUMS_PITCH + row % 16;
      const float2 v = *reinterpret_cast<const float2*>(part);
      total = s ? make_float2(__fadd_rn(total.x, v.x), __fadd_rn(total.y, v.y)) : v;
    }
    T* const target = out + ((size_t)(first + token) * heads + mine.head) * (N + tail) + mine.row + row;
    *reinterpret_cast<u32*>(target) = pack2<T>(total.x, total.y);
  }
}

// What goes into latent attention: absorbed and rotated queries, and the cache. The product of each head with what lies
// beside it; blocks of their own normalise each token's latent, rotate its key and write both to the cache. Lengths,
// places and angles are at hand before the predecessor is done.
// Bound by memory at decode sizes (the weights are read once), by L2 at prefill.
#include "mla/head_gemm.cuh"

// Turns `rotated` elements by their position's angles; pairs are (2i, 2i + 1), or (i, i + rotated / 2) if not
// INTERLEAVED. One warp; source and target may be the same.
template <typename T, bool INTERLEAVED>
__device__ __forceinline__ void rotate(T* target, const T* source, const float* cos, const float* sin, int rotated) {
  const u32* const in = reinterpret_cast<const u32*>(source);
  u32* const out = reinterpret_cast<u32*>(target);
  const int lane = threadIdx.x % 32, half = rotated / 2;
  const auto turn = [](float a, float b, float c, float s) { return __fmaf_rn(a, c, -__fmul_rn(b, s)); };
  if (INTERLEAVED) {
    for (int i = lane; i < half; i += 32) {
      const float2 v = unpack2<T>(in[i]);
      out[i] = pack2<T>(turn(v.x, v.y, cos[i], sin[i]), turn(v.y, v.x, cos[i], -sin[i]));
    }
  } else {
    for (int i = lane; i < half / 2; i += 32) {
      const float2 a = unpack2<T>(in[i]), b = unpack2<T>(in[i + half / 2]);
      const float2 c = *reinterpret_cast<const float2*>(cos + 2 * i), s = *reinterpret_cast<const float2*>(sin + 2 * i);
      out[i] = pack2<T>(turn(a.x, b.x, c.x, s.x), turn(a.y, b.y, c.y, s.y));
      out[i + half / 2] = pack2<T>(turn(b.x, a.x, c.x, -s.x), turn(b.y, a.y, c.y, -s.y));
    }
  }
}

// The weights of the norm of two times eight elements a lane.
__device__ __forceinline__ void load_norm(float (&weights)[2][8], const float* norm, int rank) {
#pragma unroll
  for (int k = 0; k < 2; k++) {
    const int i = threadIdx.x % 32 + 32 * k;
#pragma unroll
    for (int j = 0; j < 8; j += 4)
      *reinterpret_cast<float4*>(&weights[k][j]) =
          i < rank / 8 ? *reinterpret_cast<const float4*>(norm + i * 8 + j) : make_float4(0.f, 0.f, 0.f, 0.f);
  }
}

// One token's latent and key into the cache: kv [rank + rotated], of which the latent is normalised by its root mean
// square and the key rotated. target: its place. One warp.
template <typename T, bool INTERLEAVED>
__device__ __forceinline__ void store_token(T* target, const T* kv, const float (&norm)[2][8], float eps, const float* cos,
                                            const float* sin, int rank, int rotated) {
  const int lane = threadIdx.x % 32;
  const uint4* const in = reinterpret_cast<const uint4*>(kv);
  float v[2][8], sum = 0.f;
#pragma unroll
  for (int k = 0; k < 2; k++) {
    const int i = lane + 32 * k;
#pragma unroll
    for (int j = 0; j < 8; j++) v[k][j] = 0.f;
    if (i < rank / 8) unpack8<T>(in[i], v[k]);
#pragma unroll
    for (int j = 0; j < 8; j++) sum = __fmaf_rn(v[k][j], v[k][j], sum);
  }
  const float factor = __fdiv_rn(1.f, sqrtf(__fadd_rn(__fdiv_rn(warp_sum(sum), rank), eps)));
#pragma unroll
  for (int k = 0; k < 2; k++) {
    const int i = lane + 32 * k;
    if (i >= rank / 8) continue;
#pragma unroll
    for (int j = 0; j < 8; j++) v[k][j] = __fmul_rn(__fmul_rn(v[k][j], factor), norm[k][j]);
    reinterpret_cast<uint4*>(target)[i] = pack8<T>(v[k]);
  }
  rotate<T, INTERLEAVED>(target + rank, kv + rank, cos, sin, rotated);
}

// out [tokens, heads * (rank + rotated)] = weight[h] @ q[:plain], then q's rotated rest; q [tokens, q_pitch] holds heads
// of plain + rotated elements, weight [heads, rank, plain]. kv [tokens, kv_pitch] of rank + rotated goes into cache [blocks, 16, rank + rotated] at
// (tables[slot][position / 16], position % 16), its first `rank` elements normalised with weights norm float32
// [rank]. cos, sin float32 [positions, rotated / 2]. positions, token_slots int32 [tokens]; count: rows in use. rank
// and rotated multiples of 16, plain of 8; rank and plain <= 512.
// Grid: (heads * chunks + NB, ceil(tokens / (8 * NB))): the last NB blocks take eight tokens' kv each.
template <typename T, bool INTERLEAVED, int NB>
__global__ void __launch_bounds__(BLOCK_THREADS)
latent_prepare(T* out, const T* q, const T* kv, const T* __restrict__ weight, T* cache, const float* __restrict__ norm,
               const float* __restrict__ cos, const float* __restrict__ sin, const int* tables, const int* positions,
               const int* token_slots, const int* count, int tokens, int q_pitch, int kv_pitch, int heads, int rank,
               int plain, int rotated, int table_stride, float eps) {
  griddep_launch();
  extern __shared__ __align__(128) unsigned char memory[];
  __shared__ int token_positions[NB * 8];  // -1 beyond the count
  const Shared<T, NB> shared(memory);
  const int first = blockIdx.y * NB * 8, warp = threadIdx.x / 32, extra = gridDim.x - NB, half = rotated / 2;
  if (blockIdx.x >= extra) {
    const int begin = first + (blockIdx.x - extra) * 8 + warp, end = *count;
    alignas(16) float weights[2][8];
    size_t at[2];  // of two tokens, ROW_WARPS apart: where their angles and their place in the cache are
    T* target[2];
    load_norm(weights, norm, rank);
#pragma unroll
    for (int i = 0; i < 2; i++) {
      const int token = begin + i * ROW_WARPS;
      if (token >= end) continue;
      const int position = positions[token];
      const int block = tables[(size_t)token_slots[token] * table_stride + position / KV_BLOCK];
      target[i] = cache + ((size_t)block * KV_BLOCK + position % KV_BLOCK) * (rank + rotated);
      at[i] = (size_t)position * half;
    }
    griddep_wait();
#pragma unroll
    for (int i = 0; i < 2; i++) {
      const int token = begin + i * ROW_WARPS;
      if (token >= end) continue;
      const T* const source = kv + (size_t)token * kv_pitch;
      store_token<T, INTERLEAVED>(target[i], source, weights, eps, cos + at[i], sin + at[i], rank, rotated);
    }
    return;
  }
  const Share mine = share_of(blockIdx.x, rank, plain);
  load_weights(shared.weights, weight, mine, rank, plain);
  if (threadIdx.x < NB * 8) token_positions[threadIdx.x] = first + threadIdx.x < *count ? positions[first + threadIdx.x] : -1;
  __syncthreads();
  griddep_wait();
  load_x<T, NB>(shared.x, q, mine, first, tokens, q_pitch, plain, rotated);
  cp_async_commit();
  if (mine.row == 0) {
    for (int i = warp; i < NB * 8 && token_positions[i] >= 0; i += ROW_WARPS) {
      const int token = first + i;
      const size_t row = (size_t)token * heads + mine.head, at = (size_t)token_positions[i] * half;
      const T* const source = q + (size_t)token * q_pitch + mine.head * (plain + rotated);
      rotate<T, INTERLEAVED>(out + row * (rank + rotated) + rank, source + plain, cos + at, sin + at, rotated);
    }
  }
  cp_async_wait<0>();
  __syncthreads();
  multiply<T, NB>(out, shared, mine, first, tokens, heads, rank, plain, rotated);
}

// Rotary embedding of queries and keys, fused with the write of keys and values into the paged cache, and with
// the norms of query and key heads in front of it where a model has them.
#include "rowwise/head_norm.cuh"
#include "rowwise/rotation.cuh"

constexpr int KV_BLOCK = 16;

// What happens to a head before it turns: nothing.
struct AsItIs {
  __device__ __forceinline__ AsItIs fetch(int, int) const { return *this; }
  __device__ __forceinline__ const u32* operator()(const u32* in, bool, int) const { return in; }
};

// The norm of its elements, rounded as a kernel of its own would; `to` is the warp's room for them.
template <typename T, bool LAYER>
struct Normed {
  const float *q_weight, *k_weight;
  int q_step, k_step, heads, kv_heads, D;
  float eps;
  u32* to;

  struct Fetched {
    const Normed& norm;
    SliceWeights weights;
    __device__ __forceinline__ const u32* operator()(const u32* in, bool turns, int lane) const {
      if (!turns) return in;
      norm_slice<T, LAYER>(norm.to, in, weights, norm.D, norm.eps, lane);
      __syncwarp();
      return norm.to;
    }
  };
  // Its weights, before the predecessor is waited for.
  __device__ __forceinline__ Fetched fetch(int head, int lane) const {
    const float* const weight = head < heads ? q_weight + head * q_step : k_weight + (head - heads) * k_step;
    return {*this, SliceWeights(head < heads + kv_heads ? weight : nullptr, nullptr, D, lane)};
  }
};

template <typename T, bool INTERLEAVED, typename Before>
__device__ __forceinline__ void rotate_and_cache(T* qkv, T* k_cache, T* v_cache, const float* __restrict__ cos,
                                                 const float* __restrict__ sin, const int* tables, const int* positions,
                                                 const int* token_slots, const int* count, int pitch, int table_stride,
                                                 int heads, int kv_heads, int D, int rotated, const Before& before) {
  griddep_launch();
  const int head = blockIdx.x * (blockDim.x / 32) + threadIdx.x / 32, lane = threadIdx.x % 32, row = blockIdx.y;
  const int position = positions[row], slot = token_slots[row];
  const bool active = row < *count && head < heads + 2 * kv_heads;
  const bool query = head < heads, turns = head < heads + kv_heads;
  T* target = nullptr;
  const int half = rotated / 2;
  const float* const c = cos + (size_t)position * half;
  const float* const s = sin + (size_t)position * half;
  if (active && !query) {
    const int block = tables[(size_t)slot * table_stride + position / KV_BLOCK], kv = (head - heads) % kv_heads;
    target = (turns ? k_cache : v_cache) + (((size_t)block * kv_heads + kv) * KV_BLOCK + position % KV_BLOCK) * D;
  }
  const auto prepared = before.fetch(head, lane);
  griddep_wait();
  if (!active) return;
  T* const source = qkv + (size_t)row * pitch + (size_t)head * D;
  if (query) target = source;
  const u32* const raw = reinterpret_cast<const u32*>(source);
  const u32* const in = prepared(raw, turns, lane);
  u32* const out = reinterpret_cast<u32*>(target);
  int plain = 0;  // words in front that have been rotated
  if (turns && rotated) {
    plain = half;
    if (INTERLEAVED) {
      for (int i = lane; i < half; i += 32) {
        const float2 v = unpack2<T>(in[i]);
        out[i] = pack2<T>(turned_first(v.x, v.y, c[i], s[i]), turned_second(v.x, v.y, c[i], s[i]));
      }
    } else {
      for (int i = lane; i < half / 2; i += 32) {
        u32 a = in[i], b = in[i + half / 2];
        turn_halves<T>(a, b, *reinterpret_cast<const float2*>(c + 2 * i), *reinterpret_cast<const float2*>(s + 2 * i));
        out[i] = a;
        out[i + half / 2] = b;
      }
    }
  }
  if (out != in)
    for (int i = plain + lane; i < D / 2; i += 32) out[i] = in[i];
}

// qkv [T, pitch]: heads query heads, kv_heads key heads, kv_heads value heads of D elements each. Queries are
// rotated in place; keys are rotated and, like values, written to k_cache / v_cache [blocks, kv_heads, 16, D] at
// (tables[slot][position / 16], position % 16). cos, sin float32 [positions, rotated / 2]; rotated: how many
// leading elements of a head turn, a multiple of 4, 0 for none. Pairs are (i, i + rotated / 2), or (2i, 2i + 1)
// when INTERLEAVED. positions, token_slots int32 [T]; count: rows in use.
// Grid: (ceil((heads + 2 kv_heads) / warps), T), one warp a head. Bound by latency at decode sizes.
template <typename T, bool INTERLEAVED>
__global__ void rope_kv(T* qkv, T* k_cache, T* v_cache, const float* cos, const float* sin, const int* tables,
                        const int* positions, const int* token_slots, const int* count, int pitch, int table_stride,
                        int heads, int kv_heads, int D, int rotated) {
  rotate_and_cache<T, INTERLEAVED>(qkv, k_cache, v_cache, cos, sin, tables, positions, token_slots, count, pitch,
                                   table_stride, heads, kv_heads, D, rotated, AsItIs());
}

// The same for many rows and pairs (i, i + rotated / 2): a block a row, whose warps have several heads' loads in flight.
// Grid: (T), any number of warps. Bound by memory.
template <typename T>
__global__ void __launch_bounds__(128, 8)
rope_kv_rows(T* qkv, T* k_cache, T* v_cache, const float* __restrict__ cos, const float* __restrict__ sin,
             const int* tables, const int* positions, const int* token_slots, const int* count, int pitch,
             int table_stride, int heads, int kv_heads, int D, int rotated) {
  griddep_launch();
  constexpr int EACH = 5;  // heads of a warp at a time
  const int row = blockIdx.x, warp = threadIdx.x / 32, warps = blockDim.x / 32, lane = threadIdx.x % 32;
  const bool active = row < *count;
  const int position = active ? positions[row] : 0, half = rotated / 2, total = heads + 2 * kv_heads;
  const int block = active ? tables[(size_t)token_slots[row] * table_stride + position / KV_BLOCK] : 0;
  const float* const c = cos + (size_t)position * half;
  const float* const s = sin + (size_t)position * half;
  griddep_wait();
  if (!active) return;
  u32* const source = reinterpret_cast<u32*>(qkv + (size_t)row * pitch);
  const auto target = [&](int head) {  // of a head's words: its place in the cache, or where it is
    if (head < heads) return source + (size_t)head * (D / 2);
    const int kv = (head - heads) % kv_heads;
    T* const cache = head < heads + kv_heads ? k_cache : v_cache;
    return reinterpret_cast<u32*>(cache + (((size_t)block * kv_heads + kv) * KV_BLOCK + position % KV_BLOCK) * D);
  };
  for (int first = warp; first < heads + kv_heads; first += warps * EACH)
    for (int i = lane; i < half / 2; i += 32) {
      const float2 cc = *reinterpret_cast<const float2*>(c + 2 * i), ss = *reinterpret_cast<const float2*>(s + 2 * i);
      u32 a[EACH], b[EACH];
#pragma unroll
      for (int e = 0; e < EACH; e++) {
        const u32* const in = source + (size_t)min(first + e * warps, heads + kv_heads - 1) * (D / 2);
        a[e] = in[i];
        b[e] = in[i + half / 2];
      }
#pragma unroll
      for (int e = 0; e < EACH; e++) {
        const int head = first + e * warps;
        if (head >= heads + kv_heads) continue;
        turn_halves<T>(a[e], b[e], cc, ss);
        u32* const out = target(head);
        out[i] = a[e];
        out[i + half / 2] = b[e];
      }
    }
  // What does not turn: values, and the ends of keys.
  for (int head = heads + warp; head < total; head += warps) {
    const u32* const in = source + (size_t)head * (D / 2);
    u32* const out = target(head);
    for (int i = (head < heads + kv_heads ? half : 0) + lane; i < D / 2; i += 32) out[i] = in[i];
  }
}

// The same as rope_kv with the norm of each query and key head first; keys in qkv stay as they were. q_weight, k_weight
// float32 [D] with step 0, or one row a head with step D; D even and <= 256. Four warps.
template <typename T, bool INTERLEAVED, bool LAYER>
__global__ void rope_kv_normed(T* qkv, T* k_cache, T* v_cache, const float* cos, const float* sin, const int* tables,
                               const int* positions, const int* token_slots, const int* count, int pitch,
                               int table_stride, int heads, int kv_heads, int D, int rotated, const float* q_weight,
                               const float* k_weight, int q_step, int k_step, float eps) {
  __shared__ u32 room[4][128];
  const Normed<T, LAYER> before = {q_weight, k_weight, q_step, k_step, heads, kv_heads, D, eps, room[threadIdx.x / 32]};
  rotate_and_cache<T, INTERLEAVED>(qkv, k_cache, v_cache, cos, sin, tables, positions, token_slots, count, pitch,
                                   table_stride, heads, kv_heads, D, rotated, before);
}

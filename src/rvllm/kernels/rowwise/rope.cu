// Rotary embedding of queries and keys, fused with the write of keys and values into the paged cache, and with
// the norms of query and key heads in front of it where a model has them.
#include "attention/fp8_cache.cuh"
#include "rowwise/head_norm.cuh"
#include "rowwise/rotation.cuh"

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

// C: elements of the cache, T or u8 (see attention/fp8_cache.cuh): rows for that are put together in `room`, D / 2 words of
// the warp's own, which may be where `before` leaves its result.
template <typename T, bool INTERLEAVED, typename C, typename Before>
__device__ __forceinline__ void rotate_and_cache(T* qkv, C* k_cache, C* v_cache, const float* __restrict__ cos,
                                                 const float* __restrict__ sin, const int* tables, const int* positions,
                                                 const int* token_slots, const int* count, int pitch, int table_stride,
                                                 int heads, int kv_heads, int D, int rotated, const Before& before,
                                                 u32* room = nullptr) {
  constexpr bool FP8 = sizeof(C) == 1;
  griddep_launch();
  const int head = blockIdx.x * (blockDim.x / 32) + threadIdx.x / 32, lane = threadIdx.x % 32, row = blockIdx.y;
  const int position = positions[row], slot = token_slots[row];
  const bool active = row < *count && head < heads + 2 * kv_heads;
  const bool query = head < heads, turns = head < heads + kv_heads;
  T* target = nullptr;
  [[maybe_unused]] u8* piece = nullptr;
  const int half = rotated / 2;
  const float* const c = cos + (size_t)position * half;
  const float* const s = sin + (size_t)position * half;
  if (active && !query) {
    const int block = tables[(size_t)slot * table_stride + position / KV_BLOCK], kv = (head - heads) % kv_heads;
    C* const cache = turns ? k_cache : v_cache;
    const size_t at = (size_t)block * kv_heads + kv;
    if constexpr (FP8) {
      piece = cache + at * kv8::piece_bytes(D);
      target = reinterpret_cast<T*>(room);
    } else {
      target = cache + (at * KV_BLOCK + position % KV_BLOCK) * D;
    }
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
  if constexpr (FP8) {
    if (query) return;
    __syncwarp();
    kv8::store_row<T>(piece, out, D, position % KV_BLOCK, turns, lane);
  }
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

// The same into a cache in e4m3. D even and <= 256. Four warps.
template <typename T, bool INTERLEAVED>
__global__ void rope_kv_fp8(T* qkv, u8* k_cache, u8* v_cache, const float* cos, const float* sin, const int* tables,
                            const int* positions, const int* token_slots, const int* count, int pitch, int table_stride,
                            int heads, int kv_heads, int D, int rotated) {
  __shared__ u32 room[4][128];
  rotate_and_cache<T, INTERLEAVED>(qkv, k_cache, v_cache, cos, sin, tables, positions, token_slots, count, pitch,
                                   table_stride, heads, kv_heads, D, rotated, AsItIs(), room[threadIdx.x / 32]);
}

// rope_kv for many rows and pairs (i, i + rotated / 2), rotated and D multiples of 16 and 8: a block a row, 16 bytes an
// access, a row's queries, keys and values all under way before its position is known.
// Grid: (T), ROPE_THREADS. Bound by memory.
[[maybe_unused]] constexpr int ROPE_THREADS = 128, ROPE_PAIRS = 2;  // of 16 bytes that a thread turns at once
template <typename T>
__global__ void __launch_bounds__(ROPE_THREADS, 8)
rope_kv_rows(T* qkv, T* k_cache, T* v_cache, const float* __restrict__ cos, const float* __restrict__ sin,
             const int* tables, const int* positions, const int* token_slots, const int* count, int pitch,
             int table_stride, int heads, int kv_heads, int D, int rotated) {
  griddep_launch();
  const int row = blockIdx.x;
  const bool active = row < *count;
  const int position = active ? positions[row] : 0, half = rotated / 2, turning = heads + kv_heads;
  const int* const table = tables + (size_t)(active ? token_slots[row] : 0) * table_stride;
  griddep_wait();
  if (!active) return;
  T* const source = qkv + (size_t)row * pitch;
  const auto cached = [&](T* cache, int kv, int block) {
    return cache + (((size_t)block * kv_heads + kv) * KV_BLOCK + position % KV_BLOCK) * D;
  };
  const int vectors = half / 8, pairs = turning * vectors, plain = D / 8;
  for (int first = threadIdx.x; first < pairs; first += ROPE_PAIRS * ROPE_THREADS) {
    uint4 a[ROPE_PAIRS], b[ROPE_PAIRS];
#pragma unroll
    for (int e = 0; e < ROPE_PAIRS; e++) {
      const int item = min(first + e * ROPE_THREADS, pairs - 1);
      const T* const in = source + item / vectors * D + item % vectors * 8;
      a[e] = *reinterpret_cast<const uint4*>(in);
      b[e] = *reinterpret_cast<const uint4*>(in + half);
    }
    const int block = table[position / KV_BLOCK];
#pragma unroll
    for (int e = 0; e < ROPE_PAIRS; e++) {
      const int item = first + e * ROPE_THREADS, head = item / vectors, at = item % vectors * 8;
      if (item >= pairs) continue;
      const float* const c = cos + (size_t)position * half + at;
      const float* const s = sin + (size_t)position * half + at;
      u32(&x)[4] = reinterpret_cast<u32(&)[4]>(a[e]), (&y)[4] = reinterpret_cast<u32(&)[4]>(b[e]);
#pragma unroll
      for (int j = 0; j < 4; j += 2) {
        const float4 cc = *reinterpret_cast<const float4*>(c + 2 * j), ss = *reinterpret_cast<const float4*>(s + 2 * j);
        turn_halves<T>(x[j], y[j], make_float2(cc.x, cc.y), make_float2(ss.x, ss.y));
        turn_halves<T>(x[j + 1], y[j + 1], make_float2(cc.z, cc.w), make_float2(ss.z, ss.w));
      }
      T* const out = head < heads ? source + head * D : cached(k_cache, head - heads, block);
      *reinterpret_cast<uint4*>(out + at) = a[e];
      *reinterpret_cast<uint4*>(out + half + at) = b[e];
    }
  }
  // What does not turn: values, and the ends of keys.
  const int block = table[position / KV_BLOCK], end = rotated / 8, ends = kv_heads * (plain - end);
  for (int i = threadIdx.x; i < ends + kv_heads * plain; i += ROPE_THREADS) {
    const bool key = i < ends;
    const int item = key ? i : i - ends, each = key ? plain - end : plain, kv = item / each;
    const int at = (item % each + (key ? end : 0)) * 8;
    const uint4 v = *reinterpret_cast<const uint4*>(source + (heads + (key ? 0 : kv_heads) + kv) * D + at);
    *reinterpret_cast<uint4*>(cached(key ? k_cache : v_cache, kv, block) + at) = v;
  }
}

// The same into a cache in e4m3, any D that rope_kv_fp8 takes: a block a row, whose warps have several queries' loads in flight.
template <typename T>
__global__ void __launch_bounds__(ROPE_THREADS, 8)
rope_kv_fp8_rows(T* qkv, u8* k_cache, u8* v_cache, const float* __restrict__ cos, const float* __restrict__ sin,
                 const int* tables, const int* positions, const int* token_slots, const int* count, int pitch,
                 int table_stride, int heads, int kv_heads, int D, int rotated) {
  griddep_launch();
  constexpr int EACH = 5, WARPS = ROPE_THREADS / 32;  // heads of a warp at a time
  __shared__ u32 room[WARPS][128];
  const int row = blockIdx.x, warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const bool active = row < *count;
  const int position = active ? positions[row] : 0, half = rotated / 2;
  const int block = active ? tables[(size_t)token_slots[row] * table_stride + position / KV_BLOCK] : 0;
  const float* const c = cos + (size_t)position * half;
  const float* const s = sin + (size_t)position * half;
  griddep_wait();
  if (!active) return;
  u32* const source = reinterpret_cast<u32*>(qkv + (size_t)row * pitch);
  for (int first = warp; first < heads; first += WARPS * EACH)
    for (int i = lane; i < half / 2; i += 32) {
      const float2 cc = *reinterpret_cast<const float2*>(c + 2 * i), ss = *reinterpret_cast<const float2*>(s + 2 * i);
      u32 a[EACH], b[EACH];
#pragma unroll
      for (int e = 0; e < EACH; e++) {
        const u32* const in = source + (size_t)min(first + e * WARPS, heads - 1) * (D / 2);
        a[e] = in[i];
        b[e] = in[i + half / 2];
      }
#pragma unroll
      for (int e = 0; e < EACH; e++) {
        const int head = first + e * WARPS;
        if (head >= heads) continue;
        turn_halves<T>(a[e], b[e], cc, ss);
        u32* const out = source + (size_t)head * (D / 2);
        out[i] = a[e];
        out[i + half / 2] = b[e];
      }
    }
  for (int head = heads + warp; head < heads + 2 * kv_heads; head += WARPS) {
    const u32* const in = source + (size_t)head * (D / 2);
    const bool key = head < heads + kv_heads;
    const int plain = key ? half : 0;
    for (int i = lane; i < plain / 2; i += 32) {
      u32 x = in[i], y = in[i + half / 2];
      turn_halves<T>(x, y, *reinterpret_cast<const float2*>(c + 2 * i), *reinterpret_cast<const float2*>(s + 2 * i));
      room[warp][i] = x;
      room[warp][i + half / 2] = y;
    }
    for (int i = plain + lane; i < D / 2; i += 32) room[warp][i] = in[i];
    __syncwarp();
    u8* const piece = (key ? k_cache : v_cache) + ((size_t)block * kv_heads + (head - heads) % kv_heads) * kv8::piece_bytes(D);
    kv8::store_row<T>(piece, room[warp], D, position % KV_BLOCK, key, lane);
    __syncwarp();
  }
}

// The same as rope_kv with the norm of each query and key head first; keys in qkv stay as they were. q_weight, k_weight
// float32 [D] with step 0, or one row a head with step D; D even and <= 256. C: elements of the cache, T or u8. Four warps.
template <typename T, bool INTERLEAVED, bool LAYER, typename C>
__global__ void rope_kv_normed(T* qkv, C* k_cache, C* v_cache, const float* cos, const float* sin, const int* tables,
                               const int* positions, const int* token_slots, const int* count, int pitch,
                               int table_stride, int heads, int kv_heads, int D, int rotated, const float* q_weight,
                               const float* k_weight, int q_step, int k_step, float eps) {
  __shared__ u32 room[4][128];
  u32* const mine = room[threadIdx.x / 32];
  const Normed<T, LAYER> before = {q_weight, k_weight, q_step, k_step, heads, kv_heads, D, eps, mine};
  rotate_and_cache<T, INTERLEAVED>(qkv, k_cache, v_cache, cos, sin, tables, positions, token_slots, count, pitch,
                                   table_stride, heads, kv_heads, D, rotated, before, mine);
}

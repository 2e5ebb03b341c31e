// How decode attention rotates besides: queries turn in registers, as do the keys of the newest positions.
#pragma once

#include "attention/decode.cuh"
#include "rowwise/rotation.cuh"

// What turns queries and the newest keys: nothing, or the angles of each position, float32 [positions, D / 2].
struct Turned {
  static constexpr bool HERE = false;
};
template <typename T, typename C = T> struct Turning {  // C: elements of the cache
  static constexpr bool HERE = true;
  const float *cos, *sin;
  C *k_cache, *v_cache;

  template <int D>
  __device__ __forceinline__ void queries(Queries<D, 8>& q, int position, int lane) const {
#pragma unroll
    for (int kk = 0; kk < D / 32; kk++)
#pragma unroll
      for (int i = 0; i < 2; i++) {
        const size_t at = (size_t)position * (D / 2) + kk * 16 + i * 8 + lane % 4 * 2;
        turn_halves<T>(q.a[kk][i], q.a[kk + D / 32][i], *reinterpret_cast<const float2*>(cos + at),
                       *reinterpret_cast<const float2*>(sin + at));
      }
  }
};

// The key and the value of a row's newest position, words lane and lane + 32 of each; heads of 128.
template <typename T> struct Newest {
  u32 k[2], v[2];
  template <typename Mask>
  __device__ __forceinline__ void load(const Job<T, Mask>& job, int seq, int head, int lane) {
    const u32* const key = reinterpret_cast<const u32*>(job.q + (size_t)seq * job.q_pitch) + (job.kv_heads * job.group + head) * 64;
#pragma unroll
    for (int i = 0; i < 2; i++) {
      k[i] = __ldcg(key + lane + 32 * i);
      v[i] = __ldcg(key + job.kv_heads * 64 + lane + 32 * i);
    }
  }
  template <typename C>
  __device__ __forceinline__ void turn(const Turning<T, C>& by, int position, int lane) {
    const size_t at = (size_t)position * 64 + 2 * lane;
    turn_halves<T>(k[0], k[1], *reinterpret_cast<const float2*>(by.cos + at), *reinterpret_cast<const float2*>(by.sin + at));
  }
  template <typename Mask>
  __device__ __forceinline__ void store(const Job<T, Mask>& job, const Turning<T>& by, int seq, int position, int head, int lane) const {
    const int block = job.tables[(size_t)job.slots[seq] * job.table_stride + position / KV_BLOCK];
    const size_t at = (((size_t)block * job.kv_heads + head) * KV_BLOCK + position % KV_BLOCK) * 64 + lane;
#pragma unroll
    for (int i = 0; i < 2; i++) {
      reinterpret_cast<u32*>(by.k_cache)[at + 32 * i] = k[i];
      reinterpret_cast<u32*>(by.v_cache)[at + 32 * i] = v[i];
    }
  }
};

// How experts are chosen by their logits: scores, groups, the best of them and their shares.
#pragma once

#include "common/common.cuh"

enum RouteFlags : int { SIGMOID = 1, GROUP_TOP2 = 2, RENORMALISE = 4 };

// Unsigned integers in the order of the floats, all above 0. What is not a number comes last but is there, so
// that a token always has experts.
__device__ __forceinline__ u32 ordered(float x) {
  const u32 bits = __float_as_uint(x == x ? __fadd_rn(x, 0.f) : -INFINITY_F);
  return bits >> 31 ? ~bits : bits | 0x80000000u;
}

__device__ __forceinline__ float as_float(u32 key) { return __uint_as_float(key >> 31 ? key & 0x7fffffffu : ~key); }

// The id with the largest key among all lanes' (key, id), of equals the lowest.
__device__ __forceinline__ int warp_best(u32 key, int id) {
  const u32 best = __reduce_max_sync(~0u, key);
  return (int)__reduce_min_sync(~0u, key == best ? (u32)id : ~0u);
}

// One warp chooses for one token. logit(e): of an expert; keys: shared, 32 * LANE_EXPERTS words.
template <int LANE_EXPERTS, typename Logit>
__device__ __forceinline__ void choose(Logit logit, const float* bias, u32* keys, int* ids, float* shares, int experts,
                                       int top_k, int always, int groups, int kept, int flags, float scale) {
  const int lane = threadIdx.x % 32;
  float s[LANE_EXPERTS];
  u32 key[LANE_EXPERTS];  // 0: no part in it, or taken
  float most = -INFINITY_F;
#pragma unroll
  for (int i = 0; i < LANE_EXPERTS; i++) {
    const int e = lane + 32 * i;
    s[i] = e < experts ? logit(e) : -INFINITY_F;
    most = fmaxf(most, s[i]);
  }
  if (flags & SIGMOID) {
#pragma unroll
    for (int i = 0; i < LANE_EXPERTS; i++) s[i] = __fdiv_rn(1.f, __fadd_rn(1.f, expf(-s[i])));
  } else {
    most = warp_max(most);
    float total = 0.f;
#pragma unroll
    for (int i = 0; i < LANE_EXPERTS; i++) {
      s[i] = expf(__fsub_rn(s[i], most));  // 0 where there is no expert
      total = __fadd_rn(total, s[i]);
    }
    total = warp_sum(total);
#pragma unroll
    for (int i = 0; i < LANE_EXPERTS; i++) s[i] = __fdiv_rn(s[i], total);
  }
#pragma unroll
  for (int i = 0; i < LANE_EXPERTS; i++) {
    const int e = lane + 32 * i;
    key[i] = e >= experts ? 0 : ordered(bias ? __fadd_rn(s[i], bias[e]) : s[i]);
  }
  if (kept < groups) {
    const int size = experts / groups;
#pragma unroll
    for (int i = 0; i < LANE_EXPERTS; i++)
      if (lane + 32 * i < experts) keys[lane + 32 * i] = key[i];
    __syncwarp();
    u32 first = 0, second = 0;
    if (lane < groups)
      for (int i = 0; i < size; i++) {
        const u32 k = keys[lane * size + i];
        second = max(second, min(first, k));
        first = max(first, k);
      }
    const bool pair = flags & GROUP_TOP2;
    u32 worth = lane >= groups ? 0 : pair ? ordered(__fadd_rn(as_float(first), as_float(second))) : first;
    u32 chosen = 0;
    for (int j = 0; j < kept; j++) {
      const int id = warp_best(worth, lane);
      chosen |= 1u << id;
      if (lane == id) worth = 0;
    }
#pragma unroll
    for (int i = 0; i < LANE_EXPERTS; i++)
      if (!(chosen >> (lane + 32 * i) / size & 1)) key[i] = 0;
    __syncwarp();
  }
  float share = 0.f, total = 0.f;
  int expert = 0;
  for (int j = 0; j < top_k; j++) {
    u32 best = key[0];
    int mine = lane;
    float score = s[0];
#pragma unroll
    for (int i = 1; i < LANE_EXPERTS; i++)
      if (key[i] > best) best = key[i], mine = lane + 32 * i, score = s[i];
    const int id = warp_best(best, mine);
    score = __shfl_sync(~0u, score, id % 32);
#pragma unroll
    for (int i = 0; i < LANE_EXPERTS; i++)
      if (lane + 32 * i == id) key[i] = 0;
    if (lane == j) share = score, expert = id;
    total = j == 0 ? score : __fadd_rn(total, score);
  }
  if (flags & RENORMALISE) share = __fdiv_rn(share, __fadd_rn(total, 1e-20f));
  if (scale != 1.f) share = __fmul_rn(share, scale);
  if (lane >= top_k) expert = experts + lane - top_k, share = 1.f;  // those that every token has
  if (lane < top_k + always) {
    ids[lane] = expert;
    shares[lane] = share;
  }
}

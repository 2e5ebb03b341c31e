// Chooses experts for every token: the router's product, its scores and the best of them in one launch.
//
// A logit is summed by one warp: lane l takes the 16-byte vectors l, l + 32, ... in order, element by element
// with fused multiply-adds, and the lanes' sums are added as a butterfly. Neither the number of tokens nor that
// of experts enters the order. Whoever completes a group of tokens (counted in `arrivals`) chooses for them; where
// the blocks of a token are a cluster, its first one does, and logits meet in its shared memory.
#include "common/common.cuh"

constexpr int MAX_NORMED = 4096;  // elements of a row that can be normalised

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

// ids int32, shares float32 [rows, top_k + always]: behind the chosen experts, `experts`, `experts` + 1, ... with
// share 1; x [rows, k], weight [experts, k], bias float32 [experts] or null; logits
// float32 [rows, experts] and arrivals uint32 [ceil(rows / TOKENS)] (zeros, left as zeros) are scratch. Rows from
// *num_tokens on are left alone. k % 8 == 0, experts <= 32 * LANE_EXPERTS, groups <= 32, top_k + always <= 32.
// Grid: (ceil(experts / (WARPS * EXPERTS)), ceil(rows / TOKENS)). Block: WARPS * 32. Bound by latency for few tokens, by
// arithmetic for many.
// NORM (with one token a block): x is raw / sqrt(mean(raw^2) + eps) * norm_weight, by the same instructions as `norm`,
// and is written too; every block normalises for itself. k <= MAX_NORMED then.
// CLUSTER (Hopper, one token a block): a token's blocks are a cluster. No scratch.
template <typename T, int WARPS, int TOKENS, int EXPERTS, int LANE_EXPERTS, bool NORM, bool CLUSTER>
__global__ void __launch_bounds__(WARPS * 32)
route(int* ids, float* shares, T* x, const T* __restrict__ weight, const float* __restrict__ bias, float* logits,
      u32* arrivals, const int* num_tokens, const T* raw, const float* __restrict__ norm_weight, int k, int experts,
      int top_k, int always, int groups, int kept, int flags, float scale, float eps) {
  static_assert(TOKENS == 1 || !(NORM || CLUSTER), "the norm is that of one row, a cluster that of one token");
  constexpr int BATCH = TOKENS > 1 ? 1 : EXPERTS == 1 ? 16 : 12;  // vectors of a row in flight
  constexpr int NORM_VECTORS = MAX_NORMED / 8 / (WARPS * 32);    // 16-byte vectors that a thread normalises, at most
  __shared__ u32 keys[WARPS][32 * LANE_EXPERTS];
  [[maybe_unused]] __shared__ int last;
  [[maybe_unused]] __shared__ float gathered[CLUSTER ? 32 * LANE_EXPERTS : 1];  // the logits, in the cluster's first block
  griddep_launch();
#if __CUDA_ARCH__ >= 900
  if constexpr (CLUSTER) cluster_arrive();  // this block runs: others may write to its shared memory
#endif
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, vectors = k / 8;
  const int e0 = (blockIdx.x * WARPS + warp) * EXPERTS, t0 = blockIdx.y * TOKENS;
  const uint4* row[EXPERTS];
  uint4 held[EXPERTS][BATCH];
#pragma unroll
  for (int e = 0; e < EXPERTS; e++)
    row[e] = reinterpret_cast<const uint4*>(weight + (size_t)min(e0 + e, experts - 1) * k);
  const auto fetch = [&](int base) {
#pragma unroll
    for (int e = 0; e < EXPERTS; e++)
#pragma unroll
      for (int b = 0; b < BATCH; b++) {
        const int i = base + b * 32 + lane;
        held[e][b] = i < vectors ? row[e][i] : make_uint4(0, 0, 0, 0);
      }
  };
  fetch(0);  // the router's rows depend on nothing before
  __shared__ uint4 normed[NORM ? MAX_NORMED / 8 : 1];
  __shared__ float4 factors[NORM ? MAX_NORMED / 4 : 1];
  __shared__ float squares[MAX_NORMED / 256];
  if constexpr (NORM)
    for (int i = threadIdx.x; i < k / 4; i += blockDim.x) factors[i] = reinterpret_cast<const float4*>(norm_weight)[i];
  const int tokens = *num_tokens;
  griddep_wait();
  if (t0 >= tokens) {
#if __CUDA_ARCH__ >= 900
    if constexpr (CLUSTER) cluster_wait();
#endif
    return;
  }
  if constexpr (NORM) {
    const uint4* const source = reinterpret_cast<const uint4*>(raw + (size_t)t0 * k);
    float v[NORM_VECTORS][8];
#pragma unroll
    for (int n = 0; n < NORM_VECTORS; n++) {
      const int i = threadIdx.x + n * WARPS * 32;
      unpack8<T>(i < vectors ? source[i] : make_uint4(0, 0, 0, 0), v[n]);
    }
#pragma unroll
    for (int n = 0; n < NORM_VECTORS; n++) {  // 32 vectors of the row are what one warp of `norm` has
      float square = 0.f;
#pragma unroll
      for (int j = 0; j < 8; j++) square = __fmaf_rn(v[n][j], v[n][j], square);
      square = warp_sum(square);
      if (lane == 0) squares[warp + n * WARPS] = square;
    }
    __syncthreads();
    float total = squares[0];
    for (int w = 1; w < (vectors + 31) / 32; w++) total += squares[w];
    const float factor = 1.f / sqrtf(total / k + eps);
    const float* const scales = reinterpret_cast<const float*>(factors);
#pragma unroll
    for (int n = 0; n < NORM_VECTORS; n++) {
      const int i = threadIdx.x + n * WARPS * 32;
      if (i >= vectors) continue;
#pragma unroll
      for (int j = 0; j < 8; j++) v[n][j] = __fmaf_rn(__fmul_rn(v[n][j], factor), scales[i * 8 + j], 0.f);
      normed[i] = pack8<T>(v[n]);
      if (blockIdx.x == 0) reinterpret_cast<uint4*>(x + (size_t)t0 * k)[i] = normed[i];
    }
    __syncthreads();
  }
  float acc[TOKENS][EXPERTS];
#pragma unroll
  for (int t = 0; t < TOKENS; t++)
#pragma unroll
    for (int e = 0; e < EXPERTS; e++) acc[t][e] = 0.f;
  for (int base = 0; base < vectors; base += 32 * BATCH) {
    if (base) fetch(base);
#pragma unroll
    for (int t = 0; t < TOKENS; t++) {
      if (TOKENS > 1 && t0 + t >= tokens) continue;
      const uint4* const source = NORM ? normed : reinterpret_cast<const uint4*>(x + (size_t)(t0 + t) * k);
      uint4 given[BATCH];
#pragma unroll
      for (int b = 0; b < BATCH; b++) {
        const int i = base + b * 32 + lane;
        given[b] = i < vectors ? source[i] : make_uint4(0, 0, 0, 0);
      }
#pragma unroll
      for (int b = 0; b < BATCH; b++) {
        if (base + b * 32 >= vectors) break;
        float v[8];
        unpack8<T>(given[b], v);
#pragma unroll
        for (int e = 0; e < EXPERTS; e++) {
          float w[8];
          unpack8<T>(held[e][b], w);
#pragma unroll
          for (int i = 0; i < 8; i++) acc[t][e] = __fmaf_rn(v[i], w[i], acc[t][e]);
        }
      }
    }
  }
  const auto choose_for = [&](int t, auto logit) {
    choose<LANE_EXPERTS>(logit, bias, keys[warp], ids + (size_t)t * (top_k + always), shares + (size_t)t * (top_k + always),
                         experts, top_k, always, groups, kept, flags, scale);
  };
  if constexpr (CLUSTER) {
#if __CUDA_ARCH__ >= 900
    cluster_wait();
#pragma unroll
    for (int e = 0; e < EXPERTS; e++) {
      const float sum = warp_sum(acc[0][e]);
      if (lane == 0 && e0 + e < experts) cluster_store(cluster_map(smem(gathered + e0 + e), 0), sum);
    }
    __syncwarp();
    cluster_arrive();
    if (blockIdx.x > 0) return;  // nobody writes to this block
    cluster_wait();
    if (warp == 0) choose_for(t0, [&](int e) { return gathered[e]; });
#endif
  } else {
#pragma unroll
    for (int t = 0; t < TOKENS; t++)
#pragma unroll
      for (int e = 0; e < EXPERTS; e++) {
        const float sum = warp_sum(acc[t][e]);
        if (lane == 0 && t0 + t < tokens && e0 + e < experts) __stcg(logits + (size_t)(t0 + t) * experts + e0 + e, sum);
      }
    __syncthreads();
    if (threadIdx.x == 0) last = add_acq_rel(arrivals + blockIdx.y, 1) + 1 == gridDim.x;
    __syncthreads();
    if (!last) return;
    for (int t = t0 + warp; t < min(t0 + TOKENS, tokens); t += WARPS)
      choose_for(t, [&](int e) { return __ldcg(logits + (size_t)t * experts + e); });
    if (threadIdx.x == 0) arrivals[blockIdx.y] = 0;
  }
}

// Groups a step's entries (see moe/moe.cuh) by expert, and cuts each group into tiles for the matrix kernel.
#include "moe/moe.cuh"

namespace rvllm::experts {

inline constexpr int EVEN = 16;  // tiles of less than all of an expert's entries are a multiple of it

// Lanes of the warp with the same expert as this one; those with `in` false match nobody.
__device__ __forceinline__ u32 same_expert(int expert, bool in, int bits) {
  u32 mask = __ballot_sync(~0u, in);
  for (int b = 0; b < bits; b++) {
    const u32 ones = __ballot_sync(~0u, expert >> b & 1);
    mask &= expert >> b & 1 ? ones : ~ones;
  }
  return in ? mask : 0;
}

// Inclusive sum over the lanes.
__device__ __forceinline__ int running_sum(int value) {
#pragma unroll
  for (int o = 1; o < 32; o *= 2) {
    const int below = __shfl_up_sync(~0u, value, o);
    if (threadIdx.x % 32 >= o) value += below;
  }
  return value;
}

// order int32 [tokens * top_k]: the entries by expert, those of one expert ascending. tiles int4: (expert, place of
// its first entry in `order`, entries, 0), those of an expert of about as many, up to `tile`; *num_tiles: how many. ids int32
// [tokens, top_k], of up to `experts` experts. bits: of an expert's number. places int32 [tokens * top_k], or null: where
// each entry is in `order`.
// Grid: 1; CLUSTER (Hopper): a cluster, whose blocks have a part of the entries each. Shared: (warps + 4) * ceil4(experts)
// * 4. Bound by latency.
template <bool CLUSTER>
__global__ void __launch_bounds__(1024)
    sort(int* order, int4* tiles, int* num_tiles, const int* ids, const int* num_tokens, int top_k, int experts, int bits,
         int tile, int* places) {
  extern __shared__ __align__(16) int counts[];  // [warps][experts]: first how many, then places before this warp's
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, warps = blockDim.x / 32, pitch = (experts + 3) / 4 * 4;
  int* const totals = counts + warps * pitch;  // of this block
  int* const all = totals + pitch;             // of all blocks
  int* const first = all + pitch;              // place of an expert's first entry, then of this block's first one
  int* const first_tile = first + pitch;
  const int block = blockIdx.x, block_count = gridDim.x;
  ptx::griddep_launch();
  for (int i = threadIdx.x; i < (warps + 1) * pitch; i += blockDim.x) counts[i] = 0;
  ptx::griddep_wait();
  const int entries = *num_tokens * top_k, all_warps = warps * block_count;
  const int share = (entries + 32 * all_warps - 1) / (32 * all_warps) * 32;  // of a warp
  const int begin = min((block * warps + warp) * share, entries), end = min(begin + share, entries);
  int* const mine = counts + warp * pitch;
  // Calls work(i, inside, expert) for the warp's entries, 32 at a time; the next ids are on their way meanwhile.
  const auto for_entries = [&](auto work) {
    int next = begin + lane < end ? ids[begin + lane] : 0;
    for (int i = begin + lane; i - lane < end; i += 32) {
      const int expert = existing(next, experts);
      if (i + 32 < end) next = ids[i + 32];
      work(i, i < end, expert);
    }
  };
  __syncthreads();
  for_entries([&](int, bool in, int expert) {
    const u32 same = same_expert(expert, in, bits);
    if (in && lane == __ffs(same) - 1) mine[expert] += __popc(same);
    __syncwarp();
  });
  __syncthreads();
  for (int e = threadIdx.x; e < experts; e += blockDim.x) {
    int before = 0;
    for (int w = 0; w < warps; w++) {
      const int count = counts[w * pitch + e];
      counts[w * pitch + e] = before;
      before += count;
    }
    totals[e] = before;
  }
  if constexpr (CLUSTER) {
#if __CUDA_ARCH__ >= 900
    ptx::cluster_sync();
    for (int e = 4 * threadIdx.x; e < experts; e += 4 * blockDim.x) {
      int sums[4] = {}, before[4] = {};
      for (int b = 0; b < block_count; b++) {
        const float4 part = ptx::cluster_load(ptx::cluster_map(ptx::smem(totals + e), b));
        const int count[4] = {__float_as_int(part.x), __float_as_int(part.y), __float_as_int(part.z), __float_as_int(part.w)};
#pragma unroll
        for (int j = 0; j < 4; j++) {
          if (b < block) before[j] += count[j];
          sums[j] += count[j];
        }
      }
#pragma unroll
      for (int j = 0; j < 4; j++) all[e + j] = sums[j], first[e + j] = before[j];
    }
    ptx::cluster_arrive();  // what others have was read
#endif
  } else {
    __syncthreads();
    for (int e = threadIdx.x; e < experts; e += blockDim.x) all[e] = totals[e], first[e] = 0;
  }
  __syncthreads();
  if (warp == 0) {
    int place = 0, made = 0;
    for (int e = lane; e < experts + lane; e += 32) {  // the same number of rounds for every lane
      const int count = e < experts ? all[e] : 0, cut = (count + tile - 1) / tile;
      const int sums = running_sum(count), cuts = running_sum(cut);
      if (e < experts) {
        first[e] += place + sums - count;
        first_tile[e] = made + cuts - cut;
        all[e] = place + sums;  // where the next expert's begin
      }
      place += __shfl_sync(~0u, sums, 31);
      made += __shfl_sync(~0u, cuts, 31);
    }
    if (lane == 0 && block == 0) *num_tiles = made;
  }
  __syncthreads();
  for_entries([&](int i, bool in, int expert) {
    const u32 same = same_expert(expert, in, bits);
    if (in) {
      const int place = first[expert] + mine[expert] + __popc(same & ((1u << lane) - 1));
      order[place] = i;
      if (places) places[i] = place;
    }
    __syncwarp();
    if (in && lane == __ffs(same) - 1) mine[expert] += __popc(same);
    __syncwarp();
  });
  for (int e = block * blockDim.x + threadIdx.x; e < experts; e += block_count * blockDim.x) {
    const int start = e ? all[e - 1] : 0;
    // No more tiles than full ones would be, for an even share is rounded up to no more than `tile`.
    const int cut = max(1, (all[e] - start + tile - 1) / tile), even = (all[e] - start + cut - 1) / cut;
    const int each = min(tile, (even + EVEN - 1) / EVEN * EVEN);
    for (int at = start, t = first_tile[e]; at < all[e]; at += each, t++) tiles[t] = make_int4(e, at, min(each, all[e] - at), 0);
  }
#if __CUDA_ARCH__ >= 900
  if constexpr (CLUSTER) ptx::cluster_wait();
#endif
}

// out[places[t * top_k + j]] = x[t] for every token and choice: rows of `vectors` 16-byte vectors.
// Grid: (tokens). Bound by memory.
__global__ void __launch_bounds__(256)
    gather_rows(uint4* out, const uint4* x, const int* places, const int* num_tokens, int top_k, int vectors) {
  ptx::griddep_launch();
  ptx::griddep_wait();
  const int token = blockIdx.x;
  if (token >= *num_tokens) return;
  for (int i = threadIdx.x; i < vectors; i += blockDim.x) {
    const uint4 value = x[static_cast<size_t>(token) * vectors + i];
    for (int j = 0; j < top_k; j++) out[static_cast<size_t>(places[token * top_k + j]) * vectors + i] = value;
  }
}

// Rows of activations in the order of an expert's columns, a row an entry: column j of out's row is column orders[j] of
// the expert of the entry at place p of `order`, zeros where that is -1. orders: `stride` bytes from expert to expert.
// by_token: x has a row a token, else one a place. by_place: out has a row a place, else one an entry. k a multiple of 8,
// columns of out; pitch: of x. Grid: (entries, ceil(k / 8 / threads)). Bound by memory.
__global__ void reorder_rows(u16* __restrict__ out, const u16* __restrict__ x, const u8* __restrict__ orders, const int* order,
                             const int* ids, const int* num_tokens, u64 stride, int top_k, int experts, int by_token,
                             int by_place, int k, int pitch) {
  ptx::griddep_wait();
  ptx::griddep_launch();
  const int place = blockIdx.x, column = (blockIdx.y * blockDim.x + threadIdx.x) * 8;
  if (place >= *num_tokens * top_k || column >= k) return;
  const int entry = __ldcg(order + place), expert = existing(__ldcg(ids + entry), experts);
  const int* const from = reinterpret_cast<const int*>(orders + expert * stride) + column;
  const u16* const row = x + static_cast<size_t>(by_token ? entry / top_k : place) * pitch;
  alignas(16) u16 v[8];
#pragma unroll
  for (int j = 0; j < 8; j++) v[j] = from[j] < 0 ? 0 : row[from[j]];
  *reinterpret_cast<uint4*>(out + static_cast<size_t>(by_place ? place : entry) * k + column) = *reinterpret_cast<uint4*>(v);
}

}  // namespace rvllm::experts

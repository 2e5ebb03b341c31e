// Groups a step's entries (see moe/moe.cuh) by expert, and cuts each group into tiles for the matrix kernel.
#include "moe/moe.cuh"

namespace rvllm::experts {

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
// its first entry in `order`, entries, 0), each of up to `tile` entries; *num_tiles: how many. ids int32
// [tokens, top_k], of up to `experts` experts. bits: of an expert's number. places int32 [tokens * top_k], or null: where
// each entry is in `order`.
// Grid: 1. Shared: (warps + 3) * experts * 4. Bound by latency.
__global__ void __launch_bounds__(1024)
    sort(int* order, int4* tiles, int* num_tiles, const int* ids, const int* num_tokens, int top_k, int experts, int bits,
         int tile, int* places) {
  extern __shared__ __align__(16) int counts[];  // [warps][experts]: first how many, then places before this warp's
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, warps = blockDim.x / 32;
  int* const totals = counts + warps * experts;
  int* const first = totals + experts;       // place of an expert's first entry
  int* const first_tile = first + experts;
  ptx::griddep_launch();
  for (int i = threadIdx.x; i < warps * experts; i += blockDim.x) counts[i] = 0;
  ptx::griddep_wait();
  const int entries = *num_tokens * top_k;
  const int share = (entries + 32 * warps - 1) / (32 * warps) * 32;  // of a warp
  const int begin = warp * share, end = min(begin + share, entries);
  int* const mine = counts + warp * experts;
  __syncthreads();
  for (int i = begin; i < end; i += 32) {
    const bool in = i + lane < end;
    const int expert = in ? existing(ids[i + lane], experts) : 0;
    const u32 same = same_expert(expert, in, bits);
    if (in && lane == __ffs(same) - 1) mine[expert] += __popc(same);
    __syncwarp();
  }
  __syncthreads();
  for (int e = threadIdx.x; e < experts; e += blockDim.x) {
    int before = 0;
    for (int w = 0; w < warps; w++) {
      const int count = counts[w * experts + e];
      counts[w * experts + e] = before;
      before += count;
    }
    totals[e] = before;
  }
  __syncthreads();
  if (warp == 0) {
    int place = 0, made = 0;
    for (int e = lane; e < experts + lane; e += 32) {  // the same number of rounds for every lane
      const int count = e < experts ? totals[e] : 0, cut = (count + tile - 1) / tile;
      const int places = running_sum(count), cuts = running_sum(cut);
      if (e < experts) {
        first[e] = place + places - count;
        first_tile[e] = made + cuts - cut;
      }
      place += __shfl_sync(~0u, places, 31);
      made += __shfl_sync(~0u, cuts, 31);
    }
    if (lane == 0) *num_tiles = made;
  }
  __syncthreads();
  for (int i = begin; i < end; i += 32) {
    const bool in = i + lane < end;
    const int expert = in ? existing(ids[i + lane], experts) : 0;
    const u32 same = same_expert(expert, in, bits);
    if (in) {
      const int place = first[expert] + mine[expert] + __popc(same & ((1u << lane) - 1));
      order[place] = i + lane;
      if (places) places[i + lane] = place;
    }
    __syncwarp();
    if (in && lane == __ffs(same) - 1) mine[expert] += __popc(same);
    __syncwarp();
  }
  for (int e = threadIdx.x; e < experts; e += blockDim.x)
    for (int done = 0, t = first_tile[e]; done < totals[e]; done += tile, t++)
      tiles[t] = make_int4(e, first[e] + done, min(tile, totals[e] - done), 0);
}

}  // namespace rvllm::experts

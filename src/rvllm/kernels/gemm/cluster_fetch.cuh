// The sums of a cluster's blocks, fetched: each block left its partial sums of a tile of 128 rows in its shared memory, and
// adds up a share of the tile's items by reading all of them. For few tokens see gemm/cluster_reduce.cuh, which sends.
//
// An item is four neighbouring rows of a token; a share is a range of items, dealt to THREADS threads in turn.
#pragma once

#include "gemm/epilogue.cuh"
#include "gemm/gemm.cuh"

namespace rvllm::gemm {

inline constexpr int ITEMS = 2 * TILE / 4;  // of a token

// q = the sum, in ascending order, of the `count` parts of four floats, at most MOST; part s is at at(s), an address of the
// cluster's shared memory.
template <int MOST, class At>
__device__ __forceinline__ void fetch_sum(int count, At at, float (&q)[4]) {
  float4 part[MOST];
#pragma unroll
  for (int s = 0; s < MOST; s++)
    if (s < count) part[s] = ptx::cluster_load(at(s));
  q[0] = part[0].x, q[1] = part[0].y, q[2] = part[0].z, q[3] = part[0].w;
#pragma unroll
  for (int s = 1; s < MOST; s++)
    if (s < count) q[0] += part[s].x, q[1] += part[s].y, q[2] += part[s].z, q[3] += part[s].w;
}

// What this thread's items from `item` on are finished with.
template <int THREADS, class T, int HELD>
__device__ __forceinline__ void hold_items(const Epilogue& e, int token0, int row0, int item, Held<T> (&held)[HELD]) {
#pragma unroll
  for (int b = 0; b < HELD; b++, item += THREADS) held[b] = hold<T>(e, token0 + item / ITEMS, row0 + item % ITEMS * 4);
}

// Finishes the share [first, last) of a tile, and says to the cluster that its partial sums were read. fetch(token, row, q)
// sums up an item. `held`: of the thread's first items, if they were held.
template <int THREADS, class T, int HELD, class Fetch>
__device__ __forceinline__ void finish_share(const Epilogue& e, int token0, int row0, int first, int last, Held<T> (&held)[HELD],
                                             bool were_held, Fetch fetch) {
  if (!can_hold(e)) {
    finish_tile<T, 2 * TILE, 4>(e, token0, row0, first, last, threadIdx.x, THREADS, fetch);
    ptx::cluster_arrive();
    return;
  }
  for (int i = first + threadIdx.x; i - static_cast<int>(threadIdx.x) < last; i += HELD * THREADS) {
    float sums[HELD][4];
#pragma unroll
    for (int b = 0; b < HELD; b++) {
      const int item = min(i + b * THREADS, last - 1);  // no branch, so that all loads are in flight at once
      fetch(item / ITEMS, item % ITEMS * 4, sums[b]);
    }
    if (!were_held || i >= first + HELD * THREADS) hold_items<THREADS>(e, token0, row0, i, held);
    // What others have was read: said before results leave, which takes longer.
    if (i - static_cast<int>(threadIdx.x) + HELD * THREADS >= last) ptx::cluster_arrive();
#pragma unroll
    for (int b = 0; b < HELD; b++) {
      const int item = i + b * THREADS;
      if (item < last) finish_held<T>(e, token0 + item / ITEMS, row0 + item % ITEMS * 4, sums[b], held[b]);
    }
  }
  if (first >= last) ptx::cluster_arrive();
}

}  // namespace rvllm::gemm

// What the kernels of many entries on Hopper share: the work tiles of a block, and outputs that leave while the next tile is
// summed (gemm/epilogue_overlap.cuh).
#pragma once

#include "gemm/epilogue_overlap.cuh"
#include "gemm/fill_ring.cuh"
#include "moe/entries.cuh"

namespace rvllm::experts {

// The work tiles of a block, one after the other: (expert, place of the first entry, entries) and a pair of row tiles. The
// next one is read ahead.
struct WideTiles {
  TileScheduler scheduler;
  const int4* tiles;
  int4 tile, coming;
  int pair, coming_pair;
  bool any;
  __device__ WideTiles(const TileScheduler& s, const int4* t) : scheduler(s), tiles(t) { look_ahead(); }
  __device__ void look_ahead() {
    int t;
    any = scheduler.next(t, coming_pair);
    if (any) coming = __ldcg(tiles + t);
  }
  __device__ bool next() {
    if (!any) return false;
    tile = coming, pair = coming_pair;
    look_ahead();
    return true;
  }
  // Entries that are summed, one of the widths of a kernel's accumulators.
  __device__ int width() const { return tile.z <= 32 ? 32 : tile.z <= 64 ? 64 : (tile.z + 15) / 16 * 16; }
};

// 96 threads: carry finished outputs from shared memory to global memory while the next tile is summed.
template <class T, int STAGED, class Epilogue>
__device__ __forceinline__ void store_wide(WideTiles at, Epilogue epilogue, const u8* staging, int thread, int kind) {
  using namespace ptx;
  for (int g = 0; g < 2; g++) bar_arrive(gemm::ROOM + g, 128 + gemm::STORERS);
  const int step = gemm::step_tokens<STAGED>(kind);
  while (at.next())
    for (int first = 0; first < at.tile.z; first += step)
      for (int g = 0; g < 2; g++) {
        bar_sync(gemm::READY + g, 128 + gemm::STORERS);
        gemm::store_outputs<T>(epilogue(at), staging + g * STAGED, thread, (at.pair * 2 + g) * TILE, first,
                               min(step, at.tile.z - first));
        __syncwarp();
        bar_arrive(gemm::ROOM + g, 128 + gemm::STORERS);
      }
}

}  // namespace rvllm::experts

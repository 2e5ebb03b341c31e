// Weights that the next products read, brought to L2 by blocks that have nothing else to do.
#pragma once

#include "common.cuh"

constexpr u32 AHEAD_PIECE = 4096;  // bytes a thread asks for

// Two stretches of weights; bytes are multiples of 16, addresses too.
struct Ahead {
  const u8* first;
  const u8* second;
  u32 first_bytes, second_bytes;
};

// Asks for the share of a block that has no item, a piece a thread, where the first `workers` blocks share `items` in
// equal ranges; begin: where its own empty one is. What idle blocks are too few for is left out, and those that are
// not needed leave at once. Before its predecessor has ended the memory has other things to do. Nothing on GPUs before
// Hopper.
__device__ __forceinline__ void fetch_ahead(const Ahead& ahead, int begin, int items, int workers) {
#if __CUDA_ARCH__ >= 900
  if (ahead.first_bytes == 0) return;
  // Before this block lie `begin` that work where items are fewer than workers, and all workers otherwise.
  const u32 working = min(items, workers), rank = blockIdx.x - min((u32)begin, working);
  const u32 first = (ahead.first_bytes + AHEAD_PIECE - 1) / AHEAD_PIECE;
  const u32 pieces = first + (ahead.second_bytes + AHEAD_PIECE - 1) / AHEAD_PIECE;
  const u32 askers = min(gridDim.x - working, (pieces + blockDim.x - 1) / blockDim.x);
  if (rank >= askers) return;
  griddep_wait();
  const u32 piece = threadIdx.x * askers + rank;
  if (piece < first) {
    const u32 at = piece * AHEAD_PIECE;
    bulk_prefetch(ahead.first + at, min(AHEAD_PIECE, ahead.first_bytes - at));
  } else if (piece < pieces) {
    const u32 at = (piece - first) * AHEAD_PIECE;
    bulk_prefetch(ahead.second + at, min(AHEAD_PIECE, ahead.second_bytes - at));
  }
#endif
}

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

// Asks for an idle block's share, a piece a thread; rank: which of the `idle` blocks it is. What they are too few for
// is left out, and blocks that are not needed leave at once. Before its predecessor has ended the memory has other
// things to do. Nothing on GPUs before Hopper.
__device__ __forceinline__ void fetch_ahead(const Ahead& ahead, int rank, int idle) {
#if __CUDA_ARCH__ >= 900
  const u32 first = (ahead.first_bytes + AHEAD_PIECE - 1) / AHEAD_PIECE;
  const u32 pieces = first + (ahead.second_bytes + AHEAD_PIECE - 1) / AHEAD_PIECE;
  const u32 askers = min((u32)idle, (pieces + blockDim.x - 1) / blockDim.x);
  if ((u32)rank >= askers) return;
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

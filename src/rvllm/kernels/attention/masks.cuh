// Which keys a query sees beside the causal mask and the window: a policy of the attention kernels.
#pragma once

#include "attention/attention.cuh"

// All of them.
struct Everything {
  static constexpr bool ALL = true;
  __device__ __forceinline__ bool sees(int, int, int, int) const { return true; }
  __device__ __forceinline__ void hide(float (&)[8][4], int, const int (&)[2], const int (&)[2], int) const {}
};

// Blocks of `size` positions: block j from a position of block i where i - j < local, and for head h those where
// (j + 1 + h * head_step) % stride == 0 (Phi-3-small).
struct SomeBlocks {
  static constexpr bool ALL = false;
  int size, local, stride, head_step;

  __device__ __forceinline__ bool seen(int head, int block, int key_block) const {
    return block - key_block < local || (key_block + 1 + head * head_step) % stride == 0;
  }
  // Whether tile t may be seen by any of `heads` heads from first_head on, at positions from `position` on.
  __device__ __forceinline__ bool sees(int t, int position, int first_head, int heads) const {
    if (size % TILE) return true;
    const int key_block = t * TILE / size;
    if (position / size - key_block < local) return true;
    if (head_step == 0) heads = 1;
    for (int h = first_head; h < first_head + heads; h++)
      if ((key_block + 1 + h * head_step) % stride == 0) return true;
    return false;
  }
  // Hides what the two rows of this thread, each of its own head and position, do not see of the tile.
  __device__ __forceinline__ void hide(float (&s)[8][4], int tile_start, const int (&position)[2], const int (&head)[2],
                                       int lane) const {
    if (size % TILE == 0) {
#pragma unroll
      for (int h = 0; h < 2; h++)
        if (!seen(head[h], position[h] / size, tile_start / size)) {
#pragma unroll
          for (int n = 0; n < 8; n++) s[n][2 * h] = s[n][2 * h + 1] = -INFINITY_F;
        }
      return;
    }
#pragma unroll
    for (int n = 0; n < 8; n++)
#pragma unroll
      for (int i = 0; i < 4; i++) {
        const int key = tile_start + n * 8 + lane % 4 * 2 + (i & 1);
        if (!seen(head[i / 2], position[i / 2] / size, key / size)) s[n][i] = -INFINITY_F;
      }
  }
};

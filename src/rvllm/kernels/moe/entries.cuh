// A step's entries (see moe.cuh) by expert, made by every block for itself: for few entries that is quicker than a
// launch that makes it for all.
#pragma once

#include "moe/moe.cuh"

namespace rvllm::experts {

constexpr int MAX_LISTED = 512;           // entries
constexpr int MASK_WORDS = MAX_LISTED / 32;

// Up to some number of entries of one expert, which meet its weights together.
struct EntryTile {
  int expert, first, count;  // first: place of its first entry in the order
};

// In shared memory.
struct EntryList {
  u16 order[MAX_LISTED];    // entries by expert, those of one expert ascending
  uint2 tiles[MAX_LISTED];  // (expert, first << 16 | count)
  int count;                // of tiles
  __device__ EntryTile tile(int i) const {
    const uint2 t = tiles[i];
    return {static_cast<int>(t.x), static_cast<int>(t.y >> 16), static_cast<int>(t.y & 0xffff)};
  }
};

// 32-bit words of scratch that `list_entries` needs.
__host__ __device__ constexpr int list_scratch(int experts) { return experts * (MASK_WORDS + 1); }

// First half: clears the scratch. Depends on nothing.
__device__ __forceinline__ void list_begin(u32* scratch, int experts) {
  for (int i = threadIdx.x; i < experts * MASK_WORDS; i += blockDim.x) scratch[i] = 0;
  __syncthreads();
}

// Second half: lists entries 0 .. entries - 1, at most MAX_LISTED, of `experts` experts, in tiles of up to `tile`.
// places, or null: where each entry is in the order. All threads of the block call it; the scratch is free afterwards,
// also for the copy engine.
__device__ __forceinline__ void list_entries(EntryList& list, u32* scratch, const int* ids, int* places, int entries,
                                             int experts, int tile) {
  u32* const masks = scratch;                        // [experts][MASK_WORDS]: bit i of an expert's: entry i is its
  u32* const first = scratch + experts * MASK_WORDS;  // place of an expert's first entry
  const int lane = threadIdx.x % 32, words = (entries + 31) / 32;
  for (int i = threadIdx.x; i < entries; i += blockDim.x)
    atomicOr(masks + existing(__ldcg(ids + i), experts) * MASK_WORDS + i / 32, 1u << i % 32);
  __syncthreads();
  if (threadIdx.x < 32) {
    const int each = (experts + 31) / 32, begin = min(lane * each, experts), end = min(begin + each, experts);
    u32 mine = 0;  // entries and, above them, tiles
    for (int e = begin; e < end; e++) {
      int count = 0;
      for (int w = 0; w < words; w++) count += __popc(masks[e * MASK_WORDS + w]);
      first[e] = count;
      mine += static_cast<u32>(count) | static_cast<u32>((count + tile - 1) / tile) << 16;
    }
    u32 before = mine;
#pragma unroll
    for (int o = 1; o < 32; o *= 2) {
      const u32 below = __shfl_up_sync(~0u, before, o);
      if (lane >= o) before += below;
    }
    if (lane == 31) list.count = before >> 16;
    before -= mine;
    int place = before & 0xffff, made = before >> 16;
    for (int e = begin; e < end; e++) {
      const int count = first[e];
      first[e] = place;
      for (int done = 0; done < count; done += tile)
        list.tiles[made++] = make_uint2(e, static_cast<u32>(place + done) << 16 | min(tile, count - done));
      place += count;
    }
  }
  __syncthreads();
  for (int i = threadIdx.x; i < entries; i += blockDim.x) {
    const int expert = existing(__ldcg(ids + i), experts);
    const u32* const mask = masks + expert * MASK_WORDS;
    int place = first[expert] + __popc(mask[i / 32] & ((1u << i % 32) - 1));
    for (int w = 0; w < i / 32; w++) place += __popc(mask[w]);
    list.order[place] = static_cast<u16>(i);
    if (places) places[i] = place;
  }
#if __CUDA_ARCH__ >= 900
  ptx::fence_async_shared();
#endif
  __syncthreads();
}

}  // namespace rvllm::experts

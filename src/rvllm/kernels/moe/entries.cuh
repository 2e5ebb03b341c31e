// A step's entries (see moe.cuh) by expert, made by every block for itself: for few entries that is quicker than a
// launch that makes it for all.
#pragma once

#include "moe/moe.cuh"

namespace rvllm::experts {

inline constexpr int MAX_LISTED = 1024;  // entries
inline constexpr int MAX_TILES = 672;    // of 8 entries and more, of up to 544 experts

// Up to some number of entries of one expert, which meet its weights together.
struct EntryTile {
  int expert, first, count;  // first: place of its first entry in the order
};

// In shared memory.
struct EntryList {
  uint2 tiles[MAX_TILES];  // (expert, first << 16 | count)
  u16 order[MAX_LISTED];   // entries by expert, those of one expert ascending
  int count;               // of tiles
  __device__ EntryTile tile(int i) const {
    const uint2 t = tiles[i];
    return {static_cast<int>(t.x), static_cast<int>(t.y >> 16), static_cast<int>(t.y & 0xffff)};
  }
};

// First half: clears the scratch, experts * (pitch + 1) words. Depends on nothing. pitch: words of an expert's mask of up
// to 32 * pitch entries, odd, so that experts fall into different banks.
__device__ __forceinline__ void list_begin(u32* scratch, int experts, int pitch) {
  for (int i = threadIdx.x; i < experts * pitch; i += blockDim.x) scratch[i] = 0;
  __syncthreads();
}

// Second half: lists entries 0 .. entries - 1 of `experts` experts, in tiles of up to `tile`. places, or null: where each
// entry is in the order. All threads of the block call it; the scratch is free afterwards, also for the copy engine.
__device__ __forceinline__ void list_entries(EntryList& list, u32* scratch, const int* ids, int* places, int entries,
                                             int experts, int pitch, int tile) {
  u32* const masks = scratch;                  // [experts][pitch]: bit i of an expert's: entry i is its
  u32* const first = scratch + experts * pitch;  // how many an expert has, then the place of its first one
  const int lane = threadIdx.x % 32, words = (entries + 31) / 32;
  for (int i = threadIdx.x; i < entries; i += blockDim.x)
    atomicOr(masks + existing(__ldcg(ids + i), experts) * pitch + i / 32, 1u << i % 32);
  __syncthreads();
  for (int e = threadIdx.x; e < experts; e += blockDim.x) {
    int count = 0;
    for (int w = 0; w < words; w++) count += __popc(masks[e * pitch + w]);
    first[e] = count;
  }
  __syncthreads();
  if (threadIdx.x < 32) {
    const int each = (experts + 31) / 32, begin = min(lane * each, experts), end = min(begin + each, experts);
    u32 mine = 0;  // entries and, above them, tiles
    for (int e = begin; e < end; e++) mine += first[e] | (first[e] + tile - 1) / tile << 16;
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
    const u32* const mask = masks + expert * pitch;
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

// The order of work tiles: groups of `group` row pairs pass over all entries before the next ones begin, so that both
// operands stay in L2 when an expert has more entries than one tile.
struct TileScheduler {
  int tiles, pairs, group, unit;
  __device__ bool next(int& tile, int& pair) {
    if (unit >= tiles * pairs) return false;
    const int first = unit / (group * tiles) * group, within = unit - first * tiles, height = min(group, pairs - first);
    tile = within / height;
    pair = first + within % height;
    unit += gridDim.x;
    return true;
  }
};

}  // namespace rvllm::experts

// How weights come: groups of warps walk over their units of all steps and keep rings of pieces in flight, which run ahead
// into the next step while the block waits for that step's input.
#pragma once

#include "decode/step.cuh"

namespace rvllm::decode {

// ROWS rows x 64 columns of a weight: contiguous where they are packed, else `pitch` bytes from row to row.
struct Piece {
  const u8* from;
  int pitch;  // 0: packed
};

// The ring of a group of warps, filled and read in one order. On Hopper its first warp asks for pieces, one that all have
// read a turn later, so that it need not wait for the others; else every warp brings its own rows.
template <int SLOTS>
struct Ring {
  static constexpr int PIECE_BYTES = GROUP * SLICE_BYTES;
  u32 base, bars;
  int member, lane, slot = 0, read = -1;
  u32 phase = 0, read_phase = 0;
  __device__ Ring(u8* shared, u64* barriers, int warp, int lane)
      : base(smem(shared) + warp / GROUP * SLOTS * PIECE_BYTES), bars(smem(barriers) + warp / GROUP * SLOTS * 16),
        member(warp % GROUP), lane(lane) {
#if __CUDA_ARCH__ >= 900
    if (member == 0 && lane < SLOTS) {
      mbar_init(full(lane), 1);
      mbar_init(empty(lane), GROUP);
    }
    mbar_init_fence();
    if constexpr (GROUP > 1)
      __syncthreads();
    else
      __syncwarp();
#endif
  }
  __device__ u32 full(int s) const { return bars + 16 * s; }
  __device__ u32 empty(int s) const { return bars + 16 * s + 8; }
  __device__ void load(int to, const Piece& piece) {
    const u32 at = base + to * PIECE_BYTES;
#if __CUDA_ARCH__ >= 900
    if (!piece.from) return;
    if (lane == 0) {
      mbar_arrive_expect(full(to), PIECE_BYTES);
      if (!piece.pitch) bulk_load(at, piece.from, PIECE_BYTES, full(to), EVICT_FIRST);
    }
    if (piece.pitch) {
      __syncwarp();
      for (int r = lane; r < ROWS; r += 32)
        bulk_load(at + r * 128, piece.from + static_cast<u64>(r) * piece.pitch, 128, full(to), EVICT_FIRST);
    }
#else
    if (piece.from) {
#pragma unroll
      for (int i = lane + member * (SLICE_BYTES / 16); i < (member + 1) * (SLICE_BYTES / 16); i += 32)
        cp_async16_once(at + i * 16, piece.from + (piece.pitch ? static_cast<u64>(i / 8) * piece.pitch + i % 8 * 16 : i * 16));
    }
    cp_async_commit();  // also when empty, so that the count of groups stays in step
#endif
  }
  // Fills an empty ring; whatever was read of it, all threads have passed a barrier since.
  template <class Next>
  __device__ void prime(Next next) {
    read = -1;
#if __CUDA_ARCH__ >= 900
    if (member > 0) return;
#endif
    for (int i = 0; i < SLOTS; i++) load(slot + i < SLOTS ? slot + i : slot + i - SLOTS, next());
  }
  // Waits for the oldest piece: the address of this warp's rows.
  __device__ u32 wait() const {
#if __CUDA_ARCH__ >= 900
    mbar_wait(full(slot), phase);
#else
    cp_async_wait<SLOTS - 1>();
    __syncwarp();
#endif
    return base + slot * PIECE_BYTES + member * SLICE_BYTES;
  }
  // It was read: its place goes to another.
  template <class Next>
  __device__ void refill(Next next) {
    __syncwarp();
#if __CUDA_ARCH__ >= 900
    if constexpr (GROUP > 1) {
      if (lane == 0) mbar_arrive(empty(slot));
      if (member == 0) {
        if (read >= 0) {
          mbar_wait(empty(read), read_phase);
          load(read, next());
        }
        read = slot, read_phase = phase;
      }
    } else {
      load(slot, next());
    }
#else
    load(slot, next());
#endif
    if (++slot == SLOTS) slot = 0, phase ^= 1;
  }
};

// The groups of rows of a step that fall to this block. Those of UP are counted through the token's experts.
struct Share {
  int first, count;
  __device__ explicit Share(const Step& s) {
    const int all = (s.rows + ROWS - 1) / ROWS * (s.type == UP ? s.entries : 1);
    first = segment_start(all, gridDim.x, blockIdx.x);
    count = segment_start(all, gridDim.x, blockIdx.x + 1) - first;
  }
  // Units: a segment of such a group; of DOWN a segment of each expert's.
  __device__ static int each(const Step& s) { return s.type == DOWN ? s.entries * s.segments : s.segments; }
};

// The order in which a warp takes the pieces of all steps: units one behind the other, groups of warps in turn.
template <bool MIXTURE>
struct Walk {
  const Chain& chain;
  const int* ids;  // the token's experts, once `chosen`
  int group;
  bool chosen = false;
  int step = -1, unit = 0, units = 0, block = 0, last = 0;
  const u8* from = nullptr;
  int stride = 0, pitch = 0;

  __device__ Piece next() {  // nothing behind the last, and before experts are chosen
    while (block == last) {
      unit += GROUPS;
      while (unit >= units) {
        if (step + 1 >= chain.count) return {nullptr, 0};
        if (MIXTURE && chain.steps[step + 1].type == UP && !chosen) {
          unit = units;
          return {nullptr, 0};
        }
        const Step& s = chain.steps[++step];
        units = Share(s).count * Share::each(s);
        unit = group;
      }
      begin(chain.steps[step]);
    }
    return {from + static_cast<u64>(block++) * stride, pitch};
  }
  __device__ void begin(const Step& s) {
    const int segment = unit % s.segments;
    int at = Share(s).first + unit / Share::each(s);
    u64 matrix = 0;
    stride = TILE_BYTES, pitch = 0;
    if constexpr (MIXTURE) {
      const u64 tiles = static_cast<u64>((s.rows + TILE - 1) / TILE) * s.blocks;
      const int each = (s.rows + ROWS - 1) / ROWS;
      if (s.type == UP) matrix = ids[at / each] * tiles * TILE_BYTES, at %= each;
      if (s.type == DOWN) matrix = ids[unit / s.segments % s.entries] * tiles * TILE_BYTES;
      if (s.type == ROUTE) stride = TILE * 2, pitch = s.k * 2;
    }
    block = segment_start(s.blocks, s.segments, segment);
    last = segment_start(s.blocks, s.segments, segment + 1);
    from = s.weights + matrix + (pitch ? static_cast<u64>(at) * ROWS * pitch
                                        : static_cast<u64>(at / (TILE / ROWS)) * s.blocks * TILE_BYTES + at % (TILE / ROWS) * (ROWS * 128));
  }
};

// Adds 16 rows x 64 columns of W times 64 elements of x to acc. swizzled: whether the chunks of W's rows are.
template <class T>
__device__ __forceinline__ void multiply(float (&acc)[4], u32 w, u32 x, int lane, bool swizzled) {
  const int row = lane % 16, mask = swizzled ? row % 8 : 0;
  u32 a[4][4], b[2][4];
#pragma unroll
  for (int i = 0; i < 2; i++) ldmatrix_x4(b[i], x + (4 * i + lane / 8) * 16);
#pragma unroll
  for (int i = 0; i < 4; i++) ldmatrix_x4(a[i], w + row * 128 + ((2 * i + lane / 16) ^ mask) * 16);
#pragma unroll
  for (int i = 0; i < 4; i++) mma_16816(acc, a[i], {b[i / 2][i % 2 * 2], b[i / 2][i % 2 * 2 + 1]}, T());
}

}  // namespace rvllm::decode

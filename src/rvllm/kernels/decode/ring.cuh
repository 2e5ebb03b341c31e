// How weights come: every warp walks over its units of all steps and keeps a ring of pieces in flight, which runs ahead into
// the next step while the block waits for that step's input.
#pragma once

#include "decode/step.cuh"

namespace rvllm::decode {

// ROWS rows x 64 columns of a weight: contiguous where they are packed, else `pitch` bytes from row to row.
struct Piece {
  const u8* from;
  int pitch;  // 0: packed
};

// A warp's ring of pieces, filled and read in one order.
template <int SLOTS>
struct Ring {
  u32 base, bars;
  int lane, slot = 0;
  u32 phase = 0;
  __device__ Ring(u8* shared, u64* barriers, int warp, int lane)
      : base(smem(shared) + warp * SLOTS * PIECE_BYTES), bars(smem(barriers) + warp * SLOTS * 8), lane(lane) {
    keep(base);
    keep(bars);
#if __CUDA_ARCH__ >= 900
    if (lane < SLOTS) mbar_init(bars + 8 * lane, 1);
    mbar_init_fence();
    __syncwarp();
#endif
  }
  __device__ void load(int to, const Piece& piece) {
    const u32 at = base + to * PIECE_BYTES;
#if __CUDA_ARCH__ >= 900
    if (!piece.from) return;
    if (lane == 0) {
      mbar_arrive_expect(bars + 8 * to, PIECE_BYTES);
      if (!piece.pitch) bulk_load(at, piece.from, PIECE_BYTES, bars + 8 * to, EVICT_FIRST);
    }
    if (piece.pitch) {
      __syncwarp();
      bulk_load(at + lane * 128, piece.from + static_cast<u64>(lane) * piece.pitch, 128, bars + 8 * to, EVICT_FIRST);
    }
#else
    if (piece.from) {
#pragma unroll
      for (int i = lane; i < PIECE_BYTES / 16; i += 32)
        cp_async16_once(at + i * 16, piece.from + (piece.pitch ? static_cast<u64>(i / 8) * piece.pitch + i % 8 * 16 : i * 16));
    }
    cp_async_commit();  // also when empty, so that the count of groups stays in step
#endif
  }
  // Fills an empty ring.
  template <class Next>
  __device__ void prime(Next next) {
    for (int i = 0; i < SLOTS; i++) load(slot + i < SLOTS ? slot + i : slot + i - SLOTS, next());
  }
  // Waits for the oldest piece.
  __device__ u32 wait() const {
#if __CUDA_ARCH__ >= 900
    mbar_wait(bars + 8 * slot, phase);
#else
    cp_async_wait<SLOTS - 1>();
    __syncwarp();
#endif
    return base + slot * PIECE_BYTES;
  }
  // It was read: its place goes to another.
  __device__ void refill(const Piece& piece) {
    __syncwarp();
    load(slot, piece);
    if (++slot == SLOTS) slot = 0, phase ^= 1;
  }
};

// The groups of rows of a step that fall to this block. Those of UP are counted through the token's experts.
struct Share {
  int first, count;
  __device__ explicit Share(const Step& s) {
    const int all = s.groups * (s.type == UP ? s.entries : 1);
    first = segment_start(all, gridDim.x, blockIdx.x);
    count = segment_start(all, gridDim.x, blockIdx.x + 1) - first;
  }
  // Units: a segment of such a group; of DOWN a segment of each expert's.
  __device__ static int each(const Step& s) { return s.type == DOWN ? s.entries * s.segments : s.segments; }
};

// A warp's unit of a step: every WARPS-th of the block's, found without division.
struct Unit {
  int left = 0;  // units from this one to the block's last
  int group, entry, segment;
  __device__ void begin(const Step& s, int warp) {
    const Share share(s);
    group = share.first, entry = 0, segment = 0;
    if (s.type == UP) entry = share.first / s.groups, group = share.first - entry * s.groups;
    left = share.count * Share::each(s);
    advance(s, warp);
  }
  __device__ void advance(const Step& s, int by) {
    left -= by;
    segment += by;
    while (segment >= s.segments) {
      segment -= s.segments;
      if (s.type == DOWN) {
        if (++entry == s.entries) entry = 0, group++;
      } else if (++group == s.groups) {
        group = 0, entry++;
      }
    }
  }
};

// The order in which a warp's pieces come: units one behind the other, along K, of all steps.
template <bool MIXTURE>
struct Walk {
  const Chain& chain;
  const int* ids;  // the token's experts, once `chosen`
  int warp;
  bool chosen = false;
  int step = -1, blocks = 0, stride = TILE_BYTES, pitch = 0;
  Unit unit;
  const u8* from = nullptr;

  __device__ Piece next() {  // nothing behind the last, and before experts are chosen
    if (blocks == 0) {
      if (unit.left > 0) unit.advance(chain.steps[step], WARPS);
      while (unit.left <= 0) {
        if (step + 1 >= chain.count || (MIXTURE && chain.steps[step + 1].type == UP && !chosen)) return {nullptr, 0};
        unit.begin(chain.steps[++step], warp);
      }
      locate(chain.steps[step]);
    }
    blocks--;
    const u8* const at = from;
    from += stride;
    return {at, pitch};
  }
  __device__ void locate(const Step& s) {
    const int first = s.bounds[unit.segment];
    blocks = s.bounds[unit.segment + 1] - first;
    if (MIXTURE && s.type == ROUTE) {
      stride = TILE * 2, pitch = s.k * 2;
      from = s.weights + static_cast<u64>(unit.group) * ROWS * pitch + first * stride;
      return;
    }
    stride = TILE_BYTES, pitch = 0;
    u64 tile = static_cast<u64>(unit.group / (TILE / ROWS)) * s.blocks + first;
    if (MIXTURE && s.type != PRODUCT) tile += static_cast<u64>(ids[unit.entry] * ((s.rows + TILE - 1) / TILE)) * s.blocks;
    from = s.weights + tile * TILE_BYTES + unit.group % (TILE / ROWS) * PIECE_BYTES;
  }
};

// Where a lane reads of a piece and of x: offsets in bytes, kept in registers through the main loop.
struct Lanes {
  u32 w[TILE / 16], x;
  // swizzled: whether the chunks of the weight's rows are.
  __device__ Lanes(int lane, bool swizzled) : x(lane / 8 * 16) {
    const int row = lane % 16, mask = swizzled ? row % 8 : 0;
#pragma unroll
    for (int i = 0; i < TILE / 16; i++) {
      w[i] = row * 128 + ((2 * i + lane / 16) ^ mask) * 16;
      keep(w[i]);
    }
    keep(x);
  }
};

// Adds ROWS rows x 64 columns of W times 64 elements of x to acc.
template <class T>
__device__ __forceinline__ void multiply(float (&acc)[HALVES][4], u32 w, u32 x, const Lanes& at) {
  u32 a[TILE / 16][HALVES][4], b[2][4];
#pragma unroll
  for (int i = 0; i < 2; i++) ldmatrix_x4(b[i], x + at.x + 64 * i);
#pragma unroll
  for (int i = 0; i < TILE / 16; i++)
#pragma unroll
    for (int h = 0; h < HALVES; h++) ldmatrix_x4(a[i][h], w + at.w[i] + SLICE_BYTES * h);
#pragma unroll
  for (int i = 0; i < TILE / 16; i++)
#pragma unroll
    for (int h = 0; h < HALVES; h++) mma_16816(acc[h], a[i][h], {b[i / 2][i % 2 * 2], b[i / 2][i % 2 * 2 + 1]}, T());
}

}  // namespace rvllm::decode

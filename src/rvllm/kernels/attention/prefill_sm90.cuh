// What prefill attention for Hopper is made of before anything is multiplied: shared memory, work tiles and their order, and
// the producers, which bring tiles of keys and values. See prefill_sm90.cu.
#pragma once

#include "attention/fp8_cache.cuh"
#include "attention/masks.cuh"

namespace rvllm {
struct alignas(64) TensorMap {
  u64 opaque[16];
};
}  // namespace rvllm

inline constexpr int GROUP_ROWS = 64, ROWS = 2 * GROUP_ROWS, CONSUMERS = 256, THREADS = CONSUMERS + 128;

// FP8: of a cache in e4m3 (see fp8_cache.cuh), whose pieces four producer warps fetch into room of their own first.
template <int D, bool FP8 = false>
struct Layout {
  static constexpr int HALVES = (D + 63) / 64, HALF = TILE * 128;  // of 64 columns; bytes
  static constexpr int STAGE = HALVES * HALF, QUERIES = 16 * HALVES * 128, TOTALS = 16 * D * 4;  // of a warp, the last two
  static constexpr int AHEAD = 4, PIECES = FP8 ? 4 * AHEAD * kv8::piece_bytes(D) : 0;  // pieces of a warp, bytes of all
  static constexpr int BARRIERS = FP8 ? 512 : 256, LIMIT = 232448;
  static constexpr int FIT = (LIMIT - BARRIERS - PIECES - 8 * (QUERIES + TOTALS)) / (2 * STAGE);
  static constexpr int STAGES = FIT < 6 ? FIT : 6;
  static constexpr int BYTES = 2 * STAGES * STAGE + 8 * (QUERIES + TOTALS) + PIECES + BARRIERS;
  static_assert(STAGES >= 2 && 32 * STAGES + 8 <= 256, "a tile is fetched while another is multiplied");
};

// One work tile: rows first_row .. last_row of a sequence under one kv head, and the key tiles it sees.
struct Work {
  int seq, head, first_row, last_row;
  int offset, start, kv_len;  // row of the sequence's first token, its position, and the end of the context
  int visible_lo, position, first_tile, last_tile;
};

// The work tiles of this block, in order, of which there are `tiles` for each kv head.
template <typename Mask>
struct Scheduler {
  static constexpr bool CAUSAL = true, SPLITS = true, ALL = Mask::ALL;
  const int *kv_lens, *query_offsets;
  const int2* work;
  int tiles, kv_heads, group, window;
  const Mask& mask;

  // The first tile from t on that a block sees something of.
  __device__ __forceinline__ int seen_from(int t, const Work& w) const {
    if constexpr (!Mask::ALL)
      while (t < w.last_tile && !mask.sees(t, w.position, w.head * group, group)) t++;
    return t;
  }
  __device__ __forceinline__ bool get(int round, Work& w) const {
    const int turn = round & 1 ? gridDim.x - 1 - blockIdx.x : blockIdx.x, index = round * gridDim.x + turn;
    if (index >= tiles * kv_heads) return false;
    const int2 mine = work[index / kv_heads];
    w.seq = mine.x;
    w.head = index % kv_heads;
    w.first_row = mine.y;
    w.offset = query_offsets[w.seq];
    const int tokens = query_offsets[w.seq + 1] - w.offset;
    w.kv_len = kv_lens[w.seq];
    w.start = w.kv_len - tokens;
    w.last_row = min(w.first_row + ROWS, tokens * group) - 1;
    w.position = w.start + w.first_row / group;
    w.visible_lo = window > 0 ? max(0, w.position - window + 1) : 0;
    w.last_tile = (w.start + w.last_row / group) / TILE;
    w.first_tile = seen_from(w.visible_lo / TILE, w);
    return true;
  }
};

// Stages of keys and of values, which fill and empty separately.
template <int D, bool FP8>
struct Ring {
  using L = Layout<D, FP8>;
  u32 base, bars;
  int stage = 0;
  u32 phase = 0;
  __device__ __forceinline__ void advance() {
    if (++stage == L::STAGES) stage = 0, phase ^= 1;
  }
  __device__ __forceinline__ u32 keys() const { return base + stage * L::STAGE; }
  __device__ __forceinline__ u32 values() const { return base + (L::STAGES + stage) * L::STAGE; }
  __device__ __forceinline__ u32 full_keys() const { return bars + 32 * stage; }
  __device__ __forceinline__ u32 full_values() const { return bars + 32 * stage + 8; }
  __device__ __forceinline__ u32 free_keys() const { return bars + 32 * stage + 16; }
  __device__ __forceinline__ u32 free_values() const { return bars + 32 * stage + 24; }
};

// By one thread, before any other touches them. edge_bar: of values that a producer completes itself.
template <int D, bool FP8>
__device__ __forceinline__ void init_barriers(const Ring<D, FP8>& ring, u32 edge_bar, int producers) {
  for (Ring<D, FP8> r = ring; r.phase == 0; r.advance()) {
    mbar_init(r.full_keys(), producers);
    mbar_init(r.full_values(), producers);
    mbar_init(r.free_keys(), CONSUMERS / 32);
    mbar_init(r.free_values(), CONSUMERS / 32);
  }
  mbar_init(edge_bar, 1);
}

// Rows of a stage of values outside [first, end) become zeros, and the stage full. By one warp.
template <int D, bool FP8>
__device__ __forceinline__ void complete_values(const Ring<D, FP8>& ring, int first, int end, int lane) {
  for (int i = lane; i < Layout<D, FP8>::STAGE / 16; i += 32) {
    const int r = i / 8 % TILE;
    if (r < first || r >= end) store_shared(ring.values() + i * 16, make_uint4(0, 0, 0, 0));
  }
  fence_async_shared();
  __syncwarp();
  if (lane == 0) mbar_arrive(ring.full_values());
}

// The producer warp: every tile of every work tile, the blocks that hold something. Values of positions that do not
// exist are zeros (their weights are zero, and zero times what lies there might not be).
template <int D, typename Mask>
__device__ __forceinline__ void produce(Ring<D, false> ring, Scheduler<Mask> scheduler, const TensorMap& k_map,
                                        const TensorMap& v_map, const int* tables, const int* slots, int table_stride,
                                        u32 edge_bar, int lane) {
  using L = Layout<D>;
  constexpr int BLOCKS = TILE / KV_BLOCK, LOOKAHEAD = 32;
  const int block = lane / L::HALVES, half = lane % L::HALVES;
  const u32 place = half * L::HALF + block * (KV_BLOCK * 128);
  u32 edge_phase = 0;
  Work w;
  for (int round = 0; scheduler.get(round, w); round++) {
    const int* const table = tables + (size_t)slots[w.seq] * table_stride;
    int from = -1;
    int4 ids;
    for (int t = w.first_tile; t <= w.last_tile; t = scheduler.seen_from(t + 1, w)) {
      if (t / LOOKAHEAD != from) {  // the tables of the next tiles, one a lane
        from = t / LOOKAHEAD;
        ids = *reinterpret_cast<const int4*>(table + min(from * LOOKAHEAD + lane, w.last_tile) * BLOCKS);
      }
      const int x = __shfl_sync(~0u, ids.x, t % LOOKAHEAD), y = __shfl_sync(~0u, ids.y, t % LOOKAHEAD);
      const int z = __shfl_sync(~0u, ids.z, t % LOOKAHEAD), u = __shfl_sync(~0u, ids.w, t % LOOKAHEAD);
      const int row = ((block == 0 ? x : block == 1 ? y : block == 2 ? z : u) * scheduler.kv_heads + w.head) * KV_BLOCK;
      const int first = max(0, w.visible_lo - t * TILE) / KV_BLOCK, rows = min(TILE, w.kv_len - t * TILE);
      const int end = (rows + KV_BLOCK - 1) / KV_BLOCK;
      const bool mine = block >= first && block < end, edge = first > 0 || rows < TILE;
      const u32 bytes = (end - first) * (L::HALVES * KV_BLOCK * 128);
      mbar_wait(ring.free_keys(), ring.phase ^ 1);
      if (lane == 0) mbar_arrive_expect(ring.full_keys(), bytes);
      __syncwarp();
      if (mine) tensor_load_2d(ring.keys() + place, &k_map, half * 64, row, ring.full_keys());
      mbar_wait(ring.free_values(), ring.phase ^ 1);
      const u32 bar = edge ? edge_bar : ring.full_values();
      if (lane == 0) mbar_arrive_expect(bar, bytes);
      __syncwarp();
      if (mine) tensor_load_2d(ring.values() + place, &v_map, half * 64, row, bar);
      if (edge) {
        mbar_wait(edge_bar, edge_phase);
        edge_phase ^= 1;
        complete_values<D>(ring, first * KV_BLOCK, rows, lane);
      }
      ring.advance();
    }
  }
}

// A producer warp of a cache in e4m3: of every tile the piece with 16 of its positions, of its keys and then of its values.
// Pieces are fetched AHEAD at a time and made numbers in the stage from there; `pieces`, `bars`: the warp's own.
template <typename T, int D>
struct PieceRing {
  using L = Layout<D, true>;
  static constexpr int BYTES = kv8::piece_bytes(D);
  u8* pieces;
  u32 bars;
  int slot = 0;
  u32 phase = 0;

  __device__ __forceinline__ u8* piece() const { return pieces + slot * BYTES; }
  __device__ __forceinline__ void advance() {
    if (++slot == L::AHEAD) slot = 0, phase ^= 1;
  }
  __device__ __forceinline__ void fetch(const u8* from) const {
    mbar_arrive_expect(bars + 8 * slot, BYTES);
    bulk_load(smem(piece()), from, BYTES, bars + 8 * slot, EVICT_NORMAL);
  }
  __device__ __forceinline__ void wait() const { mbar_wait(bars + 8 * slot, phase); }
};

// Where the 16-byte chunk of columns 8 c on is, of row r of a stage.
template <int D>
__device__ __forceinline__ u32 stage_chunk(int r, int c) {
  return c / 8 * Layout<D>::HALF + r * 128 + (c % 8 ^ r % 8) * 16;
}

// A piece of keys as numbers, into rows `first` on of a stage.
template <typename T, int D>
__device__ __forceinline__ void expand_keys_to(u32 stage, const u8* piece, int first, int lane) {
  static_assert(D % 32 == 0, "chunks of eight columns are stored four at a time");
  const int row = lane / 4, c = lane % 4;
#pragma unroll
  for (int h = 0; h < 2; h++) {
    const u32 factor = kv8::factor_of<T>(piece[kv8::POSITIONS * D + row + 8 * h]);
    const auto store = [&](int k, u32 a, u32 b) {  // eight rows of four chunks
      stmatrix_x4(stage + stage_chunk<D>(first + 8 * h + lane % 8, 2 * k + lane / 8), kv8::expand_high<T>(a, factor),
                  kv8::expand_low<T>(a, factor), kv8::expand_high<T>(b, factor), kv8::expand_low<T>(b, factor));
    };
#pragma unroll
    for (int k = 0; k < D / 16; k += 4) {
      const u8* const from = piece + kv8::key_word(D, row + 8 * h, k, c);
      if (k + 4 <= D / 16) {
        const uint4 w = *reinterpret_cast<const uint4*>(from);
        store(k, w.x, w.y);
        store(k + 2, w.z, w.w);
      } else {
        const uint2 w = *reinterpret_cast<const uint2*>(from);
        store(k, w.x, w.y);
      }
    }
  }
}
// The same of values; rows from `end` on become zeros.
template <typename T, int D>
__device__ __forceinline__ void expand_values_to(u32 stage, const u8* piece, int first, int end, int lane) {
#pragma unroll
  for (int i = lane; i < D; i += 32) {
    const int r = i / (D / 8), j = i % (D / 8);
    const uint4 v = *reinterpret_cast<const uint4*>(piece + kv8::value_chunk(D, r, j));
#pragma unroll
    for (int h = 0; h < 2; h++) {
      const u32 f = first + r + 8 * h < end ? kv8::factor_of<T>(piece[kv8::POSITIONS * D + r + 8 * h]) : 0u;
      const auto expand = [&](u32 w) { return h == 0 ? kv8::expand_high<T>(w, f) : kv8::expand_low<T>(w, f); };
      store_shared(stage + stage_chunk<D>(first + r + 8 * h, j), make_uint4(expand(v.x), expand(v.y), expand(v.z), expand(v.w)));
    }
  }
}

// The tiles that a warp has yet to fetch its pieces of, in the order in which the stages are filled.
template <int D, typename Mask>
struct PieceScheduler {
  const Scheduler<Mask>& scheduler;
  const int *tables, *slots;
  int table_stride, block;  // block: which 16 positions of a tile are this warp's
  int round, t;
  Work w;
  bool more;

  __device__ __forceinline__ void begin() {
    round = 0;
    more = scheduler.get(round, w);
    t = w.first_tile;
  }
  __device__ __forceinline__ void next() {
    t = scheduler.seen_from(t + 1, w);
    if (t <= w.last_tile) return;
    more = scheduler.get(++round, w);
    t = w.first_tile;
  }
  // Rows of the tile that exist, and whether this warp's piece has something that is seen.
  __device__ __forceinline__ int rows() const { return min(TILE, w.kv_len - t * TILE); }
  __device__ __forceinline__ bool wanted() const {
    return block * KV_BLOCK < rows() && (block + 1) * KV_BLOCK > w.visible_lo - t * TILE;
  }
  __device__ __forceinline__ const u8* piece(const u8* cache) const {
    const int id = tables[(size_t)slots[w.seq] * table_stride + t * (TILE / KV_BLOCK) + block];
    return cache + ((size_t)id * scheduler.kv_heads + w.head) * kv8::piece_bytes(D);
  }
};

template <typename T, int D, typename Mask>
__device__ __forceinline__ void produce_fp8(Ring<D, true> ring, const Scheduler<Mask>& scheduler, const u8* k_cache,
                                            const u8* v_cache, const int* tables, const int* slots, int table_stride,
                                            PieceRing<T, D> pieces, int warp, int lane) {
  using L = Layout<D, true>;
  PieceScheduler<D, Mask> at{scheduler, tables, slots, table_stride, warp}, ahead{scheduler, tables, slots, table_stride, warp};
  at.begin();
  ahead.begin();
  PieceRing<T, D> fetched = pieces;
  const auto fetch = [&] {  // a tile's keys and values
    if (!ahead.more) return;
    if (ahead.wanted()) {
      if (lane == 0) fetched.fetch(ahead.piece(k_cache));
      fetched.advance();
      if (lane == 0) fetched.fetch(ahead.piece(v_cache));
      fetched.advance();
    }
    ahead.next();
  };
  const int first = warp * KV_BLOCK;
  int under_way = 0;
  const auto fill = [&] {  // pieces of the next tiles, as many as there is room for
    while (ahead.more && under_way + 2 * ahead.wanted() <= L::AHEAD) {
      under_way += 2 * ahead.wanted();
      fetch();
    }
  };
  fill();
  for (; at.more; at.next()) {
    const bool wanted = at.wanted();
    mbar_wait(ring.free_keys(), ring.phase ^ 1);
    if (wanted) {
      pieces.wait();
      expand_keys_to<T, D>(ring.keys(), pieces.piece(), first, lane);
      pieces.advance();
    }
    fence_async_shared();
    __syncwarp();
    if (lane == 0) mbar_arrive(ring.full_keys());
    mbar_wait(ring.free_values(), ring.phase ^ 1);
    if (wanted) {
      pieces.wait();
      expand_values_to<T, D>(ring.values(), pieces.piece(), first, at.rows(), lane);
      pieces.advance();
    } else {
      for (int i = lane; i < KV_BLOCK * D / 8; i += 32)
        store_shared(ring.values() + stage_chunk<D>(first + i / (D / 8), i % (D / 8)), make_uint4(0, 0, 0, 0));
    }
    fence_async_shared();
    __syncwarp();
    if (lane == 0) mbar_arrive(ring.full_values());
    ring.advance();
    if (wanted) under_way -= 2;
    fill();
  }
}

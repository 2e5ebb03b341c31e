// Attention of sequences that compute one token this step, over a paged cache of keys and values in e4m3 (fp8_cache.cuh),
// where the copy engine brings its pieces (from compute capability 9.0 on; elsewhere attention/decode.cu is used).
//
// Work is dealt as in decode_ring.cu: the keys of a (sequence, kv head) are a row of tiles of 64 positions, the rows of all
// sequences one line of tiles; groups of up to four warps, one a head, take equal ranges of that line, cut where a split
// ends. Each warp has a ring of SLOTS tiles, keys and values in turn, and asks for the next whenever it has used one. Making numbers
// of codes takes about as many instructions as all the rest, so two blocks share an SM, with 192 KB under way.
//
// attn_decode_rope_fp8 does what rope_kv_fp8 does besides, as attn_decode_rope of decode_ring.cu does for 16 bits.
#include "attention/fp8_cache.cuh"
#include "attention/turning.cuh"

inline constexpr int WARPS = TILES_PER_SPLIT, THREADS = WARPS * 32;

// A warp's ring of tiles in shared memory, each its pieces one behind the other, and a barrier a slot. Below capability 9.0
// (the emulator) the lanes copy.
template <int D, int SLOTS> struct Ring {
  static constexpr int PIECE = kv8::piece_bytes(D), BLOCKS = TILE / KV_BLOCK, SLOT = BLOCKS * PIECE;
  unsigned char* tiles;
  u32 bars;

  __device__ __forceinline__ u8* slot(int s) const { return tiles + s * SLOT; }

  __device__ __forceinline__ void init(unsigned char* tiles_, u32 bars_, int lane) {
    tiles = tiles_;
    bars = bars_;
#if __CUDA_ARCH__ >= 900
    if (lane < SLOTS) mbar_init(bars + lane * 8, 1);
    if (lane < SLOTS) mbar_init_fence();
    __syncwarp();
#endif
  }

  // Asks for a tile's visible cache blocks. part 0: all of them; 1: all but the newest position's; 2: only that.
  // id: of the cache block number lane % BLOCKS.
  __device__ __forceinline__ void copy(int s, const Tile& t, int part, const u8* cache, int id, int kv_heads, int head,
                                       int lane) {
    const int b = lane % BLOCKS, first = t.lo / KV_BLOCK, last = (t.hi - 1) / KV_BLOCK;
    const bool newest = t.newest && b == last;
    const bool mine = b >= first && b <= last && (part == 0 || newest == (part == 2));
    const int at = id * kv_heads + head;
#if __CUDA_ARCH__ >= 900
    if (part != 2 && lane == 0) mbar_arrive_expect(bars + s * 8, (last - first + 1) * PIECE);
    __syncwarp();
    if (mine && lane < BLOCKS) bulk_load(smem(slot(s)) + b * PIECE, cache + (size_t)at * PIECE, PIECE, bars + s * 8, EVICT_FIRST);
#else
    for (int from = 0; from < BLOCKS; from++) {
      const bool wanted = __shfl_sync(~0u, mine, from);
      const int its = __shfl_sync(~0u, at, from);
      for (int i = lane; wanted && i < PIECE / 16; i += 32)
        cp_async16(smem(slot(s)) + from * PIECE + i * 16, cache + (size_t)its * PIECE + i * 16);
    }
    cp_async_commit();
#endif
  }

  // Waits for the slot's copy, which is the slot's first, third, ... where parity is 0.
  __device__ __forceinline__ void wait(int s, u32 parity) const {
#if __CUDA_ARCH__ >= 900
    mbar_wait(bars + s * 8, parity);
#else
    cp_async_wait<0>();
    __syncwarp();
#endif
  }
};

// The tiles that a warp has yet to ask for: keys, then values of each.
template <int ROWS, int D, typename T, typename Mask> struct Ahead {
  Cursor at;
  Tile tile;
  int row, id, end, slot;
  bool values, active;

  __device__ __forceinline__ void look(const Job<T, Mask>& job, int sub, int heads, int lane) {
    row = at.row * heads + sub;
    tile = tile_of<ROWS>(job, at, row);
    if (tile.empty()) return;
    const int entry = (at.of.first_split * TILES_PER_SPLIT + at.tile) * (TILE / KV_BLOCK) + lane % (TILE / KV_BLOCK);
    id = job.tables[(size_t)job.slots[at.seq] * job.table_stride + entry];
  }
  // On to the next tile that is not empty.
  __device__ __forceinline__ void next(const Job<T, Mask>& job, const Line& line, int sub, int heads, int lane) {
    do {
      line.advance(at);
      active = at.line < end;
      if (!active) return;
      look(job, sub, heads, lane);
    } while (tile.empty());
  }
};

template <typename T, int D, int ROWS, int SLOTS, typename Mask, typename Turn>
__device__ __forceinline__ void attend(T* out, const T* q, const u8* k_cache, const u8* v_cache, const int* tables,
                                       const int* slots, const int* kv_lens, const int* count, float* partial, int* arrivals,
                                       int q_pitch, int out_pitch, int table_stride, int kv_heads, int group, float scale,
                                       float soft_cap, int window, int max_seqs, const Mask& mask, const Turn& turn) {
  griddep_launch();
  using Tiles = Ring<D, SLOTS>;
  constexpr int GROUPS = Stored<D, ROWS>::GROUPS, H = ROWS / 8;
  extern __shared__ __align__(1024) unsigned char shared[];
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, parts = (group + ROWS - 1) / ROWS;
  unsigned char* const base = shared + (1024 - smem(shared) % 1024) % 1024;
  Tiles ring;
  ring.init(base + warp * SLOTS * Tiles::SLOT, smem(base + WARPS * SLOTS * Tiles::SLOT) + warp * SLOTS * 8, lane);
  const Job<T, Mask> job = {out, q, tables, slots, partial, arrivals, q_pitch, out_pitch, table_stride,
                            kv_heads, group, parts, kv_heads * parts, scale, soft_cap, mask};

  // This warp's tiles.
  Line line(kv_lens, min(*count, max_seqs), window, lane);
  const bool shares = line.splits * job.rows <= (int)gridDim.x;
  const int heads = shares ? 1 : job.rows % 4 == 0 ? 4 : job.rows % 2 == 0 ? 2 : 1;  // that go side by side
  const int sub = shares ? 0 : warp % heads;
  line.rows = job.rows / heads;
  Cursor at;
  int end;
  if (shares) {
    if ((int)blockIdx.x >= line.splits * line.rows) {
      if (blockIdx.x == 0) griddep_wait();
      return;
    }
    at = line.split_of(blockIdx.x, lane);
    at.tile += warp;
    end = 1;
  } else {
    const int sides = WARPS / heads, all = line.tiles * line.rows, rows = line.seqs * line.rows;
    const int worker = blockIdx.x * sides + warp / heads;
    int workers = gridDim.x * sides;
    // Where rows are nearly equal and fewer, as many have a part in each.
    if (rows <= workers && (long long)line.longest * workers * 8 <= (long long)all * 9) workers = workers / rows * rows;
    if (workers == rows) {
      if (worker < rows) at = line.row_of(worker);
      end = worker < rows ? at.of.tiles : 0;
      if (worker >= rows) at.line = 0;
    } else {
      const int slack = all / (8 * workers);
      at = line.cut((int)((long long)all * min(worker, workers) / workers), slack, lane);
      end = line.cut((int)((long long)all * min(worker + 1, workers) / workers), slack, lane).line;
    }
    if (at.line >= end) {
      if (blockIdx.x == 0) griddep_wait();
      return;
    }
  }

  Ahead<ROWS, D, T, Mask> ahead;
#pragma unroll 1
  // What may be had before the predecessor is done, and the rest of it.
  for (int part = Turn::HERE ? 0 : 1; part <= (Turn::HERE ? 0 : 2); part++) {
    ahead.at = at;
    ahead.end = end;
    ahead.slot = 0;
    ahead.values = false;
    ahead.active = true;
    ahead.look(job, sub, heads, lane);
    if (ahead.tile.empty()) {
      if (shares)
        ahead.active = false;
      else
        ahead.next(job, line, sub, heads, lane);
    }
    if (part == 2) griddep_wait();
#pragma unroll 1
    for (int i = 0; i < SLOTS && ahead.active; i++) {
      if (part != 2 || ahead.tile.newest)
        ring.copy(ahead.slot, ahead.tile, part, ahead.values ? v_cache : k_cache, ahead.id, kv_heads,
                  ahead.row / parts, lane);
      ahead.slot = ahead.slot + 1 == SLOTS ? 0 : ahead.slot + 1;
      if (ahead.values) {
        if (shares)
          ahead.active = false;
        else
          ahead.next(job, line, sub, heads, lane);
      }
      ahead.values = !ahead.values;
    }
  }
  const auto ask = [&] {  // for the next tile, into the slot that has just been used
    if (!ahead.active) return;
    ring.copy(ahead.slot, ahead.tile, 0, ahead.values ? v_cache : k_cache, ahead.id, kv_heads,
              ahead.row / parts, lane);
    ahead.slot = ahead.slot + 1 == SLOTS ? 0 : ahead.slot + 1;
    if (ahead.values) ahead.next(job, line, sub, heads, lane);
    ahead.values = !ahead.values;
  };

  if (Turn::HERE) griddep_wait();

  Queries<D, ROWS> queries;
  Newest<T> newest;
  int row = at.row * heads + sub;
  bool turned = !Turn::HERE;
  const auto take = [&](int seq, int its_row) {  // the queries of a row
    queries.load(job, seq, its_row, lane);
    if constexpr (Turn::HERE) {
      newest.load(job, seq, its_row, lane);
      turned = false;
    }
  };
  take(at.seq, row);
  const float factor = soft_cap > 0.f ? LOG2E : __fmul_rn(scale, LOG2E);
  State<ROWS, GROUPS> split, run;
  split.clear();
  int run_start = at.split(), slot = 0;
  u32 parity = 0;
  // The newest position's key or value, into the tile in the ring and into the cache.
  const auto put_newest = [&](const Tile& tile, const u32(&words)[2], bool key) {
    if constexpr (Turn::HERE) {
      __shared__ u32 room[WARPS][D / 2];
      u32* const whole = room[warp];
      whole[lane] = words[0];
      whole[lane + 32] = words[1];
      __syncwarp();
      const int position = at.of.position, within = position % KV_BLOCK;
      const int block = tables[(size_t)slots[at.seq] * table_stride + position / KV_BLOCK];
      u8* const cache = key ? turn.k_cache : turn.v_cache;
      kv8::store_row<T>(ring.slot(slot) + (tile.hi - 1) / KV_BLOCK * Tiles::PIECE, whole, D, within, key, lane);
      kv8::store_row<T>(cache + ((size_t)block * kv_heads + row) * Tiles::PIECE, whole, D, within, key, lane);
#if __CUDA_ARCH__ >= 900
      fence_async_shared();
#endif
      __syncwarp();
    }
  };
  const auto pass = [&] {
    if (++slot == SLOTS) {
      slot = 0;
      parity ^= 1;
    }
  };
#pragma unroll 1
  while (true) {
    Cursor next = at;
    line.advance(next);
    const bool more = next.line < end, row_ends = next.tile == 0;
    const Tile tile = tile_of<ROWS>(job, at, row);
    const bool whole = tile.hi > TILE / 2;
    float m[2] = {-INFINITY_F, -INFINITY_F}, l[2] = {0.f, 0.f};
    float x[D / 8][4];
    if constexpr (Turn::HERE) {
      if (!turned) {
        turn.queries(queries, at.of.position, lane);
        newest.turn(turn, at.of.position, lane);
        turned = true;
      }
    }
    if (!tile.empty()) {
      float s[8][4];
      u32 p[4][4];
      ring.wait(slot, parity);
      if (Turn::HERE && tile.newest) put_newest(tile, newest.k, true);
      kv8::scores<T, D, 2>(s, [&](u32(&a)[4], int k) { queries.fragment(a, k); }, ring.slot(slot), whole ? 4 : 2, lane);
      __syncwarp();
      ask();
      pass();
      const u32 value[2] = {newest.v[0], newest.v[1]};
      if (more && row_ends) take(next.seq, next.row * heads + sub);
      if (soft_cap > 0.f) tile_soft_cap(s, scale, soft_cap);
      if (tile.partial()) {
        const int lo[2] = {tile.lo, tile.lo}, hi[2] = {tile.hi - 1, tile.hi - 1};
        tile_mask(s, lo, hi, lane);
      }
      if constexpr (!Mask::ALL) {
        const int first = job.first_head(row, ROWS) + lane / 4;
        const int position[2] = {at.of.position, at.of.position}, query_head[2] = {first, first + 8};
        mask.hide(s, at.of.first_split * SPLIT + at.tile * TILE, position, query_head, lane);
      }
      tile_softmax<T>(s, p, factor, m, l, ROWS == 16);
      ring.wait(slot, parity);
      if (Turn::HERE && tile.newest) put_newest(tile, value, false);
      kv8::values<T, D>(x, p, ring.slot(slot), whole ? 4 : 2, tile.lo, tile.hi, lane);
      __syncwarp();
      if (!shares) {
        ask();
        pass();
        Factors f[H];
        split.factors(f, m, l);
#pragma unroll
        for (int g = 0; g < GROUPS; g++) split.add(g, group_of<ROWS, D>(x, g), f);
      }
    } else if (more && row_ends) {
      take(next.seq, next.row * heads + sub);
    }
    if (shares) {
      if (tile.empty()) {
#pragma unroll
        for (int n = 0; n < D / 8; n++) x[n][0] = x[n][1] = x[n][2] = x[n][3] = 0.f;
      }
      at.tile -= warp;
      float4* const exchange = reinterpret_cast<float4*>(base);
      finish_shared<D, ROWS, 1>(job, at, x, m, l, exchange, SLOTS * Tiles::SLOT / 16, 0, warp, lane);
      return;
    }
    if (next.tile % TILES_PER_SPLIT == 0 || !more) {
      finish_split<D, ROWS>(job, at, row, run_start, row_ends, more, split, run, lane);
      split.clear();
      if (row_ends) run_start = 0;
    }
    if (!more) break;
    at = next;
    row = at.row * heads + sub;
  }
}

// Parameters as those of attn_decode_fp8. Grid: twice as many blocks of 128 threads as there are SMs.
template <typename T, int D, int SLOTS>
__global__ void __launch_bounds__(THREADS, 2)
attn_decode_ring_fp8(T* out, const T* q, const u8* k_cache, const u8* v_cache, const int* tables, const int* slots,
                     const int* kv_lens, const int* count, float* partial, int* arrivals, int q_pitch, int out_pitch,
                     int table_stride, int kv_heads, int group, float scale, float soft_cap, int window, int max_seqs) {
  attend<T, D, 8, SLOTS>(out, q, k_cache, v_cache, tables, slots, kv_lens, count, partial, arrivals, q_pitch, out_pitch,
                         table_stride, kv_heads, group, scale, soft_cap, window, max_seqs, Everything(), Turned());
}

// The same for queries, keys and values as a product left them, in qkv [T, q_pitch], and a cache without the newest
// position: see rope_kv_fp8. Heads of 128, groups of up to 8.
template <typename T, int D, int SLOTS>
__global__ void __launch_bounds__(THREADS, 2)
attn_decode_rope_fp8(T* out, const T* qkv, u8* k_cache, u8* v_cache, const int* tables, const int* slots, const int* kv_lens,
                     const int* count, float* partial, int* arrivals, int q_pitch, int out_pitch, int table_stride,
                     int kv_heads, int group, float scale, float soft_cap, int window, int max_seqs, const float* cos,
                     const float* sin) {
  static_assert(D == 128);
  attend<T, D, 8, SLOTS>(out, qkv, k_cache, v_cache, tables, slots, kv_lens, count, partial, arrivals, q_pitch, out_pitch,
                         table_stride, kv_heads, group, scale, soft_cap, window, max_seqs, Everything(),
                         Turning<T, u8>{cos, sin, k_cache, v_cache});
}

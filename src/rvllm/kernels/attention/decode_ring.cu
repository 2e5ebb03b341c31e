// Attention of sequences that compute one token this step, over a paged KV cache, where the copy engine brings the
// keys and values (from compute capability 9.0 on; elsewhere attention/decode.cu is used).
//
// The keys of a (sequence, kv head, up to ROWS query heads of its group) are a row of tiles of 64 positions; the rows
// of all sequences are one line of tiles. Groups of up to four warps of a block, one a head, take equal, contiguous
// ranges of that line, cut where a split of 256 positions ends, and walk them side by side: a cache block's heads lie
// one behind the other, so that memory is read 16 KB at a time. A warp merges its tiles in its registers, and nobody
// waits for anybody. Where there are fewer splits than fours of warps, four take a tile of a split each.
// A run of splits from a row's first on is merged as it comes; other splits leave their states in `partial`, and
// whoever brings a row's last split merges them in ascending order.
//
// Each warp has a ring of half tiles, those of a tile's keys and then of its values, and asks for the next whenever it
// has used one. A block's SLOTS half tiles are 192 KB under way on each SM, where the memory's latency needs 40. A tile
// is some 1,200 instructions, most of which depend on the one before: where there are many rows, eight warps hide each
// other's latencies; where four have a row each, more of them would have nothing to do, and rings would be shorter.
// The list of work follows from the metadata, so it is made before the predecessor is done, and the ring is filled
// (but for the block of the newest position) before that too.
//
// attn_decode_rope does what rope_kv does besides: queries turn in registers, and the warp that attends to the newest
// position puts its key and value into the tile and into the cache.
#include "attention/turning.cuh"

inline constexpr int MAX_THREADS = 256, SHARERS = TILES_PER_SPLIT;
inline constexpr int ROWS_A_SLOT = TILE / 2, BLOCKS_A_SLOT = ROWS_A_SLOT / KV_BLOCK;

struct alignas(64) TensorMap {
  u64 opaque[16];
};

// A warp's ring of half tiles in shared memory: [slots][D / 64][32 rows][64 columns] with the 128-byte swizzle, and a
// barrier a slot. Below capability 9.0 (the emulator) the lanes copy.
template <typename T, int D> struct Ring {
  static constexpr int PANELS = D / 64, PANEL = ROWS_A_SLOT * 128, SLOT = PANELS * PANEL, BLOCKS = TILE / KV_BLOCK;
  unsigned char* tiles;
  u32 bars;
  int slots;

  __device__ __forceinline__ u32 slot(int s) const { return smem(tiles) + s * SLOT; }

  __device__ __forceinline__ void init(unsigned char* tiles_, u32 bars_, int slots_, int lane) {
    tiles = tiles_;
    bars = bars_;
    slots = slots_;
#if __CUDA_ARCH__ >= 900
    if (lane < slots) mbar_init(bars + lane * 8, 1);
    if (lane < slots) mbar_init_fence();
    __syncwarp();
#endif
  }

  // Which of a tile's cache blocks this lane copies.
  static __device__ __forceinline__ int block_of(int lane) { return lane / PANELS % BLOCKS; }

  // Asks for the visible cache blocks of half a tile. part 0: all of them; 1: all but the newest position's; 2: only
  // that. id: of the cache block number block_of(lane).
  __device__ __forceinline__ void copy(int s, const Tile& t, int half, int part, const TensorMap* map, const T* cache, int id,
                                       int kv_heads, int head, int lane) {
    const int b = block_of(lane), first = t.lo / KV_BLOCK, last = (t.hi - 1) / KV_BLOCK;
    const bool newest = t.newest && b == last;
    const bool mine = b / BLOCKS_A_SLOT == half && b >= first && b <= last && (part == 0 || newest == (part == 2));
    const int row = (id * kv_heads + head) * KV_BLOCK;
#if __CUDA_ARCH__ >= 900
    const int from = max(first, half * BLOCKS_A_SLOT), to = min(last + 1, (half + 1) * BLOCKS_A_SLOT);
    if (part != 2 && lane == 0) mbar_arrive_expect(bars + s * 8, max(0, to - from) * KV_BLOCK * D * 2);
    __syncwarp();
    if (mine && lane < BLOCKS * PANELS)
      tensor_load_2d(slot(s) + lane % PANELS * PANEL + b % BLOCKS_A_SLOT * KV_BLOCK * 128, map, lane % PANELS * 64, row,
                     bars + s * 8);
#else
    for (int from = 0; from < BLOCKS * PANELS; from++) {
      const bool wanted = __shfl_sync(~0u, mine, from);
      const int its_row = __shfl_sync(~0u, row, from), panel = from % PANELS;
      for (int i = lane; wanted && i < KV_BLOCK * 8; i += 32) {
        const int r = from / PANELS % BLOCKS_A_SLOT * KV_BLOCK + i / 8;
        cp_async16(slot(s) + panel * PANEL + r * 128 + ((i % 8 ^ r % 8) * 16),
                   cache + (size_t)(its_row + i / 8) * D + panel * 64 + i % 8 * 8);
      }
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

  // Puts a row of 128 elements, words lane and lane + 32 of it, in its place.
  __device__ __forceinline__ void put(int s, int row, const u32 (&words)[2], int lane) const {
#pragma unroll
    for (int i = 0; i < 2; i++)
      *reinterpret_cast<u32*>(tiles + s * SLOT + i * PANEL + row * 128 + (lane / 4 ^ row % 8) * 16 + lane % 4 * 4) = words[i];
#if __CUDA_ARCH__ >= 900
    fence_async_shared();
#endif
    __syncwarp();
  }

  // Makes zeros of the rows of a half that are not visible.
  __device__ __forceinline__ void clear_hidden(int s, const Tile& t, int half, int lane) const {
#pragma unroll 1
    for (int i = lane; i < ROWS_A_SLOT * 8 * PANELS; i += 32) {
      const int row = i / 8 % ROWS_A_SLOT, panel = i / (8 * ROWS_A_SLOT), position = half * ROWS_A_SLOT + row;
      if (position >= t.lo && position < t.hi) continue;
      *reinterpret_cast<uint4*>(tiles + s * SLOT + panel * PANEL + row * 128 + i % 8 * 16) = make_uint4(0, 0, 0, 0);
    }
#if __CUDA_ARCH__ >= 900
    fence_async_shared();
#endif
    __syncwarp();
  }
};

// Scores of half a tile in a ring's slot, summed as scores_of does.
template <int HALF, typename T, int D, int ROWS>
__device__ __forceinline__ void scores_in(float (&s)[8][4], const Queries<D, ROWS>& q, u32 keys, int lane) {
  const u32 start = keys + (lane % 8 + lane / 16 * 8) * 128 + ((lane / 8 % 2 ^ lane % 8) * 16);
#pragma unroll
  for (int kk = 0; kk < D / 16; kk++) {
    u32 a[4];
    if constexpr (ROWS == 8) {
      a[0] = q.a[kk][0];
      a[2] = q.a[kk][1];
      a[1] = a[3] = 0;
    } else {
#pragma unroll
      for (int i = 0; i < 4; i++) a[i] = q.a[kk][i];
    }
#pragma unroll
    for (int b = 0; b < 2; b++) {
      u32 r[4];
      ldmatrix_x4(r, (start ^ kk % 4 * 32) + kk / 4 * Ring<T, D>::PANEL + b * (16 * 128));
      mma_16816(s[4 * HALF + 2 * b], a, {r[0], r[1]}, T());
      mma_16816(s[4 * HALF + 2 * b + 1], a, {r[2], r[3]}, T());
    }
  }
}

// x += p v of half a tile in a ring's slot, all columns at once, summed as values_of does.
template <int HALF, typename T, int D>
__device__ __forceinline__ void values_in(float (&x)[D / 8][4], const u32 (&p)[4][4], u32 values, int lane) {
  const u32 start = values + lane % 16 * 128 + ((lane / 16 ^ lane % 8) * 16);
#pragma unroll
  for (int j = 0; j < 2; j++) {
#pragma unroll
    for (int g = 0; g < D / 16; g++) {
      u32 r[4];
      ldmatrix_x4_trans(r, (start ^ g % 4 * 32) + g / 4 * Ring<T, D>::PANEL + j * (16 * 128));
      mma_16816(x[2 * g], p[2 * HALF + j], {r[0], r[1]}, T());
      mma_16816(x[2 * g + 1], p[2 * HALF + j], {r[2], r[3]}, T());
    }
  }
}

// The half tiles that a warp has yet to ask for: of a tile's keys, then of its values; the second half only where
// something of it is visible.
template <int ROWS, int D, typename T, typename Mask> struct Ahead {
  Cursor at;
  Tile tile;
  int row, id, end, slot, half;
  bool values, active;

  __device__ __forceinline__ void look(const Job<T, Mask>& job, int sub, int heads, int lane) {
    row = at.row * heads + sub;
    tile = tile_of<ROWS>(job, at, row);
    if (tile.empty()) return;
    const int entry = (at.of.first_split * TILES_PER_SPLIT + at.tile) * (TILE / KV_BLOCK) + Ring<T, D>::block_of(lane);
    id = job.tables[(size_t)job.slots[at.seq] * job.table_stride + entry];
  }
  // On to the next tile that is not empty.
  __device__ __forceinline__ void next_tile(const Job<T, Mask>& job, const Line& line, int sub, int heads, int lane) {
    do {
      line.advance(at);
      active = at.line < end;
      if (!active) return;
      look(job, sub, heads, lane);
    } while (tile.empty());
  }
  // On to the next half tile. single: there is no tile after this one.
  __device__ __forceinline__ void next(const Job<T, Mask>& job, const Line& line, int slots, bool single, int sub, int heads,
                                       int lane) {
    slot = slot + 1 == slots ? 0 : slot + 1;
    if (half == 0 && tile.hi > ROWS_A_SLOT) {
      half = 1;
      return;
    }
    half = 0;
    values = !values;
    if (values) return;
    if (single)
      active = false;
    else
      next_tile(job, line, sub, heads, lane);
  }
};

template <typename T, int D, int ROWS, int SLOTS, typename Mask, typename Turn>
__device__ __forceinline__ void attend(T* out, const T* q, const T* k_cache, const T* v_cache, const int* tables,
                                       const int* slots, const int* kv_lens, const int* count, float* partial, int* arrivals,
                                       int q_pitch, int out_pitch, int table_stride, int kv_heads, int group, float scale,
                                       float soft_cap, int window, int max_seqs, const TensorMap* k_map,
                                       const TensorMap* v_map, const Mask& mask, const Turn& turn) {
  griddep_launch();
  using Tiles = Ring<T, D>;
  constexpr int GROUPS = Stored<D, ROWS>::GROUPS, H = ROWS / 8;
  extern __shared__ __align__(1024) unsigned char shared[];
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, warps = blockDim.x / 32, parts = (group + ROWS - 1) / ROWS;
  unsigned char* const base = shared + (1024 - smem(shared) % 1024) % 1024;
  const Job<T, Mask> job = {out, q, tables, slots, partial, arrivals, q_pitch, out_pitch, table_stride,
                            kv_heads, group, parts, kv_heads * parts, scale, soft_cap, mask};

  // This warp's tiles.
  Line line(kv_lens, min(*count, max_seqs), window, lane);
  const int blocks = gridDim.x, all_splits = line.splits * job.rows;
  const bool shares = all_splits <= blocks * (warps / SHARERS);
  // Warps of this block that work: four where that is enough for all splits, or for all rows.
  const int used = (shares ? all_splits <= blocks : line.seqs * job.rows <= SHARERS * blocks) ? SHARERS : warps;
  if (warp >= used) return;
  const int heads = shares ? 1 : job.rows % 4 == 0 ? 4 : job.rows % 2 == 0 ? 2 : 1;  // that go side by side
  const int sub = shares ? 0 : warp % heads;
  line.rows = job.rows / heads;
  Cursor at;
  int end;
  if (shares) {
    const int split = warp / SHARERS * blocks + blockIdx.x;
    if (split >= all_splits) {
      if (blockIdx.x == 0) griddep_wait();
      return;
    }
    at = line.split_of(split, lane);
    at.tile += warp % SHARERS;
    end = 1;
  } else {
    const int sides = used / heads, workers = blocks * sides, worker = warp / heads * blocks + blockIdx.x;
    const int all = line.tiles * line.rows, rows = line.seqs * line.rows;
    if (rows <= workers && (long long)line.longest * workers * 8 <= (long long)all * 9) {  // nearly equal rows: one each
      if (worker < rows) at = line.row_of(worker);
      end = worker < rows ? at.of.tiles : 0;
      if (worker >= rows) at.line = 0;
    } else {
      const int slack = all / (8 * workers);
      at = line.cut((int)((long long)all * worker / workers), slack, lane);
      end = line.cut((int)((long long)all * (worker + 1) / workers), slack, lane).line;
    }
    if (at.line >= end) {
      if (blockIdx.x == 0) griddep_wait();
      return;
    }
  }

  const int depth = SLOTS / used;  // those that work have the rings of the others too
  Tiles ring;
  ring.init(base + warp * depth * Tiles::SLOT, smem(base + SLOTS * Tiles::SLOT) + warp * depth * 8, depth, lane);

  const auto ask_for = [&](auto& ahead, int part) {
    ring.copy(ahead.slot, ahead.tile, ahead.half, part, ahead.values ? v_map : k_map, ahead.values ? v_cache : k_cache,
              ahead.id, kv_heads, parts == 1 ? ahead.row : ahead.row / parts, lane);
  };
  Ahead<ROWS, D, T, Mask> ahead;
#pragma unroll 1
  // What may be had before the predecessor is done, and the rest of it.
  for (int part = Turn::HERE ? 0 : 1; part <= (Turn::HERE ? 0 : 2); part++) {
    ahead.at = at;
    ahead.end = end;
    ahead.slot = ahead.half = 0;
    ahead.values = false;
    ahead.active = true;
    ahead.look(job, sub, heads, lane);
    if (ahead.tile.empty()) {
      if (shares)
        ahead.active = false;
      else
        ahead.next_tile(job, line, sub, heads, lane);
    }
    if (part == 2) griddep_wait();
#pragma unroll 1
    for (int i = 0; i < depth && ahead.active; i++) {
      if (part != 2 || ahead.tile.newest) ask_for(ahead, part);
      ahead.next(job, line, depth, shares, sub, heads, lane);
    }
  }
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
  const auto put_newest = [&](const Tile& tile, int half, const u32(&words)[2]) {
    if (Turn::HERE && tile.newest && (tile.hi - 1) / ROWS_A_SLOT == half) ring.put(slot, (tile.hi - 1) % ROWS_A_SLOT, words, lane);
  };
  const auto pass = [&] {  // the slot has been used: asks for the next half tile, into it
    __syncwarp();
    if (ahead.active) {
      ask_for(ahead, 0);
      ahead.next(job, line, depth, shares, sub, heads, lane);
    }
    if (++slot == depth) {
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
    const bool whole = tile.hi > ROWS_A_SLOT;
    float m[2] = {-INFINITY_F, -INFINITY_F}, l[2] = {0.f, 0.f};
    float x[D / 8][4];
    if constexpr (Turn::HERE) {
      if (!turned) {
        turn.queries(queries, at.of.position, lane);
        newest.turn(turn, at.of.position, lane);
        turned = true;
      }
      if (tile.newest && !tile.empty()) newest.store(job, turn, at.seq, at.of.position, row, lane);
    }
    if (!tile.empty()) {
      float s[8][4];
      u32 p[4][4];
#pragma unroll
      for (int n = 0; n < 8; n++) s[n][0] = s[n][1] = s[n][2] = s[n][3] = 0.f;
      ring.wait(slot, parity);
      put_newest(tile, 0, newest.k);
      scores_in<0, T, D, ROWS>(s, queries, ring.slot(slot), lane);
      pass();
      if (whole) {
        ring.wait(slot, parity);
        put_newest(tile, 1, newest.k);
        scores_in<1, T, D, ROWS>(s, queries, ring.slot(slot), lane);
        pass();
      }
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
#pragma unroll
      for (int n = 0; n < D / 8; n++) x[n][0] = x[n][1] = x[n][2] = x[n][3] = 0.f;
      ring.wait(slot, parity);
      if (tile.lo > 0 || tile.hi < ROWS_A_SLOT) ring.clear_hidden(slot, tile, 0, lane);
      put_newest(tile, 0, value);
      values_in<0, T, D>(x, p, ring.slot(slot), lane);
      pass();
      if (whole) {
        ring.wait(slot, parity);
        if (tile.partial()) ring.clear_hidden(slot, tile, 1, lane);
        put_newest(tile, 1, value);
        values_in<1, T, D>(x, p, ring.slot(slot), lane);
        pass();
      }
      if (!shares) {
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
      at.tile -= warp % SHARERS;
      const int sharers = warp / SHARERS, pitch = depth * Tiles::SLOT / 16;
      float4* const exchange = reinterpret_cast<float4*>(base) + sharers * SHARERS * pitch;
      finish_shared<D, ROWS, 2>(job, at, x, m, l, exchange, pitch, sharers, warp % SHARERS, lane);
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

// Parameters as those of attn_decode; k_map, v_map: the caches as matrices [blocks * kv_heads * 16, D], in boxes of 16
// rows and 64 columns. Grid: as many blocks as there are SMs, of four or eight warps.
template <typename T, int D, int ROWS, int SLOTS>
__global__ void __launch_bounds__(MAX_THREADS, 1)
attn_decode_ring(T* out, const T* q, const T* k_cache, const T* v_cache, const int* tables, const int* slots,
                 const int* kv_lens, const int* count, float* partial, int* arrivals, int q_pitch, int out_pitch,
                 int table_stride, int kv_heads, int group, float scale, float soft_cap, int window, int max_seqs,
                 const __grid_constant__ TensorMap k_map, const __grid_constant__ TensorMap v_map) {
  attend<T, D, ROWS, SLOTS>(out, q, k_cache, v_cache, tables, slots, kv_lens, count, partial, arrivals, q_pitch, out_pitch,
                            table_stride, kv_heads, group, scale, soft_cap, window, max_seqs, &k_map, &v_map,
                            Everything(), Turned());
}

// The same for queries, keys and values as a product left them, in qkv [T, q_pitch], and a cache without the newest
// position: see rope_kv. Heads of 128, groups of up to 8.
template <typename T, int D, int SLOTS>
__global__ void __launch_bounds__(MAX_THREADS, 1)
attn_decode_rope(T* out, const T* qkv, T* k_cache, T* v_cache, const int* tables, const int* slots, const int* kv_lens,
                 const int* count, float* partial, int* arrivals, int q_pitch, int out_pitch, int table_stride,
                 int kv_heads, int group, float scale, float soft_cap, int window, int max_seqs,
                 const __grid_constant__ TensorMap k_map, const __grid_constant__ TensorMap v_map, const float* cos,
                 const float* sin) {
  static_assert(D == 128);
  attend<T, D, 8, SLOTS>(out, qkv, k_cache, v_cache, tables, slots, kv_lens, count, partial, arrivals, q_pitch, out_pitch,
                         table_stride, kv_heads, group, scale, soft_cap, window, max_seqs, &k_map, &v_map, Everything(),
                         Turning<T>{cos, sin, k_cache, v_cache});
}

// Attention of sequences that compute one token this step, over a paged KV cache, where the copy engine brings the
// keys and values (from compute capability 9.0 on; elsewhere attention/decode.cu is used).
//
// The keys of a (sequence, kv head, up to ROWS query heads of its group) are a row of tiles of 64 positions; the rows
// of all sequences are one line of tiles. Groups of up to four warps of a block, one a head, take equal, contiguous
// ranges of that line, cut where a split of 256 positions ends, and walk them side by side: a cache block's heads lie
// one behind the other, so that memory is read 16 KB at a time. A warp merges its tiles in its registers, and nobody
// waits for anybody. Where there are fewer splits than blocks, the four warps of a block take a tile of a split each.
// A run of splits from a row's first on is merged as it comes; other splits leave their states in `partial`, and
// whoever brings a row's last split merges them in ascending order.
//
// Each warp has a ring of SLOTS tiles, keys and values in turn, and asks for the next whenever it has used one: twelve
// tiles are 192 KB under way on each SM, where the memory's latency needs about 40.
// The list of work follows from the metadata, so it is made before the predecessor is done, and the ring is filled
// (but for the block of the newest position) before that too.
#include "attention/decode.cuh"

constexpr int WARPS = TILES_PER_SPLIT, THREADS = WARPS * 32;

struct alignas(64) TensorMap {
  u64 opaque[16];
};

// A warp's ring of tiles in shared memory: [SLOTS][D / 64][64 rows][64 columns] with the 128-byte swizzle, and a
// barrier a slot. Below capability 9.0 (the emulator) the lanes copy.
template <typename T, int D, int SLOTS> struct Ring {
  static constexpr int HALVES = D / 64, HALF = TILE * 128, SLOT = HALVES * HALF, BLOCKS = TILE / KV_BLOCK;
  unsigned char* tiles;
  u32 bars;

  __device__ __forceinline__ u32 slot(int s) const { return smem(tiles) + s * SLOT; }

  __device__ __forceinline__ void init(unsigned char* tiles_, u32 bars_, int lane) {
    tiles = tiles_;
    bars = bars_;
#if __CUDA_ARCH__ >= 900
    if (lane < SLOTS) mbar_init(bars + lane * 8, 1);
    if (lane < SLOTS) mbar_init_fence();
    __syncwarp();
#endif
  }

  // Which of a tile's cache blocks this lane copies.
  static __device__ __forceinline__ int block_of(int lane) { return lane / HALVES % BLOCKS; }

  // Asks for a tile's visible cache blocks. part 0: all of them; 1: all but the newest position's; 2: only that.
  // id: of the cache block number block_of(lane).
  __device__ __forceinline__ void copy(int s, const Tile& t, int part, const TensorMap* map, const T* cache, int id,
                                       int kv_heads, int head, int lane) {
    const int b = block_of(lane), first = t.lo / KV_BLOCK, last = (t.hi - 1) / KV_BLOCK;
    const bool newest = t.newest && b == last;
    const bool mine = b >= first && b <= last && (part == 0 || newest == (part == 2));
    const int row = (id * kv_heads + head) * KV_BLOCK;
#if __CUDA_ARCH__ >= 900
    if (part != 2 && lane == 0) mbar_arrive_expect(bars + s * 8, (last - first + 1) * KV_BLOCK * D * 2);
    __syncwarp();
    if (mine && lane < BLOCKS * HALVES)
      tensor_load_2d(slot(s) + lane % HALVES * HALF + b * KV_BLOCK * 128, map, lane % HALVES * 64, row, bars + s * 8);
#else
    for (int from = 0; from < BLOCKS * HALVES; from++) {
      const bool wanted = __shfl_sync(~0u, mine, from);
      const int its_row = __shfl_sync(~0u, row, from), half = from % HALVES;
      for (int i = lane; wanted && i < KV_BLOCK * 8; i += 32) {
        const int r = from / HALVES * KV_BLOCK + i / 8;
        cp_async16(slot(s) + half * HALF + r * 128 + ((i % 8 ^ r % 8) * 16),
                   cache + (size_t)(its_row + i / 8) * D + half * 64 + i % 8 * 8);
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

  // Makes zeros of the rows of a used half that are not visible.
  __device__ __forceinline__ void clear_hidden(int s, const Tile& t, int lane) const {
    const int rows = t.hi > TILE / 2 ? TILE : TILE / 2;
#pragma unroll 1
    for (int i = lane; i < rows * 8 * HALVES; i += 32) {
      const int row = i / 8 % rows, half = i / (8 * rows);
      if (row >= t.lo && row < t.hi) continue;
      *reinterpret_cast<uint4*>(tiles + s * SLOT + half * HALF + row * 128 + i % 8 * 16) = make_uint4(0, 0, 0, 0);
    }
#if __CUDA_ARCH__ >= 900
    fence_async_shared();
#endif
    __syncwarp();
  }
};

// Scores of a tile in a ring's slot, summed as scores_of does; of its first half only where the rest is not visible.
template <typename T, int D, int ROWS>
__device__ __forceinline__ void scores_in(float (&s)[8][4], const Queries<D, ROWS>& q, u32 keys, bool whole, int lane) {
  const u32 start = keys + (lane % 8 + lane / 16 * 8) * 128 + ((lane / 8 % 2 ^ lane % 8) * 16);
#pragma unroll
  for (int n = 0; n < 8; n++)
#pragma unroll
    for (int i = 0; i < 4; i++) s[n][i] = 0.f;
#pragma unroll
  for (int half = 0; half < 2; half++) {
    if (half && !whole) break;
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
      for (int b = 2 * half; b < 2 * half + 2; b++) {
        u32 r[4];
        ldmatrix_x4(r, (start ^ kk % 4 * 32) + kk / 4 * (TILE * 128) + b * (16 * 128));
        mma_16816(s[2 * b], a, {r[0], r[1]}, T());
        mma_16816(s[2 * b + 1], a, {r[2], r[3]}, T());
      }
    }
  }
}

// x = p v of a tile in a ring's slot, all columns at once, summed as values_of does.
template <typename T, int D>
__device__ __forceinline__ void values_in(float (&x)[D / 8][4], const u32 (&p)[4][4], u32 values, bool whole, int lane) {
  const u32 start = values + lane % 16 * 128 + ((lane / 16 ^ lane % 8) * 16);
#pragma unroll
  for (int n = 0; n < D / 8; n++)
#pragma unroll
    for (int i = 0; i < 4; i++) x[n][i] = 0.f;
#pragma unroll
  for (int j = 0; j < 4; j++) {
    if (j == 2 && !whole) break;
#pragma unroll
    for (int g = 0; g < D / 16; g++) {
      u32 r[4];
      ldmatrix_x4_trans(r, (start ^ g % 4 * 32) + g / 4 * (TILE * 128) + j * (16 * 128));
      mma_16816(x[2 * g], p[j], {r[0], r[1]}, T());
      mma_16816(x[2 * g + 1], p[j], {r[2], r[3]}, T());
    }
  }
}

// The tiles that a warp has yet to ask for: keys, then values of each.
template <int ROWS, int D, int SLOTS, typename T, typename Mask> struct Ahead {
  Cursor at;
  Tile tile;
  int row, id, end, slot;
  bool values, active;

  __device__ __forceinline__ void look(const Job<T, Mask>& job, int sub, int heads, int lane) {
    row = at.row * heads + sub;
    tile = tile_of<ROWS>(job, at, row);
    if (tile.empty()) return;
    const int entry = (at.of.first_split * TILES_PER_SPLIT + at.tile) * (TILE / KV_BLOCK) + Ring<T, D, SLOTS>::block_of(lane);
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

template <typename T, int D, int ROWS, int SLOTS, typename Mask>
__device__ __forceinline__ void attend(T* out, const T* q, const T* k_cache, const T* v_cache, const int* tables,
                                       const int* slots, const int* kv_lens, const int* count, float* partial, int* arrivals,
                                       int q_pitch, int out_pitch, int table_stride, int kv_heads, int group, float scale,
                                       float soft_cap, int window, int max_seqs, const TensorMap* k_map,
                                       const TensorMap* v_map, const Mask& mask) {
  griddep_launch();
  using Tiles = Ring<T, D, SLOTS>;
  constexpr int GROUPS = Stored<D, ROWS>::GROUPS, H = ROWS / 8;
  extern __shared__ __align__(1024) unsigned char shared[];
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, parts = (group + ROWS - 1) / ROWS;
  unsigned char* const base = shared + (1024 - smem(shared) % 1024) % 1024;
  Tiles ring;
  ring.init(base + warp * SLOTS * Tiles::SLOT, smem(base + WARPS * SLOTS * Tiles::SLOT) + warp * SLOTS * 8, lane);
  const Job<T, Mask> job = {out, q, k_cache, v_cache, tables, slots, partial, arrivals, q_pitch, out_pitch, table_stride,
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
    const int sides = WARPS / heads, workers = gridDim.x * sides, worker = blockIdx.x * sides + warp / heads;
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

  Ahead<ROWS, D, SLOTS, T, Mask> ahead;
#pragma unroll 1
  for (int part = 1; part <= 2; part++) {  // what may be had before the predecessor is done, and the rest of it
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
      if (part == 1 || ahead.tile.newest)
        ring.copy(ahead.slot, ahead.tile, part, ahead.values ? v_map : k_map, ahead.values ? v_cache : k_cache, ahead.id, kv_heads,
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
    ring.copy(ahead.slot, ahead.tile, 0, ahead.values ? v_map : k_map, ahead.values ? v_cache : k_cache, ahead.id, kv_heads,
              ahead.row / parts, lane);
    ahead.slot = ahead.slot + 1 == SLOTS ? 0 : ahead.slot + 1;
    if (ahead.values) ahead.next(job, line, sub, heads, lane);
    ahead.values = !ahead.values;
  };

  Queries<D, ROWS> queries;
  int row = at.row * heads + sub;
  queries.load(job, at.seq, row, lane);
  const float factor = soft_cap > 0.f ? LOG2E : __fmul_rn(scale, LOG2E);
  State<ROWS, GROUPS> split, run;
  split.clear();
  int run_start = at.split(), slot = 0;
  u32 parity = 0;
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
    if (!tile.empty()) {
      float s[8][4];
      u32 p[4][4];
      ring.wait(slot, parity);
      scores_in<T, D, ROWS>(s, queries, ring.slot(slot), whole, lane);
      __syncwarp();
      ask();
      pass();
      if (more && row_ends) queries.load(job, next.seq, next.row * heads + sub, lane);
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
      if (tile.partial()) ring.clear_hidden(slot, tile, lane);
      values_in<T, D>(x, p, ring.slot(slot), whole, lane);
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
      queries.load(job, next.seq, next.row * heads + sub, lane);
    }
    if (shares) {
      if (tile.empty()) {
#pragma unroll
        for (int n = 0; n < D / 8; n++) x[n][0] = x[n][1] = x[n][2] = x[n][3] = 0.f;
      }
      at.tile -= warp;
      float4* const exchange = reinterpret_cast<float4*>(base);
      finish_shared<D, ROWS>(job, at, x, m, l, exchange, SLOTS * Tiles::SLOT / 16, warp, lane);
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
// rows and 64 columns. Grid: as many blocks of 128 threads as there are SMs.
template <typename T, int D, int ROWS, int SLOTS>
__global__ void __launch_bounds__(THREADS, 1)
attn_decode_ring(T* out, const T* q, const T* k_cache, const T* v_cache, const int* tables, const int* slots,
                 const int* kv_lens, const int* count, float* partial, int* arrivals, int q_pitch, int out_pitch,
                 int table_stride, int kv_heads, int group, float scale, float soft_cap, int window, int max_seqs,
                 const __grid_constant__ TensorMap k_map, const __grid_constant__ TensorMap v_map) {
  attend<T, D, ROWS, SLOTS>(out, q, k_cache, v_cache, tables, slots, kv_lens, count, partial, arrivals, q_pitch, out_pitch,
                            table_stride, kv_heads, group, scale, soft_cap, window, max_seqs, &k_map, &v_map,
                            Everything());
}

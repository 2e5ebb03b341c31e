// What decode attention by warps is made of: the step's sequences as one line of tiles, queries and scores in
// registers, states that are merged, and the memory in which unfinished ones are handed over.
#pragma once

#include "attention/masks.cuh"

// The lengths of a sequence's keys, in tiles and splits from the first split that its query sees.
struct Sequence {
  int position, lo;  // the query's position and the first one it sees
  int first_split, tiles, splits;
};

__device__ __forceinline__ Sequence sequence_of(int kv_len, int window) {
  Sequence s;
  s.position = kv_len - 1;
  s.lo = window > 0 ? max(0, s.position - window + 1) : 0;
  s.first_split = s.lo / SPLIT;
  s.tiles = s.position / TILE - s.first_split * TILES_PER_SPLIT + 1;
  s.splits = (s.tiles + TILES_PER_SPLIT - 1) / TILES_PER_SPLIT;
  return s;
}

// A tile of the line.
struct Cursor {
  Sequence of;
  int seq, row, tile;  // tile: counted from the first split's first
  int splits_before;   // of one row of each earlier sequence
  int line;            // tiles before this one
  __device__ __forceinline__ int split() const { return tile / TILES_PER_SPLIT; }
};

// The step's sequences as one line of tiles: `rows` rows of each sequence, one behind the other, a sequence's rows
// being groups of heads that are computed together. Each lane knows what comes before its own few sequences.
struct Line {
  const int* kv_lens;
  int seqs, rows, window, each;  // each: sequences a lane
  int lane_tiles, lane_splits;   // of one row of all sequences before this lane's
  int tiles, splits, longest;    // of one row of all sequences; longest: tiles of the longest row

  __device__ __forceinline__ Line(const int* lens, int count, int window_, int lane)
      : kv_lens(lens), seqs(count), rows(1), window(window_), each((count + 31) / 32), longest(0) {
    int t = 0, s = 0;
#pragma unroll 1
    for (int i = lane * each; i < min(seqs, (lane + 1) * each); i++) {
      const Sequence q = sequence_of(kv_lens[i], window);
      t += q.tiles;
      s += q.splits;
      longest = max(longest, q.tiles);
    }
    lane_tiles = t;
    lane_splits = s;
#pragma unroll
    for (int o = 1; o < 32; o <<= 1) {
      const int other_tiles = __shfl_up_sync(~0u, lane_tiles, o), other_splits = __shfl_up_sync(~0u, lane_splits, o);
      longest = max(longest, __shfl_xor_sync(~0u, longest, o));
      if (lane >= o) {
        lane_tiles += other_tiles;
        lane_splits += other_splits;
      }
    }
    tiles = __shfl_sync(~0u, lane_tiles, 31);
    splits = __shfl_sync(~0u, lane_splits, 31);
    lane_tiles -= t;
    lane_splits -= s;
  }

  // Where a cut near x goes: the nearest end of a split, or an end of the row that is at most `slack` tiles away.
  __device__ __forceinline__ Cursor cut(int x, int slack, int lane) const {
    Cursor c;
    c.line = tiles * rows;
    if (x >= c.line) return c;
    const int of_row = x / rows;
    const int owner = 31 - __clz(__ballot_sync(~0u, lane_tiles <= of_row && lane * each < seqs));
    int before = __shfl_sync(~0u, lane_tiles, owner);
    c.splits_before = __shfl_sync(~0u, lane_splits, owner);
    c.seq = owner * each;
    c.of = sequence_of(kv_lens[c.seq], window);
#pragma unroll 1
    while (before + c.of.tiles <= of_row) {
      before += c.of.tiles;
      c.splits_before += c.of.splits;
      c.of = sequence_of(kv_lens[++c.seq], window);
    }
    const int within = x - before * rows;
    c.row = within / c.of.tiles;
    const int tile = within - c.row * c.of.tiles;
    c.tile = (tile + TILES_PER_SPLIT / 2) / TILES_PER_SPLIT * TILES_PER_SPLIT;
    if (tile <= slack && 2 * tile <= c.of.tiles)
      c.tile = 0;
    else if (c.of.tiles - tile <= slack)
      c.tile = c.of.tiles;
    c.line = before * rows + c.row * c.of.tiles + min(c.tile, c.of.tiles);
    if (c.tile >= c.of.tiles) next_row(c);
    return c;
  }

  // The first tile of the line's split number x.
  __device__ __forceinline__ Cursor split_of(int x, int lane) const {
    const int of_row = x / rows;
    const int owner = 31 - __clz(__ballot_sync(~0u, lane_splits <= of_row && lane * each < seqs));
    Cursor c;
    c.splits_before = __shfl_sync(~0u, lane_splits, owner);
    c.seq = owner * each;
    c.of = sequence_of(kv_lens[c.seq], window);
#pragma unroll 1
    while (c.splits_before + c.of.splits <= of_row) {
      c.splits_before += c.of.splits;
      c.of = sequence_of(kv_lens[++c.seq], window);
    }
    const int within = x - c.splits_before * rows;
    c.row = within / c.of.splits;
    c.tile = (within - c.row * c.of.splits) * TILES_PER_SPLIT;
    c.line = 0;
    return c;
  }

  // The first tile of the line's row number x, counted from itself.
  __device__ __forceinline__ Cursor row_of(int x) const {
    Cursor c;
    c.seq = x / rows;
    c.row = x - c.seq * rows;
    c.of = sequence_of(kv_lens[c.seq], window);
    c.tile = c.line = c.splits_before = 0;
    return c;
  }

  __device__ __forceinline__ void next_row(Cursor& c) const {
    c.tile = 0;
    if (++c.row < rows) return;
    c.row = 0;
    c.splits_before += c.of.splits;
    if (++c.seq < seqs) c.of = sequence_of(kv_lens[c.seq], window);
  }

  __device__ __forceinline__ void advance(Cursor& c) const {
    c.tile++;
    c.line++;
    if (c.tile >= c.of.tiles) next_row(c);
  }
};

// What every part of the kernel is told. rows: kv heads times parts of a group; row r is part r % parts of r / parts.
template <typename T, typename Mask> struct Job {
  T* out;
  const T* q;
  const int *tables, *slots;
  float* partial;
  int* arrivals;
  int q_pitch, out_pitch, table_stride, kv_heads, group, parts, rows;
  float scale, soft_cap;
  Mask mask;

  __device__ __forceinline__ int first_head(int row, int each) const { return row / parts * group + row % parts * each; }
  __device__ __forceinline__ int heads(int row, int each) const { return min(each, group - row % parts * each); }
};

// A tile's visible rows [lo, hi), counted from its first; empty when hi <= 0 or lo >= TILE. newest: the last of them
// is the query's own position.
struct Tile {
  int lo, hi;
  bool newest;
  __device__ __forceinline__ bool empty() const { return hi <= 0 || lo >= TILE; }
  __device__ __forceinline__ bool partial() const { return lo > 0 || hi < TILE; }
};

template <int ROWS, typename T, typename Mask>
__device__ __forceinline__ Tile tile_of(const Job<T, Mask>& job, const Cursor& c, int row) {
  const int start = c.of.first_split * SPLIT + c.tile * TILE;
  Tile tile;
  tile.lo = max(0, c.of.lo - start);
  tile.hi = min(TILE, c.of.position + 1 - start);
  tile.newest = c.of.position < start + TILE;
  if constexpr (!Mask::ALL) {
    if (!job.mask.sees(start / TILE, c.of.position, job.first_head(row, ROWS), job.heads(row, ROWS))) tile.hi = 0;
  }
  return tile;
}

// The queries of a row as mma's A fragments.
template <int D, int ROWS> struct Queries {
  u32 a[D / 16][ROWS / 4];
  // Of columns 16 k on; rows that there are none of are zeros.
  __device__ __forceinline__ void fragment(u32 (&to)[4], int k) const {
    if constexpr (ROWS == 8) {
      to[0] = a[k][0];
      to[2] = a[k][1];
      to[1] = to[3] = 0;
    } else {
#pragma unroll
      for (int i = 0; i < 4; i++) to[i] = a[k][i];
    }
  }
  template <typename T, typename Mask>
  __device__ __forceinline__ void load(const Job<T, Mask>& job, int seq, int row, int lane) {
    const int heads = job.heads(row, ROWS);
    const T* const source = job.q + (size_t)seq * job.q_pitch + (size_t)job.first_head(row, ROWS) * D + lane % 4 * 2;
#pragma unroll
    for (int h = 0; h < ROWS / 8; h++) {
      const int head = lane / 4 + 8 * h;
#pragma unroll
      for (int kk = 0; kk < D / 16; kk++)
#pragma unroll
        for (int i = 0; i < 2; i++)
          a[kk][h + i * (ROWS / 8)] =
              head < heads ? __ldcg(reinterpret_cast<const u32*>(source + (size_t)head * D + kk * 16 + i * 8)) : 0u;
    }
  }
};

// A merged state of ROWS output rows: x[j] of a lane are, with eight rows, columns 16 j + 2 (lane % 4) + {0, 1} of row
// lane / 4 and the same eight columns on; with sixteen, columns 8 j + ... of row lane / 4 and of the row eight below.
// That is how mma leaves them. N: all columns, or a warp's share.
template <int ROWS, int N> struct State {
  static constexpr int H = ROWS / 8;
  float4 x[N];
  float M[H], L[H];

  __device__ __forceinline__ void clear() {
#pragma unroll
    for (int h = 0; h < H; h++) {
      M[h] = -INFINITY_F;
      L[h] = 0.f;
    }
#pragma unroll
    for (int j = 0; j < N; j++) x[j] = make_float4(0.f, 0.f, 0.f, 0.f);
  }
  __device__ __forceinline__ void factors(Factors (&f)[H], const float* m, const float* l) {
#pragma unroll
    for (int h = 0; h < H; h++) {
      f[h] = merge_maximum(M[h], m[h]);
      L[h] = merge(L[h], l[h], f[h]);
    }
  }
  __device__ __forceinline__ void add(int j, const float4& v, const Factors (&f)[H]) {
    x[j] = make_float4(merge(x[j].x, v.x, f[0]), merge(x[j].y, v.y, f[0]), merge(x[j].z, v.z, f[H - 1]),
                       merge(x[j].w, v.w, f[H - 1]));
  }
  __device__ __forceinline__ void add(const State& other) {
    Factors f[H];
    factors(f, other.M, other.L);
#pragma unroll
    for (int j = 0; j < N; j++) add(j, other.x[j], f);
  }
};

// What a tile left in a lane's registers, in the order of State.
template <int ROWS, int DV>
__device__ __forceinline__ float4 group_of(const float (&x)[DV / 8][4], int g) {
  if constexpr (ROWS == 8)
    return make_float4(x[2 * g][0], x[2 * g][1], x[2 * g + 1][0], x[2 * g + 1][1]);
  else
    return make_float4(x[g][0], x[g][1], x[g][2], x[g][3]);
}

// A split's state in memory, of a head of each of the first `lanes` / 4 rows: x of all columns, lane by lane, then M
// and L. In words: decode_ring_state() in specs.py.
template <int DV, int ROWS> struct Stored {
  static constexpr int GROUPS = ROWS == 8 ? DV / 16 : DV / 8, H = ROWS / 8;
  float* at;
  int lanes;

  __device__ __forceinline__ float* state(int index) const { return at + (size_t)index * lanes * (GROUPS * 4 + 2 * H); }

  template <int N>
  __device__ __forceinline__ void store(int index, const State<ROWS, N>& s, int first, int step, int lane) const {
    if (lane >= lanes) return;
    float* const to = state(index);
#pragma unroll
    for (int j = 0; j < N; j++)
      if (first + j * step < GROUPS) __stcg(reinterpret_cast<float4*>(to) + (first + j * step) * lanes + lane, s.x[j]);
    if (first) return;
#pragma unroll
    for (int h = 0; h < H; h++)
      __stcg(reinterpret_cast<float2*>(to + GROUPS * 4 * lanes) + h * lanes + lane, make_float2(s.M[h], s.L[h]));
  }
  // Merges states [begin, end) into `sum`, BATCH of them under way at once.
  template <int BATCH, int N>
  __device__ __forceinline__ void merge_all(State<ROWS, N>& sum, int begin, int end, int first, int step, int lane) const {
    sum.clear();
    lane = min(lane, lanes - 1);
#pragma unroll 1
    for (int s = begin; s < end; s += BATCH) {
      float4 x[BATCH][N];
      float m[BATCH][H], l[BATCH][H];
#pragma unroll
      for (int b = 0; b < BATCH; b++) {
        const float* const source = state(min(s + b, end - 1));
#pragma unroll
        for (int h = 0; h < H; h++) {
          const float2 ml = __ldcg(reinterpret_cast<const float2*>(source + GROUPS * 4 * lanes) + h * lanes + lane);
          m[b][h] = ml.x;
          l[b][h] = ml.y;
        }
#pragma unroll
        for (int j = 0; j < N; j++)
          x[b][j] = __ldcg(reinterpret_cast<const float4*>(source) + min(first + j * step, GROUPS - 1) * lanes + lane);
      }
#pragma unroll
      for (int b = 0; b < BATCH; b++) {
        if (s + b >= end) break;
        Factors f[H];
        sum.factors(f, m[b], l[b]);
#pragma unroll
        for (int j = 0; j < N; j++) sum.add(j, x[b][j], f);
      }
    }
  }
};

// Writes finished output rows.
template <int DV, int ROWS, int N, typename T, typename Mask>
__device__ __forceinline__ void store_output(const Job<T, Mask>& job, int seq, int row, const State<ROWS, N>& s, int first,
                                             int step, int lane) {
  constexpr int H = ROWS / 8, GROUPS = Stored<DV, ROWS>::GROUPS;
  const int heads = job.heads(row, ROWS), head = lane / 4;
  T* const target = job.out + (size_t)seq * job.out_pitch + (size_t)(job.first_head(row, ROWS) + head) * DV + lane % 4 * 2;
  float over[H];
#pragma unroll
  for (int h = 0; h < H; h++) over[h] = finish(s.L[h]);
#pragma unroll
  for (int j = 0; j < N; j++) {
    const int g = first + j * step;
    if (g >= GROUPS) break;
    const u32 low = pack2<T>(__fmul_rn(s.x[j].x, over[0]), __fmul_rn(s.x[j].y, over[0]));
    const u32 high = pack2<T>(__fmul_rn(s.x[j].z, over[H - 1]), __fmul_rn(s.x[j].w, over[H - 1]));
    if constexpr (ROWS == 8) {
      if (head >= heads) continue;
      *reinterpret_cast<u32*>(target + g * 16) = low;
      *reinterpret_cast<u32*>(target + g * 16 + 8) = high;
    } else {
      if (head < heads) *reinterpret_cast<u32*>(target + g * 8) = low;
      if (head + 8 < heads) *reinterpret_cast<u32*>(target + g * 8 + 8 * DV) = high;
    }
  }
}

// Adds `brought` splits of a row to those that are there, the first `leading` of the row as one state. -1, or where
// these were the last, the number of the first state.
__device__ __forceinline__ int arrive(int* counter, int brought, int leading, int splits) {
  const int mine = brought | leading << 16, sum = atomicAdd(counter, mine) + mine;
  if ((sum & 0xffff) != splits) return -1;
  *counter = 0;
  return max(0, (sum >> 16) - 1);
}

// Where a row's states are.
template <int DV, int ROWS, typename T, typename Mask>
__device__ __forceinline__ Stored<DV, ROWS> states_of(const Job<T, Mask>& job, const Cursor& c, int row) {
  Stored<DV, ROWS> states = {job.partial, 4 * min(job.group, 8)};
  states.at = states.state(job.rows * c.splits_before + row * c.of.splits);
  return states;
}

// The end of four warps that share a split: tiles into the split, and that into the row. exchange: a place of `pitch`
// vectors a warp. sharers: which four of the block, of FOURS.
template <int DV, int ROWS, int FOURS, typename T, typename Mask>
__device__ __forceinline__ void finish_shared(const Job<T, Mask>& job, const Cursor& at, const float (&x)[DV / 8][4],
                                              const float (&m)[2], const float (&l)[2], float4* exchange, int pitch,
                                              int sharers, int warp, int lane) {
  constexpr int WARPS = TILES_PER_SPLIT, GROUPS = Stored<DV, ROWS>::GROUPS, MINE = (GROUPS + WARPS - 1) / WARPS, H = ROWS / 8;
  __shared__ float2 all_tile_states[FOURS][WARPS][H][32];
  __shared__ int all_merge_from[FOURS];
  auto& tile_states = all_tile_states[sharers];
  int& merge_from = all_merge_from[sharers];
#pragma unroll
  for (int g = 0; g < GROUPS; g++) exchange[warp * pitch + g * 32 + lane] = group_of<ROWS, DV>(x, g);
#pragma unroll
  for (int h = 0; h < H; h++) tile_states[warp][h][lane] = make_float2(m[h], l[h]);
  bar_sync(1 + sharers, WARPS * 32);
  State<ROWS, MINE> split;
  split.clear();
#pragma unroll 1
  for (int w = 0; w < WARPS; w++) {
    float tile_m[H], tile_l[H];
#pragma unroll
    for (int h = 0; h < H; h++) {
      tile_m[h] = tile_states[w][h][lane].x;
      tile_l[h] = tile_states[w][h][lane].y;
    }
    Factors f[H];
    split.factors(f, tile_m, tile_l);
#pragma unroll
    for (int j = 0; j < MINE; j++)
      if (warp + j * WARPS < GROUPS) split.add(j, exchange[w * pitch + (warp + j * WARPS) * 32 + lane], f);
  }
  if (at.of.splits > 1) {
    const Stored<DV, ROWS> states = states_of<DV, ROWS>(job, at, at.row);
    states.store(at.split(), split, warp, WARPS, lane);
    __threadfence();
    bar_sync(1 + sharers, WARPS * 32);
    if (warp == 0 && lane == 0) merge_from = arrive(job.arrivals + at.seq * job.rows + at.row, 1, 0, at.of.splits);
    bar_sync(1 + sharers, WARPS * 32);
    if (merge_from < 0) return;
    __threadfence();
    states.template merge_all<ROWS == 8 ? 16 : 8>(split, merge_from, at.of.splits, warp, WARPS, lane);
  }
  store_output<DV, ROWS>(job, at.seq, at.row, split, warp, WARPS, lane);
}

// The end of a split of a warp's own. run_start: the split where its run of splits of this row began; run: those
// merged so far.
template <int DV, int ROWS, typename T, typename Mask>
__device__ __forceinline__ void finish_split(const Job<T, Mask>& job, const Cursor& at, int row, int run_start, bool row_ends,
                                             bool more, const State<ROWS, Stored<DV, ROWS>::GROUPS>& split,
                                             State<ROWS, Stored<DV, ROWS>::GROUPS>& run, int lane) {
  const int index = at.split();
  const bool leading = run_start == 0, run_ends = row_ends || !more;
  if (leading && index > 0)
    run.add(split);
  else
    run = split;
  if (leading && !run_ends) return;
  if (!(leading && row_ends)) {
    const Stored<DV, ROWS> states = states_of<DV, ROWS>(job, at, row);
    states.store(index, run, 0, 1, lane);
    if (!run_ends) return;
    const int brought = index + 1 - run_start;
    __threadfence();
    __syncwarp();
    int begin = -1;
    if (lane == 0) begin = arrive(job.arrivals + at.seq * job.rows + row, brought, leading ? brought : 0, at.of.splits);
    begin = __shfl_sync(~0u, begin, 0);
    if (begin < 0) return;
    __threadfence();
    states.template merge_all<ROWS == 8 ? 4 : 2>(run, begin, at.of.splits, 0, 1, lane);
  }
  store_output<DV, ROWS>(job, at.seq, row, run, 0, 1, lane);
}

// Attention of sequences that compute one token this step, over a paged KV cache.
//
// Work is cut into items: (sequence, kv head, up to 16 query heads of its group, split of 256 positions). Blocks
// of four warps take equal, contiguous ranges of the list of items: each warp computes one tile of 64 positions
// with the group's heads as the rows of the tensor-core tile (padded to 16), then the block merges the four tiles
// into the split and the split into the run of splits it holds. A run that is a whole sequence is finished there;
// otherwise states go to `partial`, and the block that brings a sequence's last split merges all of them in
// ascending order.
// The list of items follows from the metadata, so it is made before the predecessor is done, and the first keys
// (but the newest position's) are fetched before that too. A warp has one buffer, for keys and values in turn, and
// several blocks on an SM overlap one's arithmetic with another's loads; launched with more shared memory it has
// one for each, which is quicker where there are fewer items than SMs. Where heads are too large for that, the values of a
// split of at most two tiles are fetched at once by the two other warps into their buffers.
// Bound by memory at long contexts (the KV cache is read once), by latency at short ones.
#include "attention/fp8_cache.cuh"
#include "attention/masks.cuh"
#include "rowwise/head_norm.cuh"
#include "rowwise/rotation.cuh"

inline constexpr int WARPS = 4, THREADS = WARPS * 32;
static_assert(WARPS == TILES_PER_SPLIT, "one round of a block's warps is one split");

struct Item {
  int seq, head, part;      // part: which 16 of the group's query heads
  int split, splits;        // counted from the first split the query sees
  int first_split;
  int position, lo;         // the query's position and the first one it sees
};

// The item of a given number; prefix (shared): splits * kv_heads * parts before each sequence.
__device__ __forceinline__ Item item_of(int index, const int* prefix, const int* kv_lens, int seqs, int parts, int window) {
  int below = 0, above = seqs;
  while (above - below > 1) {
    const int middle = (below + above) / 2;
    (prefix[middle] <= index ? below : above) = middle;
  }
  Item item;
  item.seq = below;
  item.position = kv_lens[below] - 1;
  item.lo = window > 0 ? max(0, item.position - window + 1) : 0;
  item.first_split = item.lo / SPLIT;
  item.splits = item.position / SPLIT - item.first_split + 1;
  const int within = index - prefix[below], row = within / item.splits;
  item.split = within % item.splits;
  item.head = row / parts;
  item.part = row % parts;
  return item;
}

// One warp's tile of an item: rows [lo, hi) of it are visible; empty when hi <= 0 or lo >= TILE.
struct Tile {
  int lo, hi, newest;  // newest: the row of the query's own position, or -1
  int4 blocks;
  __device__ __forceinline__ bool empty() const { return hi <= 0 || lo >= TILE; }
  __device__ __forceinline__ int block(int b) const { return b == 0 ? blocks.x : b == 1 ? blocks.y : b == 2 ? blocks.z : blocks.w; }
};

template <typename Sight>
__device__ __forceinline__ Tile tile_of(const Item& item, int warp, const int* tables, int table_stride,
                                        const int* slots, int group, const Sight& sight) {
  const int start = (item.first_split + item.split) * SPLIT + warp * TILE;
  Tile tile;
  tile.lo = max(0, item.lo - start);
  tile.hi = min(TILE, item.position + 1 - start);
  tile.newest = item.position >= start && item.position < start + TILE ? item.position - start : -1;
  if constexpr (!Sight::ALL) {
    const int first = item.part * 16;
    if (!sight.sees(start / TILE, item.position, item.head * group + first, min(16, group - first))) tile.hi = 0;
  }
  tile.blocks = make_int4(0, 0, 0, 0);
  if (!tile.empty())
    tile.blocks = *reinterpret_cast<const int4*>(tables + (size_t)slots[item.seq] * table_stride + start / KV_BLOCK);
  return tile;
}

// A warp's copy of its tile of one head to shared memory; row `skip` is left alone (-1: none).
template <typename T, int D>
__device__ __forceinline__ void fetch(T* buffer, const T* cache, const Tile& t, int head, int kv_heads, int skip, int lane) {
  if (!t.empty()) load_tile<T, D, 32>(buffer, cache, t.blocks, head, kv_heads, t.lo, t.hi, skip, lane);
}

__device__ __forceinline__ u32 dynamic_shared_bytes() {
  u32 bytes;
  asm("mov.u32 %0, %%dynamic_smem_size;" : "=r"(bytes));
  return bytes;
}

// The same of a cache in e4m3, whose pieces are fetched whole; the newest position's is left for fetch_newest.
template <typename T, int D>
__device__ __forceinline__ void fetch(T* buffer, const u8* cache, const Tile& t, int head, int kv_heads, int skip, int lane) {
  if (t.empty()) return;
  const u32 wanted = kv8::pieces_of(t.lo, t.hi) & (skip < 0 ? ~0u : ~(1u << skip / KV_BLOCK));
  kv8::load_pieces<D, 32>(reinterpret_cast<u8*>(buffer), cache, t.blocks, head, kv_heads, wanted, lane);
}

// Fetches the newest position's row, which the predecessor has just written to the cache.
template <typename T, int D>
__device__ __forceinline__ void fetch_newest(T* buffer, const T* cache, const Tile& t, int head, int kv_heads, int lane) {
  if (t.newest < 0 || lane >= D / 8) return;
  const size_t row = ((size_t)t.block(t.newest / KV_BLOCK) * kv_heads + head) * KV_BLOCK + t.newest % KV_BLOCK;
  cp_async16(smem(buffer + t.newest * (D + PAD) + lane * 8), cache + row * D + lane * 8);
}
template <typename T, int D>
__device__ __forceinline__ void fetch_newest(T* buffer, const u8* cache, const Tile& t, int head, int kv_heads, int lane) {
  if (t.newest >= 0 && !t.empty())
    kv8::load_pieces<D, 32>(reinterpret_cast<u8*>(buffer), cache, t.blocks, head, kv_heads, 1u << t.newest / KV_BLOCK, lane);
}

// Four columns of one output row, merged so far.
struct Sum {
  float M, L, X[4];
  __device__ __forceinline__ void clear() {
    M = -INFINITY_F;
    L = X[0] = X[1] = X[2] = X[3] = 0.f;
  }
  __device__ __forceinline__ void add(float m, float l, const float4& x) {
    const Factors f = merge_maximum(M, m);
    L = merge(L, l, f);
    X[0] = merge(X[0], x.x, f);
    X[1] = merge(X[1], x.y, f);
    X[2] = merge(X[2], x.z, f);
    X[3] = merge(X[3], x.w, f);
  }
};

// What turns queries and the newest keys, with norms of their heads in front where a model has them: nothing, or the angles
// of each position, float32 [positions, rotated / 2].
struct Turned {
  static constexpr bool HERE = false;
};
template <typename T>
struct Turning {
  static constexpr bool HERE = true;
  const float *cos, *sin;
  T *k_cache, *v_cache;
  int rotated;                      // leading elements of a head that turn, a multiple of 4
  bool normed;                      // RMS norms of heads, by float32 weights [D] with step 0, or one row a head
  const float *q_weight, *k_weight;
  int q_step, k_step;
  float eps;
};

// C: elements of the cache, T or u8 (see fp8_cache.cuh).
template <typename T, int DK, int DV, typename C, typename Sight, typename Turn>
__device__ __forceinline__ void attend(T* __restrict__ out, const T* __restrict__ q, const C* k_cache, const C* v_cache,
                                       const int* tables, const int* slots, const int* kv_lens, const int* count,
                                       float* partial, int* arrivals, int q_pitch, int out_pitch, int table_stride,
                                       int kv_heads, int group, float scale, float soft_cap, int window, int max_seqs,
                                       const Sight& sight, const Turn& turn) {
  griddep_launch();
  constexpr int KS = DK + PAD, VS = DV + PAD, XS = DV + 8;  // row pitches; XS in floats
  constexpr bool FP8 = sizeof(C) == 1;
  constexpr int BUFFER = TILE * (KS > VS ? KS : VS) / (FP8 ? 2 : 1), SUMS = (16 * DV / 4 + THREADS - 1) / THREADS;
  static_assert(16 * XS * 4 <= BUFFER * 2, "the exchange of results fits where the values were");
  extern __shared__ __align__(128) unsigned char shared[];
  __shared__ float2 states[WARPS][16];
  __shared__ int warp_totals[WARPS], last_here;
  T* const buffers = reinterpret_cast<T*>(shared);
  T* const queries = buffers + WARPS * BUFFER;
  int* const prefix = reinterpret_cast<int*>(queries + 16 * KS);
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  T* const second = reinterpret_cast<T*>(prefix + (max_seqs + 31) / 32 * 32);  // buffers for values, if there is room
  const bool separate = dynamic_shared_bytes() >= smem(second + WARPS * BUFFER) - smem(shared);
  T* const buffer = buffers + warp * BUFFER;
  constexpr bool LENDS = DV > 128 && !FP8;
  const auto lends = [&](const Item& item) {
    return LENDS && !separate && item.position + 1 - (item.first_split + item.split) * SPLIT <= WARPS / 2 * TILE;
  };
  const int parts = (group + 15) / 16;

  // How many items come before each sequence: a running sum over the block.
  const int seqs = min(*count, max_seqs);
  int items = 0;
  for (int base = 0; base < max_seqs; base += THREADS) {
    const int s = base + threadIdx.x, position = s < max_seqs ? kv_lens[s] - 1 : 0;
    const int lo = window > 0 ? max(0, position - window + 1) : 0;
    const int mine = s < seqs ? (position / SPLIT - lo / SPLIT + 1) * kv_heads * parts : 0;
    int sum = mine;
#pragma unroll
    for (int o = 1; o < 32; o <<= 1) {
      const int other = __shfl_up_sync(~0u, sum, o);
      if (lane >= o) sum += other;
    }
    if (lane == 31) warp_totals[warp] = sum;
    __syncthreads();
    int before = items;
    for (int w = 0; w < WARPS; w++) {
      if (w < warp) before += warp_totals[w];
      items += warp_totals[w];
    }
    if (s < max_seqs) prefix[s] = before + sum - mine;
    __syncthreads();
  }
  const int begin = (int)((long long)items * blockIdx.x / gridDim.x), end = (int)((long long)items * (blockIdx.x + 1) / gridDim.x);
  if (begin == end) {
    if (blockIdx.x == 0) griddep_wait();
    return;
  }

  const auto fetch_queries = [&](const Item& item) {
    const int rows = min(16, group - item.part * 16);
    const T* const source = q + (size_t)item.seq * q_pitch + (size_t)(item.head * group + item.part * 16) * DK;
    for (int i = threadIdx.x; i < 16 * (DK / 8); i += THREADS) {
      const bool valid = i / (DK / 8) < rows;
      cp_async16(smem(queries + i / (DK / 8) * KS + i % (DK / 8) * 8), valid ? source + i * 8 : q, valid ? 16 : 0);
    }
  };

  // TURN: queries, the newest key and its value as a product left them: into shared memory, keys and values into the cache.
  float2 cosine[2], sine[2];
  const auto angles_of = [&](int position) {
    if constexpr (Turn::HERE) {
#pragma unroll
      for (int k = 0; k < 2; k++)
        if (const int i = lane + 32 * k; i < turn.rotated / 4) {
          const size_t at = (size_t)position * (turn.rotated / 2) + 2 * i;
          cosine[k] = *reinterpret_cast<const float2*>(turn.cos + at);
          sine[k] = *reinterpret_cast<const float2*>(turn.sin + at);
        }
    }
  };
  const auto clear_queries = [&](const Item& item) {  // rows that no head has
    const int rows = min(16, group - item.part * 16);
    for (int i = rows * KS / 2 + threadIdx.x; i < 16 * KS / 2; i += THREADS) reinterpret_cast<u32*>(queries)[i] = 0;
  };
  const auto slice_weights = [&](const Item& item, int j) {  // of this item's slice j: a query, or its key
    const float* weight = nullptr;
    if constexpr (Turn::HERE) {
      const int rows = min(16, group - item.part * 16);
      if (turn.normed && j < rows && turn.q_weight) weight = turn.q_weight + (item.head * group + item.part * 16 + j) * turn.q_step;
      if (turn.normed && j == rows && turn.k_weight) weight = turn.k_weight + item.head * turn.k_step;
    }
    return SliceWeights(weight, nullptr, DK, lane);
  };
  const auto bring_turned = [&](const Item& item, int first, SliceWeights weights, T* values_at) {
    if constexpr (Turn::HERE) {
      const int rows = min(16, group - item.part * 16), last = item.split + 1 == item.splits ? rows + 2 : rows;
      const int within = item.position - (item.first_split + item.split) * SPLIT, tile = within / TILE, row = within % TILE;
      for (int j = first + warp; j < last; j += WARPS) {
        const bool query = j < rows, value = j > rows;
        const int head = query ? item.head * group + item.part * 16 + j : kv_heads * (group + value) + item.head;
        const u32* const in = reinterpret_cast<const u32*>(q + (size_t)item.seq * q_pitch + (size_t)head * DK);
        u32* cached = nullptr;
        if (!query) {
          const int block = tables[(size_t)slots[item.seq] * table_stride + item.position / KV_BLOCK];
          const size_t at = ((size_t)block * kv_heads + item.head) * KV_BLOCK + item.position % KV_BLOCK;
          cached = reinterpret_cast<u32*>((value ? turn.v_cache : turn.k_cache) + at * DK);
        }
        if (value) {
          u32* const to = reinterpret_cast<u32*>(values_at + tile * BUFFER + row * VS);
          for (int i = lane; i < DV / 2; i += 32) {
            const u32 word = in[i];
            cached[i] = word;
            if (values_at) to[i] = word;
          }
          continue;
        }
        u32* const out = reinterpret_cast<u32*>(query ? queries + j * KS : buffers + tile * BUFFER + row * KS);
        const u32* from = in;
        if (turn.normed) {
          if (j >= WARPS) weights = slice_weights(item, j);
          norm_slice<T, false>(out, in, weights, DK, turn.eps, lane);
          __syncwarp();
          from = out;
        }
        const int half = turn.rotated / 2;
#pragma unroll
        for (int k = 0; k < 2; k++)
          if (const int i = lane + 32 * k; i < half / 2) {
            u32 a = from[i], b = from[i + half / 2];
            turn_halves<T>(a, b, cosine[k], sine[k]);
            out[i] = a;
            out[i + half / 2] = b;
          }
        if (from != out)
          for (int i = half + lane; i < DK / 2; i += 32) out[i] = from[i];
        __syncwarp();
        if (!query)
          for (int i = lane; i < DK / 2; i += 32) cached[i] = out[i];
      }
    }
  };

  Item item = item_of(begin, prefix, kv_lens, seqs, parts, window);
  Tile tile = tile_of(item, warp, tables, table_stride, slots, group, sight);
  bool lent = lends(item);
  const auto partners = [&](const Item& item) {  // the tile whose values this warp fetches
    return tile_of(item, warp - WARPS / 2, tables, table_stride, slots, group, sight);
  };
  T* const own_values = (separate ? second : buffers) + warp * BUFFER;
  fetch<T, DK>(buffer, k_cache, tile, item.head, kv_heads, tile.newest, lane);
  if (separate) fetch<T, DV>(own_values, v_cache, tile, item.head, kv_heads, tile.newest, lane);
  Tile other;
  if constexpr (LENDS) {
    if (lent && warp >= WARPS / 2) {
      other = partners(item);
      fetch<T, DV>(buffer, v_cache, other, item.head, kv_heads, other.newest, lane);
    }
  }
  const auto values_of_newest = [&](bool lent) {  // where values are fetched besides keys
    return separate ? second : lent ? buffers + WARPS / 2 * BUFFER : nullptr;
  };
  if constexpr (Turn::HERE) {
    angles_of(item.position);
    clear_queries(item);
    const SliceWeights weights = slice_weights(item, warp);
    griddep_wait();
    bring_turned(item, 0, weights, values_of_newest(lent));
  } else {
    griddep_wait();
    fetch_queries(item);
    fetch_newest<T, DK>(buffer, k_cache, tile, item.head, kv_heads, lane);
    if (separate) fetch_newest<T, DV>(own_values, v_cache, tile, item.head, kv_heads, lane);
    if constexpr (LENDS)
      if (lent && warp >= WARPS / 2) fetch_newest<T, DV>(buffer, v_cache, other, item.head, kv_heads, lane);
  }
  cp_async_commit();

  const float factor = soft_cap > 0.f ? LOG2E : __fmul_rn(scale, LOG2E);
  const int partial_stride = (min(group, 16) * (DV + 2) + 3) / 4 * 4;
  Sum run[SUMS];  // the splits of this sequence and head that this block has merged so far
  int run_start = item.split;
  for (int index = begin; index < end; index++) {
    const bool more = index + 1 < end;
    Item next;
    Tile next_tile;
    if (more) {
      next = item;
      if (++next.split == next.splits) next = item_of(index + 1, prefix, kv_lens, seqs, parts, window);
      next_tile = tile_of(next, warp, tables, table_stride, slots, group, sight);
    }
    cp_async_wait<0>();  // the keys and the queries are here
    __syncthreads();
    T* const results = separate ? second : lent ? buffers + WARPS / 2 * BUFFER : buffers;  // of all warps
    T* const values = results + warp * BUFFER;
    float* const exchange = reinterpret_cast<float*>(values);
    const int blocks = (tile.hi + KV_BLOCK - 1) / KV_BLOCK, row = lane / 4;
    u32 p[4][4];
    float m[2] = {-INFINITY_F, -INFINITY_F}, l[2] = {0.f, 0.f};
    if (!tile.empty()) {
      float s[8][4];
      if constexpr (FP8) {
        const u32 at = smem(queries + lane % 16 * KS + lane / 16 * 8);
        const auto query = [&](u32(&a)[4], int k) { ldmatrix_x4(a, at + k * 32); };
        kv8::scores<T, DK, DK <= 128 ? 4 : 2>(s, query, reinterpret_cast<const u8*>(buffer), blocks, lane);
      } else {
        tile_scores<T, DK>(s, queries, buffer, blocks, lane);
      }
      __syncwarp();
      if (!separate && !lent) fetch<T, DV>(buffer, v_cache, tile, item.head, kv_heads, -1, lane);
      cp_async_commit();
      if (soft_cap > 0.f) tile_soft_cap(s, scale, soft_cap);
      const int lo[2] = {tile.lo, tile.lo}, hi[2] = {tile.hi - 1, tile.hi - 1};
      if (tile.lo > 0 || tile.hi < TILE) tile_mask(s, lo, hi, lane);
      if constexpr (!Sight::ALL) {
        const int position[2] = {item.position, item.position}, first = item.head * group + item.part * 16 + row;
        const int query_head[2] = {first, first + 8};
        sight.hide(s, (item.first_split + item.split) * SPLIT + warp * TILE, position, query_head, lane);
      }
      tile_softmax<T>(s, p, factor, m, l, group > 8);
      cp_async_wait<0>();  // the values are here
      __syncwarp();
      float x[DV / 8][4];
      if constexpr (FP8) {
        kv8::values<T, DV>(x, p, reinterpret_cast<const u8*>(values), blocks, tile.lo, tile.hi, lane);
      } else {
        tile_values<T, DV>(p, values, blocks, lane, [&](int g, const float (&r)[2][4]) {
#pragma unroll
          for (int i = 0; i < 4; i++) {
            x[2 * g][i] = r[0][i];
            x[2 * g + 1][i] = r[1][i];
          }
        });
      }
      __syncwarp();
#pragma unroll
      for (int n = 0; n < DV / 8; n++) {  // results go where the values were
        float* const cell = exchange + row * XS + n * 8 + (lane % 4) * 2;
        *reinterpret_cast<float2*>(cell) = make_float2(x[n][0], x[n][1]);
        if (group > 8) *reinterpret_cast<float2*>(cell + 8 * XS) = make_float2(x[n][2], x[n][3]);
      }
    }
    if (lane % 4 == 0) {
      states[warp][row] = make_float2(m[0], l[0]);
      states[warp][row + 8] = make_float2(m[1], l[1]);
    }
    __syncthreads();

    // Tiles into the split, the split into the run; thread by thread, four columns of a row at a time.
    const int rows = min(16, group - item.part * 16);
    const bool leading = run_start == 0, done = item.split + 1 == item.splits, ends = done || !more;
    float* const cell = partial + (size_t)index * partial_stride;
    T* const target = out + (size_t)item.seq * out_pitch + (size_t)(item.head * group + item.part * 16) * DV;
    const auto store = [&](int r, int column, const Sum& sum) {
      const float f = finish(sum.L);
      const u32 low = pack2<T>(__fmul_rn(sum.X[0], f), __fmul_rn(sum.X[1], f));
      const u32 high = pack2<T>(__fmul_rn(sum.X[2], f), __fmul_rn(sum.X[3], f));
      *reinterpret_cast<uint2*>(target + r * DV + column) = make_uint2(low, high);
    };
#pragma unroll
    for (int k = 0; k < SUMS; k++) {
      const int e = threadIdx.x + k * THREADS, r = e / (DV / 4), column = e % (DV / 4) * 4;
      if (r >= rows) continue;
      Sum split;
      split.clear();
#pragma unroll
      for (int w = 0; w < WARPS; w++) {
        const float2 state = states[w][r];
        if (state.x == -INFINITY_F) continue;
        const float* const source = reinterpret_cast<const float*>(results + w * BUFFER) + r * XS + column;
        split.add(state.x, state.y, *reinterpret_cast<const float4*>(source));
      }
      if (leading) {  // from the first split on, in order: one running sum
        if (item.split > 0) {
          run[k].add(split.M, split.L, make_float4(split.X[0], split.X[1], split.X[2], split.X[3]));
          split = run[k];
        } else if (!ends) {
          run[k] = split;
        }
      }
      if (leading && done) {
        store(r, column, split);
      } else if (leading && !ends) {
        if (column == 0) __stcg(reinterpret_cast<float2*>(cell + rows * DV) + r, make_float2(-INFINITY_F, 0.f));
      } else {
        __stcg(reinterpret_cast<float4*>(cell + r * DV + column), make_float4(split.X[0], split.X[1], split.X[2], split.X[3]));
        if (column == 0) __stcg(reinterpret_cast<float2*>(cell + rows * DV) + r, make_float2(split.M, split.L));
      }
    }
    __syncthreads();  // the exchange and the queries have been read
    if (more) {
      const int skip = Turn::HERE ? next_tile.newest : -1;
      fetch<T, DK>(buffer, k_cache, next_tile, next.head, kv_heads, skip, lane);
      if (separate) fetch<T, DV>(own_values, v_cache, next_tile, next.head, kv_heads, skip, lane);
      lent = lends(next);
      if constexpr (LENDS)
        if (lent && warp >= WARPS / 2) {
          const Tile its = partners(next);
          fetch<T, DV>(buffer, v_cache, its, next.head, kv_heads, Turn::HERE ? its.newest : -1, lane);
        }
      if constexpr (Turn::HERE) {
        if (ends) {
          angles_of(next.position);
          clear_queries(next);
        } else if (next.split + 1 == next.splits) {
          angles_of(next.position);
        }
        const int first = ends ? 0 : min(16, group - next.part * 16);
        bring_turned(next, first, slice_weights(next, first + warp), values_of_newest(lent));
      } else if (ends) {
        fetch_queries(next);
      }
    }
    cp_async_commit();

    if (ends && !(leading && done)) {  // the run is part of a sequence: whoever completes it merges all of it
      int* const arrived = arrivals + (item.seq * kv_heads + item.head) * parts + item.part;
      const int brought = item.split + 1 - run_start;
      __threadfence();
      __syncthreads();
      if (threadIdx.x == 0) last_here = atomicAdd(arrived, brought) + brought == item.splits;
      __syncthreads();
      if (last_here) {
        __threadfence();
        const float* const first = partial + (size_t)(index - item.split) * partial_stride;
        for (int e = threadIdx.x; e < rows * (DV / 4); e += THREADS) {
          const int r = e / (DV / 4), column = e % (DV / 4) * 4;
          constexpr int BATCH = 8;
          Sum sum;
          sum.clear();
          for (int j = 0; j < item.splits; j += BATCH) {
            float2 state[BATCH];
            float4 x[BATCH];
#pragma unroll
            for (int b = 0; b < BATCH; b++) {
              const float* const source = first + (size_t)min(j + b, item.splits - 1) * partial_stride;
              state[b] = __ldcg(reinterpret_cast<const float2*>(source + rows * DV) + r);
              x[b] = __ldcg(reinterpret_cast<const float4*>(source + r * DV + column));
            }
#pragma unroll
            for (int b = 0; b < BATCH; b++)
              if (j + b < item.splits && state[b].x != -INFINITY_F) sum.add(state[b].x, state[b].y, x[b]);
          }
          store(r, column, sum);
        }
        if (threadIdx.x == 0) *arrived = 0;
      }
    }
    if (ends) run_start = 0;
    item = next;
    tile = next_tile;
  }
}

// out, q [decodes, pitch]: row s is sequence s; query head h at columns h * D of q. k_cache [blocks, kv_heads,
// 16, DK], v_cache likewise with DV. tables int32 [slots, table_stride], table_stride % 4 == 0. slots, kv_lens
// int32 [seqs]; kv_lens counts the newest token. count: how many sequences there are, at most max_seqs.
// partial float [items, rows * (DV + 2), rounded up to 4], rows = min(group, 16); arrivals int32 [max_seqs *
// kv_heads * parts], zero before and after. window 0: none; soft_cap 0: none.
// Grid: any number of blocks of 128 threads.
template <typename T, int DK, int DV>
__global__ void __launch_bounds__(THREADS, DV <= 64 ? 4 : DV <= 128 ? 3 : 1)
attn_decode(T* out, const T* q, const T* k_cache, const T* v_cache, const int* tables, const int* slots,
            const int* kv_lens, const int* count, float* partial, int* arrivals, int q_pitch, int out_pitch,
            int table_stride, int kv_heads, int group, float scale, float soft_cap, int window, int max_seqs) {
  attend<T, DK, DV>(out, q, k_cache, v_cache, tables, slots, kv_lens, count, partial, arrivals, q_pitch, out_pitch,
                    table_stride, kv_heads, group, scale, soft_cap, window, max_seqs, Everything(), Turned());
}

// The same over a cache in e4m3: pieces [blocks, kv_heads], see fp8_cache.cuh.
template <typename T, int D>
__global__ void __launch_bounds__(THREADS, D <= 64 ? 4 : D <= 128 ? 3 : 1)
attn_decode_fp8(T* out, const T* q, const u8* k_cache, const u8* v_cache, const int* tables, const int* slots,
                const int* kv_lens, const int* count, float* partial, int* arrivals, int q_pitch, int out_pitch,
                int table_stride, int kv_heads, int group, float scale, float soft_cap, int window, int max_seqs) {
  attend<T, D, D>(out, q, k_cache, v_cache, tables, slots, kv_lens, count, partial, arrivals, q_pitch, out_pitch,
                  table_stride, kv_heads, group, scale, soft_cap, window, max_seqs, Everything(), Turned());
}

// attn_decode where queries see some blocks of keys only.
template <typename T, int DK, int DV>
__global__ void __launch_bounds__(THREADS, DV <= 64 ? 4 : DV <= 128 ? 3 : 1)
attn_decode_sparse(T* out, const T* q, const T* k_cache, const T* v_cache, const int* tables, const int* slots,
                   const int* kv_lens, const int* count, float* partial, int* arrivals, int q_pitch, int out_pitch,
                   int table_stride, int kv_heads, int group, float scale, float soft_cap, int window, int max_seqs,
                   int size, int local, int stride, int head_step) {
  attend<T, DK, DV>(out, q, k_cache, v_cache, tables, slots, kv_lens, count, partial, arrivals, q_pitch, out_pitch,
                    table_stride, kv_heads, group, scale, soft_cap, window, max_seqs,
                    SomeBlocks{size, local, stride, head_step}, Turned());
}

// attn_decode for queries, keys and values as a product left them, in qkv [T, q_pitch], and a cache without the newest
// position: turned, with norms of heads in front where there are, as rope_kv and rope_kv_normed do. Pairs (i, i + rotated / 2).
template <typename T, int D>
__global__ void __launch_bounds__(THREADS, D <= 64 ? 4 : D <= 128 ? 3 : 1)
attn_decode_turn(T* out, const T* qkv, T* k_cache, T* v_cache, const int* tables, const int* slots, const int* kv_lens,
                 const int* count, float* partial, int* arrivals, int q_pitch, int out_pitch, int table_stride, int kv_heads,
                 int group, float scale, float soft_cap, int window, int max_seqs, const float* cos, const float* sin,
                 int rotated, int normed, const float* q_weight, const float* k_weight, int q_step, int k_step, float eps) {
  attend<T, D, D>(out, qkv, k_cache, v_cache, tables, slots, kv_lens, count, partial, arrivals, q_pitch, out_pitch,
                  table_stride, kv_heads, group, scale, soft_cap, window, max_seqs, Everything(),
                  Turning<T>{cos, sin, k_cache, v_cache, rotated, normed != 0, q_weight, k_weight, q_step, k_step, eps});
}

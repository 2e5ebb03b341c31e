// Attention of sequences that compute one token this step, over a paged KV cache.
//
// Work is cut into items: (sequence, split of 256 positions, kv head, up to 16 query heads of its group). A
// block of four warps takes items b, b + gridDim, ...: each warp computes one tile of 64 positions with the
// group's heads as the rows of the tensor-core tile (padded to 16), then the block merges the four tiles. A
// sequence of one split is finished there; otherwise the split's state goes to `partial`, and the block that
// brings a sequence's last split merges all of them in ascending order.
// The list of items follows from the metadata, so it is made before the predecessor is done, and everything
// but the newest position's key and value is fetched before that too.
// Bound by memory at long contexts (the KV cache is read once), by latency at short ones.
#include "attention.cuh"

constexpr int WARPS = 4;
static_assert(WARPS == TILES_PER_SPLIT, "one round of a block's warps is one split");

struct Item {
  int seq, split, head, part;       // part: which 16 of the group's query heads
  int splits, first_split, index;   // of the sequence; index: the item's number
  int position, lo;                 // the query's position and the first one it sees
};

struct Work {
  const int* slots;
  const int* kv_lens;
  const int* prefix;  // shared: items before each sequence
  int seqs, kv_heads, parts, window;
};

__device__ __forceinline__ int splits_of(int position, int window) {
  const int lo = window > 0 ? max(0, position - window + 1) : 0;
  return position / SPLIT - lo / SPLIT + 1;
}

__device__ __forceinline__ Item item_of(const Work& work, int index) {
  int below = 0, above = work.seqs;
  while (above - below > 1) {
    const int middle = (below + above) / 2;
    (work.prefix[middle] <= index ? below : above) = middle;
  }
  Item item;
  item.index = index;
  item.seq = below;
  item.position = work.kv_lens[below] - 1;
  item.lo = work.window > 0 ? max(0, item.position - work.window + 1) : 0;
  item.first_split = item.lo / SPLIT;
  item.splits = item.position / SPLIT - item.first_split + 1;
  const int per_split = work.kv_heads * work.parts, within = index - work.prefix[below];
  item.split = item.first_split + within / per_split;
  item.head = within % per_split / work.parts;
  item.part = within % work.parts;
  return item;
}

// One warp's tile of an item: rows [lo, hi) of it are visible; empty when hi <= 0 or lo >= TILE.
struct Tile {
  int lo, hi, newest;  // newest: the row of the query's own position, or -1
  int4 blocks;
  __device__ bool empty() const { return hi <= 0 || lo >= TILE; }
};

__device__ __forceinline__ Tile tile_of(const Item& item, int warp, const int* tables, int table_stride, int slot) {
  const int start = item.split * SPLIT + warp * TILE;
  Tile tile;
  tile.lo = max(0, item.lo - start);
  tile.hi = min(TILE, item.position + 1 - start);
  tile.newest = item.position >= start && item.position < start + TILE ? item.position - start : -1;
  tile.blocks = make_int4(0, 0, 0, 0);
  if (!tile.empty())
    tile.blocks = *reinterpret_cast<const int4*>(tables + (size_t)slot * table_stride + start / KV_BLOCK);
  return tile;
}

// Fetches the newest position's row, which the predecessor has just written to the cache.
template <typename T, int D>
__device__ __forceinline__ void load_newest(T* tile, const T* cache, const Tile& t, int head, int kv_heads, int lane) {
  const int b = t.newest / KV_BLOCK;
  const int id = b == 0 ? t.blocks.x : b == 1 ? t.blocks.y : b == 2 ? t.blocks.z : t.blocks.w;
  const T* source = cache + (((size_t)id * kv_heads + head) * KV_BLOCK + t.newest % KV_BLOCK) * D;
  if (lane < D / 8) cp_async16(smem(tile + t.newest * (D + PAD) + lane * 8), source + lane * 8);
}

// out, q [decodes, pitch]: row s is sequence s; query head h at columns h * D of q. k_cache [blocks, kv_heads,
// 16, DK], v_cache likewise with DV. tables int32 [slots, table_stride], table_stride % 4 == 0. slots, kv_lens
// int32 [seqs]; kv_lens counts the newest token. count: how many sequences there are, at most max_seqs.
// partial float [items, rows, DV + 2 (rounded to 4)], arrivals int32 [max_seqs * kv_heads * parts], zero
// before and after. window 0: none; soft_cap 0: none.
// Grid: any number of blocks of 128 threads. SHARED: one buffer for keys and values in turn (large heads).
template <typename T, int DK, int DV, bool SHARED>
__global__ void __launch_bounds__(WARPS * 32)
attn_decode(T* __restrict__ out, const T* __restrict__ q, const T* k_cache, const T* v_cache, const int* tables,
            const int* slots, const int* kv_lens, const int* count, float* partial, int* arrivals, int q_pitch,
            int out_pitch, int table_stride, int kv_heads, int group, float scale, float soft_cap, int window,
            int max_seqs) {
  griddep_launch();
  constexpr int KS = DK + PAD, VS = DV + PAD, XS = DV + 8;  // row pitches; XS in floats
  constexpr int K_TILE = TILE * KS, V_TILE = TILE * VS, BUFFER = SHARED ? (K_TILE > V_TILE ? K_TILE : V_TILE) : K_TILE + V_TILE;
  static_assert(16 * XS * 4 <= V_TILE * 2, "the exchange of results fits where the values were");
  extern __shared__ __align__(128) unsigned char shared[];
  __shared__ float2 states[WARPS][16];
  __shared__ int warp_totals[WARPS], last_here;
  T* const tiles = reinterpret_cast<T*>(shared);
  T* const queries = tiles + WARPS * BUFFER;
  int* const prefix = reinterpret_cast<int*>(queries + (SHARED ? 1 : WARPS) * 16 * KS);
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  T* const k_tile = tiles + warp * BUFFER;
  T* const v_tile = SHARED ? k_tile : k_tile + K_TILE;
  T* const q_tile = SHARED ? queries : queries + warp * 16 * KS;
  float* const exchange = reinterpret_cast<float*>(v_tile);
  const int parts = (group + 15) / 16;

  // How many items come before each sequence: a running sum over the block.
  const int seqs = min(*count, max_seqs);
  int items = 0;
  for (int base = 0; base < max_seqs; base += WARPS * 32) {
    const int s = base + threadIdx.x;
    int mine = s < max_seqs ? kv_lens[s] - 1 : 0;
    mine = s < seqs ? splits_of(mine, window) * kv_heads * parts : 0;
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
  if (blockIdx.x >= items) {
    if (blockIdx.x == 0) griddep_wait();
    return;
  }

  const Work work = {slots, kv_lens, prefix, seqs, kv_heads, parts, window};
  const auto tile_for = [&](const Item& item) { return tile_of(item, warp, tables, table_stride, slots[item.seq]); };
  const auto load_k = [&](const Item& item, const Tile& t, int skip) {
    if (!t.empty()) load_tile<T, DK, 32>(k_tile, k_cache, t.blocks, item.head, kv_heads, t.lo, t.hi, skip, lane);
  };
  const auto load_v = [&](const Item& item, const Tile& t, int skip) {
    if (!t.empty()) load_tile<T, DV, 32>(v_tile, v_cache, t.blocks, item.head, kv_heads, t.lo, t.hi, skip, lane);
  };
  const auto rows_of = [&](const Item& item) { return min(16, group - item.part * 16); };
  const auto load_q = [&](const Item& item) {
    const int rows = rows_of(item), worker = SHARED ? (int)threadIdx.x : lane, workers = SHARED ? WARPS * 32 : 32;
    const T* source = q + (size_t)item.seq * q_pitch + (size_t)(item.head * group + item.part * 16) * DK;
    for (int i = worker; i < 16 * (DK / 8); i += workers) {
      const int row = i / (DK / 8), chunk = i % (DK / 8);
      const bool valid = row < rows;
      cp_async16(smem(q_tile + row * KS + chunk * 8), valid ? source + row * DK + chunk * 8 : q, valid ? 16 : 0);
    }
  };

  Item item = item_of(work, blockIdx.x);
  Tile tile = tile_for(item);
  load_k(item, tile, tile.newest);
  cp_async_commit();
  if (!SHARED) load_v(item, tile, tile.newest);
  cp_async_commit();
  griddep_wait();
  load_q(item);
  if (tile.newest >= 0) load_newest<T, DK>(k_tile, k_cache, tile, item.head, kv_heads, lane);
  cp_async_commit();
  if (!SHARED && tile.newest >= 0) load_newest<T, DV>(v_tile, v_cache, tile, item.head, kv_heads, lane);
  cp_async_commit();

  const float factor = soft_cap > 0.f ? LOG2E : __fmul_rn(scale, LOG2E);
  while (true) {
    const int next_index = item.index + gridDim.x;
    const bool more = next_index < items;
    Item next;
    Tile next_tile;
    if (more) {
      next = item_of(work, next_index);
      next_tile = tile_for(next);
    }
    cp_async_wait<1>();  // the keys and the queries are here
    if (SHARED)
      __syncthreads();
    else
      __syncwarp();
    const int blocks = (tile.hi + KV_BLOCK - 1) / KV_BLOCK;
    u32 p[4][4];
    float m[2] = {-INFINITY_F, -INFINITY_F}, l[2] = {0.f, 0.f};
    if (!tile.empty()) {
      float s[8][4];
      tile_scores<T, DK>(s, q_tile, k_tile, blocks, lane);
      if (soft_cap > 0.f) tile_soft_cap(s, scale, soft_cap);
      const int lo[2] = {tile.lo, tile.lo}, hi[2] = {tile.hi - 1, tile.hi - 1};
      tile_mask(s, lo, hi, lane);
      tile_softmax<T>(s, p, factor, m, l);
    }
    __syncwarp();
    if (SHARED) {
      load_v(item, tile, -1);
      cp_async_commit();
      cp_async_wait<0>();
    } else {
      if (more) {
        load_k(next, next_tile, -1);
        load_q(next);
      }
      cp_async_commit();
      cp_async_wait<1>();  // the values are here; the next keys are on their way
    }
    __syncwarp();
    const int row = lane / 4;
    float x[DV / 8][4];
    if (!tile.empty())
      tile_values<T, DV>(p, v_tile, blocks, lane, [&](int g, const float (&r)[2][4]) {
#pragma unroll
        for (int i = 0; i < 4; i++) {
          x[2 * g][i] = r[0][i];
          x[2 * g + 1][i] = r[1][i];
        }
      });
    __syncwarp();
    if (!tile.empty()) {  // results go where the values were
#pragma unroll
      for (int n = 0; n < DV / 8; n++) {
        float* const cell = exchange + row * XS + n * 8 + (lane % 4) * 2;
        *reinterpret_cast<float2*>(cell) = make_float2(x[n][0], x[n][1]);
        *reinterpret_cast<float2*>(cell + 8 * XS) = make_float2(x[n][2], x[n][3]);
      }
    }
    if (lane % 4 == 0) {
      states[warp][row] = make_float2(m[0], l[0]);
      states[warp][row + 8] = make_float2(m[1], l[1]);
    }
    __syncthreads();

    // Merge the block's tiles: thread by thread, four columns of a row at a time.
    const int rows = rows_of(item), row_floats = DV + 2, stride = (min(group, 16) * row_floats + 3) / 4 * 4;
    T* const target = out + (size_t)item.seq * out_pitch + (size_t)(item.head * group + item.part * 16) * DV;
    const auto store = [&](int r, int column, const float (&X)[4], float L) {
      const u32 low = pack2<T>(finish(X[0], L), finish(X[1], L)), high = pack2<T>(finish(X[2], L), finish(X[3], L));
      *reinterpret_cast<uint2*>(target + r * DV + column) = make_uint2(low, high);
    };
    for (int e = threadIdx.x; e < rows * (DV / 4); e += WARPS * 32) {
      const int r = e / (DV / 4), column = e % (DV / 4) * 4;
      float M = -INFINITY_F, L = 0.f, X[4] = {0.f, 0.f, 0.f, 0.f};
#pragma unroll
      for (int w = 0; w < WARPS; w++) {
        const float2 state = states[w][r];
        if (state.x == -INFINITY_F) continue;
        const float* source = reinterpret_cast<const float*>(tiles + w * BUFFER + (SHARED ? 0 : K_TILE)) + r * XS + column;
        const float4 v = *reinterpret_cast<const float4*>(source);
        const Factors f = merge_maximum(M, state.x);
        L = merge(L, state.y, f);
        X[0] = merge(X[0], v.x, f);
        X[1] = merge(X[1], v.y, f);
        X[2] = merge(X[2], v.z, f);
        X[3] = merge(X[3], v.w, f);
      }
      if (item.splits == 1) {
        store(r, column, X, L);
      } else {
        float* const cell = partial + (size_t)item.index * stride;
        __stcg(reinterpret_cast<float4*>(cell + r * DV + column), make_float4(X[0], X[1], X[2], X[3]));
        if (column == 0) __stcg(reinterpret_cast<float2*>(cell + rows * DV) + r, make_float2(M, L));
      }
    }
    if (item.splits > 1) {
      int* const arrived = arrivals + (item.seq * kv_heads + item.head) * parts + item.part;
      __threadfence();
      __syncthreads();
      if (threadIdx.x == 0) last_here = atomicAdd(arrived, 1) == item.splits - 1;
      __syncthreads();
      if (last_here) {
        __threadfence();
        const int per_split = kv_heads * parts;
        const float* const first = partial + (size_t)(item.index - (item.split - item.first_split) * per_split) * stride;
        for (int e = threadIdx.x; e < rows * (DV / 4); e += WARPS * 32) {
          const int r = e / (DV / 4), column = e % (DV / 4) * 4;
          float M = -INFINITY_F, L = 0.f, X[4] = {0.f, 0.f, 0.f, 0.f};
#pragma unroll 4
          for (int j = 0; j < item.splits; j++) {
            const float* const cell = first + (size_t)j * per_split * stride;
            const float2 state = __ldcg(reinterpret_cast<const float2*>(cell + rows * DV) + r);
            const float4 v = __ldcg(reinterpret_cast<const float4*>(cell + r * DV + column));
            const Factors f = merge_maximum(M, state.x);
            L = merge(L, state.y, f);
            X[0] = merge(X[0], v.x, f);
            X[1] = merge(X[1], v.y, f);
            X[2] = merge(X[2], v.z, f);
            X[3] = merge(X[3], v.w, f);
          }
          store(r, column, X, L);
        }
        if (threadIdx.x == 0) *arrived = 0;
      }
    }
    if (!more) break;
    __syncthreads();  // the exchange has been read
    if (SHARED) {
      load_k(next, next_tile, -1);
      load_q(next);
      cp_async_commit();
      cp_async_commit();
    } else {
      load_v(next, next_tile, -1);
      cp_async_commit();
    }
    item = next;
    tile = next_tile;
  }
}

// latent_prefill for Hopper: the same rows, the same sums in the same order (mla/mla.cuh), by wgmma.
//
// Persistent blocks of two consumer warpgroups and a producer warp take 64 rows of a sequence after each other. Keys come
// by tensor maps, a cache block of 16 positions and 64 columns (a chunk, 128 bytes wide, swizzled) a copy, each chunk with
// barriers of its own: what has been multiplied makes room at once. Tiles are taken in pairs, of which each warpgroup
// scores one; weights go through shared memory, where the tile's rotated keys were, which are no values; then each
// warpgroup multiplies both tiles' values, of its 256 columns. Splits of one tile are merged into the result as they come.
// From splits of four tiles on the result of the splits before is in global memory: registers hold one of both.
// Bound by the tensor cores.
#include "attention/prefill_sm90.cuh"
#include "mla/mla.cuh"
#include "ptx/wgmma.cuh"

inline constexpr int RANK = 512, WIDTH = 576, CHUNKS = WIDTH / 64, OWN = RANK / 64 / 2;  // chunks, and those of a warpgroup's values
inline constexpr int CHUNK = TILE * 128, TILE_BYTES = CHUNKS * CHUNK;
inline constexpr int STATES = 3 * TILE_BYTES, BARS = STATES + 2 * 2 * 2 * 64 * 4;  // bytes before them in shared memory
inline constexpr int TOTAL_FLOATS = GROUP_ROWS * RANK;                             // of a block, in global memory

// Shared memory: queries, a tile of keys for each warpgroup, maxima and sums of weights, barriers.
struct Places {
  u32 base;
  __device__ __forceinline__ u32 queries() const { return base; }
  __device__ __forceinline__ u32 keys(int stage) const { return base + (1 + stage) * TILE_BYTES; }
  __device__ __forceinline__ u32 weights(int stage) const { return keys(stage) + (CHUNKS - 1) * CHUNK; }
  __device__ __forceinline__ u32 full(int stage, int chunk) const { return base + BARS + 16 * (stage * CHUNKS + chunk); }
  __device__ __forceinline__ u32 free(int stage, int chunk) const { return full(stage, chunk) + 8; }
  __device__ __forceinline__ u32 full_queries() const { return base + BARS + 32 * CHUNKS; }
  __device__ __forceinline__ u32 free_queries() const { return full_queries() + 8; }
  __device__ __forceinline__ u32 edge() const { return full_queries() + 16; }
};

// 64 rows of a sequence; row r is its token r / heads under head r % heads.
struct Rows {
  int seq, first, count, offset, start, last_tile;
};

struct RowScheduler {
  const int *kv_lens, *query_offsets;
  const int2* work;
  int tiles, heads;
  __device__ __forceinline__ bool get(int round, Rows& w) const {
    const int turn = round & 1 ? gridDim.x - 1 - blockIdx.x : blockIdx.x, index = round * gridDim.x + turn;
    if (index >= tiles) return false;
    const int2 mine = work[index];
    w.seq = mine.x;
    w.first = mine.y;
    w.offset = query_offsets[w.seq];
    const int tokens = query_offsets[w.seq + 1] - w.offset;
    w.count = min(GROUP_ROWS, tokens * heads - w.first);
    w.start = kv_lens[w.seq] - tokens;
    w.last_tile = (w.start + (w.first + w.count - 1) / heads) / TILE;
    return true;
  }
};

__device__ __forceinline__ void produce_latents(const Places& at, const RowScheduler& scheduler, const TensorMap& q_map,
                                                const TensorMap& k_map, const int* tables, const int* slots,
                                                int table_stride, int lane) {
  u32 free_phase[2] = {1, 1}, edge_phase = 0;
  Rows w;
  for (int round = 0; scheduler.get(round, w); round++) {
    const int* const table = tables + (size_t)slots[w.seq] * table_stride;
    const int kv_len = scheduler.kv_lens[w.seq];
    mbar_wait(at.free_queries(), (round & 1) ^ 1);
    if (lane == 0) mbar_arrive_expect(at.full_queries(), TILE_BYTES);
    __syncwarp();
    const int first = w.offset * scheduler.heads + w.first;
    if (lane < CHUNKS) tensor_load_2d(at.queries() + lane * CHUNK, &q_map, lane * 64, first, at.full_queries());
    for (int t = 0; t <= w.last_tile; t++) {
      const int stage = t & 1, rows = min(TILE, kv_len - t * TILE);
      // Blocks behind the context are not this sequence's: the last one that is stands in for them, hidden as the future is.
      const int id = lane < TILE / KV_BLOCK ? table[min(t * (TILE / KV_BLOCK) + lane, (kv_len - 1) / KV_BLOCK)] : 0;
#pragma unroll 1
      for (int i = 0; i < CHUNKS; i++) {
        const int chunk = i < 8 ? i / 2 + i % 2 * OWN : i;  // in the order in which they are freed
        const bool edge = rows < TILE;
        const u32 place = at.keys(stage) + chunk * CHUNK, bar = edge ? at.edge() : at.full(stage, chunk);
        mbar_wait(at.free(stage, chunk), stage ? free_phase[1] : free_phase[0]);
        if (lane == 0) mbar_arrive_expect(bar, CHUNK);
        __syncwarp();
        if (lane < TILE / KV_BLOCK) tensor_load_2d(place + lane * (KV_BLOCK * 128), &k_map, chunk * 64, id * KV_BLOCK, bar);
        if (!edge) continue;
        mbar_wait(at.edge(), edge_phase);
        edge_phase ^= 1;
        for (int c = rows * 8 + lane; c < TILE * 8; c += 32) store_shared(place + c * 16, make_uint4(0, 0, 0, 0));
        fence_async_shared();
        __syncwarp();
        if (lane == 0) mbar_arrive(at.full(stage, chunk));
      }
      free_phase[0] ^= stage ^ 1;
      free_phase[1] ^= stage;
    }
  }
}

// What a consumer thread keeps of its two rows: sums over positions of 256 columns, chunk by chunk, laid out like wgmma's
// accumulators; of all splits so far, or of this one alone where those before are in global memory (`apart`).
template <typename T>
struct Consumer {
  const Places& at;
  float4* total;  // this thread's share of the totals in global memory, 256 float4 apart
  int group, warp, lane;
  float M[2], L[2], run_M[2], run_L[2], x[OWN][32];
  bool apart;

  __device__ __forceinline__ void clear_split() {
#pragma unroll
    for (int h = 0; h < 2; h++) M[h] = -INFINITY_F, L[h] = 0.f;
#pragma unroll
    for (int c = 0; c < OWN; c++)
#pragma unroll
      for (int i = 0; i < 32; i++) x[c][i] = 0.f;
  }
  __device__ __forceinline__ u32 place_of(int buffer, int stage, int sums, int row) const {
    return at.base + STATES + (((buffer * 2 + stage) * 2 + sums) * 64 + row) * 4;
  }

  // Weights of a tile, of whose positions from its start on the thread's rows see those up to hi.
  __device__ __forceinline__ void weigh(int stage, u32 phase, const int (&hi)[2], float factor, int buffer) {
    float s[2][32];
    const u64 queries = wgmma_operand(at.queries()), keys = wgmma_operand(at.keys(stage));
#pragma unroll
    for (int c = 0; c < CHUNKS; c++) {
      mbar_wait(at.full(stage, c), phase);
      if (c == 0) {
        wgmma_pin(s[0]);
        wgmma_pin(s[1]);
        wgmma_fence();
      }
#pragma unroll
      for (int k = 0; k < 4; k++)
        wgmma<TILE, T>(s[k % 2], wgmma_further(queries, c * CHUNK + k * 32), wgmma_further(keys, c * CHUNK + k * 32), c + k / 2 > 0);
      wgmma_commit();
    }
    wgmma_wait<0>();
    wgmma_pin(s[0]);
    wgmma_pin(s[1]);
    float m[2], l[2];
#pragma unroll
    for (int h = 0; h < 2; h++) m[h] = -INFINITY_F;
#pragma unroll
    for (int i = 0; i < 32; i++) {
      const int h = i / 2 % 2, position = i / 4 * 8 + lane % 4 * 2 + i % 2;
      const float score = __fadd_rn(s[0][i], s[1][i]);
      s[0][i] = position > hi[h] ? -INFINITY_F : score;
      m[h] = fmaxf(m[h], s[0][i]);
    }
    bar_sync(2 + group, 128);  // the warpgroup has multiplied: weights may lie where the rotated keys are
#pragma unroll
    for (int h = 0; h < 2; h++) {
      m[h] = fmaxf(m[h], __shfl_xor_sync(~0u, m[h], 1));
      m[h] = __fmul_rn(fmaxf(m[h], __shfl_xor_sync(~0u, m[h], 2)), factor);
      const float base = m[h] == -INFINITY_F ? 0.f : m[h];
      const int row = warp % 4 * 16 + lane / 4 + 8 * h;
#pragma unroll
      for (int j = 0; j < 8; j++) {
        const float a = exp2_fast(__fmaf_rn(s[0][4 * j + 2 * h], factor, -base));
        const float b = exp2_fast(__fmaf_rn(s[0][4 * j + 2 * h + 1], factor, -base));
        float sum = __fadd_rn(a, b);
        sum = __fadd_rn(sum, __shfl_xor_sync(~0u, sum, 1));
        sum = __fadd_rn(sum, __shfl_xor_sync(~0u, sum, 2));
        l[h] = j == 0 ? sum : __fadd_rn(l[h], sum);
        const u32 place = at.weights(stage) + row * 128 + (j ^ row % 8) * 16 + lane % 4 * 4;
        asm volatile("st.shared.u32 [%0], %1;" ::"r"(place), "r"(pack2<T>(a, b)) : "memory");
      }
      if (lane % 4 == 0) {
        asm volatile("st.shared.f32 [%0], %1;" ::"r"(place_of(buffer, stage, 0, row)), "f"(m[h]) : "memory");
        asm volatile("st.shared.f32 [%0], %1;" ::"r"(place_of(buffer, stage, 1, row)), "f"(l[h]) : "memory");
      }
    }
  }

  // A tile's values into the sums.
  __device__ __forceinline__ void add(int stage, u32 phase, int buffer) {
    u32 p[4][4];
    const int tile_row = warp % 4 * 16 + lane % 16;
#pragma unroll
    for (int k = 0; k < 4; k++)
      ldmatrix_x4(p[k], at.weights(stage) + tile_row * 128 + ((2 * k + lane / 16) ^ tile_row % 8) * 16);
    Factors f[2];
#pragma unroll
    for (int h = 0; h < 2; h++) {
      const int row = warp % 4 * 16 + lane / 4 + 8 * h;
      float m, l;
      asm volatile("ld.shared.f32 %0, [%1];" : "=f"(m) : "r"(place_of(buffer, stage, 0, row)) : "memory");
      asm volatile("ld.shared.f32 %0, [%1];" : "=f"(l) : "r"(place_of(buffer, stage, 1, row)) : "memory");
      f[h] = merge_maximum(M[h], m);
      L[h] = merge(L[h], l, f[h]);
    }
    const bool kept = __all_sync(~0u, f[0].keep == 1.f && f[1].keep == 1.f);
    fence_async_shared();  // the copy engine writes there next
    __syncwarp();
    if (lane == 0) mbar_arrive(at.free(stage, CHUNKS - 1));
    float v[2][32];
    const u64 values = wgmma_operand_mn(at.keys(stage) + group * OWN * CHUNK, CHUNK);
    const auto multiply = [&](int c, float (&into)[32]) {
      mbar_wait(at.full(stage, group * OWN + c), phase);
      wgmma_pin(into);
      wgmma_fence();
#pragma unroll
      for (int k = 0; k < 4; k++) wgmma_rs<64, T, 1>(into, p[k], wgmma_further(values, c * CHUNK + k * 2048), k > 0);
      wgmma_commit();
    };
    multiply(0, v[0]);
#pragma unroll
    for (int c = 0; c < OWN; c++) {
      if (c + 1 < OWN) {
        multiply(c + 1, v[(c + 1) % 2]);
        wgmma_wait<1>();
      } else {
        wgmma_wait<0>();
      }
      float(&done)[32] = v[c % 2];
      wgmma_pin(done);
      if (lane == 0) mbar_arrive(at.free(stage, group * OWN + c));
      if (kept) {
#pragma unroll
        for (int i = 0; i < 32; i++) x[c][i] = __fmaf_rn(done[i], f[i / 2 % 2].add, x[c][i]);
      } else {
#pragma unroll
        for (int i = 0; i < 32; i++) x[c][i] = merge(x[c][i], done[i], f[i / 2 % 2]);
      }
    }
  }

  // Before the first split of several tiles: what there is goes to global memory.
  __device__ __forceinline__ void set_apart() {
#pragma unroll
    for (int i = 0; i < OWN * 8; i++)
      total[i * CONSUMERS] = make_float4(x[i / 8][i % 8 * 4], x[i / 8][i % 8 * 4 + 1], x[i / 8][i % 8 * 4 + 2], x[i / 8][i % 8 * 4 + 3]);
#pragma unroll
    for (int h = 0; h < 2; h++) run_M[h] = M[h], run_L[h] = L[h];
    apart = true;
    clear_split();
  }
  // A split of several tiles into the result so far, which goes back to global memory, or stays in x at the end.
  template <bool LAST>
  __device__ __forceinline__ void end_split() {
    Factors f[2];
#pragma unroll
    for (int h = 0; h < 2; h++) {
      f[h] = merge_maximum(run_M[h], M[h]);
      run_L[h] = merge(run_L[h], L[h], f[h]);
    }
#pragma unroll
    for (int b = 0; b < OWN * 2; b++) {
      float4 old[4];
#pragma unroll
      for (int i = 0; i < 4; i++) old[i] = total[(b * 4 + i) * CONSUMERS];
#pragma unroll
      for (int i = 0; i < 4; i++) {
        float* const mine = &x[b / 2][b % 2 * 16 + i * 4];
        mine[0] = merge(old[i].x, mine[0], f[0]), mine[1] = merge(old[i].y, mine[1], f[0]);
        mine[2] = merge(old[i].z, mine[2], f[1]), mine[3] = merge(old[i].w, mine[3], f[1]);
        if (!LAST) total[(b * 4 + i) * CONSUMERS] = make_float4(mine[0], mine[1], mine[2], mine[3]);
      }
    }
    if (!LAST) {
      clear_split();
    } else {
#pragma unroll
      for (int h = 0; h < 2; h++) L[h] = run_L[h];
    }
  }

  __device__ __forceinline__ void store(T* out, const Rows& w, int heads) const {
#pragma unroll
    for (int h = 0; h < 2; h++) {
      const int row = warp % 4 * 16 + lane / 4 + 8 * h;
      if (row >= w.count) continue;
      const float over = finish(L[h]);
      T* const target = out + ((size_t)w.offset * heads + w.first + row) * RANK + group * OWN * 64 + lane % 4 * 2;
#pragma unroll
      for (int c = 0; c < OWN; c++)
#pragma unroll
        for (int j = 0; j < 8; j++)
          *reinterpret_cast<u32*>(target + c * 64 + j * 8) =
              pack2<T>(__fmul_rn(x[c][4 * j + 2 * h], over), __fmul_rn(x[c][4 * j + 2 * h + 1], over));
    }
  }
};

template <typename T>
__device__ __forceinline__ void consume_latents(const Places& at, const RowScheduler& scheduler, T* out, float4* totals,
                                                float factor, int warp, int lane) {
  Consumer<T> mine{at, totals + threadIdx.x, warp / 4, warp, lane};
  u32 phase[2] = {0, 0}, buffer = 0;
  Rows w;
  for (int round = 0; scheduler.get(round, w); round++) {
    int position[2];  // of this thread's two rows; -1 sees nothing
#pragma unroll
    for (int h = 0; h < 2; h++) {
      const int row = warp % 4 * 16 + lane / 4 + 8 * h;
      position[h] = row < w.count ? w.start + (w.first + row) / scheduler.heads : -1;
    }
    mine.apart = false;
    mine.clear_split();
    mbar_wait(at.full_queries(), round & 1);
    for (int t = 0; t <= w.last_tile; t += 2) {
      const bool both = t < w.last_tile;
      if (mine.group == 0 || both) {
        const int tile = t + mine.group, hi[2] = {position[0] - tile * TILE, position[1] - tile * TILE};
        mine.weigh(mine.group, mine.group ? phase[1] : phase[0], hi, factor, buffer);
      }
      bar_sync(1, CONSUMERS);  // weights are there
      if (t + 2 > w.last_tile && lane == 0) mbar_arrive(at.free_queries());
      if (t == SHORT_SPLITS) mine.set_apart();
      mine.add(0, phase[0], buffer);
      phase[0] ^= 1;
      if (both) {
        mine.add(1, phase[1], buffer);
        phase[1] ^= 1;
      }
      buffer ^= 1;
      if (mine.apart && t + 2 <= w.last_tile && split_of(t + 2) != split_of(t)) mine.template end_split<false>();
    }
    if (mine.apart) mine.template end_split<true>();
    mine.store(out, w, scheduler.heads);
  }
}

// As latent_prefill, of latents of 512 elements and rotated keys of 64; q_map: tensor map of the queries as rows [tokens *
// heads, 576] in boxes of 64 x 64, k_map: of the cache as rows [blocks * 16, 576] in boxes of 16 x 64, both with the 128-byte
// swizzle. work: of 64 rows; count: how many. totals: TOTAL_FLOATS a block. Grid: any number of blocks, one an SM.
template <typename T>
__global__ void __launch_bounds__(THREADS, 1)
latent_prefill_sm90(T* __restrict__ out, const __grid_constant__ TensorMap q_map, const __grid_constant__ TensorMap k_map,
                    const int* tables, const int* slots, const int* kv_lens, const int* query_offsets, const int2* work,
                    const int* count, float4* totals, int heads, int table_stride, float scale) {
  griddep_launch();
  extern __shared__ __align__(1024) unsigned char shared[];
  const Places at{smem(shared)};
  const int warp = __shfl_sync(~0u, threadIdx.x / 32, 0), lane = threadIdx.x % 32;
  if (threadIdx.x == 0) {
    tensor_map_prefetch(&q_map);
    tensor_map_prefetch(&k_map);
    for (int stage = 0; stage < 2; stage++)
      for (int chunk = 0; chunk < CHUNKS; chunk++) {
        mbar_init(at.full(stage, chunk), 1);
        mbar_init(at.free(stage, chunk), chunk < CHUNKS - 1 ? 4 : 8);
      }
    mbar_init(at.full_queries(), 1);
    mbar_init(at.free_queries(), 8);
    mbar_init(at.edge(), 1);
    mbar_init_fence();
  }
  __syncthreads();
  griddep_wait();
  const RowScheduler scheduler{kv_lens, query_offsets, work, *count, heads};
  if (warp >= CONSUMERS / 32) {
    registers_lower<40>();
    if (warp == CONSUMERS / 32) produce_latents(at, scheduler, q_map, k_map, tables, slots, table_stride, lane);
  } else {
    registers_raise<232>();
    consume_latents<T>(at, scheduler, out, totals + (size_t)blockIdx.x * (TOTAL_FLOATS / 4), __fmul_rn(scale, LOG2E), warp, lane);
  }
}

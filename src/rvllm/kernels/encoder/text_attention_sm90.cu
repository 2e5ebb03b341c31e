// text_attention for Hopper: the same rows, the same sums in the same order, by wgmma.
//
// The consumers are those of attn_prefill_sm90 (attention/prefill_sm90_consumer.cuh) without its splits, and with rows
// that see all of their text. Keys and values are boxes of 64 rows out of the matrix that qkv is; what a text's last
// box holds of the next text is hidden, or made zeros where it is values.
#include "attention/prefill_sm90_consumer.cuh"

struct TextScheduler {
  static constexpr bool CAUSAL = false, SPLITS = false, ALL = true;
  const int* offsets;
  const int2* work;
  int tiles, heads;
  int group = 1, window = 0;

  __device__ __forceinline__ int seen_from(int t, const Work&) const { return t; }
  __device__ __forceinline__ bool get(int round, Work& w) const {
    const int turn = round & 1 ? gridDim.x - 1 - blockIdx.x : blockIdx.x, index = round * gridDim.x + turn;
    if (index >= tiles * heads) return false;
    const int2 mine = work[index / heads];
    w.seq = mine.x;
    w.head = index % heads;
    w.first_row = mine.y;
    w.offset = offsets[w.seq];
    w.kv_len = offsets[w.seq + 1] - w.offset;
    w.last_row = min(w.first_row + ROWS, w.kv_len) - 1;
    w.start = w.visible_lo = w.position = w.first_tile = 0;
    w.last_tile = (w.kv_len - 1) / TILE;
    return true;
  }
};

template <int D>
__device__ __forceinline__ void produce_texts(Ring<D, false> ring, const TextScheduler& scheduler, const TensorMap& map,
                                              u32 edge_bar, int lane) {
  using L = Layout<D>;
  u32 edge_phase = 0;
  Work w;
  for (int round = 0; scheduler.get(round, w); round++) {
    for (int t = 0; t <= w.last_tile; t++) {
      const int column = (scheduler.heads + w.head) * D + lane * 64, row = w.offset + t * TILE, rows = min(TILE, w.kv_len - t * TILE);
      mbar_wait(ring.free_keys(), ring.phase ^ 1);
      if (lane == 0) mbar_arrive_expect(ring.full_keys(), L::STAGE);
      __syncwarp();
      if (lane < L::HALVES) tensor_load_2d(ring.keys() + lane * L::HALF, &map, column, row, ring.full_keys());
      mbar_wait(ring.free_values(), ring.phase ^ 1);
      const u32 bar = rows < TILE ? edge_bar : ring.full_values();
      if (lane == 0) mbar_arrive_expect(bar, L::STAGE);
      __syncwarp();
      if (lane < L::HALVES) tensor_load_2d(ring.values() + lane * L::HALF, &map, column + scheduler.heads * D, row, bar);
      if (rows < TILE) {
        mbar_wait(edge_bar, edge_phase);
        edge_phase ^= 1;
        complete_values<D>(ring, 0, rows, lane);
      }
      ring.advance();
    }
  }
}

// As text_attention; map: tensor map of qkv in boxes of 64 x 64 with the 128-byte swizzle. work int32 [n, 2]: (text,
// first of 128 rows); count: how many there are. Grid: any number of blocks, one an SM.
template <typename T, int D>
__global__ void __launch_bounds__(THREADS, 1)
text_attention_sm90(T* __restrict__ out, const T* __restrict__ qkv, const __grid_constant__ TensorMap map, const int* offsets,
                    const int2* work, const int* count, int heads, float scale) {
  using L = Layout<D>;
  griddep_launch();
  extern __shared__ __align__(1024) unsigned char shared[];
  const u32 base = smem(shared), queries = base + 2 * L::STAGES * L::STAGE;
  const u32 bars = queries + 8 * (L::QUERIES + L::TOTALS), edge_bar = bars + 32 * L::STAGES;
  const int warp = __shfl_sync(~0u, threadIdx.x / 32, 0), lane = threadIdx.x % 32;
  const Ring<D, false> ring{base, bars};
  if (threadIdx.x == 0) {
    tensor_map_prefetch(&map);
    init_barriers(ring, edge_bar, 1);
    mbar_init_fence();
  }
  __syncthreads();
  griddep_wait();
  const TextScheduler scheduler{offsets, work, *count, heads};
  if (warp >= CONSUMERS / 32) {
    registers_lower<40>();
    if (warp == CONSUMERS / 32) produce_texts<D>(ring, scheduler, map, edge_bar, lane);
  } else {
    registers_raise<232>();
    float* const totals = reinterpret_cast<float*>(shared + 2 * L::STAGES * L::STAGE + 8 * L::QUERIES + warp * L::TOTALS);
    consume<T, D, false>(ring, scheduler, queries + warp * L::QUERIES, totals, out, qkv, 3 * heads * D, heads * D, scale, warp,
                         lane);
  }
}

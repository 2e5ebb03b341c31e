// attn_prefill for Hopper: the same rows, the same sums in the same order, by wgmma. See prefill.cu and attention.cuh.
//
// Persistent blocks of two consumer warpgroups, 64 rows each, and a producer warp that brings tiles of 64 keys and of
// their values through tensor maps, a cache block of 16 positions and 64 columns (128 bytes, swizzled) a copy. Queries
// stay in registers as wgmma's A operand, and so do the weights. A warpgroup hands over the products of the next tile's
// keys and of this tile's values together, takes the next tile's exponentials while the latter run, and folds the
// values into the split; the two warpgroups hand over in turns. The totals of finished splits are in shared memory.
// Work tiles come longest first; block b takes the b-th, then from the other end of the next round, and so on.
// Bound by the tensor cores; exponentials and the folding of tiles take about as long.
#include "attention/prefill_sm90_consumer.cuh"

// Cache: k_map and v_map, or the addresses of pieces.
template <typename T, int D, bool FP8, typename Cache, typename Mask>
__device__ __forceinline__ void attend(T* __restrict__ out, const T* q, const Cache& keys, const Cache& values,
                                       const int* tables, const int* slots, const int* kv_lens, const int* query_offsets,
                                       const int2* work, const int* count, int q_pitch, int out_pitch, int table_stride,
                                       int kv_heads, int group, float scale, int window, const Mask& mask) {
  using L = Layout<D, FP8>;
  constexpr int PRODUCERS = FP8 ? 4 : 1;  // warps
  griddep_launch();
  extern __shared__ __align__(1024) unsigned char shared[];
  const u32 base = smem(shared), queries = base + 2 * L::STAGES * L::STAGE;
  const u32 pieces = queries + 8 * (L::QUERIES + L::TOTALS), bars = pieces + L::PIECES;
  const u32 edge_bar = bars + 32 * L::STAGES;
  const int warp = __shfl_sync(~0u, threadIdx.x / 32, 0), lane = threadIdx.x % 32;
  const Ring<D, FP8> ring{base, bars};
  if (threadIdx.x == 0) {
    if constexpr (!FP8) {
      tensor_map_prefetch(&keys);
      tensor_map_prefetch(&values);
    }
    init_barriers(ring, edge_bar, PRODUCERS);
    if constexpr (FP8)
      for (int i = 0; i < PRODUCERS * L::AHEAD; i++) mbar_init(bars + 256 + 8 * i, 1);
    mbar_init_fence();
  }
  __syncthreads();
  griddep_wait();
  const Scheduler<Mask> scheduler{kv_lens, query_offsets, work, *count, kv_heads, group, window, mask};
  if (warp >= CONSUMERS / 32) {
    registers_lower<40>();  // what is left when each of 256 consumers has 232
    const int producer = warp - CONSUMERS / 32;
    if constexpr (FP8) {
      u8* const own = shared + (pieces - base) + producer * (L::PIECES / PRODUCERS);
      const PieceRing<T, D> fetched{own, bars + 256 + producer * (8 * L::AHEAD)};
      produce_fp8<T, D>(ring, scheduler, keys, values, tables, slots, table_stride, fetched, producer, lane);
    } else if (producer == 0) {
      produce<D>(ring, scheduler, keys, values, tables, slots, table_stride, edge_bar, lane);
    }
  } else {
    registers_raise<232>();
    float* const totals = reinterpret_cast<float*>(shared + 2 * L::STAGES * L::STAGE + 8 * L::QUERIES + warp * L::TOTALS);
    consume<T, D, FP8>(ring, scheduler, queries + warp * L::QUERIES, totals, out, q, q_pitch, out_pitch, scale, warp,
                       lane);
  }
}

// As attn_prefill; k_map, v_map: tensor maps of the caches as matrices [blocks * kv_heads * 16, D] in boxes of 16 x
// 64 with the 128-byte swizzle. count: how many work tiles a kv head has. Grid: any number of blocks, one an SM.
template <typename T, int D>
__global__ void __launch_bounds__(THREADS, 1)
attn_prefill_sm90(T* out, const T* q, const __grid_constant__ TensorMap k_map, const __grid_constant__ TensorMap v_map,
                  const int* tables, const int* slots, const int* kv_lens, const int* query_offsets, const int2* work,
                  const int* count, int q_pitch, int out_pitch, int table_stride, int kv_heads, int group, float scale,
                  int window) {
  attend<T, D, false>(out, q, k_map, v_map, tables, slots, kv_lens, query_offsets, work, count, q_pitch, out_pitch,
                      table_stride, kv_heads, group, scale, window, Everything());
}

// The same over a cache in e4m3: pieces [blocks, kv_heads], see fp8_cache.cuh.
template <typename T, int D>
__global__ void __launch_bounds__(THREADS, 1)
attn_prefill_sm90_fp8(T* out, const T* q, const u8* k_cache, const u8* v_cache, const int* tables, const int* slots,
                      const int* kv_lens, const int* query_offsets, const int2* work, const int* count, int q_pitch,
                      int out_pitch, int table_stride, int kv_heads, int group, float scale, int window) {
  attend<T, D, true>(out, q, k_cache, v_cache, tables, slots, kv_lens, query_offsets, work, count, q_pitch, out_pitch,
                     table_stride, kv_heads, group, scale, window, Everything());
}

// Experts whose weights keep their format (integers with scales of groups, GGUF's blocks, E4M3): the entries of one
// expert, a tile at a time, times its matrix. mma.sync fed by cp.async; weights become 16 bits in registers.
#include "gemm/integer/sums_sm80.cuh"
#include "moe/quantised.cuh"

namespace rvllm::experts {

inline constexpr int THREADS = 128, STAGES = 3;

// out = act(W[expert] x) for the tile (expert, first, count) of tiles[0 .. *num_tiles - 1]; parameters and grid as of `many`
// in grouped_gemm.cu, for tiles of 64 rows. order null: entries are not sorted, each is a tile of its own, of the expert that
// ids int32 [tokens, top_k] says. weights: a stack of `experts` packed matrices, `stride` bytes each; chunks: ceil(K / 128).
// kind: Scales, of E4M3. k % 8 == 0. Groups are summed as in gemm/integer/gemm_sm80.cu and gemm/fp8/gemm_sm80.cu, so a
// product has the bits of the dense one. Bound by memory for few entries.
template <class T, int TOKENS, class F>
__global__ void __launch_bounds__(THREADS)
    quantised(T* out, const T* x, const u8* __restrict__ weights, const int* order, const int4* tiles, const int* num_tiles,
              const int* ids, const int* num_tokens, u64 stride, int kind, int top_k, int experts, int by_token, int k,
              int chunks, int segments, int rows, int pitch, int act, int gated, int group) {
  using namespace ptx;
  constexpr bool E4M3 = IS_E4M3<F>;
  constexpr int BOX = TOKENS * TILE * 2, STAGE = F::CHUNK + 2 * BOX, PITCH = TILE + 4, COPIES = TOKENS / 8;
  static_assert(TOKENS * PITCH * 4 <= STAGES * STAGE, "the staged sums reuse the pipeline");
  extern __shared__ __align__(1024) u8 shared[];
  const u32 base = smem(shared);
  const int thread = threadIdx.x, warp = thread / 32, lane = thread % 32, row = warp * 16 + lane / 4;
  if (by_token) griddep_wait();
  griddep_launch();
  const int count_tiles = order ? __ldcg(num_tiles) : *num_tokens * top_k;
  const int heap = group * count_tiles, row_tiles = (rows + TILE - 1) / TILE;
  if (count_tiles == 0) return;
  const int within = blockIdx.x % heap, row_tile = blockIdx.x / heap * group + within % group;
  if (row_tile >= row_tiles) return;
  const int t = within / group;
  const int4 tile = order ? __ldcg(tiles + t) : make_int4(existing(__ldcg(ids + t), experts), t, 1, 0);
  const int first = tile.y, count = tile.z;
  const u8* const matrix = weights + tile.x * stride;
  const u8* const strip = matrix + static_cast<u64>(row_tile) * chunks * F::CHUNK;

  const T* source[COPIES];  // of the entries that this thread copies, at its sixteenth of a chunk
#pragma unroll
  for (int c = 0; c < COPIES; c++) {
    const int entry = thread / 16 + 8 * c;
    source[c] = nullptr;
    if (entry < count) {
      const int place = first + entry;
      source[c] = x + static_cast<size_t>(!by_token ? place : (order ? __ldcg(order + place) : place) / top_k) * k + thread % 16 * 8;
    }
  }
  const auto load_weights = [&](int chunk) {
    if (chunk >= chunks) return;
    const u32 at = base + chunk % STAGES * STAGE + 2 * BOX;
    const u8* const from = strip + static_cast<u64>(chunk) * F::CHUNK;
#pragma unroll
    for (int i = 0; i < F::CHUNK; i += THREADS * 16)
      if (i + THREADS * 16 <= F::CHUNK || i + thread * 16 < F::CHUNK) cp_async16(at + i + thread * 16, from + i + thread * 16);
  };
  const auto load_x = [&](int chunk) {
    if (chunk < chunks) {
      const u32 at = base + chunk % STAGES * STAGE + thread % 16 / 8 * BOX;
      const bool inside = chunk * CHUNK_K + thread % 16 * 8 < k;
#pragma unroll
      for (int c = 0; c < COPIES; c++) {
        const int entry = thread / 16 + 8 * c;
        if (source[c])
          cp_async16(at + entry * 128 + (thread % 8 ^ entry % 8) * 16, inside ? source[c] + chunk * CHUNK_K : x, inside ? 16 : 0);
      }
    }
    cp_async_commit();  // also when empty, so that the count of groups stays in step
  };
  for (int s = 0; s < STAGES - 1; s++) load_weights(s);
  if (!by_token) griddep_wait();
  for (int s = 0; s < STAGES - 1; s++) load_x(s);

  const float* scales = nullptr;
  float by_row[2] = {1.f, 1.f};
  if constexpr (E4M3) {
    scales = reinterpret_cast<const float*>(matrix + static_cast<u64>(row_tiles) * chunks * F::CHUNK);
    if (kind == ROW_SCALES) by_row[0] = scales[row_tile * TILE + row], by_row[1] = scales[row_tile * TILE + row + 8];
  }
  Sums<T, TOKENS, F> sums;
  int segment = 0, end = segment_start(chunks, segments, 1);
  for (int chunk = 0; chunk < chunks; chunk++) {
    cp_async_wait<STAGES - 2>();
    __syncthreads();
    load_weights(chunk + STAGES - 1);
    load_x(chunk + STAGES - 1);
    const u32 b_base = base + chunk % STAGES * STAGE, here = b_base + 2 * BOX;
    sums.multiply(b_base, here, thread, row);
    if constexpr (E4M3) {
      float by_block[2] = {1.f, 1.f};
      if (kind == BLOCK_SCALES) {
        const float* at = scales + (static_cast<size_t>(chunk) * row_tiles + row_tile) * 8 + warp * 2;
        by_block[0] = at[0], by_block[1] = at[1];
      }
      sums.scale(by_block);
    } else if constexpr (F::INTEGERS && F::RUNS == 1) {
      sums.scale_by_run(here + 4 * row);
    }
    if (chunk + 1 == end) {
      sums.end_segment(segment == 0, [&](float v, int half) { return E4M3 ? __fmul_rn(v, by_row[half]) : v; });
      segment++;
      end = segment_start(chunks, segments, segment + 1);
    }
  }
  cp_async_wait<0>();
  __syncthreads();

  float* const staging = reinterpret_cast<float*>(shared);  // [TOKENS][PITCH]
  stage_sums<PITCH>(staging, sums.total, row, lane);
  __syncthreads();
  write_tile<T, TILE, PITCH, THREADS>(out, staging, order, thread, first, count, row_tile, rows, pitch, act, gated, by_token);
}

}  // namespace rvllm::experts

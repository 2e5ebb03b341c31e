// Experts for many tokens: the entries of one expert, a tile at a time, times its matrix. mma.sync fed by cp.async.
#include "moe/moe.cuh"

namespace rvllm::experts {

// ROWS x TOKENS outputs a block, by ROW_WARPS x TOKEN_WARPS warps.
template <int ROWS, int TOKENS, int ROW_WARPS, int TOKEN_WARPS>
struct Shape {
  static constexpr int THREADS = 32 * ROW_WARPS * TOKEN_WARPS;
  static constexpr int SLICES = ROWS / ROW_WARPS / 16;    // of 16 rows, a warp
  static constexpr int OCTETS = TOKENS / TOKEN_WARPS / 8;  // of 8 tokens, a warp
  static constexpr int W_BYTES = ROWS * TILE * 2, STAGE = W_BYTES + TOKENS * TILE * 2;
  static constexpr bool SUMS_SHARED = SLICES * OCTETS >= 8;  // of the segments before: registers are short
  static constexpr int STAGES = SUMS_SHARED ? 3 : 4, PITCH = ROWS + 4;
  static constexpr int BYTES = STAGES * STAGE + (SUMS_SHARED ? ROWS * TOKENS * 4 : 0);
  static constexpr int BLOCKS = TOKENS >= 128 ? 1 : TOKENS >= 64 ? 3 : 5;  // a multiprocessor
  static_assert(TOKENS * PITCH * 4 <= STAGES * STAGE, "the staged sums reuse the pipeline");
  static_assert(TOKENS * 8 % THREADS == 0 && W_BYTES % (THREADS * 16) == 0, "copies come out even");
};

// For the tile (expert, first, count) of tiles[0 .. *num_tiles - 1]: out = act(W[expert] x), or without `act`.
// by_token (the up matrix): x has a row a token, out a row a place in `order`; otherwise x has a row a place and out
// a row an entry. k, blocks, rows, pitch, act, gated as in `one_up`; segments of K. most: tiles the grid allows for.
// Grid: (ceil(ceil(rows / ROWS) / GROUP) * GROUP * most). GROUP row tiles pass over all tiles of entries before the
// next ones begin, so that both operands stay in L2. Bound by the tensor cores, or by memory for few entries.
template <class T, int ROWS, int TOKENS, int ROW_WARPS, int TOKEN_WARPS>
__global__ void __launch_bounds__(Shape<ROWS, TOKENS, ROW_WARPS, TOKEN_WARPS>::THREADS,
                                  Shape<ROWS, TOKENS, ROW_WARPS, TOKEN_WARPS>::BLOCKS)
    many(T* out, const T* x, const u8* __restrict__ weights, const int* order, const int4* tiles, const int* num_tiles,
         int top_k, int by_token, int k, int blocks, int segments, int rows, int pitch, int act, int gated, int group) {
  using S = Shape<ROWS, TOKENS, ROW_WARPS, TOKEN_WARPS>;
  using namespace ptx;
  constexpr int THREADS = S::THREADS, STAGES = S::STAGES;
  constexpr int COPIES = TOKENS * 8 / THREADS;  // of x, a thread and stage
  extern __shared__ __align__(1024) u8 shared[];
  const u32 base = smem(shared);
  const int thread = threadIdx.x, warp = thread / 32, lane = thread % 32;
  const int row_warp = warp % ROW_WARPS, token_warp = warp / ROW_WARPS;
  if (by_token) griddep_wait();
  griddep_launch();
  const int count_tiles = __ldcg(num_tiles), heap = group * count_tiles, row_tiles = (rows + ROWS - 1) / ROWS;
  if (count_tiles == 0) return;
  const int within = blockIdx.x % heap, row_tile = blockIdx.x / heap * group + within % group;
  if (row_tile >= row_tiles) return;
  const int4 tile = __ldcg(tiles + within / group);
  const int first = tile.y, count = tile.z;

  const u64 strip = static_cast<u64>(blocks) * TILE_BYTES;  // 64 rows of W
  const u8* const matrix = weights + tile.x * matrix_bytes(rows, blocks);
  const int strips = (rows + TILE - 1) / TILE;
  const T* source[COPIES];
#pragma unroll
  for (int c = 0; c < COPIES; c++) {
    const int row = (thread + c * THREADS) / 8;
    source[c] = nullptr;
    if (row < count) {
      const int place = first + row;
      source[c] = x + static_cast<size_t>(by_token ? __ldcg(order + place) / top_k : place) * k + thread % 8 * 8;
    }
  }
  const auto load_weights = [&](int block) {
    if (block >= blocks) return;
    const u32 at = base + block % STAGES * S::STAGE;
#pragma unroll
    for (int i = 0; i < S::W_BYTES; i += THREADS * 16) {
      const int byte = i + thread * 16, strip_of = min(row_tile * (ROWS / TILE) + byte / TILE_BYTES, strips - 1);
      cp_async16(at + byte, matrix + strip_of * strip + static_cast<u64>(block) * TILE_BYTES + byte % TILE_BYTES);
    }
  };
  const auto load_x = [&](int block) {
    if (block < blocks) {
      const u32 at = base + block % STAGES * S::STAGE;
      const bool inside = block * TILE + thread % 8 * 8 < k;
#pragma unroll
      for (int c = 0; c < COPIES; c++) {
        const int row = (thread + c * THREADS) / 8;
        if (source[c])
          cp_async16(at + S::W_BYTES + row * 128 + (thread % 8 ^ row % 8) * 16, inside ? source[c] + block * TILE : x,
                     inside ? 16 : 0);
      }
    }
    cp_async_commit();  // also when empty, so that the count of groups stays in step
  };
  for (int s = 0; s < STAGES - 1; s++) load_weights(s);
  if (!by_token) griddep_wait();
  for (int s = 0; s < STAGES - 1; s++) load_x(s);

  // The sum of the segments before this one: four floats of each of a thread's fragments, in registers or in shared
  // memory, where only this thread looks at them.
  float acc[S::SLICES][S::OCTETS][4] = {};
  float sum[S::SUMS_SHARED ? 1 : S::SLICES][S::SUMS_SHARED ? 1 : S::OCTETS][4] = {};
  float4* const sums = reinterpret_cast<float4*>(shared + STAGES * S::STAGE) + thread;
  const auto held = [&](int m, int j) -> float4 {
    if constexpr (S::SUMS_SHARED)
      return sums[(m * S::OCTETS + j) * THREADS];
    else
      return make_float4(sum[m][j][0], sum[m][j][1], sum[m][j][2], sum[m][j][3]);
  };
  int segment = 0, end = segment_start(blocks, segments, 1);
  for (int block = 0; block < blocks; block++) {
    cp_async_wait<STAGES - 2>();
    __syncthreads();
    load_weights(block + STAGES - 1);
    load_x(block + STAGES - 1);
    const u32 w_base = base + block % STAGES * S::STAGE + row_warp * (S::SLICES * SLICE_BYTES);
    const u32 x_base = base + block % STAGES * S::STAGE + S::W_BYTES + token_warp * (S::OCTETS * 8 * 128);
#pragma unroll
    for (int step = 0; step < TILE / 16; step++) {
      u32 a[S::SLICES][4];
#pragma unroll
      for (int m = 0; m < S::SLICES; m++) {
        const int row = m * 16 + lane % 16;
        ldmatrix_x4(a[m], w_base + row * 128 + ((2 * step + lane / 16) ^ row % 8) * 16);
      }
#pragma unroll
      for (int j = 0; j < S::OCTETS; j += 2) {
        u32 b[4];
        const int token = 8 * j + lane / 16 * 8 + lane % 8, half = 2 * step + lane / 8 % 2;
        ldmatrix_x4(b, x_base + token * 128 + (half ^ token % 8) * 16);
#pragma unroll
        for (int m = 0; m < S::SLICES; m++) {
          mma_16816(acc[m][j], a[m], {b[0], b[1]}, T());
          mma_16816(acc[m][j + 1], a[m], {b[2], b[3]}, T());
        }
      }
    }
    if (block + 1 == end) {
#pragma unroll
      for (int m = 0; m < S::SLICES; m++)
#pragma unroll
        for (int j = 0; j < S::OCTETS; j++) {
          float4 now = make_float4(acc[m][j][0], acc[m][j][1], acc[m][j][2], acc[m][j][3]);
          if (segment > 0) {
            const float4 before = held(m, j);
            now.x = before.x + now.x, now.y = before.y + now.y, now.z = before.z + now.z, now.w = before.w + now.w;
          }
          if constexpr (S::SUMS_SHARED)
            sums[(m * S::OCTETS + j) * THREADS] = now;
          else
            sum[m][j][0] = now.x, sum[m][j][1] = now.y, sum[m][j][2] = now.z, sum[m][j][3] = now.w;
#pragma unroll
          for (int i = 0; i < 4; i++) acc[m][j][i] = 0.f;
        }
      segment++;
      end = segment_start(blocks, segments, segment + 1);
    }
  }
  cp_async_wait<0>();
  __syncthreads();

  float* const staging = reinterpret_cast<float*>(shared);  // [TOKENS][PITCH]
#pragma unroll
  for (int m = 0; m < S::SLICES; m++)
#pragma unroll
    for (int j = 0; j < S::OCTETS; j++) {
      const float4 total = held(m, j);
#pragma unroll
      for (int i = 0; i < 4; i++) {
        const int row = (row_warp * S::SLICES + m) * 16 + lane / 4 + i / 2 * 8;
        const int token = (token_warp * S::OCTETS + j) * 8 + lane % 4 * 2 + i % 2;
        staging[token * S::PITCH + row] = i == 0 ? total.x : i == 1 ? total.y : i == 2 ? total.z : total.w;
      }
    }
  __syncthreads();
  write_tile<T, ROWS, S::PITCH, S::THREADS>(out, staging, order, thread, first, count, row_tile, rows, pitch, act, gated, by_token);
}

}  // namespace rvllm::experts

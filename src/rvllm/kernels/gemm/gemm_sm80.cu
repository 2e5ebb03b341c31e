// Matrix kernel for GPUs without wgmma (sm_80 and later): mma.sync fed by cp.async, the same packed weights.
// A block sums ROWS rows of W by TOKENS tokens over all of K: up to 64 tokens 4 warps with 16 of 64 rows each, for
// 128 tokens 8 warps with 32 of 128 rows and half of the tokens each.
//
// grid (row tiles * G, token tiles / G): G neighbouring blocks take the same rows and other tokens, so that weights
// come from L2 for all but one of them, and G token tiles of x stay there.
#include "gemm/gemm.cuh"

namespace rvllm::gemm {

template <int TOKENS>
struct Sm80 {
  static constexpr bool LARGE = TOKENS > 64;
  static constexpr int ROWS = LARGE ? 128 : 64, WARPS_ALONG_TOKENS = LARGE ? 2 : 1;
  static constexpr int THREADS = 128 * WARPS_ALONG_TOKENS, STAGES = LARGE ? 3 : 4;
  static constexpr int WEIGHTS = ROWS / TILE * TILE_BYTES, STAGE = WEIGHTS + TOKENS * TILE * 2;
  static constexpr int M = ROWS / 64, N = TOKENS / 8 / WARPS_ALONG_TOKENS;  // instructions of a warp along rows, tokens
  static constexpr int PITCH = ROWS + 4;                                    // floats of a token's sums
  static_assert(TOKENS * PITCH * 4 <= STAGES * STAGE, "the staged sums reuse the pipeline");
};

// x: [tokens, k] row-major with `x_pitch` elements from row to row, k and x_pitch multiples of 8, 16-byte
// aligned. The rest as in gemm/gemm_sm90.cu.
template <class T, int TOKENS>
__global__ void __launch_bounds__(Sm80<TOKENS>::THREADS)
    gemm(const T* __restrict__ x, const u8* __restrict__ weights, void* out, const void* bias, const void* residual,
         int kind, int tokens, int rows, int pitch, float scale, float soft_cap, int blocks, int segments, int k,
         int x_pitch) {
  using namespace ptx;
  using S = Sm80<TOKENS>;
  constexpr int STAGES = S::STAGES, STAGE = S::STAGE, M = S::M, N = S::N;
  extern __shared__ __align__(1024) u8 shared[];
  const u32 base = smem(shared);
  const int thread = threadIdx.x, warp = thread / 32, lane = thread % 32;
  const int row_tiles = (rows + S::ROWS - 1) / S::ROWS, together = gridDim.x / row_tiles;
  const int row_tile = blockIdx.x / together, token0 = (blockIdx.y * together + blockIdx.x % together) * TOKENS;
  const int last_tile = (rows + TILE - 1) / TILE - 1;
  const Epilogue e{out, bias, residual, kind, tokens, rows, pitch, scale, soft_cap};

  griddep_launch();
  griddep_wait();
  if (token0 >= tokens) return;
  const auto load = [&](int block) {
    if (block < blocks) {
      const u32 at = base + block % STAGES * STAGE;
#pragma unroll
      for (int r = 0; r < S::ROWS / TILE; r++) {
        const u64 tile = min(row_tile * (S::ROWS / TILE) + r, last_tile);
        const u8* from = weights + (tile * blocks + block) * TILE_BYTES;
        for (int i = thread * 16; i < TILE_BYTES; i += S::THREADS * 16) cp_async16(at + r * TILE_BYTES + i, from + i);
      }
      for (int i = thread; i < TOKENS * 8; i += S::THREADS) {
        const int row = i / 8, chunk = i % 8, column = block * TILE + chunk * 8;
        const bool inside = token0 + row < tokens && column < k;
        const T* from = inside ? x + static_cast<size_t>(token0 + row) * x_pitch + column : x;
        cp_async16(at + S::WEIGHTS + row * 128 + (chunk ^ row % 8) * 16, from, inside ? 16 : 0);
      }
    }
    cp_async_commit();  // also when empty, so that the count of groups stays in step
  };
  for (int s = 0; s < STAGES - 1; s++) load(s);

  // A warp's rows row0 .. row0 + 16 * M - 1 and tokens from column0 on, both within the block's.
  const int row0 = warp % 4 * 16 * M, column0 = warp / 4 * 8 * N;
  float sum[M][N][4], acc[M][N][4] = {};
  int segment = 0, end = segment_start(blocks, segments, 1);
  for (int block = 0; block < blocks; block++) {
    cp_async_wait<STAGES - 2>();
    __syncthreads();
    load(block + STAGES - 1);
    const u32 a_base = base + block % STAGES * STAGE, b_base = a_base + S::WEIGHTS;
#pragma unroll
    for (int step = 0; step < TILE / 16; step++) {
      u32 a[M][4];
#pragma unroll
      for (int m = 0; m < M; m++) {
        const int row = row0 + m * 16 + lane % 16, chunk = 2 * step + lane / 16;
        ldmatrix_x4(a[m], a_base + row * 128 + (chunk ^ row % 8) * 16);
      }
#pragma unroll
      for (int j = 0; j < N; j += 2) {
        u32 b[4];
        const int token = column0 + 8 * j + lane / 16 * 8 + lane % 8, half = 2 * step + lane / 8 % 2;
        ldmatrix_x4(b, b_base + token * 128 + (half ^ token % 8) * 16);
#pragma unroll
        for (int m = 0; m < M; m++) {
          mma_16816(acc[m][j], a[m], {b[0], b[1]}, T());
          mma_16816(acc[m][j + 1], a[m], {b[2], b[3]}, T());
        }
      }
    }
    if (block + 1 == end) {
#pragma unroll
      for (int m = 0; m < M; m++)
#pragma unroll
        for (int j = 0; j < N; j++)
#pragma unroll
          for (int i = 0; i < 4; i++) {
            sum[m][j][i] = segment == 0 ? acc[m][j][i] : sum[m][j][i] + acc[m][j][i];
            acc[m][j][i] = 0.f;
          }
      segment++;
      end = segment_start(blocks, segments, segment + 1);
    }
  }
  cp_async_wait<0>();
  __syncthreads();

  float* staging = reinterpret_cast<float*>(shared);
  const int row = row0 + lane / 4, column = column0 + lane % 4 * 2;
#pragma unroll
  for (int m = 0; m < M; m++)
#pragma unroll
    for (int j = 0; j < N; j++)
#pragma unroll
      for (int i = 0; i < 4; i++)
        staging[(8 * j + column + i % 2) * S::PITCH + row + m * 16 + i / 2 * 8] = sum[m][j][i];
  __syncthreads();
  const int count = min(TOKENS, tokens - token0);
  finish_tile<T, S::ROWS, 2>(e, token0, row_tile * S::ROWS, 0, count * items_per_token<S::ROWS>(kind), thread, S::THREADS,
                             [&](int token, int r, float(&q)[4]) {
                               const float4 f = *reinterpret_cast<const float4*>(staging + token * S::PITCH + r);
                               q[0] = f.x, q[1] = f.y, q[2] = f.z, q[3] = f.w;
                             });
}

}  // namespace rvllm::gemm

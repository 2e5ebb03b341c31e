// Matrix kernel for GPUs without wgmma (sm_80 and later): mma.sync fed by cp.async, the same packed weights.
//
// A block sums ROWS rows of W by TOKENS tokens; its warps have equal parts of that. 64 of K at a time arrive in a ring of
// `stages` of shared memory, as many as the card has room for. A warp loads the operands of the next 16 of K while it
// multiplies the present ones.
//
// grid (row tiles * G, token tiles / G, splits): G neighbouring blocks take the same rows and other tokens, so that weights
// come from memory for one of them and from L2 for the others, and G token tiles of x stay there. splits is 1, and a block
// sums all of K, segment after segment; or the number of segments, and each block has one of them. Then it leaves its sums
// in `partials`, and whichever block of an output tile comes last adds all of them up, in ascending order: which one that
// is changes no bit.
#include "gemm/gemm.cuh"

namespace rvllm::gemm {

inline constexpr int MAX_SPLIT_TILES = 8192;  // output tiles of a split product: their counters stand before the sums

template <int ROWS, int TOKENS, int ROW_WARPS, int TOKEN_WARPS>
struct Mma {
  static constexpr int THREADS = 32 * ROW_WARPS * TOKEN_WARPS;
  static constexpr int WARP_ROWS = ROWS / ROW_WARPS, WARP_TOKENS = TOKENS / TOKEN_WARPS;
  static constexpr int M = WARP_ROWS / 16, N = WARP_TOKENS / 8;  // instructions of a warp for 16 of K
  static constexpr int WEIGHT_BYTES = ROWS * TILE * 2, STAGE = (ROWS + TOKENS) * TILE * 2;
  static constexpr bool KEEPS = M * N <= 16;  // registers for the sum of earlier segments beside this one's
  static constexpr int PITCH = ROWS + 4;      // floats from token to token of the staged sums
  // Warps side by side whose sums are staged at once, in what two stages of the ring take.
  static constexpr int fits(int warps) { return warps * WARP_TOKENS * PITCH * 4 <= 2 * STAGE ? warps : fits(warps / 2); }
  static constexpr int CHUNK = fits(TOKEN_WARPS) * WARP_TOKENS;
  static_assert(CHUNK > 0 && (N == 1 || N % 2 == 0) && 512 % THREADS == 0, "tiles of the table in specs.py");
};

__device__ __forceinline__ void wait_for_all_but(int pending) {
  switch (pending) {
    case 0: return ptx::cp_async_wait<0>();
    case 1: return ptx::cp_async_wait<1>();
    case 2: return ptx::cp_async_wait<2>();
    case 3: return ptx::cp_async_wait<3>();
    default: return ptx::cp_async_wait<4>();
  }
}

// Where a warp finds its rows of W and its tokens in a stage: this lane's row, and its chunk of it before the swizzle.
template <class Shape>
struct Operands {
  static constexpr int PAIR = Shape::N == 1 ? 1 : 2;  // instructions whose tokens one load brings
  u32 weights, weight_chunk, x, x_chunk;

  // 16 of K from step * 16 on; `at`: bytes from the first stage.
  __device__ __forceinline__ void load_weights(u32 (&a)[Shape::M][4], u32 at, int step) const {
#pragma unroll
    for (int m = 0; m < Shape::M; m++) ptx::ldmatrix_x4(a[m], weights + at + m * 16 * 128 + (weight_chunk ^ step * 32));
  }
  __device__ __forceinline__ void load_x(u32 (&b)[Shape::N][2], int n, u32 at, int step) const {
    const u32 from = x + at + n * 8 * 128 + (x_chunk ^ step * 32);
    if constexpr (PAIR == 1) {
      ptx::ldmatrix_x2(b[n], from);
    } else {
      u32 both[4];
      ptx::ldmatrix_x4(both, from);
      b[n][0] = both[0], b[n][1] = both[1], b[n + 1][0] = both[2], b[n + 1][1] = both[3];
    }
  }
};

// Of one output tile all segments' sums, in ascending order, if this block is the last to bring one; false if not.
// arrived: a word of shared memory that is free once all threads are here.
template <class Shape>
__device__ __forceinline__ bool add_up(float (&sum)[Shape::M][Shape::N][4], void* partials, int tile, int segments,
                                       int segment, int thread, u32* arrived) {
  constexpr int QUADS = Shape::M * Shape::N, PART = QUADS * Shape::THREADS;
  u32* const counter = static_cast<u32*>(partials) + tile;
  float4* const sums = reinterpret_cast<float4*>(static_cast<u32*>(partials) + MAX_SPLIT_TILES) +
                       static_cast<size_t>(tile) * segments * PART + thread;
#pragma unroll
  for (int q = 0; q < QUADS; q++) {
    const float(&v)[4] = sum[q / Shape::N][q % Shape::N];
    sums[segment * PART + q * Shape::THREADS] = {v[0], v[1], v[2], v[3]};
  }
  __threadfence();
  __syncthreads();
  if (thread == 0) *arrived = ptx::add_acq_rel(counter, 1);
  __syncthreads();
  if (*arrived != static_cast<u32>(segments) - 1) return false;
  __threadfence();
  if (thread == 0) *counter = 0;  // for the next launch
  const auto each = [&](int s, auto what) {
#pragma unroll
    for (int q = 0; q < QUADS; q++) {
      const uint4 part = ptx::load_l2(sums + s * PART + q * Shape::THREADS);
      float(&to)[4] = sum[q / Shape::N][q % Shape::N];
      what(to[0], __uint_as_float(part.x)), what(to[1], __uint_as_float(part.y));
      what(to[2], __uint_as_float(part.z)), what(to[3], __uint_as_float(part.w));
    }
  };
  each(0, [](float& to, float part) { to = part; });
  for (int s = 1; s < segments; s++) each(s, [](float& to, float part) { to += part; });
  return true;
}

// x: [tokens, k] row-major with `x_pitch` elements from row to row, k and x_pitch multiples of 8, 16-byte aligned.
// partials: MAX_SPLIT_TILES counters that are zero, then [output tiles, segments, sums of a tile] floats; of a split product
// alone. The rest as in gemm/gemm_sm90.cu.
template <class T, int ROWS, int TOKENS, int ROW_WARPS, int TOKEN_WARPS, int MIN_BLOCKS>
__global__ void __launch_bounds__(32 * ROW_WARPS * TOKEN_WARPS, MIN_BLOCKS)
    gemm(const T* __restrict__ x, const u8* __restrict__ weights, void* out, const void* bias, const void* residual,
         int kind, int tokens, int rows, int pitch, float scale, float soft_cap, int blocks, int segments, int k,
         int x_pitch, int stages, void* partials) {
  using namespace ptx;
  using Shape = Mma<ROWS, TOKENS, ROW_WARPS, TOKEN_WARPS>;
  constexpr int THREADS = Shape::THREADS, M = Shape::M, N = Shape::N, STAGE = Shape::STAGE, STEPS = TILE / 16;
  extern __shared__ __align__(1024) u8 shared[];
  const u32 base = smem(shared);
  const int thread = threadIdx.x, warp = thread / 32, lane = thread % 32;
  const int row_tiles = (rows + ROWS - 1) / ROWS, together = gridDim.x / row_tiles, row_tile = blockIdx.x / together;
  const int token_tile = blockIdx.y * together + blockIdx.x % together, token0 = token_tile * TOKENS;
  const bool split = gridDim.z > 1;
  const int first = split ? segment_start(blocks, segments, blockIdx.z) : 0;
  const int last = split ? segment_start(blocks, segments, blockIdx.z + 1) : blocks;

  // A thread copies 16 bytes here and there: of weights THREADS apart, of x the same chunk of every THREADS / 8th token.
  const auto load_weights = [&](int block, int slot) {
    const u32 at = base + slot * STAGE + thread * 16;
#pragma unroll
    for (int i = 0; i < ROWS * 8 / THREADS; i++) {
      const int tile = row_tile * (ROWS / TILE) + i * THREADS / 512;
      const bool exists = ROWS == TILE || tile * TILE < rows;
      const u8* from = weights + (static_cast<u64>(exists ? tile : 0) * blocks + block) * TILE_BYTES;
      cp_async16(at + i * THREADS * 16, from + i * THREADS % 512 * 16 + thread * 16, exists ? 16 : 0);
    }
  };
  const int x_row = thread / 8, x_column = thread % 8;
  const T* const x_from = x + static_cast<size_t>(token0 + x_row) * x_pitch + x_column * 8;
  const auto load_x = [&](int block, int slot) {
    const u32 at = base + slot * STAGE + Shape::WEIGHT_BYTES + x_row * 128 + (x_column ^ x_row % 8) * 16;
    const int column = block * TILE;
    const bool within = column + x_column * 8 < k;
#pragma unroll
    for (int row = 0; row < TOKENS; row += THREADS / 8) {
      if (TOKENS < THREADS / 8 && x_row >= TOKENS) break;
      const bool inside = within && token0 + x_row + row < tokens;
      const T* from = inside ? x_from + static_cast<size_t>(row) * x_pitch + column : x;
      cp_async16(at + row * 128, from, inside ? 16 : 0);
    }
  };

  griddep_launch();
  if (token0 < tokens)
    for (int s = 0; s < stages - 1; s++)
      if (first + s < last) load_weights(first + s, s);
  griddep_wait();
  if (token0 >= tokens) return;
  for (int s = 0; s < stages - 1; s++) {
    if (first + s < last) load_x(first + s, s);
    cp_async_commit();  // also when empty, so that the count of groups stays in step
  }

  const int warp_row = warp % ROW_WARPS * Shape::WARP_ROWS, warp_token = warp / ROW_WARPS * Shape::WARP_TOKENS;
  const int x_lane = (N == 1 ? 0 : lane / 16 * 8) + lane % 8;
  const Operands<Shape> operands{base + (warp_row + lane % 16) * 128, (lane / 16 ^ lane % 8) * 16u,
                                 base + Shape::WEIGHT_BYTES + (warp_token + x_lane) * 128, (lane / 8 % 2 ^ lane % 8) * 16u};
  u32 a[2][M][4], b[N][2];
  wait_for_all_but(stages - 2);
  __syncthreads();
  operands.load_weights(a[0], 0, 0);
#pragma unroll
  for (int n = 0; n < N; n += Operands<Shape>::PAIR) operands.load_x(b, n, 0, 0);

  constexpr int EARLIER_M = Shape::KEEPS ? M : 1, EARLIER_N = Shape::KEEPS ? N : 1;
  float acc[M][N][4] = {}, earlier[EARLIER_M][EARLIER_N][4];
  int slot = 0, filled = stages - 1;  // of the ring: what is multiplied, what is loaded next
  int segment = 0, end = split ? last : segment_start(blocks, segments, 1);
  for (int block = first; block < last; block++) {
    const int next = slot + 1 == stages ? 0 : slot + 1;
#pragma unroll
    for (int step = 0; step < STEPS; step++) {
      if (step == STEPS - 1) {  // the next stage is there, and no warp reads this one any more
        wait_for_all_but(stages - 2);
        __syncthreads();
      }
      const u32 at = (step == STEPS - 1 ? next : slot) * STAGE;
      operands.load_weights(a[(step + 1) % 2], at, (step + 1) % STEPS);
      if (step == 0) {
        if (const int ahead = block + stages - 1; ahead < last) load_weights(ahead, filled), load_x(ahead, filled);
        cp_async_commit();
        filled = slot;
      }
#pragma unroll
      for (int n = 0; n < N; n++) {
#pragma unroll
        for (int m = 0; m < M; m++) mma_16816(acc[m][n], a[step % 2][m], b[n], T());
        if (constexpr int PAIR = Operands<Shape>::PAIR; n % PAIR == PAIR - 1)  // their registers are free for the next
          operands.load_x(b, n + 1 - PAIR, at, (step + 1) % STEPS);
      }
    }
    slot = next;
    if constexpr (Shape::KEEPS) {
      if (block + 1 == end) {
#pragma unroll
        for (int i = 0; i < M * N * 4; i++) {
          float &to = earlier[i / 4 / N][i / 4 % N][i % 4], &own = acc[i / 4 / N][i / 4 % N][i % 4];
          to = segment == 0 ? own : to + own;
          own = 0.f;
        }
        segment++;
        end = split ? 0 : segment_start(blocks, segments, segment + 1);
      }
    }
  }
  cp_async_wait<0>();
  const auto finish_sums = [&](float (&sum)[M][N][4]) {
    const int tile = token_tile * row_tiles + row_tile;
    if (split && !add_up<Shape>(sum, partials, tile, segments, blockIdx.z, thread, reinterpret_cast<u32*>(shared))) return;
    Epilogue e{out, bias, residual, kind, tokens, rows, pitch, scale, soft_cap};
    e.best_only = e.asks_for_best();
    float* const staging = reinterpret_cast<float*>(shared);
    constexpr int PITCH = Shape::PITCH, CHUNK = Shape::CHUNK;
    const int row = warp_row + lane / 4, column = warp_token % CHUNK + lane % 4 * 2;
#pragma unroll 1
    for (int begin = 0; begin < TOKENS; begin += CHUNK) {
      const int count = min(CHUNK, tokens - token0 - begin);
      if (count <= 0) return;
      __syncthreads();  // the ring, or the chunk before, has been read
      if (warp_token / CHUNK * CHUNK == begin) {
#pragma unroll
        for (int m = 0; m < M; m++)
#pragma unroll
          for (int n = 0; n < N; n++)
#pragma unroll
            for (int i = 0; i < 4; i++)
              staging[(n * 8 + column + i % 2) * PITCH + row + m * 16 + i / 2 * 8] = sum[m][n][i];
      }
      __syncthreads();
      if (e.best_only) {
        for (int r = 0; r < ROWS && row_tile * ROWS + r < rows; r += TILE)
          store_bests<T>(e, staging + r, PITCH, token0 + begin, row_tile * ROWS + r, count, thread, THREADS);
        continue;
      }
      finish_staged<T, ROWS, PITCH>(e, staging, token0 + begin, row_tile * ROWS, count, thread, THREADS);
    }
  };
  if constexpr (Shape::KEEPS)
    finish_sums(earlier);
  else
    finish_sums(acc);
}

}  // namespace rvllm::gemm

// Attention among all tokens of a text (encoders): no cache, no mask, whole texts of any lengths in one batch.
//
// A block takes 64 query rows of one (text, head), 16 a warp, and walks over the text's keys in tiles of 64 rows:
// keys are fetched while values are used and the other way round. A tile's state comes from that tile alone and
// tiles are merged in ascending order (attention/attention.cuh), so a text's numbers do not depend on its company.
// Bound by latency at short texts, by the tensor cores (mma.sync) at long ones.
#include "attention/attention.cuh"

inline constexpr int WARPS = 4, THREADS = WARPS * 32, ROWS = WARPS * 16;

// Copies rows [0, rows) of a tile of TILE rows, `pitch` elements apart, and zeros the others.
template <typename T, int D>
__device__ __forceinline__ void load_rows(T* tile, const T* source, int pitch, int rows) {
  constexpr int CHUNKS = D / 8;
#pragma unroll 4
  for (int piece = threadIdx.x; piece < TILE * CHUNKS; piece += THREADS) {
    const int row = piece / CHUNKS, chunk = piece % CHUNKS;
    const bool valid = row < rows;
    const T* const from = valid ? source + (size_t)row * pitch + chunk * 8 : source;
    cp_async16(smem(tile + row * (D + PAD) + chunk * 8), from, valid ? 16 : 0);
  }
}

// out [T, heads * D], qkv [T, 3 * heads * D]: queries, keys, values. offsets int32 [texts + 1]: the first row of
// each text. work int32 [n, 2]: (text, first row) of each block, text -1 for none. Grid: (n, heads), 128 threads.
template <typename T, int D>
__global__ void __launch_bounds__(THREADS)
text_attention(T* __restrict__ out, const T* __restrict__ qkv, const int* offsets, const int2* work, int heads,
               float scale) {
  griddep_launch();
  constexpr int STRIDE = D + PAD;
  extern __shared__ __align__(128) unsigned char shared[];
  T* const q_tile = reinterpret_cast<T*>(shared);
  T* const k_tile = q_tile + ROWS * STRIDE;
  T* const v_tile = k_tile + TILE * STRIDE;
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, head = blockIdx.y;
  const int2 mine = work[blockIdx.x];
  if (mine.x < 0) {  // a graph is captured for the most blocks its steps can have
    griddep_wait();
    return;
  }
  const int offset = offsets[mine.x], length = offsets[mine.x + 1] - offset;
  const int pitch = 3 * heads * D, tiles = (length + TILE - 1) / TILE;
  const T* const queries = qkv + (size_t)offset * pitch + head * D;
  const T* const keys = queries + heads * D;
  const T* const values = keys + heads * D;
  const auto load = [&](T* tile, const T* from, int t) {
    load_rows<T, D>(tile, from + (size_t)t * TILE * pitch, pitch, length - t * TILE);
  };

  griddep_wait();
  load_rows<T, D>(q_tile, queries + (size_t)mine.y * pitch, pitch, length - mine.y);
  load(k_tile, keys, 0);
  cp_async_commit();
  const float factor = __fmul_rn(scale, LOG2E);
  const bool idle = mine.y + warp * 16 >= length;
  float M[2] = {-INFINITY_F, -INFINITY_F}, L[2] = {0.f, 0.f}, x[D / 8][4] = {};
  cp_async_wait<0>();
  __syncthreads();
  load(v_tile, values, 0);
  cp_async_commit();
  for (int t = 0; t < tiles; t++) {
    const int rows = min(TILE, length - t * TILE), blocks = (rows + 15) / 16;
    u32 p[4][4];
    float m[2], l[2];
    if (!idle) {
      float s[8][4];
      tile_scores<T, D>(s, q_tile + warp * 16 * STRIDE, k_tile, blocks, lane);
      if (rows < TILE) {
        const int lo[2] = {0, 0}, hi[2] = {rows - 1, rows - 1};
        tile_mask(s, lo, hi, lane);
      }
      tile_softmax<T>(s, p, factor, m, l);
    }
    cp_async_wait<0>();
    __syncthreads();  // the values are here, the keys have been read
    if (t + 1 < tiles) load(k_tile, keys, t + 1);
    cp_async_commit();
    if (!idle) {
      Factors f[2];
#pragma unroll
      for (int h = 0; h < 2; h++) {
        f[h] = merge_maximum(M[h], m[h]);
        L[h] = merge(L[h], l[h], f[h]);
      }
      tile_values<T, D>(p, v_tile, blocks, lane, [&](int g, const float (&r)[2][4]) {
#pragma unroll
        for (int n = 0; n < 2; n++)
#pragma unroll
          for (int i = 0; i < 4; i++) x[2 * g + n][i] = merge(x[2 * g + n][i], r[n][i], f[i / 2]);
      });
    }
    cp_async_wait<0>();
    __syncthreads();  // the next keys are here, the values have been read
    if (t + 1 < tiles) load(v_tile, values, t + 1);
    cp_async_commit();
  }
  cp_async_wait<0>();
#pragma unroll
  for (int h = 0; h < 2; h++) {
    const int row = mine.y + warp * 16 + lane / 4 + 8 * h;
    if (row >= length) continue;
    const float over = finish(L[h]);
    T* const target = out + (size_t)(offset + row) * heads * D + head * D + lane % 4 * 2;
#pragma unroll
    for (int n = 0; n < D / 8; n++)
      *reinterpret_cast<u32*>(target + n * 8) = pack2<T>(__fmul_rn(x[n][2 * h], over), __fmul_rn(x[n][2 * h + 1], over));
  }
}

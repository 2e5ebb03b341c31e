// What all matrix kernels share: how weights lie in memory and what happens to a finished sum.
//
//   y[t, n] = sum_k x[t, k] W[n, k], 16-bit operands, float32 sums
//
// Weights are packed once, at load: 64 x 64 tiles, each the 8 KB image of shared memory that the tensor
// cores read (128-byte swizzle), the tiles of 64 rows one behind the other along K. Rows and columns are
// padded with zeros to multiples of 64. See packed_offset and rvllm/backends/cuda/gemm.py.
//
// Batch invariance: K is cut into segments that depend on the weight's shape alone. A segment is summed by
// consecutive 16-wide matrix instructions into one accumulator; the segments' sums are added in ascending
// order. Every variant does exactly that, so the bits of y[t, n] depend on row t of x and row n of W only.
#pragma once

#include "ptx.cuh"

namespace rvllm::gemm {

constexpr int TILE = 64;                     // rows and columns of a packed tile
constexpr int TILE_BYTES = TILE * TILE * 2;  // 8192

// Byte offset of element (row, k) in a packed matrix of `blocks` = ceil(K / 64) tiles a row.
__host__ __device__ inline u64 packed_offset(u64 row, u32 k, u32 blocks) {
  const u32 chunk = (k % TILE / 8) ^ (row % 8);
  return (row / TILE * blocks + k / TILE) * TILE_BYTES + row % TILE * (TILE * 2) + chunk * 16 + k % 8 * 2;
}

// First block of segment s out of `segments`; the same formula as segment_bounds in gemm.py.
__device__ __forceinline__ int segment_start(int blocks, int segments, int s) { return blocks * s / segments; }

// What becomes of the sum. "Rounded" is to the 16-bit type, so that a fused epilogue gives the very bits
// that the separate ops would.
enum Kind : int {
  STORE = 0,           // rounded(sum + bias); with a residual: rounded(residual + scale * that)
  LOGITS = 1,          // float32: cap * tanh((sum * scale + bias) / cap), or without the cap when it is 0
  GATED_SILU = 2,      // rounded(act(gate) * up), gate and up rounded first; rows interleaved by eights
  GATED_GELU = 3,      //   erf form
  GATED_GELU_TANH = 4  //   tanh form
};

struct Epilogue {
  void* out;             // [tokens, pitch]
  const void* bias;      // [rows] in packed row order, or null
  const void* residual;  // [tokens, pitch], may be `out`, or null
  int kind;
  int tokens;  // rows of y to write
  int rows;    // packed rows that exist: N, or 2 * width when gated
  int pitch;   // elements from token to token of out and residual
  float scale, soft_cap;
};

__device__ __forceinline__ float to_float(bf16 v) { return __bfloat162float(v); }
__device__ __forceinline__ float to_float(f16 v) { return __half2float(v); }
template <class T>
__device__ __forceinline__ T rounded(float v);
template <>
__device__ __forceinline__ bf16 rounded<bf16>(float v) { return __float2bfloat16_rn(v); }
template <>
__device__ __forceinline__ f16 rounded<f16>(float v) { return __float2half_rn(v); }

__device__ __forceinline__ float activate(float x, int kind) {
  if (kind == GATED_SILU) return x / (1.f + expf(-x));
  if (kind == GATED_GELU) return 0.5f * x * (1.f + erff(x * 0.70710678f));
  return 0.5f * x * (1.f + tanhf(0.79788456f * (x + 0.044715f * x * x * x)));
}

template <class T>
struct alignas(4 * sizeof(T)) Quad {
  T v[4];
};

// Four elements of row `token` of a [tokens, pitch] matrix from column n; aligned says one access may do.
template <class T>
__device__ __forceinline__ void store_quad(T* matrix, const Quad<T>& q, size_t at, int count, bool aligned) {
  if (aligned && count >= 4) {
    *reinterpret_cast<Quad<T>*>(matrix + at) = q;
  } else {
#pragma unroll
    for (int i = 0; i < 4; i++)
      if (i < count) matrix[at + i] = q.v[i];
  }
}

// Finishes packed rows row .. row + 3 of one token. `row` is a multiple of 4.
template <class T>
__device__ __forceinline__ void finish(const Epilogue& e, int token, int row, const float (&sum)[4]) {
  const int count = e.rows - row;
  if (token >= e.tokens || count <= 0) return;
  const bool aligned = (e.pitch & 3) == 0;
  const size_t at = static_cast<size_t>(token) * e.pitch + row;
  float v[4];
#pragma unroll
  for (int i = 0; i < 4; i++) {
    v[i] = e.kind == LOGITS ? sum[i] * e.scale : sum[i];
    if (e.bias && i < count) v[i] += to_float(static_cast<const T*>(e.bias)[row + i]);
  }
  if (e.kind == LOGITS) {
    Quad<float> q;
#pragma unroll
    for (int i = 0; i < 4; i++) q.v[i] = e.soft_cap > 0.f ? e.soft_cap * tanhf(v[i] / e.soft_cap) : v[i];
    store_quad(static_cast<float*>(e.out), q, at, count, aligned);
    return;
  }
  Quad<T> q;
#pragma unroll
  for (int i = 0; i < 4; i++) q.v[i] = rounded<T>(v[i]);
  if (e.residual) {
    const T* residual = static_cast<const T*>(e.residual) + at;
    Quad<T> r = q;
    if (aligned && count >= 4) {
      r = *reinterpret_cast<const Quad<T>*>(residual);
    } else {
#pragma unroll
      for (int i = 0; i < 4; i++)
        if (i < count) r.v[i] = residual[i];
    }
#pragma unroll
    for (int i = 0; i < 4; i++) q.v[i] = rounded<T>(to_float(r.v[i]) + to_float(q.v[i]) * e.scale);
  }
  store_quad(static_cast<T*>(e.out), q, at, count, aligned);
}

// Finishes four outputs of one token: packed rows row .. row + 3 hold gates, row + 8 .. row + 11 their ups.
template <class T>
__device__ __forceinline__ void finish_gated(const Epilogue& e, int token, int row, const float (&gate)[4],
                                             const float (&up)[4]) {
  if (token >= e.tokens || row >= e.rows) return;
  const int column = row / 16 * 8 + row % 8;
  Quad<T> q;
#pragma unroll
  for (int i = 0; i < 4; i++) {
    float g = gate[i], u = up[i];
    if (e.bias) {
      g += to_float(static_cast<const T*>(e.bias)[row + i]);
      u += to_float(static_cast<const T*>(e.bias)[row + 8 + i]);
    }
    q.v[i] = rounded<T>(activate(to_float(rounded<T>(g)), e.kind) * to_float(rounded<T>(u)));
  }
  store_quad(static_cast<T*>(e.out), q, static_cast<size_t>(token) * e.pitch + column, e.pitch - column,
             (e.pitch & 3) == 0);
}

// Finishes everything of a staged [tokens][PITCH] float32 tile that falls to one of `threads` threads.
// load(token, row, float (&)[4]) reads four staged sums; first..last are items in units of one quad.
template <class T, int ROWS, class Load>
__device__ __forceinline__ void finish_tile(const Epilogue& e, int token0, int row0, int first, int last, int thread,
                                            int threads, Load load) {
  if (e.kind >= GATED_SILU) {
    constexpr int ITEMS = ROWS / 8;
    for (int i = first + thread; i < last; i += threads) {
      const int token = i / ITEMS, q = i % ITEMS, row = q / 2 * 16 + q % 2 * 4;
      float gate[4], up[4];
      load(token, row, gate);
      load(token, row + 8, up);
      finish_gated<T>(e, token0 + token, row0 + row, gate, up);
    }
  } else {
    constexpr int ITEMS = ROWS / 4;
    for (int i = first + thread; i < last; i += threads) {
      const int token = i / ITEMS, row = i % ITEMS * 4;
      float sum[4];
      load(token, row, sum);
      finish<T>(e, token0 + token, row0 + row, sum);
    }
  }
}

// Quads (or gate/up pairs of quads) that a tile of ROWS rows has for one token.
template <int ROWS>
__device__ __forceinline__ int items_per_token(int kind) {
  return kind >= GATED_SILU ? ROWS / 8 : ROWS / 4;
}

}  // namespace rvllm::gemm

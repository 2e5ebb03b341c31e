// What all matrix kernels share: how weights lie in memory and what happens to a finished sum.
//
//   y[t, n] = sum_k x[t, k] W[n, k], 16-bit operands, float32 sums
//
// Weights are packed once, at load: 64 x 64 tiles, each the 8 KB image of shared memory that the tensor
// cores read (128-byte swizzle), the tiles of 64 rows one behind the other along K. Rows and columns are
// padded with zeros to multiples of 64. See packed_offset and rvllm/backends/cuda/ops/gemm/plan.py.
//
// Batch invariance: K is cut into segments that depend on the weight's shape alone. A segment is summed by
// consecutive 16-wide matrix instructions into one accumulator; the segments' sums are added in ascending
// order. Every variant does exactly that, so the bits of y[t, n] depend on row t of x and row n of W only.
#pragma once

#include "common/activations.cuh"
#include "common/best.cuh"
#include "common/slot.cuh"
#include "ptx/ptx.cuh"

namespace rvllm::gemm {

inline constexpr int TILE = 64;                     // rows and columns of a packed tile
inline constexpr int TILE_BYTES = TILE * TILE * 2;  // 8192

// Byte offset of element (row, k) in a packed matrix of `blocks` = ceil(K / 64) tiles a row.
__host__ __device__ constexpr u64 packed_offset(u64 row, u32 k, u32 blocks) {
  const u32 chunk = (k % TILE / 8) ^ (row % 8);
  return (row / TILE * blocks + k / TILE) * TILE_BYTES + row % TILE * (TILE * 2) + chunk * 16 + k % 8 * 2;
}

// First block of segment s out of `segments`.
__device__ __forceinline__ int segment_start(int blocks, int segments, int s) { return blocks * s / segments; }

// What becomes of the sum. "Rounded" is to the 16-bit type, so that a fused epilogue gives the very bits
// that the separate ops would.
enum Kind : int {
  STORE = 0,           // rounded(sum + bias); with a residual: rounded(residual + scale * that)
  LOGITS = 1,          // float32: cap * tanh((sum * scale + bias) / cap), or without the cap when it is 0; where only
                       //   the best is asked for, a row begins with the Best of each 64 logits instead, noise included
  GATED_SILU = 2,      // rounded(act(gate) * up), gate and up rounded first; rows interleaved by eights
  GATED_GELU = 3,      //   erf form
  GATED_GELU_TANH = 4, //   tanh form
  GATED_CLAMPED = 5,   //   clamped_gate; scale is its alpha, soft_cap its limit
  ACT_SILU = 6,        // rounded(act(rounded(sum + bias))), in the order of Act
  ACT_GELU = 7,
  ACT_GELU_TANH = 8,
  ACT_RELU = 9,
  ACT_RELU2 = 10
};
__device__ __forceinline__ bool gated(int kind) { return kind >= GATED_SILU && kind <= GATED_CLAMPED; }

struct Epilogue {
  void* out;             // [tokens, pitch]
  const void* bias;      // [rows] in packed row order, or null
  const void* residual;  // [tokens, pitch], may be `out`, or null; of LOGITS the step's word BEST_ONLY
  int kind;
  int tokens;  // rows of y to write
  int rows;    // packed rows that exist: N, or 2 * width when gated (then a multiple of 16)
  int pitch;   // elements from token to token of out and residual
  float scale, soft_cap;
  int best_only = 0;  // see LOGITS

  // Of the step, so that it may be asked before any wait.
  __device__ __forceinline__ int asks_for_best() const {
    return kind == LOGITS && residual ? *static_cast<const int*>(residual) : 0;
  }
  __device__ __forceinline__ drawing::Noise noise_of(int token) const {
    using namespace drawing;
    return best_only == DRAW ? RowDraws{static_cast<const int*>(residual) - BEST_ONLY}.of(token) : Noise{0.f, 0, 0};
  }
};

__device__ __forceinline__ float to_float(bf16 v) { return __bfloat162float(v); }
__device__ __forceinline__ float to_float(f16 v) { return __half2float(v); }
template <class T>
__device__ __forceinline__ T rounded(float v);
template <>
__device__ __forceinline__ bf16 rounded<bf16>(float v) { return __float2bfloat16_rn(v); }
template <>
__device__ __forceinline__ f16 rounded<f16>(float v) { return __float2half_rn(v); }

template <class T>
__device__ __forceinline__ T added(T residual, T value, float scale) {
  return rounded<T>(fmaf(gemm::to_float(value), scale, gemm::to_float(residual)));
}
__device__ __forceinline__ float capped(float v, float cap) { return __fmul_rn(cap, tanhf(__fdiv_rn(v, cap))); }
__device__ __forceinline__ float logit(float sum, float bias, float scale, float cap) {
  const float v = fmaf(sum, scale, bias);
  return cap > 0.f ? capped(v, cap) : v;
}
template <class T>
__device__ __forceinline__ float bias_of(const Epilogue& e, int row) {
  return e.bias && row < e.rows ? gemm::to_float(static_cast<const T*>(e.bias)[row]) : 0.f;
}

template <class T, int COUNT>
struct alignas(COUNT * sizeof(T)) Pack {
  T v[COUNT];
};

// value = act(gate) * up, element by element; the kind is looked at once.
template <class T, int COUNT>
__device__ __forceinline__ void gate_all(Pack<T, COUNT>& value, const Pack<T, COUNT>& gate, const Pack<T, COUNT>& up,
                                         const Epilogue& e) {
  const auto all = [&](auto act) {
#pragma unroll
    for (int i = 0; i < COUNT; i++) value.v[i] = rounded<T>(act(gemm::to_float(gate.v[i]), gemm::to_float(up.v[i])));
  };
  if (e.kind == GATED_SILU)
    all([](float g, float u) { return __fmul_rn(silu(g), u); });
  else if (e.kind == GATED_CLAMPED)
    all([&](float g, float u) { return clamped_gate(g, u, e.soft_cap, e.scale); });
  else
    all([&](float g, float u) { return __fmul_rn(activated(g, e.kind == GATED_GELU ? Act::GELU : Act::GELU_TANH), u); });
}

// Applies the activation of an ACT kind to rounded values; other kinds leave them.
template <class T, int COUNT>
__device__ __forceinline__ void activate_all(Pack<T, COUNT>& value, int kind) {
  if (kind < ACT_SILU) return;
#pragma unroll
  for (int i = 0; i < COUNT; i++)
    value.v[i] = rounded<T>(activated(gemm::to_float(value.v[i]), static_cast<Act>(kind - ACT_SILU)));
}

// COUNT neighbouring elements of a matrix, `left` of which exist; aligned says that one access may do.
template <class T, int COUNT>
__device__ __forceinline__ void store(T* at, const Pack<T, COUNT>& pack, int left, bool aligned) {
  if (aligned && left >= COUNT) {
    *reinterpret_cast<Pack<T, COUNT>*>(at) = pack;
  } else {
#pragma unroll
    for (int i = 0; i < COUNT; i++)
      if (i < left) at[i] = pack.v[i];
  }
}
// Adds the residual at the same place to rounded values.
template <class T, int COUNT>
__device__ __forceinline__ void add_residual(const T* at, Pack<T, COUNT>& pack, float scale, int left, bool aligned) {
  Pack<T, COUNT> r = pack;
  if (aligned && left >= COUNT) {
    r = *reinterpret_cast<const Pack<T, COUNT>*>(at);
  } else {
#pragma unroll
    for (int i = 0; i < COUNT; i++)
      if (i < left) r.v[i] = at[i];
  }
#pragma unroll
  for (int i = 0; i < COUNT; i++) pack.v[i] = added<T>(r.v[i], pack.v[i], scale);
}

// Adds a residual that has been fetched.
template <class T, int COUNT>
__device__ __forceinline__ void add_fetched(const Pack<T, COUNT>& residual, Pack<T, COUNT>& pack, float scale) {
#pragma unroll
  for (int i = 0; i < COUNT; i++) pack.v[i] = added<T>(residual.v[i], pack.v[i], scale);
}

// Finishes packed rows row .. row + 3 of one token. `row` is a multiple of 4.
template <class T>
__device__ __forceinline__ void finish(const Epilogue& e, int token, int row, const float (&sum)[4]) {
  const int left = e.rows - row;
  if (token >= e.tokens || left <= 0) return;
  const bool aligned = (e.pitch & 3) == 0;
  const size_t at = static_cast<size_t>(token) * e.pitch + row;
  if (e.kind == LOGITS) {
    Pack<float, 4> q;
#pragma unroll
    for (int i = 0; i < 4; i++) q.v[i] = logit(sum[i], bias_of<T>(e, row + i), e.scale, e.soft_cap);
    store(static_cast<float*>(e.out) + at, q, left, aligned);
    return;
  }
  Pack<T, 4> q;
#pragma unroll
  for (int i = 0; i < 4; i++) q.v[i] = rounded<T>(sum[i] + bias_of<T>(e, row + i));
  activate_all(q, e.kind);
  if (e.residual) add_residual(static_cast<const T*>(e.residual) + at, q, e.scale, left, aligned);
  store(static_cast<T*>(e.out) + at, q, left, aligned);
}

// What four neighbouring outputs are finished with. Read before their sum is there, it hides a trip to L2, or to memory.
template <class T>
struct Held {
  Pack<T, 4> bias = {}, residual = {};
};
// Whether quads of this product can be finished with what was held: none is gated, none is cut off.
__device__ __forceinline__ bool can_hold(const Epilogue& e) {
  return !gated(e.kind) && e.kind != LOGITS && ((e.pitch | e.rows) & 3) == 0;
}
template <class T>
__device__ __forceinline__ Held<T> hold(const Epilogue& e, int token, int row) {
  Held<T> held;
  if (token >= e.tokens || row >= e.rows) return held;
  const auto at = [](const void* base, size_t i) { return *reinterpret_cast<const Pack<T, 4>*>(static_cast<const T*>(base) + i); };
  if (e.bias) held.bias = at(e.bias, row);
  if (e.residual) held.residual = at(e.residual, static_cast<size_t>(token) * e.pitch + row);
  return held;
}
// As `finish`, where can_hold.
template <class T>
__device__ __forceinline__ void finish_held(const Epilogue& e, int token, int row, const float (&sum)[4], const Held<T>& held) {
  if (token >= e.tokens || row >= e.rows) return;
  Pack<T, 4> q;
#pragma unroll
  for (int i = 0; i < 4; i++) q.v[i] = rounded<T>(sum[i] + gemm::to_float(held.bias.v[i]));
  activate_all(q, e.kind);
  if (e.residual) {
#pragma unroll
    for (int i = 0; i < 4; i++) q.v[i] = added<T>(held.residual.v[i], q.v[i], e.scale);
  }
  store(static_cast<T*>(e.out) + static_cast<size_t>(token) * e.pitch + row, q, 4, true);
}

// Finishes four outputs of one token: packed rows row .. row + 3 hold gates, row + 8 .. row + 11 their ups.
template <class T>
__device__ __forceinline__ void finish_gated(const Epilogue& e, int token, int row, const float (&gate)[4],
                                             const float (&up)[4]) {
  if (token >= e.tokens || row >= e.rows) return;
  Pack<T, 4> q, g, u;
#pragma unroll
  for (int i = 0; i < 4; i++) {
    g.v[i] = rounded<T>(gate[i] + bias_of<T>(e, row + i));
    u.v[i] = rounded<T>(up[i] + bias_of<T>(e, row + 8 + i));
  }
  gate_all(q, g, u, e);
  store(static_cast<T*>(e.out) + static_cast<size_t>(token) * e.pitch + row / 16 * 8 + row % 8, q, 4,
        (e.pitch & 3) == 0);
}

// Finishes what falls to one of `threads` threads of a tile of ROWS rows of float32 sums that lies anywhere:
// load(token, row, float (&)[4]) reads four. first..last are items, see items_per_token. BATCH items are
// read before the first is finished, so that their latencies overlap.
template <class T, int ROWS, int BATCH, class Load>
__device__ __forceinline__ void finish_tile(const Epilogue& e, int token0, int row0, int first, int last, int thread,
                                            int threads, Load load) {
  if (gated(e.kind)) {
    constexpr int ITEMS = ROWS / 8;
#pragma unroll 1
    for (int i = first + thread; i < last; i += threads) {
      const int token = i / ITEMS, q = i % ITEMS, row = q / 2 * 16 + q % 2 * 4;
      float gate[4], up[4];
      load(token, row, gate);
      load(token, row + 8, up);
      finish_gated<T>(e, token0 + token, row0 + row, gate, up);
    }
  } else {
    constexpr int ITEMS = ROWS / 4;
#pragma unroll 1
    for (int i = first + thread; i < last; i += BATCH * threads) {
      float sum[BATCH][4];
#pragma unroll
      for (int b = 0; b < BATCH; b++) {
        const int item = min(i + b * threads, last - 1);  // no branch, so that all loads are in flight at once
        load(item / ITEMS, item % ITEMS * 4, sum[b]);
      }
#pragma unroll
      for (int b = 0; b < BATCH; b++) {
        const int item = i + b * threads;
        if (item < last) finish<T>(e, token0 + item / ITEMS, row0 + item % ITEMS * 4, sum[b]);
      }
    }
  }
}

// Of `count` tokens' sums of 64 packed rows from row0 on, the best logit: tokens `pitch` floats apart, 4 threads each.
template <class T>
__device__ __forceinline__ void store_bests(const Epilogue& e, const float* sums, int pitch, int token0, int row0, int count,
                                            int thread, int threads) {
  constexpr int EACH = TILE / 4;
  for (int first = 0; first < count; first += threads / 4) {
    const int token = first + thread / 4;
    Best best = no_candidate();
    if (token < count) {
      const drawing::Noise noise = e.noise_of(token0 + token);
#pragma unroll 4
      for (int i = 0; i < EACH; i++) {
        const int r = thread % 4 + i * 4, row = row0 + r;
        if (row < e.rows) {
          const float value = logit(sums[token * pitch + r], bias_of<T>(e, row), e.scale, e.soft_cap);
          best = better(best, candidate(noise.of_id(value, row), row));
        }
      }
    }
#pragma unroll
    for (int o = 2; o; o >>= 1)
      best = better(best, {__shfl_xor_sync(~0u, best.value, o), __shfl_xor_sync(~0u, best.id, o)});
    if (token < count && thread % 4 == 0)
      reinterpret_cast<Best*>(static_cast<float*>(e.out) + static_cast<size_t>(token0 + token) * e.pitch)[row0 / TILE] = best;
  }
}

// Quads (or gate/up pairs of quads) that a tile of ROWS rows has for one token.
template <int ROWS>
__device__ __forceinline__ int items_per_token(int kind) {
  return gated(kind) ? ROWS / 8 : ROWS / 4;
}

// Finishes `count` tokens' sums of ROWS rows in shared memory, a token's PITCH floats apart.
template <class T, int ROWS, int PITCH>
__device__ __forceinline__ void finish_staged(const Epilogue& e, const float* sums, int token0, int row0, int count,
                                              int thread, int threads) {
  finish_tile<T, ROWS, 2>(e, token0, row0, 0, count * items_per_token<ROWS>(e.kind), thread, threads,
                          [&](int token, int r, float(&q)[4]) {
                            const float4 f = *reinterpret_cast<const float4*>(sums + token * PITCH + r);
                            q[0] = f.x, q[1] = f.y, q[2] = f.z, q[3] = f.w;
                          });
}

// Stages a warp's sums of 16 rows by 8 N tokens, as mma.sync leaves them, for that; row: of the thread's first sum.
template <int PITCH, int N>
__device__ __forceinline__ void stage_sums(float* staging, const float (&sum)[N][4], int row, int lane) {
#pragma unroll
  for (int j = 0; j < N; j++)
#pragma unroll
    for (int i = 0; i < 4; i++) staging[(8 * j + lane % 4 * 2 + i % 2) * PITCH + row + i / 2 * 8] = sum[j][i];
}

// acc += 16 rows of W by 8 N tokens, for the 16 columns `step` of a tile of x in shared memory: 64 columns a token.
template <class T, int N>
__device__ __forceinline__ void multiply_step(float (&acc)[N][4], const u32 (&a)[4], u32 x, int step, int lane) {
#pragma unroll
  for (int j = 0; j < N; j += 2) {
    u32 b[4];
    const int token = 8 * j + lane / 16 * 8 + lane % 8, half = 2 * step + lane / 8 % 2;
    ptx::ldmatrix_x4(b, x + token * 128 + (half ^ token % 8) * 16);
    ptx::mma_16816(acc[j], a, {b[0], b[1]}, T());
    ptx::mma_16816(acc[j + 1], a, {b[2], b[3]}, T());
  }
}

}  // namespace rvllm::gemm

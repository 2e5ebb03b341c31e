// Epilogue overlap: sums leave while the next tile is summed. A consumer warpgroup leaves its outputs in STAGED bytes of
// shared memory, a phase of STAGED / 128 tokens at a time (twice as many when gated, which halves the rows), and goes on;
// STORERS other threads store them. Logits leave the registers directly.
#pragma once

#include "gemm/best_logits.cuh"
#include "ptx/wgmma.cuh"

namespace rvllm::gemm {

inline constexpr int STORERS = 96;  // threads that write finished tiles
inline constexpr int FLOW_STAGING = 128 * TILE * 2;  // bytes a warpgroup's finished outputs wait in

// Where piece `c` (16 bytes) of a token's row lies: pieces of 8 consecutive tokens fall into different banks.
template <bool GATED>
__device__ __forceinline__ u32 staged(int token, int c) {
  return GATED ? token * TILE + (c ^ (token / 2 % 4)) * 16 : token * (2 * TILE) + (c ^ (token % 8)) * 16;
}
template <int STAGED>
__device__ __forceinline__ int step_tokens(int kind) { return gated(kind) ? STAGED / TILE : STAGED / (2 * TILE); }
template <int STAGED>
__device__ __forceinline__ int phases(const Epilogue& e, const int limit) {
  const int step = step_tokens<STAGED>(e.kind);
  return limit <= 0 || e.kind == LOGITS ? 0 : (limit + step - 1) / step;
}
enum Named : int { ROOM = 1, READY = 4, ALL_READ = 7 };  // barriers of warpgroup 0; those of the others follow

// Two sums rounded to T, as they lie in memory, and what they are then.
template <class T>
__device__ __forceinline__ u32 rounded_pair(float low, float high);
template <>
__device__ __forceinline__ u32 rounded_pair<bf16>(float low, float high) {
  const __nv_bfloat162 p = __floats2bfloat162_rn(low, high);
  return *reinterpret_cast<const u32*>(&p);
}
template <>
__device__ __forceinline__ u32 rounded_pair<f16>(float low, float high) {
  const __half2 p = __floats2half2_rn(low, high);
  return *reinterpret_cast<const u32*>(&p);
}
template <class T>
__device__ __forceinline__ float2 widened(u32 pair);
template <>
__device__ __forceinline__ float2 widened<bf16>(u32 pair) {
  return make_float2(__uint_as_float(pair << 16), __uint_as_float(pair & 0xffff0000u));
}
template <>
__device__ __forceinline__ float2 widened<f16>(u32 pair) { return __half22float2(*reinterpret_cast<const __half2*>(&pair)); }

// The bits of silu(v) in fewer steps: silu's further ones are for a denormal exp(-v), which 1 swallows, and for a
// divisor below 2^-126, which 1 + exp(-v) is not.
__device__ __forceinline__ float silu_quick(float v) {
  return __fmul_rn(v, ptx::reciprocal_fast(__fadd_rn(1.f, ptx::exp2_fast(__fmul_rn(v, -1.44269504f)))));
}

// OWNED: the warpgroup has waited for ROOM itself, and all outputs are one phase.
template <class T, int TOKENS, int STAGED, bool OWNED = false>
__device__ __forceinline__ void stage_outputs(const Epilogue& e, const float (&acc)[TOKENS / 2], u32 staging, int group,
                                          int thread, int row0, int token0, int limit) {
  if (limit <= 0) return;
  const int warp = thread / 32, lane = thread % 32, row = row0 + warp * 16 + lane / 4, column = lane % 4 * 2;
  const float bias[2] = {bias_of<T>(e, row), bias_of<T>(e, row + 8)};
  if (e.kind == LOGITS && e.best_only) {
    u8* const scratch = static_cast<u8*>(__cvta_shared_to_generic(staging));
    leave_best_logits<T, TOKENS>(e, acc, reinterpret_cast<Best*>(scratch), ALL_READ + group, thread, row0, token0, limit);
    return;
  }
  if (e.kind == LOGITS) {  // 8 lanes hold 8 neighbours of a token: a whole sector of 32 bytes
    const auto all = [&](auto finished) {
      float* out = static_cast<float*>(e.out) + static_cast<size_t>(token0 + column) * e.pitch + row;
#pragma unroll
      for (int j = 0; j < TOKENS / 8; j++) {
#pragma unroll
        for (int i = 0; i < 4; i++)
          if (8 * j + column + i % 2 < limit && row + i / 2 * 8 < e.rows)
            out[i % 2 * static_cast<size_t>(e.pitch) + i / 2 * 8] = finished(acc[4 * j + i], bias[i / 2]);
        out += 8 * static_cast<size_t>(e.pitch);
      }
    };
    if (e.soft_cap > 0.f)
      all([&](float sum, float b) { return logit(sum, b, e.scale, e.soft_cap); });
    else
      all([&](float sum, float b) { return fmaf(sum, e.scale, b); });
    return;
  }
  const auto pair = [&](int i, int half) { return rounded_pair<T>(acc[i] + bias[half], acc[i + 1] + bias[half]); };
  if (gated(e.kind)) {
    constexpr int STEP = STAGED / TILE;
    const auto all = [&](auto act) {
#pragma unroll
      for (int q = 0; q < TOKENS / 32; q++) {
        if (32 * q >= limit) break;
        if (!OWNED && 32 * q % STEP == 0) ptx::bar_sync(ROOM + group, 128 + STORERS);
        u32 r[4];
#pragma unroll
        for (int m = 0; m < 4; m++) {
          const float2 gate = widened<T>(pair(16 * q + 4 * m, 0)), up = widened<T>(pair(16 * q + 4 * m + 2, 1));
          r[m] = rounded_pair<T>(act(gate.x, up.x), act(gate.y, up.y));
        }
        ptx::stmatrix_x4_trans(staging + staged<true>(32 * q % STEP + lane, warp), r);
        if (32 * (q + 1) % STEP == 0 || 32 * (q + 1) >= limit) ptx::bar_arrive(READY + group, 128 + STORERS);
      }
    };
    if (e.kind == GATED_SILU)
      all([](float g, float u) { return __fmul_rn(silu_quick(g), u); });
    else if (e.kind == GATED_CLAMPED)
      all([&](float g, float u) { return clamped_gate(g, u, e.soft_cap, e.scale); });
    else
      all([&](float g, float u) { return __fmul_rn(activated(g, e.kind == GATED_GELU ? Act::GELU : Act::GELU_TANH), u); });
    return;
  }
  constexpr int STEP = STAGED / (2 * TILE);
#pragma unroll
  for (int first = 0; first < TOKENS; first += STEP) {
    if (first >= limit) break;
    if (!OWNED) ptx::bar_sync(ROOM + group, 128 + STORERS);
#pragma unroll
    for (int q = 0; q < STEP / 16; q++) {  // 16 tokens, 16 rows
      const int i = first / 2 + q * 8;
      const u32 r[4] = {pair(i, 0), pair(i + 2, 1), pair(i + 4, 0), pair(i + 6, 1)};
      ptx::stmatrix_x4_trans(staging + staged<false>(16 * q + lane / 16 * 8 + lane % 8, warp * 2 + lane / 8 % 2), r);
    }
    ptx::bar_arrive(READY + group, 128 + STORERS);
  }
}

// What the storers do for one phase of one warpgroup: tokens token1 .. token1 + count - 1. FETCHED: residuals of a
// thread that are fetched before the first of them is added; one after the other each would wait for memory, which
// nothing hides behind a block's last tile.
template <class T, int FETCHED = 1>
__device__ __forceinline__ void store_outputs(const Epilogue& e, const u8* staging, int thread, int row0, int token1, int count) {
  const bool aligned = (e.pitch & 7) == 0;
  if (gated(e.kind)) {
    for (int item = thread; item < count * 4; item += STORERS) {
      const int t = item / 4, piece = item % 4, n = row0 / 2 + piece * 8;
      if (n >= e.rows / 2) continue;
      const auto value = *reinterpret_cast<const Pack<T, 8>*>(staging + staged<true>(t, piece));
      store(static_cast<T*>(e.out) + static_cast<size_t>(token1 + t) * e.pitch + n, value, 8, aligned);
    }
    return;
  }
  if (FETCHED > 1 && e.residual && aligned && row0 + TILE <= e.rows) {
    const auto at = [&](int item) { return static_cast<size_t>(token1 + item / 8) * e.pitch + row0 + item % 8 * 8; };
    for (int first = thread; first < count * 8; first += FETCHED * STORERS) {
      Pack<T, 8> residual[FETCHED];
#pragma unroll
      for (int i = 0; i < FETCHED; i++)
        if (const int item = first + i * STORERS; item < count * 8)
          residual[i] = *reinterpret_cast<const Pack<T, 8>*>(static_cast<const T*>(e.residual) + at(item));
#pragma unroll
      for (int i = 0; i < FETCHED; i++)
        if (const int item = first + i * STORERS; item < count * 8) {
          auto value = *reinterpret_cast<const Pack<T, 8>*>(staging + staged<false>(item / 8, item % 8));
          activate_all(value, e.kind);
          add_fetched(residual[i], value, e.scale);
          store(static_cast<T*>(e.out) + at(item), value, 8, true);
        }
    }
    return;
  }
  for (int item = thread; item < count * 8; item += STORERS) {
    const int t = item / 8, piece = item % 8, n = row0 + piece * 8, left = e.rows - n;
    if (left <= 0) continue;
    auto value = *reinterpret_cast<const Pack<T, 8>*>(staging + staged<false>(t, piece));
    const size_t to = static_cast<size_t>(token1 + t) * e.pitch + n;
    activate_all(value, e.kind);
    if (e.residual) add_residual(static_cast<const T*>(e.residual) + to, value, e.scale, left, aligned);
    store(static_cast<T*>(e.out) + to, value, left, aligned);
  }
}

}  // namespace rvllm::gemm

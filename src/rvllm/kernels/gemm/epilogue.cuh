// How sums leave the registers of a warpgroup that has them in wgmma's layout.
#pragma once

#include "gemm/best_logits.cuh"
#include "ptx/wgmma.cuh"

namespace rvllm::gemm {

// Finishes one warpgroup's accumulators: packed rows row0 .. row0 + 63 of TOKENS tokens from token0 on.
// 16-bit results turn around in `staging`, CHUNK tokens at a time, to leave in 16-byte pieces. EARLY: the residuals of a
// chunk are fetched while its sums turn around; one by one each would wait for memory.
template <class T, int TOKENS, int CHUNK, int PITCH, bool EARLY = false>
__device__ __forceinline__ void finish_accumulators(const Epilogue& e, const float (&acc)[TOKENS / 2], u8* staging,
                                                    int barrier, int thread, int row0, int token0) {
  const int warp = thread / 32, lane = thread % 32, row = row0 + warp * 16 + lane / 4, column = lane % 4 * 2;
  const float bias[2] = {bias_of<T>(e, row), bias_of<T>(e, row + 8)};
  if (e.kind == LOGITS && e.best_only) {
    leave_best_logits<T, TOKENS>(e, acc, reinterpret_cast<Best*>(staging), barrier, thread, row0, token0, e.tokens - token0);
    return;
  }
  if (e.kind == LOGITS) {
    constexpr int SUMS = CHUNK < 32 ? CHUNK : 32, SUM_PITCH = TILE + 4;  // tokens at a time, floats
    float* sums = reinterpret_cast<float*>(staging);
    for (int chunk = 0; chunk < TOKENS / SUMS; chunk++) {
      const int token1 = token0 + chunk * SUMS, count = min(SUMS, e.tokens - token1);
      if (count <= 0) break;
      ptx::bar_sync(barrier, 128);
#pragma unroll
      for (int i = 0; i < TOKENS / 2; i++)  // registers are chosen at compile time, the chunk is not
        if (i / (SUMS / 2) == chunk)
          sums[(i % (SUMS / 2) / 4 * 8 + column + i % 2) * SUM_PITCH + row - row0 + i % 4 / 2 * 8] = acc[i];
      ptx::bar_sync(barrier, 128);
      finish_tile<T, TILE, 2>(e, token1, row0, 0, count * (TILE / 4), thread, 128, [&](int t, int r, float(&q)[4]) {
        const float4 f = *reinterpret_cast<const float4*>(sums + t * SUM_PITCH + r);
        q[0] = f.x, q[1] = f.y, q[2] = f.z, q[3] = f.w;
      });
    }
    return;
  }
  const bool pairs = gated(e.kind), aligned = (e.pitch & 7) == 0;
  // Lanes 0-15 hold the addresses of two matrices: 8 tokens of rows 0-7 and of rows 8-15 of this warp.
  const u32 at = ptx::smem(staging) + lane % 8 * PITCH + warp * 32 + lane / 8 % 2 * 16;
  const auto both = [](float low, float high) {
    const Pack<T, 2> p{{rounded<T>(low), rounded<T>(high)}};
    return *reinterpret_cast<const u32*>(&p);
  };
  constexpr int ITEMS = EARLY ? CHUNK * 8 / 128 : 1;
  static_assert(ITEMS > 0);
  const bool early = EARLY && !pairs && e.residual && aligned && row0 + TILE <= e.rows;
  Pack<T, 8> residual[ITEMS];
  for (int chunk = 0; chunk < TOKENS / CHUNK; chunk++) {
    const int token1 = token0 + chunk * CHUNK, count = min(CHUNK, e.tokens - token1);
    if (count <= 0) break;
    const auto place = [&](int item) { return static_cast<size_t>(token1 + item / 8) * e.pitch + row0 + item % 8 * 8; };
    if (early)
#pragma unroll
      for (int i = 0; i < ITEMS; i++)
        if (const int item = thread + i * 128; item < count * 8)
          residual[i] = *reinterpret_cast<const Pack<T, 8>*>(static_cast<const T*>(e.residual) + place(item));
    ptx::bar_sync(barrier, 128);
#pragma unroll
    for (int j = 0; j < TOKENS / 8; j++)  // registers are chosen at compile time, the chunk is not
      if (j / (CHUNK / 8) == chunk)
        ptx::stmatrix_x2_trans(at + j % (CHUNK / 8) * 8 * PITCH, both(acc[4 * j] + bias[0], acc[4 * j + 1] + bias[0]),
                               both(acc[4 * j + 2] + bias[1], acc[4 * j + 3] + bias[1]));
    ptx::bar_sync(barrier, 128);
    if (pairs) {
      for (int item = thread; item < count * 4; item += 128) {
        const int t = item / 4, piece = item % 4, n = row0 / 2 + piece * 8;
        const auto* slab = reinterpret_cast<const Pack<T, 8>*>(staging + t * PITCH + piece * 32);
        const Pack<T, 8> gates = slab[0], ups = slab[1];
        Pack<T, 8> value;
        gate_all(value, gates, ups, e);
        if (n < e.rows / 2) store(static_cast<T*>(e.out) + static_cast<size_t>(token1 + t) * e.pitch + n, value, 8, aligned);
      }
    } else if (early) {
#pragma unroll
      for (int i = 0; i < ITEMS; i++)
        if (const int item = thread + i * 128; item < count * 8) {
          auto value = *reinterpret_cast<const Pack<T, 8>*>(staging + item / 8 * PITCH + item % 8 * 16);
          activate_all(value, e.kind);
          add_fetched(residual[i], value, e.scale);
          store(static_cast<T*>(e.out) + place(item), value, 8, true);
        }
    } else {
#pragma unroll 1
      for (int item = thread; item < count * 8; item += 128) {
        const int t = item / 8, piece = item % 8, n = row0 + piece * 8, left = e.rows - n;
        auto value = *reinterpret_cast<const Pack<T, 8>*>(staging + t * PITCH + piece * 16);
        const size_t to = static_cast<size_t>(token1 + t) * e.pitch + n;
        if (left <= 0) continue;
        activate_all(value, e.kind);
        if (e.residual) add_residual(static_cast<const T*>(e.residual) + to, value, e.scale, left, aligned);
        store(static_cast<T*>(e.out) + to, value, left, aligned);
      }
    }
  }
}

}  // namespace rvllm::gemm

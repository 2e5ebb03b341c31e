// Of a warpgroup's logits, in wgmma's layout, the best of its 64 rows for each token: all that greedy decoding asks of them.
#pragma once

#include "gemm/gemm.cuh"
#include "ptx/wgmma.cuh"

namespace rvllm::gemm {

// One step of a reduction over lanes that differ in MASK: of COUNT columns a lane goes on with half, and its partner with
// the other; an odd number both keep. Returns the first column that this lane keeps.
template <int COUNT, int MASK, int COLUMNS>
__device__ __forceinline__ int halve(Best (&best)[COLUMNS], int lane) {
  const bool upper = lane & MASK;
  const auto exchanged = [](const Best& b) { return Best{__shfl_xor_sync(~0u, b.value, MASK), __shfl_xor_sync(~0u, b.id, MASK)}; };
  if constexpr (COUNT % 2 == 0) {
    constexpr int HALF = COUNT / 2;
#pragma unroll
    for (int k = 0; k < HALF; k++) {
      const Best mine = upper ? best[k + HALF] : best[k], theirs = upper ? best[k] : best[k + HALF];
      best[k] = better(mine, exchanged(theirs));
    }
    return upper ? HALF : 0;
  } else {
#pragma unroll
    for (int k = 0; k < COUNT; k++) best[k] = better(best[k], exchanged(best[k]));
    return 0;
  }
}

// Packed rows row0 .. row0 + 63 of tokens token0 .. token0 + min(TOKENS, limit) - 1. scratch: 4 * TOKENS of shared memory.
template <class T, int TOKENS>
__device__ __forceinline__ void leave_best_logits(const Epilogue& e, const float (&acc)[TOKENS / 2], Best* scratch, int barrier,
                                                  int thread, int row0, int token0, int limit) {
  if (row0 >= e.rows) return;
  constexpr int COLUMNS = TOKENS / 4, EACH = COLUMNS < 8 ? COLUMNS : 8;  // of a lane; looked at together
  const int warp = thread / 32, lane = thread % 32, row = row0 + warp * 16 + lane / 4;
  const float bias[2] = {bias_of<T>(e, row), bias_of<T>(e, row + 8)};
  ptx::bar_sync(barrier, 128);  // the last tile's were read
#pragma unroll
  for (int c0 = 0; c0 < COLUMNS; c0 += EACH) {
    if (c0 * 4 >= limit) break;
    // Noise is made in a loop that is not unrolled, by way of local memory: unrolled it is most of the kernel's code.
    float scale[EACH], noise[2][EACH];
    if (e.best_only == drawing::DRAW) {
#pragma unroll 1
      for (int k = 0; k < EACH; k++) {
        const int c = c0 + k;
        const drawing::Noise of = e.noise_of(token0 + c / 2 * 8 + lane % 4 * 2 + c % 2);
        const bool greedy = of.per_degree == 0.f;
        const uint2 words = of.words(row);  // row % 16 < 8
        scale[k] = greedy ? 1.f : of.per_degree;
        noise[0][k] = greedy ? -0.f : of.gumbel(words.x);
        noise[1][k] = greedy ? -0.f : of.gumbel(words.y);
      }
    }
    Best best[EACH];
#pragma unroll
    for (int k = 0; k < EACH; k++) {
      const int c = c0 + k;
      float first = logit(acc[c / 2 * 4 + c % 2], bias[0], e.scale, e.soft_cap);
      float second = logit(acc[c / 2 * 4 + c % 2 + 2], bias[1], e.scale, e.soft_cap);
      if (e.best_only == drawing::DRAW) {  // as Noise::drawn
        first = __fadd_rn(__fmul_rn(first, scale[k]), noise[0][k]);
        second = __fadd_rn(__fmul_rn(second, scale[k]), noise[1][k]);
      }
      const Best low = candidate(first, row), high = candidate(second, row + 8);
      best[k] = row + 8 < e.rows ? better(low, high) : row < e.rows ? low : no_candidate();
    }
    // Eight columns of eight lanes: one of each is left to a lane.
    int c = c0 + halve<EACH, 16>(best, lane);
    c += halve<(EACH > 1 ? EACH / 2 : 1), 8>(best, lane);
    c += halve<(EACH > 2 ? EACH / 4 : 1), 4>(best, lane);
    scratch[warp * TOKENS + c / 2 * 8 + lane % 4 * 2 + c % 2] = best[0];
  }
  ptx::bar_sync(barrier, 128);
  for (int token = thread; token < min(TOKENS, limit); token += 128) {
    Best found = scratch[token];
#pragma unroll
    for (int w = 1; w < 4; w++) found = better(found, scratch[w * TOKENS + token]);
    reinterpret_cast<Best*>(static_cast<float*>(e.out) + static_cast<size_t>(token0 + token) * e.pitch)[row0 / TILE] = found;
  }
}

}  // namespace rvllm::gemm

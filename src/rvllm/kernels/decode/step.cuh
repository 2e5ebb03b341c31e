// What a launch for one token computes: products one behind the other, each perhaps with a norm in front, and the router,
// up and down matrices of a mixture. Mirrored by backends/cuda/ops/decode/step.py.
#pragma once

#include "common/common.cuh"
#include "gemm/gemm.cuh"

namespace rvllm::decode {

using gemm::segment_start;
using gemm::TILE;
using gemm::TILE_BYTES;

inline constexpr int WARPS = 8, THREADS = 32 * WARPS;
inline constexpr int MAX_STEPS = 8;                               // of a launch
inline constexpr int SLICE = 16, SLICE_BYTES = SLICE * TILE * 2;  // rows of a matrix instruction, which a warp takes
inline constexpr int GROUP = 2, GROUPS = WARPS / GROUP;  // warps that take neighbouring rows together
inline constexpr int ROWS = SLICE * GROUP;                        // of a group
inline constexpr int MAX_ENTRIES = 32;                            // experts of a token

enum Type : int {
  PRODUCT = 0,  // out = epilogue(W x)
  ROUTE = 1,    // out = logits of experts, float32; weights are row-major [rows, k], k % 64 == 0, rows % 16 == 0
  UP = 2,       // of the experts chosen by the step before: out [entries, pitch] = act(W_e x), see one_up
  DOWN = 3,     // out = residual + scale * sum of shares * W_e x_e, x [entries, k], see one_down
};

template <int N>
struct Number {
  static constexpr int value = N;
};

struct Step {
  const u8* weights;    // packed; of UP and DOWN a stack of them
  const void* x;        // [k], before the norm; UP reads what the step before it had
  void* out;
  const void* bias;     // as in Epilogue; ROUTE: float32 [rows] or null, for the choice
  const void* residual;
  const float* norm_weight;  // [k], or null for ones
  const float* norm_bias;    // or null
  void* normed;         // [k]: where the norm's result goes too; null without a norm
  int type, kind, rows, pitch, k, blocks, segments;
  int layer;            // whether the norm is a layer norm
  float scale, soft_cap, eps;
  // Of a mixture. entries: experts of a token, `always` of which every token has; act, gated: as in one_up.
  int experts, entries, always, groups, kept, flags, act, gated;
  float share_scale;    // ROUTE: of shares
};
struct Chain {
  Step steps[MAX_STEPS];
  int count, x_bytes;  // of shared memory for the longest x
};

}  // namespace rvllm::decode

// Experts for one token: weights stream once through shared memory, every warp with a pipeline of its own.
//
// A block has 16 packed rows of one expert's matrix; its warps are the segments of K, whose sums meet in shared
// memory at the end. The token stands for all eight columns of the matrix instruction.
#include "moe/moe.cuh"

namespace rvllm::experts {

inline constexpr int MAX_SEGMENTS = 8;
// The bytes a warp has in flight at a stage: its slice of a tile of W, and 64 elements of x.
inline constexpr int STAGE = SLICE_BYTES + TILE * 2;

// Adds 16 rows x 64 columns of W times 64 elements of x to acc.
template <class T>
__device__ __forceinline__ void multiply(float (&acc)[4], u32 w, u32 x, int lane) {
  const int row = lane % 16;
#pragma unroll
  for (int step = 0; step < TILE / 16; step += 2) {
    u32 a[4], b[4];
    ptx::ldmatrix_x4(b, x + (2 * step + lane / 8) * 16);
    ptx::ldmatrix_x4(a, w + row * 128 + ((2 * step + lane / 16) ^ row % 8) * 16);
    ptx::mma_16816(acc, a, {b[0], b[1]}, T());
    ptx::ldmatrix_x4(a, w + row * 128 + ((2 * step + 2 + lane / 16) ^ row % 8) * 16);
    ptx::mma_16816(acc, a, {b[2], b[3]}, T());
  }
}

__device__ __forceinline__ void load_slice(u32 to, const u8* from, int lane) {
#pragma unroll
  for (int i = 0; i < SLICE_BYTES; i += 512) ptx::cp_async16_once(to + i + lane * 16, from + i + lane * 16);
}

// Rows of the up matrices of the experts that one token chose: inner = act(up x). ids int32 [top_k], the last `always` of
// them being first_always, first_always + 1, ... x [k]; out: a row an expert of the token, `pitch` elements each. k: a
// multiple of 8; blocks: ceil(k / 64); rows: packed rows (2 * width when gated). act: a value of Act. slots: stages a
// warp has memory for, STAGES or all its blocks if fewer.
// STAGES 2: six blocks share a multiprocessor, so that those of small experts are there all at once.
// Grid: (ceil(rows / 16), top_k). Block: 32 * segments. Shared: segments * slots * STAGE. Bound by memory.
template <class T, int STAGES>
__global__ void __launch_bounds__(32 * MAX_SEGMENTS, STAGES == 2 ? 6 : 1)
    one_up(T* out, const T* x, const u8* __restrict__ weights, const int* ids, int top_k, int always, int first_always,
           int k, int blocks, int rows, int pitch, int act, int gated, int slots) {
  using namespace ptx;
  extern __shared__ __align__(1024) u8 shared[];
  __shared__ float partial[MAX_SEGMENTS][SLICE];
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, segments = blockDim.x / 32;
  const u32 base = smem(shared) + warp * slots * STAGE;
  // The experts that all tokens have come first: which they are is known before the others are chosen.
  const int entry = (blockIdx.y + top_k - always) % top_k, common = entry - (top_k - always);
  const bool wait_first = common < 0;
  if (wait_first) {
    griddep_wait();
    griddep_launch();
  }
  const int expert = common >= 0 ? first_always + common : existing(__ldcg(ids + entry), first_always + always);
  const int first = segment_start(blocks, segments, warp), last = segment_start(blocks, segments, warp + 1);
  const u8* slice = weights + expert * matrix_bytes(rows, blocks) +
                    static_cast<u64>(blockIdx.x / (TILE / SLICE)) * blocks * TILE_BYTES +
                    blockIdx.x % (TILE / SLICE) * SLICE_BYTES;
  int slot = 0, load_slot = 0;
  const auto load_weights = [&](int block, int to) {
    load_slice(base + to * STAGE, slice + static_cast<u64>(block) * TILE_BYTES, lane);
  };
  const auto load_x = [&](int block) {
    if (block < last) {
      const u32 at = base + load_slot * STAGE;
      if (++load_slot == slots) load_slot = 0;
      if (lane < 8) {
        const bool inside = block * TILE + lane * 8 < k;
        cp_async16(at + SLICE_BYTES + lane * 16, inside ? x + block * TILE + lane * 8 : x, inside ? 16 : 0);
      }
    }
    cp_async_commit();  // also when empty, so that the count of groups stays in step
  };
  for (int s = 0; s < min(STAGES - 1, last - first); s++) load_weights(first + s, s);
  if (!wait_first) {
    griddep_wait();
    griddep_launch();
  }
  for (int s = 0; s < STAGES - 1; s++) load_x(first + s);
  float acc[4] = {};
  for (int block = first; block < last; block++) {
    cp_async_wait<STAGES - 2>();
    __syncwarp();
    if (block + STAGES - 1 < last) load_weights(block + STAGES - 1, load_slot);
    load_x(block + STAGES - 1);
    multiply<T>(acc, base + slot * STAGE, base + slot * STAGE + SLICE_BYTES, lane);
    if (++slot == slots) slot = 0;
  }
  cp_async_wait<0>();
  if (lane % 4 == 0) {
    partial[warp][lane / 4] = acc[0];
    partial[warp][lane / 4 + 8] = acc[2];
  }
  __syncthreads();

  const auto sum = [&](int row) {
    float total = partial[0][row];
    for (int s = 1; s < segments; s++) total += partial[s][row];
    return total;
  };
  const int height = gated ? SLICE / 2 : SLICE, row = threadIdx.x, at = blockIdx.x * height + row;
  if (row >= height || at >= (gated ? rows / 2 : rows)) return;
  out[static_cast<size_t>(entry) * pitch + at] =
      gated ? gated_value<T>(sum(row), sum(row + 8), act) : plain_value<T>(sum(row), act);
}

// One token's result: out = sum over j of shares[j] * (down[ids[j]] inner[j]), rounded; with a residual,
// rounded(residual + scale * that). A block has 16 rows of the sum and takes the token's experts one behind the
// other through one pipeline. inner [top_k, k]; residual may be out, or null; experts: how many there are. The rest as in
// `one_up`; top_k <= 32.
// Grid: (ceil(rows / 16)). Block: 32 * segments. Shared: segments * slots * STAGE + top_k * segments * 64. Bound by memory.
template <class T, int STAGES>
__global__ void __launch_bounds__(32 * MAX_SEGMENTS)
    one_down(T* out, const T* inner, const u8* __restrict__ weights, const int* ids, const float* shares, const T* residual,
        int experts, int top_k, int k, int blocks, int rows, int slots, float scale) {
  using namespace ptx;
  extern __shared__ __align__(1024) u8 shared[];
  __shared__ float parts[32][SLICE];
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, segments = blockDim.x / 32;
  const u32 base = smem(shared) + warp * slots * STAGE;
  float* const partial = reinterpret_cast<float*>(shared + segments * slots * STAGE);  // [top_k][segments][16]
  const int first = segment_start(blocks, segments, warp), last = segment_start(blocks, segments, warp + 1);
  const int each = last - first;
  const u8* const slice = weights + static_cast<u64>(blockIdx.x / (TILE / SLICE)) * blocks * TILE_BYTES +
                          blockIdx.x % (TILE / SLICE) * SLICE_BYTES + static_cast<u64>(first) * TILE_BYTES;
  const u64 matrix = matrix_bytes(rows, blocks);
  griddep_launch();
  const int chosen = lane < top_k ? existing(__ldcg(ids + lane), experts) : 0;
  const float share = lane < top_k ? __ldcg(shares + lane) : 0.f;

  // Two walks over the same tiles: the weights may run ahead of the activations.
  struct Walk {
    int j = 0, block = 0, slot = 0;
  } weights_at, x_at;
  const auto step = [&](Walk& walk) {
    if (++walk.block == each) walk.block = 0, walk.j++;
    if (++walk.slot == slots) walk.slot = 0;
  };
  const auto load_weights = [&]() {
    const int expert = __shfl_sync(~0u, chosen, weights_at.j % 32);
    if (weights_at.j >= top_k) return;
    load_slice(base + weights_at.slot * STAGE, slice + expert * matrix + static_cast<u64>(weights_at.block) * TILE_BYTES,
               lane);
    step(weights_at);
  };
  const auto load_x = [&]() {
    if (x_at.j < top_k) {
      if (lane < 8) {
        const int column = (first + x_at.block) * TILE + lane * 8;
        const bool inside = column < k;
        cp_async16(base + x_at.slot * STAGE + SLICE_BYTES + lane * 16,
                   inside ? inner + static_cast<size_t>(x_at.j) * k + column : inner, inside ? 16 : 0);
      }
      step(x_at);
    }
    cp_async_commit();  // also when empty, so that the count of groups stays in step
  };
  for (int s = 0; s < STAGES - 1; s++) load_weights();
  griddep_wait();
  for (int s = 0; s < STAGES - 1; s++) load_x();
  int slot = 0;
  for (int j = 0; j < top_k; j++) {
    float acc[4] = {};
    for (int block = 0; block < each; block++) {
      cp_async_wait<STAGES - 2>();
      __syncwarp();
      load_weights();
      load_x();
      const u32 at = base + slot * STAGE, x = at + SLICE_BYTES;
      multiply<T>(acc, at, x, lane);
      if (++slot == slots) slot = 0;
    }
    if (lane % 4 == 0) {
      partial[(j * segments + warp) * SLICE + lane / 4] = acc[0];
      partial[(j * segments + warp) * SLICE + lane / 4 + 8] = acc[2];
    }
  }
  cp_async_wait<0>();
  __syncthreads();
  for (int i = threadIdx.x; i < top_k * SLICE; i += blockDim.x) {
    const int j = i / SLICE, row = i % SLICE;
    float total = partial[j * segments * SLICE + row];
    for (int s = 1; s < segments; s++) total += partial[(j * segments + s) * SLICE + row];
    parts[j][row] = gemm::to_float(gemm::rounded<T>(total));
  }
  __syncthreads();
  if (warp > 0) return;
  float total = 0.f;
  for (int j = 0; j < top_k; j++) total = weighted(total, parts[j][lane % SLICE], __shfl_sync(~0u, share, j), j == 0);
  const int at = blockIdx.x * SLICE + lane;
  if (lane >= SLICE || at >= rows) return;
  const T value = gemm::rounded<T>(total);
  out[at] = residual ? gemm::added<T>(residual[at], value, scale) : value;
}

// out[t] = weighted_parts of token t; with a residual as in `one_down`. out and residual [tokens, width]; width % 8 == 0.
// Rows from *num_tokens on are left alone. Grid: (ceil(width / 8 / threads), rows). Bound by memory.
template <class T>
__global__ void combine(T* out, const T* parts, const float* shares, const T* residual, const int* num_tokens,
                        const int* places, int top_k, int width, float scale) {
  ptx::griddep_launch();
  ptx::griddep_wait();
  const int i = (blockIdx.x * blockDim.x + threadIdx.x) * 8, token = blockIdx.y;
  if (i >= width || token >= *num_tokens) return;
  auto value = weighted_parts(parts, shares, places, token, top_k, width, i);
  const size_t at = static_cast<size_t>(token) * width + i;
  if (residual) gemm::add_residual(residual + at, value, scale, 8, true);
  *reinterpret_cast<gemm::Pack<T, 8>*>(out + at) = value;
}

}  // namespace rvllm::experts

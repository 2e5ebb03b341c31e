// Chooses experts for every token: the router's product, its scores and the best of them in one launch.
//
// A logit is summed as every other product (see gemm/gemm.cuh): K is cut into up to eight segments by its length alone,
// a segment is consecutive 16-wide matrix instructions into one accumulator, and the segments are added in ascending
// order. Experts are the instruction's rows, tokens its columns, so neither the number of tokens nor that of experts
// enters the order.
#include "common/common.cuh"
#include "gemm/gemm.cuh"
#include "moe/choose.cuh"

using gemm::segment_start;
using gemm::TILE;

inline constexpr int SLICE = 16;  // experts of a matrix instruction
inline constexpr int SLICE_BYTES = SLICE * TILE * 2;
inline constexpr int MAX_SEGMENTS = 8;
[[maybe_unused]] constexpr int FEW = 8, MANY = 32;  // tokens of a block of `route`, at most, and of `route_many`
inline constexpr int SLOTS = 4;              // of a warp's ring in `route`
inline constexpr int MAX_NORM_WIDTH = 4096;  // elements of a row that can be normalised
inline constexpr int NORM_PARTS = MAX_NORM_WIDTH / 256;  // of 32 vectors, what one warp of `norm` has
[[maybe_unused]] constexpr int HELD = 2;  // vectors of such a row that a thread has: a block has 16 threads or more for each 64 elements, up to 256

// What a router is besides its matrix: see `choose`.
struct Router {
  const float* bias;
  int experts, top_k, always, groups, kept, flags;
  float scale;
  template <int LANE_EXPERTS, typename Logit>
  __device__ __forceinline__ void choose_for(int token, u32* keys, int* ids, float* shares, Logit logit) const {
    const size_t at = (size_t)token * (top_k + always);
    choose<LANE_EXPERTS>(logit, bias, keys, ids + at, shares + at, experts, top_k, always, groups, kept, flags, scale);
  }
};

// Brings 16 bytes of a row-major matrix [rows, k] to a tile in shared memory: elements 64 * block + 8 * chunk and on of a
// row, as row `at` of the tile. Zeros behind the matrix's columns, its last row for those behind it.
template <typename T>
__device__ __forceinline__ void load_chunk(u32 tile, int at, const T* matrix, int row, int rows, int k, int block, int chunk) {
  const int column = block * TILE + chunk * 8;
  const bool inside = column < k;
  cp_async16(tile + at * 128 + (chunk ^ at % 8) * 16, matrix + (size_t)min(row, rows - 1) * k + (inside ? column : 0),
             inside ? 16 : 0);
}

// Rows t0 and on of `raw`, `count` of them, normalised into tiles in shared memory, as load_chunk places them, and by the
// first block into x too. by: the norm's weights of this thread's vectors. squares: scratch.
template <typename T>
__device__ __forceinline__ void norm_rows(u8* tiles, T* x, const T* raw, const float (&by)[HELD][8], float (*squares)[NORM_PARTS],
                                          int t0, int count, int each, int k, float eps) {
  const auto raw_at = [&](int token, int vector) {
    return reinterpret_cast<const uint4*>(raw + (size_t)(t0 + token) * k)[vector];
  };
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, warps = blockDim.x / 32;
  const int blocks = (k + TILE - 1) / TILE, vectors = k / 8, parts = (vectors + 31) / 32;
  uint4 held[HELD];  // of the first token, which is the only one but on small GPUs
  for (int token = 0; token < count; token++) {
#pragma unroll
    for (int h = 0; h < HELD; h++) {
      const int vector = threadIdx.x + h * blockDim.x;
      const uint4 at = vector < vectors ? raw_at(token, vector) : make_uint4(0, 0, 0, 0);
      if (token == 0) held[h] = at;
      float v[8], square = 0.f;
      unpack8<T>(at, v);
#pragma unroll
      for (int j = 0; j < 8; j++) square = __fmaf_rn(v[j], v[j], square);
      square = warp_sum(square);
      if (lane == 0 && warp + h * warps < parts) squares[token][warp + h * warps] = square;
    }
  }
  __syncthreads();
  for (int token = 0; token < count; token++) {
    float total = squares[token][0];
    for (int w = 1; w < parts; w++) total += squares[token][w];
    const float factor = 1.f / sqrtf(total / k + eps);
#pragma unroll
    for (int h = 0; h < HELD; h++) {
      const int vector = threadIdx.x + h * blockDim.x;
      if (vector >= blocks * 8) continue;
      uint4 normed = make_uint4(0, 0, 0, 0);
      if (vector < vectors) {
        float v[8];
        unpack8<T>(token == 0 ? held[h] : raw_at(token, vector), v);
#pragma unroll
        for (int j = 0; j < 8; j++) v[j] = __fmaf_rn(__fmul_rn(v[j], factor), by[h][j], 0.f);
        normed = pack8<T>(v);
        if (blockIdx.x == 0) reinterpret_cast<uint4*>(x + (size_t)(t0 + token) * k)[vector] = normed;
      }
      *reinterpret_cast<uint4*>(tiles + vector / 8 * (each * 128) + token * 128 + (vector % 8 ^ token) * 16) = normed;
    }
  }
}

// ids int32, shares float32 [rows, top_k + always]: behind the chosen experts, `experts`, `experts` + 1, ... with
// share 1; x [rows, k], weight [experts, k], bias float32 [experts] or null; logits float32 [rows, experts] and arrivals
// uint32 [ceil(rows / each)] (zeros, left as zeros) are scratch. Rows from *num_tokens on are left alone. k % 8 == 0,
// experts <= 32 * LANE_EXPERTS, groups <= 32, top_k + always <= 32. each: tokens of a block, 1, 2, 4 or FEW.
// Grid: (ceil(experts / SLICE), ceil(rows / each)). Block: 32 * segments. Shared: ceil(k / 64) * each * 128 + segments *
// SLOTS * SLICE_BYTES. Bound by latency.
// NORM: x is raw / sqrt(mean(raw^2) + eps) * norm_weight, by the same instructions as `norm`, and is written too; every
// block normalises for itself. k <= MAX_NORM_WIDTH then.
// CLUSTER (Hopper): the blocks of a group of tokens are a cluster, and each chooses for some of them. No scratch.
// Otherwise whoever completes a group, counted in `arrivals`, does.
template <typename T, int LANE_EXPERTS, bool NORM, bool CLUSTER>
__global__ void __launch_bounds__(32 * MAX_SEGMENTS)
route(int* ids, float* shares, T* x, const T* __restrict__ weight, const float* __restrict__ bias, float* logits,
      u32* arrivals, const int* num_tokens, const T* raw, const float* __restrict__ norm_weight, int k, int experts,
      int top_k, int always, int groups, int kept, int flags, int each, float scale, float eps) {
  extern __shared__ __align__(1024) u8 shared[];
  __shared__ u32 keys[MAX_SEGMENTS][32 * LANE_EXPERTS];
  __shared__ float partial[MAX_SEGMENTS][FEW][SLICE];
  [[maybe_unused]] __shared__ float gathered[CLUSTER ? FEW : 1][CLUSTER ? 32 * LANE_EXPERTS : 1];  // logits of tokens this block chooses for
  __shared__ float squares[NORM ? FEW : 1][NORM_PARTS];
  __shared__ int last_here;
  griddep_launch();
#if __CUDA_ARCH__ >= 900
  if constexpr (CLUSTER) cluster_arrive();  // this block runs: others may write to its shared memory
#endif
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, warps = blockDim.x / 32;
  const int blocks = (k + TILE - 1) / TILE, vectors = k / 8, e0 = blockIdx.x * SLICE, t0 = blockIdx.y * each;
  const int first = segment_start(blocks, warps, warp), last = segment_start(blocks, warps, warp + 1);
  const u32 x_base = smem(shared), ring = x_base + blocks * each * 128 + warp * SLOTS * SLICE_BYTES;
  const auto load_weights = [&](int block) {
    if (block < last)
#pragma unroll
      for (int r = lane / 8; r < SLICE; r += 4)
        load_chunk(ring + (block - first) % SLOTS * SLICE_BYTES, r, weight, e0 + r, experts, k, block, lane % 8);
    cp_async_commit();  // also when empty, so that the count of groups stays in step
  };
  for (int s = 0; s < SLOTS; s++) load_weights(first + s);  // the router's rows depend on nothing before
  const int tokens = *num_tokens;
  [[maybe_unused]] float by[NORM ? HELD : 1][8];  // the norm's weights of this thread's vectors
  if constexpr (NORM) {
#pragma unroll
    for (int h = 0; h < HELD; h++) {
      const int vector = min(threadIdx.x + h * blockDim.x, vectors - 1);
#pragma unroll
      for (int j = 0; j < 8; j += 4)
        *reinterpret_cast<float4*>(by[h] + j) = *reinterpret_cast<const float4*>(norm_weight + vector * 8 + j);
    }
  }
  griddep_wait();
  const int count = min(each, tokens - t0);
  if (count <= 0) {
    cp_async_wait<0>();
#if __CUDA_ARCH__ >= 900
    if constexpr (CLUSTER) cluster_wait();
#endif
    return;
  }
  if constexpr (NORM)
    norm_rows<T>(shared, x, raw, by, squares, t0, count, each, k, eps);
  else
    for (int i = threadIdx.x; i < count * blocks * 8; i += blockDim.x) {
      const int token = i / (blocks * 8), block = i / 8 % blocks;
      load_chunk(x_base + block * each * 128, token, x, t0 + token, tokens, k, block, i % 8);
    }
  cp_async_commit();
  cp_async_wait<0>();
  __syncthreads();

  float acc[4] = {};
  const int row = lane % 16, token = lane % each;  // columns without a token multiply what another has
  for (int block = first; block < last; block++) {
    cp_async_wait<SLOTS - 1>();
    __syncwarp();
    const u32 w = ring + (block - first) % SLOTS * SLICE_BYTES + row * 128, t = x_base + (block * each + token) * 128;
#pragma unroll
    for (int step = 0; step < TILE / 16; step += 2) {
      u32 a[4], b[4];
      ldmatrix_x4(b, t + ((2 * step + lane / 8) ^ token) * 16);
      ldmatrix_x4(a, w + ((2 * step + lane / 16) ^ row % 8) * 16);
      mma_16816(acc, a, {b[0], b[1]}, T());
      ldmatrix_x4(a, w + ((2 * step + 2 + lane / 16) ^ row % 8) * 16);
      mma_16816(acc, a, {b[2], b[3]}, T());
    }
    __syncwarp();
    load_weights(block + SLOTS);
  }
  cp_async_wait<0>();
#pragma unroll
  for (int i = 0; i < 4; i++) partial[warp][lane % 4 * 2 + i % 2][lane / 4 + i / 2 * 8] = acc[i];
#if __CUDA_ARCH__ >= 900
  if constexpr (CLUSTER) cluster_wait();
#endif
  __syncthreads();

  const Router router{bias, experts, top_k, always, groups, kept, flags, scale};
  [[maybe_unused]] const int clustered = gridDim.x;
  for (int i = threadIdx.x; i < count * SLICE; i += blockDim.x) {
    const int t = i / SLICE, expert = e0 + i % SLICE;
    float sum = partial[0][t][i % SLICE];
    for (int s = 1; s < warps; s++) sum += partial[s][t][i % SLICE];
    if (expert >= experts) continue;
    if constexpr (CLUSTER) {
#if __CUDA_ARCH__ >= 900
      cluster_store(cluster_map(smem(&gathered[t][expert]), t % clustered), sum);
#endif
    } else {
      __stcg(logits + (size_t)(t0 + t) * experts + expert, sum);
    }
  }
  if constexpr (CLUSTER) {
#if __CUDA_ARCH__ >= 900
    __syncwarp();
    cluster_sync();
    for (int t = blockIdx.x + warp * clustered; t < count; t += warps * clustered)
      router.choose_for<LANE_EXPERTS>(t0 + t, keys[warp], ids, shares, [&](int e) { return gathered[t][e]; });
#endif
  } else {
    __syncthreads();
    if (threadIdx.x == 0) last_here = add_acq_rel(arrivals + blockIdx.y, 1) + 1 == gridDim.x;
    __syncthreads();
    if (!last_here) return;
    for (int t = t0 + warp; t < t0 + count; t += warps)
      router.choose_for<LANE_EXPERTS>(t, keys[warp], ids, shares, [&](int e) { return __ldcg(logits + (size_t)t * experts + e); });
    if (threadIdx.x == 0) arrivals[blockIdx.y] = 0;
  }
}

// The same for many tokens: a block has MANY of them and all experts, 128 at a time. segments: of K.
// Grid: (ceil(rows / MANY)). Block: 256. Shared: MANY_STAGES * (128 + MANY) * 128. Bound by L2.
[[maybe_unused]] constexpr int MANY_WARPS = 8, MANY_STAGES = 4;
template <typename T, int LANE_EXPERTS>
__global__ void __launch_bounds__(32 * MANY_WARPS)
route_many(int* ids, float* shares, const T* x, const T* __restrict__ weight, const float* __restrict__ bias, float* logits,
           const int* num_tokens, int k, int experts, int top_k, int always, int groups, int kept, int flags, int segments,
           float scale) {
  constexpr int WEIGHTS = MANY_WARPS * SLICE_BYTES, STAGE = WEIGHTS + MANY * 128;
  extern __shared__ __align__(1024) u8 shared[];
  __shared__ u32 keys[MANY_WARPS][32 * LANE_EXPERTS];
  const u32 base = smem(shared);
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, blocks = (k + TILE - 1) / TILE, t0 = blockIdx.x * MANY;
  griddep_launch();
  griddep_wait();
  const int tokens = *num_tokens, count = min(MANY, tokens - t0);
  if (count <= 0) return;
  for (int e0 = 0; e0 < experts; e0 += MANY_WARPS * SLICE) {
    const bool works = e0 + warp * SLICE < experts;
    const auto load = [&](int block) {
      if (block < blocks) {
        const u32 to = base + block % MANY_STAGES * STAGE;
        const int r = threadIdx.x / 8;
#pragma unroll
        for (int i = 0; i < 4; i++)
          if (e0 + r + 32 * i < (experts + SLICE - 1) / SLICE * SLICE)
            load_chunk(to, r + 32 * i, weight, e0 + r + 32 * i, experts, k, block, threadIdx.x % 8);
        load_chunk(to + WEIGHTS, r, x, t0 + r, tokens, k, block, threadIdx.x % 8);
      }
      cp_async_commit();
    };
    __syncthreads();  // all have read the last round's stages
    for (int s = 0; s < MANY_STAGES - 1; s++) load(s);
    float acc[MANY / 8][4] = {}, sum[MANY / 8][4] = {};
    int segment = 0, end = segment_start(blocks, segments, 1);
    for (int block = 0; block < blocks; block++) {
      cp_async_wait<MANY_STAGES - 2>();
      __syncthreads();
      load(block + MANY_STAGES - 1);
      const u32 w = base + block % MANY_STAGES * STAGE + warp * SLICE_BYTES, t = base + block % MANY_STAGES * STAGE + WEIGHTS;
      if (works)
#pragma unroll
        for (int step = 0; step < TILE / 16; step++) {
          u32 a[4], b[4];
          ldmatrix_x4(a, w + lane % 16 * 128 + ((2 * step + lane / 16) ^ lane % 8) * 16);
#pragma unroll
          for (int j = 0; j < MANY / 8; j += 2) {
            const int token = 8 * j + lane / 16 * 8 + lane % 8;
            ldmatrix_x4(b, t + token * 128 + ((2 * step + lane / 8 % 2) ^ token % 8) * 16);
            mma_16816(acc[j], a, {b[0], b[1]}, T());
            mma_16816(acc[j + 1], a, {b[2], b[3]}, T());
          }
        }
      if (block + 1 == end) {
#pragma unroll
        for (int j = 0; j < MANY / 8; j++)
#pragma unroll
          for (int i = 0; i < 4; i++) {
            sum[j][i] = segment ? sum[j][i] + acc[j][i] : acc[j][i];
            acc[j][i] = 0.f;
          }
        segment++;
        end = segment_start(blocks, segments, segment + 1);
      }
    }
    cp_async_wait<0>();
#pragma unroll
    for (int j = 0; j < MANY / 8; j++)
#pragma unroll
      for (int i = 0; i < 4; i++) {
        const int expert = e0 + warp * SLICE + lane / 4 + i / 2 * 8, t = 8 * j + lane % 4 * 2 + i % 2;
        if (expert < experts && t < count) __stcg(logits + (size_t)(t0 + t) * experts + expert, sum[j][i]);
      }
  }
  __syncthreads();
  const Router router{bias, experts, top_k, always, groups, kept, flags, scale};
  for (int t = t0 + warp; t < t0 + count; t += MANY_WARPS)
    router.choose_for<LANE_EXPERTS>(t, keys[warp], ids, shares, [&](int e) { return __ldcg(logits + (size_t)t * experts + e); });
}

// One token's products on Hopper: weights stream as in gemm_sm90.cu, by a launch whose way in and out is short.
//
// The token lies in shared memory as a whole, brought (and normalised, where a norm stands before the product, by the
// instructions of rowwise/norm.cu) by the warps that sum; it is the first of the eight tokens that wgmma takes, the others
// are whatever lay there. Its sums leave from registers: of four lanes that have a row's sums the first has the token's.
// K is cut and summed as everywhere (see gemm.cuh), so the bits are those of the kernels for many tokens.
//
//   SPLIT  a block sums one segment of K, and sends its 128 sums to the first block of its cluster, which adds them in
//          ascending order. grid (segments, 1, row pairs), cluster (segments, 1, 1).
//   else   for weights of one segment: resident blocks walk over row pairs. grid (blocks, 1, 1).
//
// Bound by memory; a block waits for its predecessor with a ring full of weights.
#include "gemm/mainloop.cuh"
#include "gemm/tile_scheduler.cuh"
#include "rowwise/row_norm.cuh"

namespace rvllm::gemm {

inline constexpr int ONE_CONSUMERS = 256, ONE_MAX_STAGES = 13, ONE_STAGE = 2 * TILE_BYTES;
inline constexpr int ONE_VECTORS = 2;  // pieces of 8 columns that a thread normalises
enum Front : int { PLAIN, RMS, LAYER_NORM };  // what stands before the product

// What lies behind a block's stages and token.
struct OneTail {
  float parts[8][2 * TILE];  // sums of the cluster's blocks, two rows of a lane side by side
  float scratch[64];
  u64 barriers[2 * ONE_MAX_STAGES + 2];
};
static_assert(sizeof(OneTail) <= 4608);

struct OneNorm {
  int front;
  void* normed;  // [K]: the normalised token is left here too
  const float *weight, *bias;  // [K] or null
  float eps;
};

// The token's 16-byte piece `i`, in shared memory, and the operand of 16 of K: pieces lie side by side, without a swizzle.
// What wgmma takes for the other seven tokens are the pieces behind.
__device__ __forceinline__ u32 one_piece(u32 x, int i) { return x + i * 16; }
__device__ __forceinline__ u64 one_operand(u32 x, int block, int j) {
  u64 operand;
  asm("mov.b64 %0, {%1, %2};" : "=l"(operand) : "r"(1u << 16 | ((x + block * TILE * 2 + 32 * j) & 0x3FFFF) >> 4), "n"(8));
  return operand;
}

// Brings pieces [first, last) of x [k] to shared memory, normalised. leave: whether to norm.normed too.
template <class T>
__device__ __forceinline__ void bring_normed(const T* x, u32 to, const OneNorm& norm, const float4 (&w)[ONE_VECTORS][2], int k, int first,
                                             int last, float* scratch, bool leave) {
  constexpr int VECTORS = ONE_VECTORS;
  const bool layer = norm.front == LAYER_NORM;
  const int vectors = k / 8, thread = threadIdx.x, warp = thread / 32, lane = thread % 32;
  uint4 raw[VECTORS];
#pragma unroll
  for (int p = 0; p < VECTORS; p++) {
    const int i = thread + p * ONE_CONSUMERS;
    raw[p] = i < vectors ? ptx::load_l2(x + i * 8) : make_uint4(0, 0, 0, 0);
  }
  // As block_sum with a vector a thread: each warp's sum, then those in ascending order.
  const auto total = [&](float* sums, auto value) {
#pragma unroll
    for (int p = 0; p < VECTORS; p++) {
      if (p * ONE_CONSUMERS >= vectors) break;
      float v[8];
      unpack8<T>(raw[p], v);
      const float sum = warp_sum(value(v, thread + p * ONE_CONSUMERS < vectors));
      if (lane == 0) sums[warp + p * (ONE_CONSUMERS / 32)] = sum;
    }
    ptx::bar_sync(1, ONE_CONSUMERS);
    float all = sums[0];
    const int parts = (vectors + 31) / 32;
    for (int i = 1; i < parts; i++) all += sums[i];
    return all;
  };
  float mean = 0.f;
  if (layer)
    mean = total(scratch, [](const float(&v)[8], bool) {
      float sum = 0.f;
#pragma unroll
      for (int j = 0; j < 8; j++) sum = sum + v[j];
      return sum;
    }) / k;
  const float squares = total(scratch + 32, [&](const float(&v)[8], bool in) {
    float sum = 0.f;
    if (in)
#pragma unroll
      for (int j = 0; j < 8; j++) sum = plus_square(sum, v[j] - mean);
    return sum;
  });
  const float factor = 1.f / sqrtf(squares / k + norm.eps);
#pragma unroll
  for (int p = 0; p < VECTORS; p++) {
    const int i = thread + p * ONE_CONSUMERS;
    if (i < vectors && (leave || (i >= first && i < last))) {
      float v[8];
      unpack8<T>(raw[p], v);
      const float weight[8] = {w[p][0].x, w[p][0].y, w[p][0].z, w[p][0].w, w[p][1].x, w[p][1].y, w[p][1].z, w[p][1].w};
#pragma unroll
      for (int j = 0; j < 8; j++)
        v[j] = finished(v[j], mean, factor, weight[j], layer && norm.bias ? norm.bias[i * 8 + j] : 0.f);
      const uint4 packed = pack8<T>(v);
      if (i >= first && i < last) ptx::store_shared(one_piece(to, i - first), packed);
      if (leave) static_cast<uint4*>(norm.normed)[i] = packed;
    } else if (i >= vectors && i < last) {
      ptx::store_shared(one_piece(to, i - first), make_uint4(0, 0, 0, 0));
    }
  }
}

// Two outputs from a lane's sums of packed rows `row` and row + 8, or one where they are a gate and its up.
template <class T>
__device__ __forceinline__ void finish_rows(const Epilogue& e, int row, float low, float high, const T (&residual)[2]) {
  T* const out = static_cast<T*>(e.out);
  if (gated(e.kind)) {
    if (row >= e.rows) return;
    Pack<T, 1> value, g{{rounded<T>(low + bias_of<T>(e, row))}}, u{{rounded<T>(high + bias_of<T>(e, row + 8))}};
    gate_all(value, g, u, e);
    out[row / 16 * 8 + row % 8] = value.v[0];
    return;
  }
#pragma unroll
  for (int h = 0; h < 2; h++) {
    const int r = row + 8 * h;
    if (r >= e.rows) break;
    Pack<T, 1> value{{rounded<T>((h ? high : low) + bias_of<T>(e, r))}};
    activate_all(value, e.kind);
    if (e.residual) value.v[0] = added<T>(residual[h], value.v[0], e.scale);
    out[r] = value.v[0];
  }
}
template <class T>
__device__ __forceinline__ void residuals_of(const Epilogue& e, int row, T (&residual)[2]) {
#pragma unroll
  for (int h = 0; h < 2; h++)
    if (e.residual && row + 8 * h < e.rows) residual[h] = static_cast<const T*>(e.residual)[row + 8 * h];
}

// x [k]; weights: packed; out [rows] or half of them, gated; residual [rows], may be `out`. blocks: ceil(k / 64). stages: of
// the ring, at most ONE_MAX_STAGES; shared memory: those, 128 bytes for each block of K that is summed here, and OneTail.
// The rest: see Epilogue and OneNorm; k <= 8 * ONE_VECTORS * ONE_CONSUMERS where a norm stands before.
template <class T, bool SPLIT>
__global__ void __launch_bounds__(ONE_CONSUMERS + 32, 2)
    one_token(const T* x, const u8* __restrict__ weights, void* out, const void* bias, const void* residual, int kind, int rows,
              float scale, float soft_cap, int k, int blocks, int segments, int stages, int front, void* normed, const float* norm_weight,
              const float* norm_bias, float eps) {
  using namespace ptx;
  extern __shared__ __align__(1024) u8 shared[];
  griddep_launch();
  const int warp = __shfl_sync(~0u, threadIdx.x / 32, 0), lane = threadIdx.x % 32;
  const int rank = SPLIT ? blockIdx.x : 0;
  const int k0 = SPLIT ? segment_start(blocks, segments, rank) : 0, k1 = SPLIT ? segment_start(blocks, segments, rank + 1) : blocks;
  const int held = SPLIT ? (blocks + segments - 1) / segments : blocks;  // the most blocks of K that a block sums
  const u32 base = smem(shared), x_at = base + stages * ONE_STAGE;
  auto* const tail = reinterpret_cast<OneTail*>(shared + stages * ONE_STAGE + (held + 1) * TILE * 2);  // at one place in all blocks
  const u32 bars = smem(tail->barriers), arrived = bars + 16 * ONE_MAX_STAGES;
  const Epilogue e{out, bias, residual, kind, 1, rows, 0, scale, soft_cap};
  const int tiles = (rows + TILE - 1) / TILE;
  Walk<8, 1, false> walk(rows, 1);
  const auto load = [&](const Visit& v, int b, int stage) {
    const u32 bar = bars + 16 * stage;
    mbar_arrive_expect(bar, v.count * TILE_BYTES);
#pragma unroll
    for (int i = 0; i < 2; i++)
      if (i < v.count)
        bulk_load(base + stage * ONE_STAGE + i * TILE_BYTES, weights + (static_cast<u64>(min(v.tile + i, tiles - 1)) * blocks + b) * TILE_BYTES,
                  TILE_BYTES, bar, EVICT_FIRST);
  };
  const Visit only{static_cast<int>(blockIdx.z) * 2, 2, 0, 8, false};
  Visit v = only;
  int loaded = 0;
  if (threadIdx.x == ONE_CONSUMERS) {
    for (int s = 0; s < stages; s++) {
      mbar_init(bars + 16 * s, 1);
      mbar_init(bars + 16 * s + 8, ONE_CONSUMERS / 32);
    }
    if (SPLIT && rank == 0) {
      mbar_init(arrived, 1);
      mbar_arrive_expect(arrived, (segments - 1) * 2 * TILE * 4);
    }
    mbar_init_fence();
    if (SPLIT || walk.next(v)) {  // the first weights: they depend on no kernel before
      loaded = min(stages, k1 - k0);
      for (int s = 0; s < loaded; s++) load(v, k0 + s, s);
    }
  }
  __syncthreads();
  if constexpr (SPLIT) cluster_arrive();  // the first block's barrier is there

  if (warp == ONE_CONSUMERS / 32) {
    if (lane == 0 && loaded) {
      int stage = loaded == stages ? 0 : loaded;
      u32 phase = loaded == stages;  // of the rounds before
      for (bool more = true; more;) {
        for (int b = k0 + loaded; b < k1; b++) {
          if (phase) mbar_wait(bars + 16 * stage + 8, (phase - 1) & 1);
          load(v, b, stage);
          if (++stage == stages) stage = 0, phase++;
        }
        loaded = 0;
        more = !SPLIT && walk.next(v);
      }
    }
    __syncwarp();
    if constexpr (SPLIT) cluster_wait();
    return;
  }

  const OneNorm norm{front, normed, norm_weight, norm_bias, eps};
  float4 w[ONE_VECTORS][2];
  if (front != PLAIN) {
#pragma unroll
    for (int p = 0; p < ONE_VECTORS; p++)
#pragma unroll
      for (int h = 0; h < 2; h++) {
        const int i = threadIdx.x + p * ONE_CONSUMERS;
        w[p][h] = norm_weight && i < k / 8 ? reinterpret_cast<const float4*>(norm_weight)[2 * i + h] : make_float4(1.f, 1.f, 1.f, 1.f);
      }
  }
  const int first = k0 * 8, last = k1 * 8;  // pieces of x that are summed here
  T residuals[2];
  const int row_in_tile = warp * 16 + lane / 4;
  griddep_wait();
  if (front == PLAIN) {
    for (int i = first + threadIdx.x; i < last; i += ONE_CONSUMERS)
      store_shared(one_piece(x_at, i - first), i < k / 8 ? load_l2(x + i * 8) : make_uint4(0, 0, 0, 0));
  } else {
    bring_normed<T>(x, x_at, norm, w, k, first, last, tail->scratch, blockIdx.x == 0 && blockIdx.z == 0);
  }
  if (SPLIT && rank == 0 && lane % 4 == 0) residuals_of<T>(e, only.tile * TILE + row_in_tile, residuals);
  fence_async_shared();  // the tensor cores read like the copy engine
  bar_sync(1, ONE_CONSUMERS);

  const int group = warp / 4;
  int stage = 0;
  u32 phase = 0;
  const auto sum = [&](float (&acc)[4], int count) {
    int reading = -1;
    for (int b = k0; b < k1; b++) {
      mbar_wait(bars + 16 * stage, phase);
      if (group < count) {
        const u32 a = base + stage * ONE_STAGE + group * TILE_BYTES;
        const int block = b - k0;
        wgmma_pin(acc);
        wgmma_fence();
#pragma unroll
        for (int j = 0; j < TILE / 16; j++) wgmma<8, T>(acc, wgmma_operand(a + 32 * j), one_operand(x_at, block, j), j > 0 || b > k0);
        wgmma_commit();
        wgmma_pin(acc);
        if (reading >= 0) {
          wgmma_wait<1>();
          if (lane == 0) mbar_arrive(bars + 16 * reading + 8);
        }
        reading = stage;
      } else if (lane == 0) {
        mbar_arrive(bars + 16 * stage + 8);
      }
      if (++stage == stages) stage = 0, phase ^= 1;
    }
    if (reading >= 0) {
      wgmma_wait<0>();
      wgmma_pin(acc);
      if (lane == 0) mbar_arrive(bars + 16 * reading + 8);
    }
  };

  float acc[4];
  if constexpr (SPLIT) {
    sum(acc, 2);
    cluster_wait();
    const u32 at = smem(&tail->parts[rank][warp * 16 + lane / 4 * 2]);
    if (rank > 0) {
      if (lane % 4 == 0) store_async_pair(cluster_map(at, 0), acc[0], acc[2], cluster_map(arrived, 0));
      return;
    }
    mbar_wait(arrived, 0);
    if (lane % 4) return;
    for (int s = 1; s < segments; s++) {
      const float2 part = *reinterpret_cast<const float2*>(&tail->parts[s][warp * 16 + lane / 4 * 2]);
      acc[0] += part.x;
      acc[2] += part.y;
    }
    finish_rows<T>(e, only.tile * TILE + row_in_tile, acc[0], acc[2], residuals);
  } else {
    while (walk.next(v)) {
      const int row = v.tile * TILE + row_in_tile;
      if (group < v.count && lane % 4 == 0) residuals_of<T>(e, row, residuals);
      sum(acc, v.count);
      if (group < v.count && lane % 4 == 0) finish_rows<T>(e, row, acc[0], acc[2], residuals);
    }
  }
}

}  // namespace rvllm::gemm

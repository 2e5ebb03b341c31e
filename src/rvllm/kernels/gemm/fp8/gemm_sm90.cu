// Products of e4m3 weights and activations for Hopper. Loads, roles and epilogues are those of gemm/gemm_sm90.cu: 128
// columns of e4m3 take the bytes that 64 of 16 bits do. What differs is the sum: the tensor cores add up 128 along K, then
// the result is scaled and added to float32 registers, in ascending order.
//
//   SPLIT  a block sums one segment of K; the segments of a tile form a cluster and are added through
//          distributed shared memory. grid (segments, token tiles, row pairs), cluster (segments, 1, 1).
//   WALK   for weights with one segment: resident blocks walk over tiles. grid (blocks, 1, 1).
//   SUM    as WALK for any number of segments, whose running sum is kept in registers too.
//
// RESIDENT kernels, for few tokens, hold all activations of a block in shared memory. Where these come in 16 bits they are
// quantised on the way in, as fp8/quantise.cu does: it costs no launch, and weights are on their way meanwhile.
//
// Up to 64 tokens leave registers for a second accumulator: while one sum of 128 is scaled, the next products are under way.
#include "gemm/epilogue.cuh"
#include "gemm/fp8/fp8.cuh"
#include "gemm/tile_scheduler.cuh"
#include "ptx/wgmma_fp8.cuh"

namespace rvllm::fp8 {

using namespace gemm;
enum Mode { SPLIT, WALK, SUM };
inline constexpr int CONSUMERS = 256;

struct alignas(64) TensorMap {
  u64 opaque[16];
};

template <int TOKENS, Mode MODE, bool RESIDENT>
struct Layout {
  static constexpr bool SINGLE = TOKENS >= 128;  // no registers for a second accumulator
  static constexpr bool MANY_REGISTERS = MODE == WALK ? TOKENS >= 160 : MODE == SUM && TOKENS >= 128;
  static constexpr int THREADS = CONSUMERS + (MANY_REGISTERS ? 128 : 32);
  static constexpr int WEIGHTS = 2 * TILE_BYTES, X = RESIDENT ? 0 : TOKENS * BLOCK_K;
  static constexpr int WEIGHT_SCALES = 2 * 8 * 4;                       // of two tiles, one for eight rows
  static constexpr int SCALES = RESIDENT ? 128 : (WEIGHT_SCALES + TOKENS * 4 + 127) / 128 * 128;
  static constexpr int STAGE = WEIGHTS + X + SCALES;
  static constexpr int RESIDENT_BLOCK = RESIDENT ? TOKENS * (BLOCK_K + 4) : 0;  // x of 128 columns and its scales
  static constexpr int CHUNK = TOKENS % 64 == 0 ? 64 : TOKENS < 32 ? TOKENS : 32;  // tokens staged at a time
  static constexpr int STAGE_PITCH = (TILE + 8) * 2;
  static constexpr int SPLIT_PITCH = 2 * TILE + 4;
  static constexpr int SUMS = (CHUNK < 32 ? CHUNK : 32) * (TILE + 4) * 4;
  static constexpr int PER_GROUP = CHUNK * STAGE_PITCH > SUMS ? CHUNK * STAGE_PITCH : SUMS;
  static constexpr int STAGING = MODE == SPLIT ? 0 : 2 * PER_GROUP;
  static constexpr int HELD = TOKENS <= 16 ? 1 : TOKENS == 64 ? 4 : 2;
  static constexpr int BARRIERS = 256, MOST = 12;
};

// The stages of loads in flight.
struct Ring {
  int stages;
  u32 weights, x, scales;
  int x_pitch, scales_pitch;
  int stage = 0;
  u32 phase = 0;
  __device__ void advance() {
    if (++stage == stages) stage = 0, phase ^= 1;
  }
  __device__ u32 weights_at() const { return weights + stage * (2 * TILE_BYTES); }
  __device__ u32 x_at() const { return x + stage * x_pitch; }
  __device__ u32 scales_at() const { return scales + stage * scales_pitch; }
};

__device__ __forceinline__ float smem_float(u32 at) {
  float v;
  asm volatile("ld.shared.f32 %0, [%1];" : "=f"(v) : "r"(at));
  return v;
}
__device__ __forceinline__ float2 smem_float2(u32 at) {
  float2 v;
  asm volatile("ld.shared.v2.f32 {%0, %1}, [%2];" : "=f"(v.x), "=f"(v.y) : "r"(at));
  return v;
}

// 16-bit x [tokens, width] from token0 and block k0 on, quantised into tiles of TOKENS rows of 128 bytes (128-byte swizzle)
// at `tiles`, scales [blocks][TOKENS] at `scales`. Rows that do not exist were zeroed before.
template <class T, int TOKENS>
__device__ __forceinline__ void quantise_resident(const T* x, int width, int pitch, int count, int k0, int blocks,
                                                  u32 tiles, u32 scales, int warp, int lane) {
  constexpr int BATCH = 4;
  const int units = blocks * count, l = lane % 16;  // half a warp takes one token's 128 columns, eight a lane
  for (int first = warp * 2; first < units; first += BATCH * (CONSUMERS / 16)) {
    uint4 in[BATCH];
    int block[BATCH], token[BATCH];
#pragma unroll
    for (int b = 0; b < BATCH; b++) {
      const int u = min(first + b * (CONSUMERS / 16) + lane / 16, units - 1);
      block[b] = u / count, token[b] = u % count;
      const int column = (k0 + block[b]) * BLOCK_K + l * 8;
      in[b] = column < width ? ptx::load_l2(x + static_cast<size_t>(token[b]) * pitch + column) : make_uint4(0, 0, 0, 0);
    }
#pragma unroll
    for (int b = 0; b < BATCH; b++) {
      const auto* pack = reinterpret_cast<const Pack<T, 8>*>(&in[b]);
      float v[8], amax = 0.f;
#pragma unroll
      for (int i = 0; i < 8; i++) {
        v[i] = to_float(pack->v[i]);
        amax = fmaxf(amax, fabsf(v[i]));
      }
#pragma unroll
      for (int d = 8; d; d /= 2) amax = fmaxf(amax, __shfl_xor_sync(~0u, amax, d));
      const float inverse = inverse_of(amax);
      u32 words[2];
#pragma unroll
      for (int i = 0; i < 2; i++)
        words[i] = to_e4m3x2(__fmul_rn(v[4 * i], inverse), __fmul_rn(v[4 * i + 1], inverse)) |
                   to_e4m3x2(__fmul_rn(v[4 * i + 2], inverse), __fmul_rn(v[4 * i + 3], inverse)) << 16;
      const u32 at = tiles + (block[b] * TOKENS + token[b]) * BLOCK_K + ((l / 2) ^ (token[b] % 8)) * 16 + l % 2 * 8;
      asm volatile("st.shared.v2.u32 [%0], {%1, %2};" ::"r"(at), "r"(words[0]), "r"(words[1]) : "memory");
      if (l == 0)
        asm volatile("st.shared.f32 [%0], %1;" ::"r"(scales + (block[b] * TOKENS + token[b]) * 4), "f"(scale_of(amax)) : "memory");
    }
  }
}
// The same of x that is quantised already: q [tokens, pitch] and scales [pitch / 128, capacity] from token0 on.
template <int TOKENS>
__device__ __forceinline__ void copy_resident(const u8* q, const float* x_scales, int pitch, int capacity, int count, int k0,
                                              int blocks, u32 tiles, u32 scales, int thread) {
  constexpr int BATCH = 4;
  const int chunks = blocks * TOKENS * 8;
  for (int first = thread; first < chunks; first += BATCH * CONSUMERS) {
    uint4 in[BATCH];
#pragma unroll
    for (int b = 0; b < BATCH; b++) {
      const int i = first + b * CONSUMERS, row = i / 8, token = row % TOKENS;
      if (i < chunks && token < count)
        in[b] = ptx::load_l2(q + static_cast<size_t>(token) * pitch + (k0 + row / TOKENS) * BLOCK_K + i % 8 * 16);
    }
#pragma unroll
    for (int b = 0; b < BATCH; b++) {
      const int i = first + b * CONSUMERS, row = i / 8, token = row % TOKENS;
      if (i < chunks && token < count)
        asm volatile("st.shared.v4.u32 [%0], {%1, %2, %3, %4};" ::"r"(tiles + row * BLOCK_K + (i % 8 ^ token % 8) * 16),
                     "r"(in[b].x), "r"(in[b].y), "r"(in[b].z), "r"(in[b].w) : "memory");
    }
  }
  for (int i = thread; i < blocks * TOKENS; i += CONSUMERS)
    if (i % TOKENS < count)
      asm volatile("st.shared.f32 [%0], %1;" ::"r"(scales + i * 4),
                   "f"(__ldcg(x_scales + static_cast<size_t>(k0 + i / TOKENS) * capacity + i % TOKENS)) : "memory");
}
template <int TOKENS>
__device__ __forceinline__ void zero_resident(int count, int blocks, u32 tiles, u32 scales, int thread) {
  const int spare = TOKENS - count;
  for (int i = thread; i < blocks * spare * 8; i += CONSUMERS) {
    const int row = i / 8 / spare * TOKENS + count + i / 8 % spare;
    asm volatile("st.shared.v4.u32 [%0], {%1, %1, %1, %1};" ::"r"(tiles + row * BLOCK_K + i % 8 * 16), "r"(0) : "memory");
    if (i % 8 == 0) asm volatile("st.shared.u32 [%0], %1;" ::"r"(scales + row * 4), "r"(0) : "memory");
  }
}

// x: tensor map of e4m3 [>= tokens, pitch] in boxes of 128 bytes x (TOKENS / CLUSTER), 128-byte swizzle; not read where x
// is RESIDENT. Its scales: x_scales [blocks, x_pitch]. RESIDENT: x_rows is that e4m3, or, where x_scales is null, 16-bit
// [>= tokens, x_width], x_pitch elements apart.
// weights, block_scales (or null), row_scales (or null): see fp8.cuh. blocks: ceil(K / 128). The rest: see Epilogue.
template <class T, int TOKENS, Mode MODE, int CLUSTER, bool RESIDENT>
__global__ void __launch_bounds__(Layout<TOKENS, MODE, RESIDENT>::THREADS, 1)
    gemm(const __grid_constant__ TensorMap x, const u8* __restrict__ weights, const float* __restrict__ block_scales,
         const float* __restrict__ row_scales, const void* x_rows, const float* x_scales, int x_width, int x_pitch,
         void* out, const void* bias, const void* residual, int kind, int tokens, int rows, int pitch, float scale,
         float soft_cap, int blocks, int segments) {
  using L = Layout<TOKENS, MODE, RESIDENT>;
  using namespace ptx;
  constexpr int REGS = TOKENS / 2;
  const int held_blocks = RESIDENT ? MODE == SPLIT ? (blocks + segments - 1) / segments : blocks : 0;
  const int stages = min(L::MOST, (dynamic_smem_bytes() - L::BARRIERS - L::STAGING - held_blocks * L::RESIDENT_BLOCK) / L::STAGE);
  constexpr u16 ALL = (1 << CLUSTER) - 1;
  extern __shared__ __align__(1024) u8 shared[];
  const u32 base = smem(shared), x_base = base + stages * L::WEIGHTS;
  const u32 resident = x_base + stages * L::X, staging_base = resident + held_blocks * TOKENS * (RESIDENT ? BLOCK_K : 0);
  const u32 scales_base = staging_base + L::STAGING, resident_scales = scales_base + stages * L::SCALES;
  const u32 bars = base + dynamic_smem_bytes() - L::BARRIERS;
  const auto full = [&](int s) { return bars + 16 * s; };
  const auto empty = [&](int s) { return bars + 16 * s + 8; };
  const Ring loads{stages, base, x_base, scales_base, L::X, L::SCALES};
  const int warp = __shfl_sync(~0u, threadIdx.x / 32, 0), lane = threadIdx.x % 32;
  const int tiles = (rows + TILE - 1) / TILE;
  const Epilogue e{out, bias, residual, kind, tokens, rows, pitch, scale, soft_cap};
  const auto split_items = [&](int rank) {
    const int count = min(TOKENS, tokens - static_cast<int>(blockIdx.y) * TOKENS);
    return count * items_per_token<2 * TILE>(kind) * rank / segments;
  };
  Held<T> held[L::HELD];
  const auto hold_from = [&](int item) {
#pragma unroll
    for (int b = 0; b < L::HELD; b++, item += CONSUMERS)
      held[b] = hold<T>(e, blockIdx.y * TOKENS + item / (TILE / 2), blockIdx.z * 2 * TILE + item % (TILE / 2) * 4);
  };

  griddep_launch();
  if (threadIdx.x == CONSUMERS) {
    if constexpr (!RESIDENT) tensor_map_prefetch(&x);
    for (int s = 0; s < stages; s++) {
      mbar_init(full(s), 1);
      mbar_init(empty(s), CONSUMERS / 32 * CLUSTER);
    }
    mbar_init_fence();
  }
  if constexpr (CLUSTER > 1)
    cluster_sync();
  else
    __syncthreads();

  int k0 = 0, k1 = blocks;
  if constexpr (MODE == SPLIT) {
    k0 = segment_start(blocks, segments, blockIdx.x);
    k1 = segment_start(blocks, segments, blockIdx.x + 1);
  }
  Walk<TOKENS, CLUSTER, false> walk(rows, tokens);
  bool once = true;
  const auto next = [&](Visit& v) {
    if constexpr (MODE == SPLIT) {
      const bool first = once;
      once = false;
      v = {static_cast<int>(blockIdx.z) * 2, 2, static_cast<int>(blockIdx.y) * TOKENS, TOKENS, false};
      return first;
    } else {
      return walk.next(v);
    }
  };

  if (warp >= CONSUMERS / 32) {
    if constexpr (L::MANY_REGISTERS) registers_lower<40>();
    if (threadIdx.x == CONSUMERS) {
      const u64 hint = walk.again() ? EVICT_NORMAL : EVICT_FIRST;
      const auto load_weights = [&](const Visit& v, int k, const Ring& ring) {
        const u32 bar = full(ring.stage), dst = ring.weights_at();
        const int count = max(0, min(v.count, tiles - v.tile));  // of a cluster's last tiles, some blocks have none
        mbar_arrive_expect(bar, count * TILE_BYTES + (block_scales ? count * 32 : 0) + (RESIDENT ? 0 : TOKENS * (BLOCK_K + 4)));
#pragma unroll
        for (int i = 0; i < 2; i++)
          if (i < count) bulk_load(dst + i * TILE_BYTES, weights + (static_cast<u64>(v.tile + i) * blocks + k) * TILE_BYTES, TILE_BYTES, bar, hint);
        if (block_scales && count > 0)
          bulk_load(ring.scales_at(), block_scales + (static_cast<u64>(k) * tiles + v.tile) * 8, count * 32, bar, EVICT_NORMAL);
      };
      const auto load_x = [&](const Visit& v, int k, const Ring& ring) {
        if constexpr (!RESIDENT) {
          constexpr int SHARE = TOKENS / CLUSTER;
          const u32 bar = full(ring.stage), dst = ring.x_at();
          // The map's elements are pairs of bytes.
          if constexpr (CLUSTER > 1) {
            const int first = walk.rank * SHARE;
            tensor_load_2d_multicast(dst + first * BLOCK_K, &x, k * (BLOCK_K / 2), v.token0 + first, bar, ALL);
          } else {
            tensor_load_2d(dst, &x, k * (BLOCK_K / 2), v.token0, bar);
          }
          bulk_load(ring.scales_at() + L::WEIGHT_SCALES, x_scales + static_cast<size_t>(k) * x_pitch + v.token0, TOKENS * 4, bar, EVICT_NORMAL);
        }
      };
      Visit v;
      bool more = next(v);
      Ring ring = loads;
      // Weights first: they depend on no kernel before this one.
      int ahead = more ? min(ring.stages, k1 - k0) : 0;
      for (Ring r = ring; r.stage < ahead; r.stage++) load_weights(v, k0 + r.stage, r);
      griddep_wait();
      for (int s = 0; s < ahead; s++) {
        load_x(v, k0 + s, ring);
        ring.advance();
      }
      while (more) {
        for (int k = k0 + ahead; k < k1; k++) {
          mbar_wait(empty(ring.stage), ring.phase ^ 1);
          load_weights(v, k, ring);
          load_x(v, k, ring);
          ring.advance();
        }
        ahead = 0;
        more = next(v);
      }
    } else {
      griddep_wait();
    }
    __syncwarp();
  } else {
    if constexpr (L::MANY_REGISTERS) registers_raise<232>();
    const int group = warp / 4, thread = threadIdx.x % 128;
    const int row = warp % 4 * 16 + lane / 4, column = lane % 4 * 2;  // of the first accumulator, within its tile
    Ring ring = loads;
    Visit v{};
    float sum[REGS];
    const auto release = [&](int stage) {
      if constexpr (CLUSTER > 1) {
        if (lane < CLUSTER) mbar_arrive_remote(empty(stage), lane);
      } else {
        if (lane == 0) mbar_arrive(empty(stage));
      }
    };
    // Queues the products of the ring's next block of K, number k; returns its stage.
    const auto multiply = [&](float(&acc)[REGS], int k) {
      const int stage = ring.stage;
      mbar_wait(full(stage), ring.phase);
      const u32 a = ring.weights_at() + group * TILE_BYTES;
      const u32 b = RESIDENT ? resident + (k - k0) * (TOKENS * BLOCK_K) : ring.x_at();
      wgmma_pin(acc);
      wgmma_fence();
#pragma unroll
      for (int j = 0; j < BLOCK_K / 32; j++) wgmma_e4m3<TOKENS>(acc, wgmma_operand(a + 32 * j), wgmma_operand(b + 32 * j), j > 0);
      wgmma_commit();
      wgmma_pin(acc);
      ring.advance();
      return stage;
    };
    // Adds the products of block k, which are done and lie in `stage`, to the sums.
    const auto promote = [&](float(&acc)[REGS], int k, int stage) {
      const u32 scales = scales_base + stage * L::SCALES;
      const u32 xs = (RESIDENT ? resident_scales + (k - k0) * TOKENS * 4 : scales + L::WEIGHT_SCALES) + column * 4;
      wgmma_pin(acc);
      if (block_scales) {
        const float2 by_block = smem_float2(scales + (group * 8 + warp % 4 * 2) * 4);
#pragma unroll
        for (int j = 0; j < TOKENS / 8; j++) {
          const float2 s = smem_float2(xs + 32 * j);
#pragma unroll
          for (int i = 0; i < 4; i++)
            sum[4 * j + i] = fmaf(acc[4 * j + i], __fmul_rn(i % 2 ? s.y : s.x, i / 2 ? by_block.y : by_block.x), sum[4 * j + i]);
        }
      } else {
#pragma unroll
        for (int j = 0; j < TOKENS / 8; j++) {
          const float2 s = smem_float2(xs + 32 * j);
#pragma unroll
          for (int i = 0; i < 4; i++) sum[4 * j + i] = fmaf(acc[4 * j + i], i % 2 ? s.y : s.x, sum[4 * j + i]);
        }
      }
    };
    // Sums blocks [first, last) into `sum`, of the tile that falls to this warpgroup.
    const auto segment = [&](int first, int last) {
      float by_row[2] = {1.f, 1.f};
      if (row_scales) {
        const float* at = row_scales + min(v.tile + group, tiles - 1) * TILE + row;
        by_row[0] = __ldg(at), by_row[1] = __ldg(at + 8);
      }
#pragma unroll
      for (int i = 0; i < REGS; i++) sum[i] = 0.f;
      int k = first;
      if constexpr (L::SINGLE) {
        float acc[REGS];
#pragma unroll 1
        for (; k < last; k++) {
          const int stage = multiply(acc, k);
          wgmma_wait<0>();
          promote(acc, k, stage);
          release(stage);
        }
      } else {
        float even[REGS], odd[REGS];
        const auto finish = [&](float(&acc)[REGS], int k, int stage) {
          promote(acc, k, stage);
          release(stage);
        };
        int at_even = multiply(even, k), at_odd;
#pragma unroll 1
        for (; k + 2 < last; k += 2) {
          at_odd = multiply(odd, k + 1);
          wgmma_wait<1>();
          finish(even, k, at_even);
          at_even = multiply(even, k + 2);
          wgmma_wait<1>();
          finish(odd, k + 1, at_odd);
        }
        if (k + 1 < last) {
          at_odd = multiply(odd, k + 1);
          wgmma_wait<1>();
          finish(even, k, at_even);
          wgmma_wait<0>();
          finish(odd, k + 1, at_odd);
        } else {
          wgmma_wait<0>();
          finish(even, k, at_even);
        }
      }
#pragma unroll
      for (int i = 0; i < REGS; i++) sum[i] = __fmul_rn(sum[i], by_row[i / 2 % 2]);
    };
    if constexpr (RESIDENT) {
      const int token0 = MODE == SPLIT ? blockIdx.y * TOKENS : 0, count = min(TOKENS, tokens - token0);
      zero_resident<TOKENS>(count, k1 - k0, resident, resident_scales, threadIdx.x);
      griddep_wait();
      if (x_scales)
        copy_resident<TOKENS>(static_cast<const u8*>(x_rows) + static_cast<size_t>(token0) * blocks * BLOCK_K, x_scales + token0,
                              blocks * BLOCK_K, x_pitch, count, k0, k1 - k0, resident, resident_scales, threadIdx.x);
      else
        quantise_resident<T, TOKENS>(static_cast<const T*>(x_rows) + static_cast<size_t>(token0) * x_pitch, x_width, x_pitch,
                                     count, k0, k1 - k0, resident, resident_scales, warp, lane);
      fence_async_shared();
      bar_sync(1, CONSUMERS);
    } else {
      griddep_wait();
    }

    if constexpr (MODE == SPLIT) {
      next(v);
      if (can_hold(e)) hold_from(split_items(blockIdx.x) + threadIdx.x);
      segment(k0, k1);
      bar_sync(1, CONSUMERS);  // both warpgroups have read their last stage before partial sums overwrite it
      float* partial = reinterpret_cast<float*>(shared);
#pragma unroll
      for (int j = 0; j < TOKENS / 8; j++)
#pragma unroll
        for (int i = 0; i < 4; i++)
          partial[(8 * j + column + i % 2) * L::SPLIT_PITCH + group * TILE + row + i / 2 * 8] = sum[4 * j + i];
    } else {
      u8* staging = shared + (staging_base - base) + group * L::PER_GROUP;
      while (next(v)) {
        if (group >= v.count) {  // nothing for this warpgroup: keep in step with the pipeline
          for (int k = 0; k < blocks; k++) {
            mbar_wait(full(ring.stage), ring.phase);
            release(ring.stage);
            ring.advance();
          }
          continue;
        }
        if constexpr (MODE == SUM) {
          float total[REGS];
          segment(0, segment_start(blocks, segments, 1));
#pragma unroll
          for (int i = 0; i < REGS; i++) total[i] = sum[i];
          for (int s = 1; s < segments; s++) {
            segment(segment_start(blocks, segments, s), segment_start(blocks, segments, s + 1));
#pragma unroll
            for (int i = 0; i < REGS; i++) total[i] += sum[i];
          }
#pragma unroll
          for (int i = 0; i < REGS; i++) sum[i] = total[i];
        } else {
          segment(0, blocks);
        }
        finish_accumulators<T, TOKENS, L::CHUNK, L::STAGE_PITCH>(e, sum, staging, 1 + group, thread, (v.tile + group) * TILE, v.token0);
      }
    }
  }

  if constexpr (MODE == SPLIT) {
    // Every block of the cluster adds up, in ascending order of segments, its share of the tile.
    cluster_sync();
    if (warp < CONSUMERS / 32) {
      const int token0 = blockIdx.y * TOKENS, row0 = blockIdx.z * 2 * TILE;
      const int first = split_items(blockIdx.x), last = split_items(blockIdx.x + 1);
      const auto load = [&](int token, int r, float(&q)[4]) {
        const u32 at = base + (token * L::SPLIT_PITCH + r) * 4;
        float4 part[8];
#pragma unroll
        for (int s = 0; s < 8; s++)
          if (s < segments) part[s] = cluster_load(cluster_map(at, s));
        q[0] = part[0].x, q[1] = part[0].y, q[2] = part[0].z, q[3] = part[0].w;
#pragma unroll
        for (int s = 1; s < 8; s++)
          if (s < segments) q[0] += part[s].x, q[1] += part[s].y, q[2] += part[s].z, q[3] += part[s].w;
      };
      if (can_hold(e)) {
        for (int i = first + threadIdx.x; i - static_cast<int>(threadIdx.x) < last; i += L::HELD * CONSUMERS) {
          float sums[L::HELD][4];
#pragma unroll
          for (int b = 0; b < L::HELD; b++) {
            const int item = min(i + b * CONSUMERS, last - 1);
            load(item / (TILE / 2), item % (TILE / 2) * 4, sums[b]);
          }
          if (i >= first + L::HELD * CONSUMERS) hold_from(i);
          if (i - static_cast<int>(threadIdx.x) + L::HELD * CONSUMERS >= last) cluster_arrive();
#pragma unroll
          for (int b = 0; b < L::HELD; b++) {
            const int item = i + b * CONSUMERS;
            if (item < last) finish_held<T>(e, token0 + item / (TILE / 2), row0 + item % (TILE / 2) * 4, sums[b], held[b]);
          }
        }
        if (first >= last) cluster_arrive();
      } else {
        finish_tile<T, 2 * TILE, 4>(e, token0, row0, first, last, threadIdx.x, CONSUMERS, load);
        cluster_arrive();
      }
    } else {
      cluster_arrive();
    }
    cluster_wait();
  } else if constexpr (CLUSTER > 1) {
    cluster_sync();
  }
}

}  // namespace rvllm::fp8

// Experts whose weights keep their format, on Hopper, for many entries: work tiles of (up to 96 entries of one expert) x (128
// rows of its matrix), dealt to one resident block a multiprocessor, as in moe/grouped_wide_sm90.cu. What streams through
// shared memory are the bytes of the format; each warpgroup turns its 64 rows of them into the register operand of wgmma,
// while the other one multiplies.
#include "moe/quantised.cuh"
#include "moe/wide.cuh"
#include "ptx/wgmma_rs.cuh"

namespace rvllm::experts {

inline constexpr int TURN = 6;  // named barriers from here on: whose turn at the tensor cores it is

template <class F>
struct QuantisedWide {
  static constexpr int ENTRIES = 96, CONSUMERS = 256, THREADS = CONSUMERS + 128;
  static constexpr int WEIGHTS = 2 * F::CHUNK, X_UNIT = ENTRIES * TILE * 2, X = 2 * X_UNIT;
  static constexpr int STAGED = ENTRIES * TILE * 2, STAGING = 2 * STAGED, BARRIERS = 256, LIMIT = 232448;
  static constexpr int FIT = (LIMIT - STAGING - BARRIERS) / (WEIGHTS + X), STAGES = FIT < 8 ? FIT : 8;
  static constexpr int BYTES = STAGES * (WEIGHTS + X) + STAGING + BARRIERS;
};

// One thread: fills the ring with chunks of 128 columns. Weights first, which depend on no kernel before this one.
template <class F>
__device__ __forceinline__ void produce_quantised(const TensorMap& x, const u8* __restrict__ weights, WideTiles at, Ring ring,
                                                  int strips, int chunks, u64 stride) {
  using namespace ptx;
  using L = QuantisedWide<F>;
  const auto load_weights = [&](int k, int stage) {
    const u32 bar = ring.full(stage), dst = ring.weights + stage * L::WEIGHTS;
    mbar_arrive_expect(bar, L::WEIGHTS + L::X);
#pragma unroll
    for (int i = 0; i < 2; i++) {
      const u64 strip = min(at.pair * 2 + i, strips - 1);
      bulk_load(dst + i * F::CHUNK, weights + at.tile.x * stride + (strip * chunks + k) * F::CHUNK, F::CHUNK, bar, EVICT_NORMAL);
    }
  };
  bool more = at.next();
  int ahead = more ? min(L::STAGES, chunks) : 0;
  for (int s = 0; s < ahead; s++) load_weights(s, s);
  griddep_wait();
  while (more) {
    for (int k = 0; k < chunks; k++) {
      if (k >= ahead) {
        mbar_wait(ring.empty(ring.stage), ring.phase ^ 1);
        load_weights(k, ring.stage);
      }
#pragma unroll
      for (int u = 0; u < 2; u++)
        tensor_load_2d(ring.x_at() + u * L::X_UNIT, &x, (2 * k + u) * TILE, at.tile.y, ring.full(ring.stage));
      ring.advance();
    }
    ahead = 0;
    more = at.next();
  }
}

// Where the scales of E4M3 matrices lie: behind the tiles, one a row or one for each eight rows of a tile and chunk.
struct RowScales {
  const float* scales;
  int kind, row_tile, row_tiles, thread;
  __device__ void of_rows(float (&by)[2]) const {
    const int row = thread / 32 * 16 + thread % 32 / 4;
    by[0] = kind == ROW_SCALES ? scales[row_tile * TILE + row] : 1.f;
    by[1] = kind == ROW_SCALES ? scales[row_tile * TILE + row + 8] : 1.f;
  }
  __device__ void of_blocks(float (&by)[2], int chunk) const {
    const float* const at = scales + (static_cast<size_t>(chunk) * row_tiles + row_tile) * 8 + thread / 32 * 2;
    by[0] = kind == BLOCK_SCALES ? at[0] : 1.f;
    by[1] = kind == BLOCK_SCALES ? at[1] : 1.f;
  }
};

// A warpgroup: its 64 rows of one work tile -> total, of as many entries as that has columns. Sums, groups and segments are
// added as in moe/quantised_gemm.cu.
template <class T, class F, int REGS>
__device__ __forceinline__ void sum_quantised(float (&total)[REGS], Ring& ring, const RowScales& scales, int group, int thread,
                                              int chunks, int segments) {
  using namespace ptx;
  using L = QuantisedWide<F>;
  constexpr bool E4M3 = IS_E4M3<F>;
  const int row = thread / 32 * 16 + thread % 32 / 4;
  float acc[REGS], sum[REGS], by_row[2];
  if constexpr (E4M3) scales.of_rows(by_row);
  const auto multiply = [&](const u32(&a)[4][4], u32 b, int from, int to, bool kept) {
    wgmma_pin(acc);
    wgmma_fence();
#pragma unroll
    for (int j = from; j < to; j++) wgmma_rs<REGS * 2, T, 0>(acc, a[j], wgmma_operand(b + 32 * j), j > from || kept);
    wgmma_commit();
    wgmma_pin(acc);
  };
  const auto promote = [&](float low, float high) {
#pragma unroll
    for (int i = 0; i < REGS; i++) sum[i] = fmaf(i % 4 < 2 ? low : high, acc[i], sum[i]);
  };
  for (int s = 0; s < segments; s++) {
    const int first = segment_start(chunks, segments, s), last = segment_start(chunks, segments, s + 1);
#pragma unroll
    for (int i = 0; i < REGS; i++) sum[i] = 0.f;
    for (int k = first; k < last; k++) {
      u32 even[4][4], odd[4][4];
      float by_block[2];
      if constexpr (E4M3) scales.of_blocks(by_block, k);
      mbar_wait(ring.full(ring.stage), ring.phase);
      const u32 here = ring.weights_at() + group * F::CHUNK, x = ring.x_at();
      F::template decode<T>(even, here, 0, thread, row);
      F::template decode<T>(odd, here, 1, thread, row);
      bar_sync(TURN + group, L::CONSUMERS);
      if constexpr (F::INTEGERS && F::RUNS > 1) {
#pragma unroll
        for (int u = 0; u < 2; u++)
#pragma unroll
          for (int j = 0; j < 4; j += F::STEPS) {
            multiply(u ? odd : even, x + u * L::X_UNIT, j, j + F::STEPS, false);
            if (u == 1 && j + F::STEPS == 4) bar_arrive(TURN + (group ^ 1), L::CONSUMERS);
            const u32 run = F::run_at(here, u, j) + 4 * row;
            const float low = low_half(shared_word(run)), high = low_half(shared_word(run + 32));
            wgmma_wait<0>();
            wgmma_pin(acc);
            promote(low, high);
          }
      } else {
        multiply(even, x, 0, 4, !F::INTEGERS && k > first);
        multiply(odd, x + L::X_UNIT, 0, 4, true);
        bar_arrive(TURN + (group ^ 1), L::CONSUMERS);
        if constexpr (F::INTEGERS && !E4M3) {
          by_block[0] = low_half(shared_word(here + 4 * row));
          by_block[1] = low_half(shared_word(here + 4 * row + 32));
        }
        wgmma_wait<0>();
        wgmma_pin(acc);
        if constexpr (F::INTEGERS) promote(by_block[0], by_block[1]);
      }
      gemm::release<1>(ring, ring.stage, thread % 32);
      ring.advance();
    }
#pragma unroll
    for (int i = 0; i < REGS; i++) {
      float v = F::INTEGERS ? sum[i] : acc[i];
      if constexpr (E4M3) v = __fmul_rn(v, by_row[i % 4 / 2]);
      total[i] = s == 0 ? v : total[i] + v;
    }
  }
}

// As `grouped_wide`, with weights in a format: a stack of packed matrices, `stride` bytes each, of ceil(K / 128) chunks a row
// tile. scales: Scales, of E4M3. x: tensor map of [>= entries, k] in boxes of 64 x ENTRIES.
// Grid: (multiprocessors). Shared: QuantisedWide<F>::BYTES. Bound by the tensor cores, and by what decoding takes.
template <class T, class F>
__global__ void __launch_bounds__(QuantisedWide<F>::THREADS, 1)
    quantised_wide(const __grid_constant__ TensorMap x, T* out, const u8* __restrict__ weights, const int4* tiles,
                   const int* num_tiles, u64 stride, int scales, int after_sort, int chunks, int segments, int rows, int pitch,
                   int kind, int group) {
  using namespace ptx;
  using L = QuantisedWide<F>;
  __builtin_assume(kind != gemm::LOGITS);
  extern __shared__ __align__(1024) u8 shared[];
  const u32 base = smem(shared), staging = base + L::STAGES * L::X, weights_base = staging + L::STAGING;
  const Ring ring{L::STAGES, weights_base, base, L::WEIGHTS, L::X, weights_base + L::STAGES * L::WEIGHTS};
  const int warp = __shfl_sync(~0u, threadIdx.x / 32, 0);
  if (threadIdx.x == L::CONSUMERS) {
    tensor_map_prefetch(&x);
    begin_ring(ring, L::CONSUMERS / 32);
  }
  __syncthreads();
  if (after_sort) griddep_wait();
  griddep_launch();
  const int strips = (rows + TILE - 1) / TILE;
  WideTiles at({__ldcg(num_tiles), (strips + 1) / 2, group, static_cast<int>(blockIdx.x)}, tiles);
  const auto epilogue = [&](const WideTiles& of) {
    return Epilogue{out + static_cast<size_t>(of.tile.y) * pitch, nullptr, nullptr, kind, of.tile.z, rows, pitch, 1.f, 0.f};
  };
  if (warp >= L::CONSUMERS / 32) {
    registers_lower<40>();
    const int thread = threadIdx.x - L::CONSUMERS - 32;
    if (thread >= 0) {
      griddep_wait();
      store_wide<T, L::STAGED>(at, epilogue, shared + (staging - base), thread, kind);
    } else if (thread == -32) {
      produce_quantised<F>(x, weights, at, ring, strips, chunks, stride);
    }
    return;
  }
  registers_raise<232>();
  const int mine = warp / 4, thread = threadIdx.x % 128;
  Ring reading = ring;
  float total[L::ENTRIES / 2] = {};
  if (mine == 1) bar_arrive(TURN, L::CONSUMERS);
  while (at.next()) {
    const int row_tile = min(at.pair * 2 + mine, strips - 1);
    const u8* const behind = weights + at.tile.x * stride + static_cast<u64>(strips) * chunks * F::CHUNK;
    const RowScales by{reinterpret_cast<const float*>(behind), scales, row_tile, strips, thread};
    of_width<64, 96>(at.tile.z <= 64 ? 64 : 96, total,
                     [&](auto& part) { sum_quantised<T, F>(part, reading, by, mine, thread, chunks, segments); });
    stage_outputs<T, L::ENTRIES, L::STAGED>(epilogue(at), total, staging + mine * L::STAGED, mine, thread,
                                            (at.pair * 2 + mine) * TILE, 0, at.tile.z);
  }
  if (mine == 0) bar_sync(TURN, L::CONSUMERS);  // as often as the other arrives
  bar_sync(ROOM + mine, 128 + STORERS);         // as often as the storers do
}

}  // namespace rvllm::experts

// Grouped products of experts on Hopper for many entries: work tiles of (up to 192 entries of one expert) x (128 rows of
// its matrix), dealt to one resident block a multiprocessor. As in the dense kernels (gemm/gemm_sm90.cu) weights are the
// 64-row side of wgmma, one thread fills a ring with the copy engine, and outputs leave while the next tile is summed.
// Rows of x lie in the order of entries by expert (`gather_rows` in moe/sort.cu), so boxes of a tensor map bring a tile's.
//
// Tiles of 128 would take in 56 bytes a cycle, as much as a multiprocessor can; wider ones are bound by the tensor cores.
#include "moe/wide.cuh"

namespace rvllm::experts {

struct Wide {
  static constexpr int ENTRIES = 192, BOX = 64;  // of a work tile, and of a load of x
  static constexpr int CONSUMERS = 256, THREADS = CONSUMERS + 128;
  static constexpr int WEIGHTS = 2 * TILE_BYTES, X = ENTRIES * TILE * 2, BOX_BYTES = BOX * TILE * 2;
  static constexpr int STAGED = ENTRIES * TILE * 2, STAGING = 2 * STAGED, BARRIERS = 256, LIMIT = 232448;
  static constexpr int STAGES = (LIMIT - STAGING - BARRIERS) / (WEIGHTS + X);
  static constexpr int BYTES = STAGES * (WEIGHTS + X) + STAGING + BARRIERS;
};

// One thread: fills the ring. Weights first, which depend on no kernel before this one.
__device__ __forceinline__ void produce_wide(const gemm::TensorMap& x, const u8* __restrict__ weights, WideTiles at,
                                             gemm::Ring ring, int strips, int blocks) {
  using namespace ptx;
  const u64 matrix = static_cast<u64>(strips) * blocks * TILE_BYTES;
  const auto boxes = [&]() { return (at.width() + Wide::BOX - 1) / Wide::BOX; };
  const auto load_weights = [&](int k, int stage) {
    const u32 bar = ring.full(stage), dst = ring.weights + stage * Wide::WEIGHTS;
    mbar_arrive_expect(bar, Wide::WEIGHTS + boxes() * Wide::BOX_BYTES);
#pragma unroll
    for (int i = 0; i < 2; i++) {
      const u64 strip = min(at.pair * 2 + i, strips - 1);
      bulk_load(dst + i * TILE_BYTES, weights + at.tile.x * matrix + (strip * blocks + k) * TILE_BYTES, TILE_BYTES, bar, EVICT_NORMAL);
    }
  };
  bool more = at.next();
  int ahead = more ? min(Wide::STAGES, blocks) : 0;
  for (int s = 0; s < ahead; s++) load_weights(s, s);
  griddep_wait();
  while (more) {
    const int count = boxes();
    for (int k = 0; k < blocks; k++) {
      if (k >= ahead) {
        mbar_wait(ring.empty(ring.stage), ring.phase ^ 1);
        load_weights(k, ring.stage);
      }
      for (int b = 0; b < count; b++)
        tensor_load_2d(ring.x_at() + b * Wide::BOX_BYTES, &x, k * TILE, at.tile.y + b * Wide::BOX, ring.full(ring.stage));
      ring.advance();
    }
    ahead = 0;
    more = at.next();
  }
}

// A warpgroup: sums its 64 rows of every work tile, segment by segment, and leaves them in shared memory.
template <class T, class Epilogue>
__device__ __forceinline__ void consume_wide(WideTiles at, Epilogue epilogue, gemm::Ring ring, u32 staging, int group,
                                             int blocks, int segments) {
  constexpr int REGS = Wide::ENTRIES / 2;
  const int thread = threadIdx.x % 128, lane = threadIdx.x % 32;
  float acc[REGS], sum[REGS] = {};
  while (at.next()) {
    gemm::of_width<32, 64, 80, 96, 112, 128, 144, 160, 176, 192>(at.width(), acc, [&](auto& part) {
      constexpr int COUNT = sizeof(part) / sizeof(float);
      gemm::sum_blocks<T, 1>(part, ring, group, lane, 0, segment_start(blocks, segments, 1));
#pragma unroll
      for (int i = 0; i < COUNT; i++) sum[i] = part[i];
      for (int s = 1; s < segments; s++) {
        gemm::sum_blocks<T, 1>(part, ring, group, lane, segment_start(blocks, segments, s), segment_start(blocks, segments, s + 1));
#pragma unroll
        for (int i = 0; i < COUNT; i++) sum[i] += part[i];
      }
    });
    gemm::stage_outputs<T, Wide::ENTRIES, Wide::STAGED>(epilogue(at), sum, staging + group * Wide::STAGED, group, thread,
                                                        (at.pair * 2 + group) * TILE, 0, at.tile.z);
  }
  ptx::bar_sync(gemm::ROOM + group, 128 + gemm::STORERS);  // as often as the storers arrive
}

// As `grouped`, with entries sorted by a launch before: out = act(W[expert] x), or without activation, by `kind`. x: tensor
// map of [>= entries, k] in boxes of 64 x BOX, 128-byte swizzle, a row a place in the order; out: likewise, `pitch`
// elements each. after_sort: what wrote the tiles may still run, or else only what wrote x.
// Grid: (multiprocessors). Shared: Wide::BYTES. Bound by the tensor cores.
template <class T>
__global__ void __launch_bounds__(Wide::THREADS, 1)
    grouped_wide(const __grid_constant__ gemm::TensorMap x, T* out, const u8* __restrict__ weights, const int4* tiles,
                 const int* num_tiles, int after_sort, int blocks, int segments, int rows, int pitch, int kind, int group) {
  using namespace ptx;
  __builtin_assume(kind != gemm::LOGITS);
  extern __shared__ __align__(1024) u8 shared[];
  const u32 base = smem(shared), x_base = base + Wide::STAGES * Wide::WEIGHTS, staging = x_base + Wide::STAGES * Wide::X;
  const gemm::Ring ring{Wide::STAGES, base, x_base, Wide::WEIGHTS, Wide::X, staging + Wide::STAGING};
  const int warp = __shfl_sync(~0u, threadIdx.x / 32, 0);
  if (threadIdx.x == Wide::CONSUMERS) {
    tensor_map_prefetch(&x);
    gemm::begin_ring(ring, Wide::CONSUMERS / 32);
  }
  __syncthreads();
  if (after_sort) griddep_wait();
  griddep_launch();
  const int strips = (rows + TILE - 1) / TILE;
  const WideTiles at({__ldcg(num_tiles), (strips + 1) / 2, group, static_cast<int>(blockIdx.x)}, tiles);
  const auto epilogue = [&](const WideTiles& of) {
    return gemm::Epilogue{out + static_cast<size_t>(of.tile.y) * pitch, nullptr, nullptr, kind, of.tile.z, rows, pitch, 1.f, 0.f};
  };
  if (warp >= Wide::CONSUMERS / 32) {
    registers_lower<56>();
    const int thread = threadIdx.x - Wide::CONSUMERS - 32;
    if (thread >= 0) {
      griddep_wait();
      store_wide<T, Wide::STAGED>(at, epilogue, shared + (staging - base), thread, kind);
    } else if (thread == -32) {
      produce_wide(x, weights, at, ring, strips, blocks);
    }
  } else {
    registers_raise<224>();
    consume_wide<T>(at, epilogue, ring, staging, warp / 4, blocks, segments);
  }
}

}  // namespace rvllm::experts

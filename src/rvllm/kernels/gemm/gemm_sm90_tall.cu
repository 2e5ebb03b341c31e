// Matrix products of more than 128 tokens for Hopper, for weights of one segment: work tiles of 192 rows and up to
// 192 tokens. Where tiles of 128 rows leave a last round that few blocks have work for, these often fill it (a 7B
// model's gate_up: 296 row pairs are 2.24 rounds of 132 blocks; 198 triples of half the tokens are 3.00).
//
// A block has three consumer warpgroups of 64 rows, one producer thread and 96 threads that write finished tiles
// (gemm/epilogue_overlap.cuh). The two blocks of a cluster take the same rows and neighbouring token tiles: each
// weight is loaded once and multicast. grid (clusters * 2, 1, 1), resident.
//
// Compiled for tiles of up to 192 tokens, and of up to 64: these need so few registers that a neighbour's blocks find
// room beside theirs, and with that their first weights arrive while the kernel before ends.
#include "gemm/epilogue_overlap.cuh"
#include "gemm/fill_ring.cuh"
#include "gemm/tile_scheduler.cuh"

namespace rvllm::gemm {

struct Tall {
  static constexpr int GROUPS = 3, CONSUMERS = GROUPS * 128, THREADS = CONSUMERS + 128, NARROW = 64;
  static constexpr int WEIGHTS = GROUPS * TILE_BYTES, STAGED = 8192, STAGING = GROUPS * STAGED;
  static constexpr int BARRIERS = 256, LIMIT = 232448, MAX_STAGES = 8;
  __host__ __device__ static constexpr int stages(int tile) {
    const int fit = (LIMIT - STAGING - BARRIERS) / (WEIGHTS + tile * TILE * 2);
    return fit < MAX_STAGES ? fit : MAX_STAGES;
  }
  __host__ __device__ static constexpr int bytes(int tile) {
    return stages(tile) * (WEIGHTS + tile * TILE * 2) + STAGING + BARRIERS;
  }
};

// One thread: fills the ring. Weights first, which depend on no kernel before this one.
__device__ __forceinline__ void produce(const TensorMap& x, const u8* __restrict__ weights, TallScheduler scheduler, Ring ring,
                                        int rows, int blocks) {
  using namespace ptx;
  constexpr u16 BOTH = 3;
  const int rank = blockIdx.x % 2, tiles = (rows + TILE - 1) / TILE;
  // Weights that are read again for other tokens may stay in L2.
  const u64 hint = scheduler.pairs > 1 ? EVICT_NORMAL : EVICT_FIRST;
  const auto load_weights = [&](const WorkTile& t, int k, const Ring& at) {
    const auto source = [&](int i) { return weights + (static_cast<u64>(min(t.row_tile + i, tiles - 1)) * blocks + k) * TILE_BYTES; };
    const u32 bar = at.full(at.stage), dst = at.weights_at();
    mbar_arrive_expect(bar, Tall::WEIGHTS + at.x_pitch);
    bulk_load_multicast(dst + rank * TILE_BYTES, source(rank), TILE_BYTES, bar, BOTH, hint);
    const int half = rank * (TILE_BYTES / 2);
    bulk_load_multicast(dst + 2 * TILE_BYTES + half, source(2) + half, TILE_BYTES / 2, bar, BOTH, hint);
  };
  const auto load_x = [&](const WorkTile& t, int k, const Ring& at) {
    tensor_load_2d(at.x_at(), &x, k * TILE, t.token0, at.full(at.stage));
  };
  fill_ring<WorkTile>(scheduler, ring, 0, blocks, load_weights, load_x);
}

// 96 threads: carry finished outputs from shared memory to global memory while the next tile is summed.
template <class T>
__device__ __forceinline__ void store_tiles(const Epilogue& e, TallScheduler scheduler, const u8* staging, int thread) {
  using namespace ptx;
  for (int g = 0; g < Tall::GROUPS; g++) bar_arrive(ROOM + g, 128 + STORERS);
  const int step = step_tokens<Tall::STAGED>(e.kind);
  WorkTile t;
  while (scheduler.next(t)) {
    const int limit = min(scheduler.tile, e.tokens - t.token0), count = phases<Tall::STAGED>(e, limit);
    for (int p = 0; p < count; p++)
      for (int g = 0; g < Tall::GROUPS; g++) {
        bar_sync(READY + g, 128 + STORERS);
        store_outputs<T>(e, staging + g * Tall::STAGED, thread, (t.row_tile + g) * TILE, t.token0 + p * step,
                     min(step, limit - p * step));
        __syncwarp();
        bar_arrive(ROOM + g, 128 + STORERS);
      }
  }
}

// A warpgroup: sums its 64 rows of every work tile and leaves them in shared memory.
template <class T, int TOKENS>
__device__ __forceinline__ void consume(const Epilogue& e, TallScheduler scheduler, Ring ring, u32 staging, int group, int blocks) {
  const int thread = threadIdx.x % 128, lane = threadIdx.x % 32;
  float acc[TOKENS / 2];
  WorkTile t;
  while (scheduler.next(t)) {
    const auto sum = [&](auto& part) { sum_blocks<T, 2>(part, ring, group, lane, 0, blocks); };
    if constexpr (TOKENS <= Tall::NARROW)
      of_width<32, 48, 64>(scheduler.tile, acc, sum);
    else
      of_width<72, 80, 96, 104, 112, 120, 128, 136, 144, 160, 176, 192>(scheduler.tile, acc, sum);
    stage_outputs<T, TOKENS, Tall::STAGED>(e, acc, staging + group * Tall::STAGED, group, thread,
                                             (t.row_tile + group) * TILE, t.token0,
                                             min(scheduler.tile, e.tokens - t.token0));
  }
  ptx::bar_sync(ROOM + group, 128 + STORERS);  // as often as the storers arrive
}

// x: tensor map of [>= tokens, K] in boxes of 64 x tile, 128-byte swizzle. weights: packed. blocks: ceil(K / 64).
// tile: tokens of a work tile, one of consume's. segments: 1. The rest: see Epilogue.
template <class T, int TOKENS>
__global__ void __launch_bounds__(Tall::THREADS, 1)
    gemm_tall(const __grid_constant__ TensorMap x, const u8* __restrict__ weights, void* out, const void* bias,
              const void* residual, int kind, int tokens, int rows, int pitch, float scale, float soft_cap, int blocks,
              int segments, int tile) {
  using namespace ptx;
  extern __shared__ __align__(1024) u8 shared[];
  const int stages = Tall::stages(tile), x_bytes = tile * TILE * 2, staging = stages * (Tall::WEIGHTS + x_bytes);
  const u32 base = smem(shared);
  const Ring ring{stages, base, base + stages * Tall::WEIGHTS, Tall::WEIGHTS, x_bytes, base + staging + Tall::STAGING};
  Epilogue e{out, bias, residual, kind, tokens, rows, pitch, scale, soft_cap};
  e.best_only = e.asks_for_best();
  const int warp = __shfl_sync(~0u, threadIdx.x / 32, 0);
  griddep_launch();
  if (threadIdx.x == Tall::CONSUMERS) {
    ptx::tensor_map_prefetch(&x);
    begin_ring(ring, Tall::CONSUMERS / 32 * 2);
  }
  cluster_sync();
  const TallScheduler scheduler(rows, tokens, tile);
  if (warp >= Tall::CONSUMERS / 32) {
    if constexpr (TOKENS > Tall::NARROW) registers_lower<80>();
    const int thread = threadIdx.x - Tall::CONSUMERS - 32;
    if (thread >= 0) {
      griddep_wait();
      store_tiles<T>(e, scheduler, shared + staging, thread);
    } else if (thread == -32) {
      produce(x, weights, scheduler, ring, rows, blocks);
    }
    __syncwarp();
  } else {
    if constexpr (TOKENS > Tall::NARROW) registers_raise<144>();
    griddep_wait();
    consume<T, TOKENS>(e, scheduler, ring, base + staging, warp / 4, blocks);
  }
  cluster_sync();  // nobody leaves while the other block's loads or arrivals may still reach it
}

}  // namespace rvllm::gemm

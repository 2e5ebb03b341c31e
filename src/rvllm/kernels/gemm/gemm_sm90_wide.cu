// Matrix products of many tokens for Hopper, for weights of several segments: work tiles of 128 rows and up to 256
// tokens. The running sum of the segments does not fit into registers beside the accumulators of so wide a tile: of a
// thread's 128 sums KEPT stay in registers, the others lie in shared memory, where finished outputs later wait for the
// storers (gemm/epilogue_overlap.cuh). A third fewer bytes come from L2 than for tiles of 128 tokens.
//
// A block has two consumer warpgroups of 64 rows, one producer thread and 96 threads that write finished tiles. The
// two blocks of a cluster take neighbouring rows and the same tokens: each activation is loaded once and multicast.
// grid (clusters * 2, 1, 1), resident.
#include "gemm/epilogue_overlap.cuh"
#include "gemm/fill_ring.cuh"
#include "gemm/tile_scheduler.cuh"

namespace rvllm::gemm {

struct Wide {
  static constexpr int GROUPS = 2, CONSUMERS = GROUPS * 128, THREADS = CONSUMERS + 128, TOKENS = 256, REGS = TOKENS / 2;
  static constexpr int KEPT = 48, LEFT = REGS - KEPT;        // running sums of a thread in registers, in shared memory
  static constexpr int STAGED = TOKENS * TILE * 2;           // a warpgroup's finished outputs
  static constexpr int ROOM_BYTES = LEFT * 128 * 4;          // of a warpgroup: running sums, then finished outputs
  static constexpr int WEIGHTS = GROUPS * TILE_BYTES, X = TOKENS * TILE * 2, STAGES = 3;
  static constexpr int BARRIERS = 256, BYTES = STAGES * (WEIGHTS + X) + GROUPS * ROOM_BYTES + BARRIERS;
  // The block has what it was launched with, 168 registers a thread: one more, and raising them waits for ever.
  static constexpr int MANY_REGISTERS = 208, FEW_REGISTERS = 88;
  static constexpr int FETCHED = 6;  // residuals of a storer
  static_assert(CONSUMERS * MANY_REGISTERS + 128 * FEW_REGISTERS <= THREADS * 168);
  static_assert(STAGED <= ROOM_BYTES && LEFT % 4 == 0 && BYTES <= 232448);
};

// One thread: fills the ring. Weights first, which depend on no kernel before this one.
__device__ __forceinline__ void produce(const TensorMap& x, const u8* __restrict__ weights, WideScheduler scheduler, Ring ring,
                                        int rows, int blocks) {
  using namespace ptx;
  constexpr u16 BOTH = 3;
  const int rank = blockIdx.x % 2, tiles = (rows + TILE - 1) / TILE;
  const auto load_weights = [&](const WideTile& t, int k, const Ring& at) {
    const u32 bar = at.full(at.stage), dst = at.weights_at();
    mbar_arrive_expect(bar, Wide::WEIGHTS + t.width * TILE * 2);
#pragma unroll
    for (int i = 0; i < Wide::GROUPS; i++) {
      const u64 tile = min(t.row_tile + i, tiles - 1);
      bulk_load(dst + i * TILE_BYTES, weights + (tile * blocks + k) * TILE_BYTES, TILE_BYTES, bar, EVICT_NORMAL);
    }
  };
  const auto load_x = [&](const WideTile& t, int k, const Ring& at) {  // boxes in turns, each for both blocks
    for (int first = rank * BOX; first < t.width; first += 2 * BOX)
      tensor_load_2d_multicast(at.x_at() + first * TILE * 2, &x, k * TILE, t.token0 + first, at.full(at.stage), BOTH);
  };
  fill_ring<WideTile>(scheduler, ring, 0, blocks, load_weights, load_x);
}

// 96 threads: carry finished outputs from shared memory to global memory while the next tile is summed.
template <class T>
__device__ __forceinline__ void store_tiles(const Epilogue& e, WideScheduler scheduler, const u8* room, int thread) {
  using namespace ptx;
  for (int g = 0; g < Wide::GROUPS; g++) bar_arrive(ROOM + g, 128 + STORERS);
  WideTile t;
  while (scheduler.next(t))
    for (int g = 0; g < Wide::GROUPS; g++) {
      bar_sync(READY + g, 128 + STORERS);
      if (e.kind != LOGITS)
        store_outputs<T, Wide::FETCHED>(e, room + g * Wide::ROOM_BYTES, thread, (t.row_tile + g) * TILE, t.token0,
                                        min(t.width, e.tokens - t.token0));
      __syncwarp();
      bar_arrive(ROOM + g, 128 + STORERS);
    }
}

// A warpgroup: sums its 64 rows of every work tile, segment by segment, and leaves them in its room.
template <class T>
__device__ __forceinline__ void consume(const Epilogue& e, WideScheduler scheduler, Ring ring, u32 room, int group, int blocks,
                                        int segments) {
  constexpr int LEFT = Wide::LEFT, KEPT = Wide::KEPT;
  const int thread = threadIdx.x % 128, lane = threadIdx.x % 32;
  // Four running sums every 2048 bytes. In this order and no other: the compiler would fetch many at once, for which there
  // are no registers.
  const u32 left = room + thread * 16;
  WideTile t;
  while (scheduler.next(t)) {
    float kept[KEPT];
    for (int s = 0; s < segments; s++) {
      const int first = segment_start(blocks, segments, s), last = segment_start(blocks, segments, s + 1);
      float acc[Wide::REGS];
#pragma unroll
      for (int i = 0; i < Wide::REGS; i++) acc[i] = 0.f;  // else what they were would be kept until here
      of_width<64, 128, 192, 256>(t.width, acc, [&](auto& part) { sum_blocks<T, 2>(part, ring, group, lane, first, last); });
      if (s == 0) {
        ptx::bar_sync(ROOM + group, 128 + STORERS);  // the storers have carried the last tile away
#pragma unroll
        for (int i = 0; i < LEFT / 4; i++)
          ptx::store_shared(left + 2048 * i, make_float4(acc[4 * i], acc[4 * i + 1], acc[4 * i + 2], acc[4 * i + 3]));
#pragma unroll
        for (int i = 0; i < KEPT; i++) kept[i] = acc[LEFT + i];
      } else {
#pragma unroll
        for (int i = 0; i < LEFT / 4; i++) {
          const float4 sum = ptx::load_shared(left + 2048 * i);
          ptx::store_shared(left + 2048 * i,
              make_float4(sum.x + acc[4 * i], sum.y + acc[4 * i + 1], sum.z + acc[4 * i + 2], sum.w + acc[4 * i + 3]));
        }
#pragma unroll
        for (int i = 0; i < KEPT; i++) kept[i] += acc[LEFT + i];
      }
    }
    float sums[Wide::REGS];
#pragma unroll
    for (int i = 0; i < LEFT / 4; i++) {
      const float4 sum = ptx::load_shared(left + 2048 * i);
      sums[4 * i] = sum.x, sums[4 * i + 1] = sum.y, sums[4 * i + 2] = sum.z, sums[4 * i + 3] = sum.w;
    }
#pragma unroll
    for (int i = 0; i < KEPT; i++) sums[LEFT + i] = kept[i];
    ptx::bar_sync(ALL_READ + group, 128);
    stage_outputs<T, Wide::TOKENS, Wide::STAGED, true>(e, sums, room, group, thread, (t.row_tile + group) * TILE, t.token0,
                                                       min(t.width, e.tokens - t.token0));
    if (e.kind == LOGITS) ptx::bar_arrive(READY + group, 128 + STORERS);
  }
  ptx::bar_sync(ROOM + group, 128 + STORERS);  // as often as the storers arrive
}

// x: tensor map of [>= tokens, K] in boxes of 64 x BOX, 128-byte swizzle. weights: packed. blocks: ceil(K / 64).
// segments: at least 2. tile: Wide::TOKENS. The rest: see Epilogue.
template <class T>
__global__ void __launch_bounds__(Wide::THREADS, 1)
    gemm_wide(const __grid_constant__ TensorMap x, const u8* __restrict__ weights, void* out, const void* bias,
              const void* residual, int kind, int tokens, int rows, int pitch, float scale, float soft_cap, int blocks,
              int segments, int tile) {
  using namespace ptx;
  constexpr int STAGES = Wide::STAGES, ROOMS = STAGES * (Wide::WEIGHTS + Wide::X);
  extern __shared__ __align__(1024) u8 shared[];
  const u32 base = smem(shared);
  const Ring ring{STAGES, base, base + STAGES * Wide::WEIGHTS, Wide::WEIGHTS, Wide::X, base + ROOMS + Wide::GROUPS * Wide::ROOM_BYTES};
  const Epilogue e{out, bias, residual, kind, tokens, rows, pitch, scale, soft_cap};
  const int warp = __shfl_sync(~0u, threadIdx.x / 32, 0);
  griddep_launch();
  if (threadIdx.x == Wide::CONSUMERS) {
    ptx::tensor_map_prefetch(&x);
    begin_ring(ring, Wide::CONSUMERS / 32 * 2);
  }
  cluster_sync();
  const WideScheduler scheduler(rows, tokens);
  if (warp >= Wide::CONSUMERS / 32) {
    registers_lower<Wide::FEW_REGISTERS>();
    const int thread = threadIdx.x - Wide::CONSUMERS - 32;
    if (thread >= 0) {
      griddep_wait();
      store_tiles<T>(e, scheduler, shared + ROOMS, thread);
    } else if (thread == -32) {
      produce(x, weights, scheduler, ring, rows, blocks);
    }
    __syncwarp();
  } else {
    registers_raise<Wide::MANY_REGISTERS>();
    griddep_wait();
    consume<T>(e, scheduler, ring, base + ROOMS + warp / 4 * Wide::ROOM_BYTES, warp / 4, blocks, segments);
  }
  cluster_sync();  // nobody leaves while the other block's loads or arrivals may still reach it
}

}  // namespace rvllm::gemm

// y = x W^T built from CUTLASS and CuTe: PipelineTmaAsync feeds TiledMMA (wgmma) from resident blocks that take
// tile after tile. For --gemm-strategy cutlass and hybrid.
//
// A tile is GROUPS * 64 rows of W by TOKENS tokens, W being the M side of wgmma. A packed tile of ours is CuTe's
// Layout_K_SW128_Atom tiled to 64 x 64, so weights are streamed as they lie. All of K is one accumulator's chain in
// ascending order, whatever the tile: the bits of y[t, n] depend on row t of x and row n of W only.
// Sums leave by gemm/epilogue.cuh, so biases, gates and residuals round as with our own mainloop.
#include "gemm/cutlass/prelude.cuh"

#include "cute/arch/cluster_sm90.hpp"
#include "cute/arch/copy_sm90_tma.hpp"
#include "cute/atom/mma_traits_sm90_gmma.hpp"
#include "cute/tensor.hpp"
#include "cutlass/arch/barrier.h"
#include "cutlass/arch/reg_reconfig.h"
#include "cutlass/numeric_types.h"
#include "cutlass/pipeline/sm90_pipeline.hpp"

#include "gemm/epilogue.cuh"

namespace rvllm::gemm {

struct alignas(64) TensorMap {
  u8 bytes[128];
};

template <class T>
struct Element;
template <>
struct Element<bf16> {
  using type = cutlass::bfloat16_t;
};
template <>
struct Element<f16> {
  using type = cutlass::half_t;
};

template <class T, int GROUPS, int TOKENS, int CLUSTER>
struct CutlassTraits {
  using E = typename Element<T>::type;
  static constexpr int ROWS = GROUPS * TILE, THREADS = 128 * (GROUPS + 1);
  static constexpr int WEIGHTS = ROWS * TILE, X = TOKENS * TILE;  // elements of a stage
  static constexpr int CHUNK = TOKENS % 64 == 0 ? 64 : TOKENS < 32 ? TOKENS : 32;  // as staging_bytes in tiles.py
  static constexpr int PITCH = (TILE + 8) * 2;
  static constexpr int SUMS = CHUNK < 32 ? CHUNK : 32;
  static constexpr int STAGING = CHUNK * PITCH > SUMS * (TILE + 4) * 4 ? CHUNK * PITCH : SUMS * (TILE + 4) * 4;
  static constexpr int ROOM = (232448 - 1024 - GROUPS * STAGING) / ((WEIGHTS + X) * 2);
  static constexpr int STAGES = ROOM < 12 ? ROOM : 12;
  using Atom = decltype(cute::SM90::GMMA::ss_op_selector<E, E, float, cute::Shape<cute::_64, cute::Int<TOKENS>, cute::_64>>());
  using Mma = decltype(cute::make_tiled_mma(Atom{}, cute::Layout<cute::Shape<cute::Int<GROUPS>, cute::_1, cute::_1>>{}));
  using K128 = cute::SM90::GMMA::Layout_K_SW128_Atom<E>;
  using LayoutW = decltype(cute::tile_to_shape(K128{}, cute::Shape<cute::Int<ROWS>, cute::_64, cute::Int<STAGES>>{}));
  using LayoutX = decltype(cute::tile_to_shape(K128{}, cute::Shape<cute::Int<TOKENS>, cute::_64, cute::Int<STAGES>>{}));
  using Pipe = cutlass::PipelineTmaAsync<STAGES>;
  using Cluster = cute::Shape<cute::Int<CLUSTER>, cute::_1, cute::_1>;  // as launched
  struct Shared {
    alignas(1024) E w[cute::cosize_v<LayoutW>];
    alignas(1024) E x[cute::cosize_v<LayoutX>];
    alignas(128) u8 staging[GROUPS][STAGING];
    typename Pipe::SharedStorage pipe;
  };
};

// Which tiles a block takes: token tiles of the same rows side by side, so that their weights come from memory once.
// The blocks of a cluster take neighbouring rows and the same tokens, each load of x serving all of them.
template <int ROWS, int TOKENS, int CLUSTER>
struct Schedule {
  int token_tiles, tiles, first, step, rank;
  __device__ __forceinline__ Schedule(int tokens, int rows) {
    token_tiles = (tokens + TOKENS - 1) / TOKENS;
    tiles = token_tiles * (((rows + ROWS - 1) / ROWS + CLUSTER - 1) / CLUSTER);
    rank = CLUSTER > 1 ? static_cast<int>(cute::block_rank_in_cluster()) : 0;
    first = blockIdx.x / CLUSTER;
    step = gridDim.x / CLUSTER;
  }
  __device__ __forceinline__ int token(int tile) const { return tile % token_tiles * TOKENS; }
  __device__ __forceinline__ int row(int tile) const { return (tile / token_tiles * CLUSTER + rank) * ROWS; }
};

template <class Traits, int CLUSTER>
struct Loads {
  using E = typename Traits::E;
  typename Traits::Shared& shared;
  const TensorMap& map;
  const E* weights;
  int rows, blocks, rank;

  // Rows beyond the last tile repeat it; the epilogue does not write them.
  template <class Barrier>
  __device__ __forceinline__ void weights_of(int row, int k, int stage, Barrier* bar) const {
    CUTE_UNROLL
    for (int i = 0; i < Traits::ROWS / TILE; i++) {
      const int tile = min(row / TILE + i, (rows - 1) / TILE);
      cute::SM90_BULK_COPY_G2S::copy(weights + (static_cast<size_t>(tile) * blocks + k) * (TILE * TILE), bar,
                                     shared.w + stage * Traits::WEIGHTS + i * TILE * TILE, TILE_BYTES);
    }
  }
  template <class Barrier>
  __device__ __forceinline__ void x_of(int token, int k, int stage, Barrier* bar) const {
    constexpr int SHARE = Traits::X / TILE / CLUSTER;
    E* to = shared.x + stage * Traits::X + rank * SHARE * TILE;
    const auto hint = static_cast<u64>(cute::TMA::CacheHintSm90::EVICT_NORMAL);
    if constexpr (CLUSTER > 1)
      cute::SM90_TMA_LOAD_MULTICAST_2D::copy(&map, bar, static_cast<u16>((1 << CLUSTER) - 1), hint, to, k * TILE,
                                             token + rank * SHARE);
    else
      cute::SM90_TMA_LOAD_2D::copy(&map, bar, hint, to, k * TILE, token);
  }
};

// x: [tokens, K] in boxes of TOKENS / CLUSTER x 64, 128-byte swizzle. weights: packed. blocks: ceil(K / 64). segments:
// one. The rest: see Epilogue.
template <class T, int GROUPS, int TOKENS, int CLUSTER>
__global__ void __launch_bounds__(128 * (GROUPS + 1), 1)
    gemm_cutlass(const __grid_constant__ TensorMap x, const void* weights, void* out, const void* bias,
                 const void* residual, int kind, int tokens, int rows, int pitch, float scale, float soft_cap,
                 int blocks, int segments) {
  using namespace cute;
  using L = CutlassTraits<T, GROUPS, TOKENS, CLUSTER>;
  using E = typename L::E;
  using Pipe = typename L::Pipe;
  extern __shared__ __align__(1024) u8 raw[];
  auto& shared = *reinterpret_cast<typename L::Shared*>(raw);
  const int group = cutlass::canonical_warp_group_idx(), thread = threadIdx.x % 128;
  const bool producer = group == GROUPS;
  ptx::griddep_launch();  // CUTLASS's own are nothing without a macro that nvcc builds set

  typename Pipe::Params params;
  params.transaction_bytes = (L::WEIGHTS + L::X) * 2;
  params.role = producer ? Pipe::ThreadCategory::Producer : Pipe::ThreadCategory::Consumer;
  params.is_leader = thread == 0;
  params.num_consumers = 128 * GROUPS;
  Pipe pipe(shared.pipe, params, typename L::Cluster{});
  if constexpr (CLUSTER > 1) {
    cute::cluster_arrive_relaxed();
    cute::cluster_wait();
  } else {
    __syncthreads();
  }
  const Schedule<L::ROWS, TOKENS, CLUSTER> work(tokens, rows);

  if (producer) {
    if constexpr (GROUPS > 1) cutlass::arch::warpgroup_reg_dealloc<40>();
    if (thread == 0) {
      const Loads<L, CLUSTER> load{shared, x, static_cast<const E*>(weights), rows, blocks, work.rank};
      prefetch_tma_descriptor(reinterpret_cast<const TmaDescriptor*>(&x));
      auto state = cutlass::make_producer_start_state<Pipe>();
      // The ring is filled with weights while the kernel before this one ends; then what it wrote is read.
      const int early = work.first < work.tiles ? min(blocks, L::STAGES) : 0;
      for (int k = 0; k < early; k++, ++state) {
        pipe.producer_acquire(state);
        load.weights_of(work.row(work.first), k, state.index(), pipe.producer_get_barrier(state));
      }
      ptx::griddep_wait();
      auto again = cutlass::make_producer_start_state<Pipe>();
      for (int k = 0; k < early; k++, ++again)
        load.x_of(work.token(work.first), k, again.index(), pipe.producer_get_barrier(again));
      for (int tile = work.first; tile < work.tiles; tile += work.step) {
        for (int k = tile == work.first ? early : 0; k < blocks; k++, ++state) {
          pipe.producer_acquire(state);
          auto* bar = pipe.producer_get_barrier(state);
          load.x_of(work.token(tile), k, state.index(), bar);
          load.weights_of(work.row(tile), k, state.index(), bar);
        }
      }
      pipe.producer_tail(state);
    }
  } else {
    if constexpr (GROUPS > 1) cutlass::arch::warpgroup_reg_alloc<232>();
    ptx::griddep_wait();  // the epilogue reads and writes what earlier kernels use
    const Epilogue end{out, bias, residual, kind, tokens, rows, pitch, scale, soft_cap};
    typename L::Mma mma;
    const auto mine = mma.get_slice(group * 128 + thread);
    Tensor w_of = mine.make_fragment_A(mine.partition_A(make_tensor(make_smem_ptr(shared.w), typename L::LayoutW{})));
    Tensor x_of = mine.make_fragment_B(mine.partition_B(make_tensor(make_smem_ptr(shared.x), typename L::LayoutX{})));
    typename Pipe::PipelineState state;
    for (int tile = work.first; tile < work.tiles; tile += work.step) {
      // Fresh for each tile: one that is carried on makes ptxas serialise wgmma.
      Tensor acc = partition_fragment_C(mma, Shape<Int<L::ROWS>, Int<TOKENS>>{});
      static_assert(decltype(size(acc))::value == TOKENS / 2);
      auto release = state;
      const auto product = [&] {
        pipe.consumer_wait(state);
        warpgroup_fence_operand(acc);
        warpgroup_arrive();
        CUTE_UNROLL
        for (int k = 0; k < size<2>(w_of); k++) {
          cute::gemm(mma, w_of(_, _, k, state.index()), x_of(_, _, k, state.index()), acc);
          mma.accumulate_ = SM90::GMMA::ScaleOut::One;
        }
        warpgroup_commit_batch();
        ++state;
      };
      mma.accumulate_ = SM90::GMMA::ScaleOut::Zero;
      product();
      for (int k = 1; k < blocks; k++, ++release) {
        product();
        warpgroup_wait<1>();
        warpgroup_fence_operand(acc);
        pipe.consumer_release(release);
      }
      warpgroup_wait<0>();
      warpgroup_fence_operand(acc);
      pipe.consumer_release(release);
      float sums[TOKENS / 2];  // as wgmma leaves them: pairs of tokens, row or row + 8, eight tokens by eight
      CUTE_UNROLL
      for (int i = 0; i < TOKENS / 2; i++) sums[i] = acc(i);
      finish_accumulators<T, TOKENS, L::CHUNK, L::PITCH>(end, sums, shared.staging[group], 1 + group, thread,
                                                         work.row(tile) + group * TILE, work.token(tile));
    }
  }
}

}  // namespace rvllm::gemm

// Grouped products of experts on Hopper: work tiles of (up to TOKENS entries of one expert) x (128 rows of its
// matrix), dealt to one resident block a multiprocessor. Weights are the 64-row side of wgmma, entries the other.
//
// Two consumer warpgroups have 64 rows each. The producer warpgroup fills a ring of stages: one thread streams packed
// tiles of weights with bulk copies, all of them gather the entries' rows of x with cp.async, because the rows of one
// expert lie anywhere. The ring goes on from work tile to work tile, so a block always has its shared memory full of
// loads under way; that, and not the number of entries, is what a step of few tokens lives on.
#include "gemm/epilogue.cuh"
#include "gemm/mainloop.cuh"
#include "moe/entries.cuh"

namespace rvllm::experts {

inline constexpr int CONSUMERS = 256, PRODUCERS = 128;

template <int TOKENS>
struct Layout {
  static constexpr int WEIGHTS = 2 * TILE_BYTES, X = TOKENS * TILE * 2, STAGE = WEIGHTS + X;
  static constexpr int STAGE_PITCH = (TILE + 8) * 2;        // bytes; spreads stores over all banks
  static constexpr int PER_GROUP = TOKENS * STAGE_PITCH, STAGING = 2 * PER_GROUP;
  static constexpr int BARRIERS = 256, LIST = (sizeof(EntryList) + 15) / 16 * 16, LIMIT = 232448;
  static constexpr int FIT = (LIMIT - STAGING - BARRIERS - LIST) / STAGE;
  static constexpr int STAGES = FIT < 12 ? FIT : 12;
  static constexpr int BYTES = STAGES * STAGE + STAGING + BARRIERS + LIST;
  static constexpr int GATHERERS = TOKENS * 8 < PRODUCERS ? TOKENS * 8 : PRODUCERS;  // threads that load x
  static constexpr int COPIES = TOKENS * 8 / GATHERERS;                              // of 16 bytes, a thread and stage
  static_assert(MAX_TILES % 2 == 0 && STAGES * STAGE >= 544 * (MAX_LISTED / 32 + 2) * 4, "the list's scratch fits");
  static_assert(STAGES * 16 <= BARRIERS && PER_GROUP % 16 == 0, "regions are aligned");
};

// For every expert and its entries: out = act(W[expert] x), or without activation, by `kind` (see gemm.cuh; never LOGITS).
// by_token (the up matrix): x has a row a token; otherwise a row a place in the order of entries by expert. out: a row a
// place, `pitch` elements each. ids int32 [tokens, top_k]. k: elements of a row of x, a multiple of 8; blocks:
// ceil(k / 64), segments: of them; rows: packed rows (2 * width when gated).
// order null: at most MAX_LISTED entries, listed by every block with mask_words words an expert; places int32 [entries],
// where by_token, becomes where each entry is. Otherwise order, tiles and num_tiles are those of `sort`.
// Grid: (multiprocessors). Shared: Layout<TOKENS>::BYTES. Bound by memory, or by the tensor cores for many entries.
template <class T, int TOKENS>
__global__ void __launch_bounds__(CONSUMERS + PRODUCERS, 1)
    grouped(T* out, const T* x, const u8* __restrict__ weights, const int* ids, const int* num_tokens, int* places,
            const int* order, const int4* tiles, const int* num_tiles, int top_k, int experts, int by_token, int k,
            int blocks, int segments, int rows, int pitch, int kind, int group, int mask_words) {
  using L = Layout<TOKENS>;
  using namespace ptx;
  constexpr int REGS = TOKENS / 2;
  __builtin_assume(kind != gemm::LOGITS);
  extern __shared__ __align__(1024) u8 shared[];
  const u32 base = smem(shared);
  gemm::Ring ring{L::STAGES, base, base + L::WEIGHTS, L::STAGE, L::STAGE, base + L::STAGES * L::STAGE + L::STAGING};
  const int warp = __shfl_sync(~0u, threadIdx.x / 32, 0), lane = threadIdx.x % 32;

  if (threadIdx.x == 0) {
    for (int s = 0; s < L::STAGES; s++) {
      mbar_init(ring.full(s), 1 + L::GATHERERS);
      mbar_init(ring.empty(s), CONSUMERS / 32);
    }
    mbar_init_fence();
  }
  const bool listed = !order;
  EntryList& list = *reinterpret_cast<EntryList*>(shared + L::STAGES * L::STAGE + L::STAGING + L::BARRIERS);
  if (listed)
    list_begin(reinterpret_cast<u32*>(shared), experts, mask_words);
  else
    __syncthreads();
  if (by_token) griddep_wait();
  griddep_launch();
  if (listed)
    list_entries(list, reinterpret_cast<u32*>(shared), ids, by_token && blockIdx.x == 0 ? places : nullptr,
                 *num_tokens * top_k, experts, mask_words, TOKENS);

  const int strips = (rows + TILE - 1) / TILE;
  TileScheduler scheduler{listed ? list.count : __ldcg(num_tiles), (strips + 1) / 2, group, static_cast<int>(blockIdx.x)};
  EntryTile tile, coming;  // this work tile's entries, and the next one's, which are looked up ahead
  int pair, coming_pair;
  bool any;
  const auto look_ahead = [&]() {
    int t;
    any = scheduler.next(t, coming_pair);
    if (!any) return;
    if (listed) {
      coming = list.tile(t);
    } else {
      const int4 v = __ldcg(tiles + t);
      coming = {v.x, v.y, v.z};
    }
  };
  const auto next = [&]() {
    if (!any) return false;
    tile = coming, pair = coming_pair;
    look_ahead();
    return true;
  };
  look_ahead();

  if (warp >= CONSUMERS / 32) {
    const int thread = threadIdx.x - CONSUMERS, chunk = thread % 8, row0 = thread / 8;
    const u32 swizzled = row0 * 128 + (chunk ^ row0 % 8) * 16;
    const auto load_weights = [&](int block, int to) {
      const u8* const matrix = weights + tile.expert * matrix_bytes(rows, blocks);
      mbar_arrive_expect(ring.full(to), L::WEIGHTS);
#pragma unroll
      for (int i = 0; i < 2; i++) {
        const u64 strip = min(pair * 2 + i, strips - 1);
        bulk_load(base + to * L::STAGE + i * TILE_BYTES, matrix + (strip * blocks + block) * TILE_BYTES, TILE_BYTES,
                  ring.full(to), TOKENS == 64 ? EVICT_NORMAL : EVICT_FIRST);
      }
    };
    bool more = next();
    int ahead = 0;
    if (!by_token) {  // weights depend on no kernel that may still run
      if (more) ahead = min(L::STAGES, blocks);
      if (thread == 0)
        for (int s = 0; s < ahead; s++) load_weights(s, s);
      griddep_wait();
    }
    if (thread >= L::GATHERERS) return;
    int entry[L::COPIES];  // of the next work tile: the rows that this thread copies from, or -1
    const auto look_up = [&](const EntryTile& of) {
#pragma unroll
      for (int c = 0; c < L::COPIES; c++) {
        const int row = row0 + c * (L::GATHERERS / 8), place = of.first + row;
        entry[c] = row >= of.count ? -1 : !by_token ? place : listed ? list.order[place] : __ldcg(order + place);
      }
    };
    if (more) look_up(tile);
    while (more) {
      const T* source[L::COPIES];
#pragma unroll
      for (int c = 0; c < L::COPIES; c++)
        source[c] = entry[c] < 0 ? nullptr : x + static_cast<size_t>(by_token ? entry[c] / top_k : entry[c]) * k + chunk * 8;
      for (int block = 0; block < blocks; block++) {
        if (block >= ahead) {
          mbar_wait(ring.empty(ring.stage), ring.phase ^ 1);
          if (thread == 0) load_weights(block, ring.stage);
        }
        const u32 at = ring.x_at() + swizzled;
        const bool inside = block * TILE + chunk * 8 < k;
#pragma unroll
        for (int c = 0; c < L::COPIES; c++)
          if (source[c]) cp_async16(at + c * (L::GATHERERS * 16), inside ? source[c] + block * TILE : x, inside ? 16 : 0);
        cp_async_mbar_arrive(ring.full(ring.stage));
        if (block == blocks / 2 && any) look_up(coming);
        ring.advance();
      }
      ahead = 0;
      more = next();
    }
    return;
  }

  const int warpgroup = warp / 4, thread = threadIdx.x % 128;
  const auto segment = [&](float(&acc)[REGS], int s) {
    gemm::sum_blocks<T, 1, true>(acc, ring, warpgroup, lane, gemm::segment_start(blocks, segments, s), gemm::segment_start(blocks, segments, s + 1));
  };
  if (!by_token) griddep_wait();
  u8* const staging = shared + L::STAGES * L::STAGE + warpgroup * L::PER_GROUP;
  while (next()) {
    float acc[REGS], sum[REGS];
    segment(acc, 0);
#pragma unroll
    for (int i = 0; i < REGS; i++) sum[i] = acc[i];
    for (int s = 1; s < segments; s++) {
      segment(acc, s);
#pragma unroll
      for (int i = 0; i < REGS; i++) sum[i] += acc[i];
    }
    const gemm::Epilogue e{out + static_cast<size_t>(tile.first) * pitch, nullptr, nullptr, kind, tile.count, rows, pitch, 1.f, 0.f};
    gemm::finish_accumulators<T, TOKENS, TOKENS, L::STAGE_PITCH>(e, sum, staging, 1 + warpgroup, thread,
                                                                   (pair * 2 + warpgroup) * TILE, 0);
  }
}

}  // namespace rvllm::experts

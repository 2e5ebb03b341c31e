// Matrix kernels for Hopper: weights stream through shared memory as the 64-row side of wgmma, tokens are
// the N side. 8 consumer warps (two warpgroups, each with 64 rows of W) and one producer warp; where the
// accumulators need more than 168 registers the producer is a warpgroup too, which gives its registers away.
//
//   SPLIT  a block sums one segment of K; the segments of a tile form a cluster and are added through
//          distributed shared memory. grid (segments, token tiles, row pairs), cluster (segments, 1, 1).
//   WALK   for weights with one segment: resident blocks walk over tiles. grid (blocks, 1, 1).
//   SUM    as WALK for any number of segments, their running sum kept in registers beside the accumulator.
//
// In WALK and SUM the two blocks of a cluster, of neighbouring row pairs, share each load of x by multicast. In a
// cluster of four, two row pairs by two token tiles, the blocks of a row pair share its weights too.
#include "gemm.cuh"
#include "wgmma.cuh"

namespace rvllm::gemm {

// RVLLM_GEMM_TRAP: a wait that never ends becomes an error.
__device__ __forceinline__ void wait(u32 bar, u32 parity) {
#ifdef RVLLM_GEMM_TRAP
  for (u32 i = 0; !ptx::mbar_try_wait(bar, parity); i++)
    if (i > 200000) __trap();
#else
  ptx::mbar_wait(bar, parity);
#endif
}
__device__ __forceinline__ u64 global_time() {
  u64 t;
  asm volatile("mov.u64 %0, %%globaltimer;" : "=l"(t));
  return t;
}

enum Mode { SPLIT, WALK, SUM, FLOW };
constexpr int CONSUMERS = 256;
constexpr int STORERS = 96;  // threads of FLOW that write finished tiles
constexpr int BOX = 64;      // tokens of one of its loads of x
constexpr int FLOW_STAGING = 128 * TILE * 2;  // bytes a warpgroup's finished outputs wait in

struct alignas(64) TensorMap {
  u64 opaque[16];
};

template <int TOKENS, Mode MODE>
struct Layout {
  static constexpr bool MANY_REGISTERS = MODE != SPLIT && TOKENS >= 160;
  static constexpr int THREADS = CONSUMERS + (MANY_REGISTERS ? 128 : 32);
  static constexpr int WEIGHTS = 2 * TILE_BYTES, X = TOKENS * TILE * 2;
  static constexpr int CHUNK = TOKENS % 64 == 0 ? 64 : TOKENS < 32 ? TOKENS : 32;  // tokens staged at a time
  static constexpr int STAGE_PITCH = (TILE + 8) * 2;    // bytes; spreads stores over all banks
  static constexpr int SPLIT_PITCH = 2 * TILE + 4;      // floats, likewise
  static constexpr int SUMS = (CHUNK < 32 ? CHUNK : 32) * (TILE + 4) * 4;  // float32 on their way to logits
  static constexpr int PER_GROUP = CHUNK * STAGE_PITCH > SUMS ? CHUNK * STAGE_PITCH : SUMS;
  static constexpr int STAGING = MODE == SPLIT ? 0 : MODE == FLOW ? 2 * FLOW_STAGING : 2 * PER_GROUP;
  static constexpr int HELD = TOKENS <= 16 ? 1 : TOKENS == 32 || TOKENS == 256 ? 2 : 4;  // items of a split sum at once
  static constexpr int BARRIERS = 256, LIMIT = 232448;
  static constexpr int FIT = (LIMIT - STAGING - BARRIERS) / (WEIGHTS + X);
  static constexpr int STAGES = FIT < 12 ? FIT : 12;
  static constexpr int BYTES = STAGES * (WEIGHTS + X) + STAGING + BARRIERS;
  static_assert(MODE != SPLIT || TOKENS * SPLIT_PITCH * 4 <= STAGES * (WEIGHTS + X), "partial sums must fit");
};

// One visit of a block to a tile: 64-row tiles `tile` .. `tile + count - 1`, `width` tokens from token0. A piece
// shares its weights with the other block of the cluster, what is no piece shares its tokens.
struct Visit {
  int tile, count, token0, width;
  bool piece;
};

// The order in which clusters of CR row pairs by CT token tiles walk over the matrix.
template <int TOKENS, int CR, int CT, bool NARROW>
struct Walk {
  static constexpr int C = CR * CT, GROUP = 16 / CR;
  int tiles, tokens, token_tiles, clusters, cluster, rank, full, index = 0;

  __device__ Walk(int rows, int tokens)
      : tiles((rows + TILE - 1) / TILE), tokens(tokens), token_tiles((tokens + TOKENS - 1) / TOKENS),
        clusters(gridDim.x / C), cluster(blockIdx.x / C), rank(blockIdx.x % C), full(tiles / (2 * C * clusters)) {}

  // Whether a group of row pairs has more token tiles than one round takes.
  __device__ bool again() const { return token_tiles > 1 && GROUP * token_tiles > clusters; }

  // With one token tile the last, partial round deals out single tiles when there are enough blocks for
  // that. With several, groups of 16 row pairs pass over all tokens, so that both operands stay in L2.
  // NARROW: the last token tile is as narrow as its tokens allow, in steps of 64. When few tiles are left for the
  // last round, each is dealt out in pieces of 128 or 64 tokens; a cluster then has pieces of one row pair.
  __device__ bool next(Visit& v) {
    const int i = index++;
    v.width = TOKENS;
    v.piece = false;
    if (token_tiles == 1 && CT == 1 && !NARROW) {
      const int round = 2 * C * clusters, rest = tiles - full * round;
      v.token0 = 0;
      if (i == full && rest <= round / 2) {
        v.count = 1;
        v.tile = full * round + cluster * C + rank;
        return cluster * C < rest;
      }
      v.count = 2;
      v.tile = ((i * clusters + cluster) * C + rank) * 2;
      return (i * clusters + cluster) * C * 2 < tiles;
    }
    const int supers = (tiles + 2 * CR - 1) / (2 * CR), across = (token_tiles + CT - 1) / CT, units = supers * across;
    int unit = i * clusters + cluster, place = rank, skip = 0;
    if constexpr (NARROW) {
      static_assert(C == 2 && CT == 1 && TOKENS == 256);
      const int rest = units % clusters, pairs = rest * C, blocks = clusters * C;
      const int pieces = pairs * 4 <= blocks ? 4 : pairs * 2 <= blocks ? 2 : 1;
      if (i == units / clusters && pieces > 1) {
        const int mine = cluster * C + rank;
        if (mine >= pairs * pieces) return false;
        unit = i * clusters + mine / (C * pieces);
        place = mine / pieces % C;
        v.piece = true;
        v.width = TOKENS / pieces;
        skip = mine % pieces * v.width;
      }
    }
    if (unit >= units) return false;
    const int group = unit / (GROUP * across), within = unit % (GROUP * across);
    const int height = min(GROUP, supers - group * GROUP);
    v.count = 2;
    v.tile = ((group * GROUP + within % height) * CR + place % CR) * 2;
    v.token0 = (within / height * CT + place / CR) * TOKENS + skip;
    if (NARROW && !v.piece) v.width = min(TOKENS, (tokens - v.token0 + BOX - 1) / BOX * BOX);
    return true;
  }
};

struct Ring {
  const int stages;
  int stage = 0;
  u32 phase = 0;
  __device__ explicit Ring(int stages) : stages(stages) {}
  __device__ void advance() {
    if (++stage == stages) stage = 0, phase ^= 1;
  }
};

// Finishes one warpgroup's accumulators: packed rows row0 .. row0 + 63 of TOKENS tokens from token0 on.
// 16-bit results turn around in `staging`, CHUNK tokens at a time, to leave in 16-byte pieces.
template <class T, int TOKENS, int CHUNK, int PITCH>
__device__ __forceinline__ void finish_accumulators(const Epilogue& e, const float (&acc)[TOKENS / 2], u8* staging,
                                                    int barrier, int thread, int row0, int token0) {
  const int warp = thread / 32, lane = thread % 32, row = row0 + warp * 16 + lane / 4, column = lane % 4 * 2;
  const float bias[2] = {bias_of<T>(e, row), bias_of<T>(e, row + 8)};
  if (e.kind == LOGITS) {
    constexpr int SUMS = CHUNK < 32 ? CHUNK : 32, SUM_PITCH = TILE + 4;  // tokens at a time, floats
    float* sums = reinterpret_cast<float*>(staging);
    for (int chunk = 0; chunk < TOKENS / SUMS; chunk++) {
      const int token1 = token0 + chunk * SUMS, count = min(SUMS, e.tokens - token1);
      if (count <= 0) break;
      ptx::bar_sync(barrier, 128);
#pragma unroll
      for (int i = 0; i < TOKENS / 2; i++)  // registers are chosen at compile time, the chunk is not
        if (i / (SUMS / 2) == chunk)
          sums[(i % (SUMS / 2) / 4 * 8 + column + i % 2) * SUM_PITCH + row - row0 + i % 4 / 2 * 8] = acc[i];
      ptx::bar_sync(barrier, 128);
      finish_tile<T, TILE, 2>(e, token1, row0, 0, count * (TILE / 4), thread, 128, [&](int t, int r, float(&q)[4]) {
        const float4 f = *reinterpret_cast<const float4*>(sums + t * SUM_PITCH + r);
        q[0] = f.x, q[1] = f.y, q[2] = f.z, q[3] = f.w;
      });
    }
    return;
  }
  const bool pairs = gated(e.kind), aligned = (e.pitch & 7) == 0;
  // Lanes 0-15 hold the addresses of two matrices: 8 tokens of rows 0-7 and of rows 8-15 of this warp.
  const u32 at = ptx::smem(staging) + lane % 8 * PITCH + warp * 32 + lane / 8 % 2 * 16;
  const auto both = [](float low, float high) {
    const Pack<T, 2> p{{rounded<T>(low), rounded<T>(high)}};
    return *reinterpret_cast<const u32*>(&p);
  };
  for (int chunk = 0; chunk < TOKENS / CHUNK; chunk++) {
    const int token1 = token0 + chunk * CHUNK, count = min(CHUNK, e.tokens - token1);
    if (count <= 0) break;
    ptx::bar_sync(barrier, 128);
#pragma unroll
    for (int j = 0; j < TOKENS / 8; j++)  // registers are chosen at compile time, the chunk is not
      if (j / (CHUNK / 8) == chunk)
        ptx::stmatrix_x2_trans(at + j % (CHUNK / 8) * 8 * PITCH, both(acc[4 * j] + bias[0], acc[4 * j + 1] + bias[0]),
                               both(acc[4 * j + 2] + bias[1], acc[4 * j + 3] + bias[1]));
    ptx::bar_sync(barrier, 128);
    if (pairs) {
      for (int item = thread; item < count * 4; item += 128) {
        const int t = item / 4, piece = item % 4, n = row0 / 2 + piece * 8;
        const auto* slab = reinterpret_cast<const Pack<T, 8>*>(staging + t * PITCH + piece * 32);
        const Pack<T, 8> gates = slab[0], ups = slab[1];
        Pack<T, 8> value;
        gate_all(value, gates, ups, e);
        if (n < e.rows / 2) store(static_cast<T*>(e.out) + static_cast<size_t>(token1 + t) * e.pitch + n, value, 8, aligned);
      }
    } else {
#pragma unroll 1
      for (int item = thread; item < count * 8; item += 128) {
        const int t = item / 8, piece = item % 8, n = row0 + piece * 8, left = e.rows - n;
        auto value = *reinterpret_cast<const Pack<T, 8>*>(staging + t * PITCH + piece * 16);
        const size_t to = static_cast<size_t>(token1 + t) * e.pitch + n;
        if (left <= 0) continue;
        activate_all(value, e.kind);
        if (e.residual) add_residual(static_cast<const T*>(e.residual) + to, value, e.scale, left, aligned);
        store(static_cast<T*>(e.out) + to, value, left, aligned);
      }
    }
  }
}

// FLOW: a consumer warpgroup leaves its outputs in shared memory, 128 tokens at a time (256 when gated, which
// halves the rows), and goes on with the next tile; STORERS threads carry them out.
// Where piece `c` (16 bytes) of a token's row lies: pieces of 8 consecutive tokens fall into different banks.
template <bool GATED>
__device__ __forceinline__ u32 staged(int token, int c) {
  return GATED ? token * TILE + (c ^ (token / 2 % 4)) * 16 : token * (2 * TILE) + (c ^ (token % 8)) * 16;
}
__device__ __forceinline__ int phases(const Epilogue& e, const int limit) {
  return limit <= 0 || e.kind == LOGITS ? 0 : gated(e.kind) || limit <= 128 ? 1 : 2;
}
enum Named : int { ROOM = 1, READY = 3 };  // barriers of warpgroup 0; those of 1 are the next

// Two sums rounded to T, as they lie in memory, and what they are then.
template <class T>
__device__ __forceinline__ u32 rounded_pair(float low, float high);
template <>
__device__ __forceinline__ u32 rounded_pair<bf16>(float low, float high) {
  const __nv_bfloat162 p = __floats2bfloat162_rn(low, high);
  return *reinterpret_cast<const u32*>(&p);
}
template <>
__device__ __forceinline__ u32 rounded_pair<f16>(float low, float high) {
  const __half2 p = __floats2half2_rn(low, high);
  return *reinterpret_cast<const u32*>(&p);
}
template <class T>
__device__ __forceinline__ float2 widened(u32 pair);
template <>
__device__ __forceinline__ float2 widened<bf16>(u32 pair) {
  return make_float2(__uint_as_float(pair << 16), __uint_as_float(pair & 0xffff0000u));
}
template <>
__device__ __forceinline__ float2 widened<f16>(u32 pair) { return __half22float2(*reinterpret_cast<const __half2*>(&pair)); }

// The bits of silu(v) in fewer steps: silu's further ones are for a denormal exp(-v), which 1 swallows, and for a
// divisor below 2^-126, which 1 + exp(-v) is not.
__device__ __forceinline__ float silu_quick(float v) {
  return __fmul_rn(v, ptx::reciprocal_quick(__fadd_rn(1.f, ptx::exp2_quick(__fmul_rn(v, -1.44269504f)))));
}

template <class T, int TOKENS>
__device__ __forceinline__ void hand_over(const Epilogue& e, const float (&acc)[TOKENS / 2], u32 staging, int group,
                                          int thread, int row0, int token0, int limit) {
  if (limit <= 0) return;
  const int warp = thread / 32, lane = thread % 32, row = row0 + warp * 16 + lane / 4, column = lane % 4 * 2;
  const float bias[2] = {bias_of<T>(e, row), bias_of<T>(e, row + 8)};
  if (e.kind == LOGITS) {  // 8 lanes hold 8 neighbours of a token: a whole sector of 32 bytes
    const auto all = [&](auto finished) {
      float* out = static_cast<float*>(e.out) + static_cast<size_t>(token0 + column) * e.pitch + row;
#pragma unroll
      for (int j = 0; j < TOKENS / 8; j++) {
#pragma unroll
        for (int i = 0; i < 4; i++)
          if (8 * j + column + i % 2 < limit && row + i / 2 * 8 < e.rows)
            out[i % 2 * static_cast<size_t>(e.pitch) + i / 2 * 8] = finished(acc[4 * j + i], bias[i / 2]);
        out += 8 * static_cast<size_t>(e.pitch);
      }
    };
    if (e.soft_cap > 0.f)
      all([&](float sum, float b) { return logit(sum, b, e.scale, e.soft_cap); });
    else
      all([&](float sum, float b) { return fmaf(sum, e.scale, b); });
    return;
  }
  const auto pair = [&](int i, int half) { return rounded_pair<T>(acc[i] + bias[half], acc[i + 1] + bias[half]); };
  if (gated(e.kind)) {
    ptx::bar_sync(ROOM + group, 128 + STORERS);
    const auto all = [&](auto act) {
#pragma unroll
      for (int q = 0; q < TOKENS / 32; q++) {
        if (32 * q >= limit) break;
        u32 r[4];
#pragma unroll
        for (int m = 0; m < 4; m++) {
          const float2 gate = widened<T>(pair(16 * q + 4 * m, 0)), up = widened<T>(pair(16 * q + 4 * m + 2, 1));
          r[m] = rounded_pair<T>(act(gate.x, up.x), act(gate.y, up.y));
        }
        ptx::stmatrix_x4_trans(staging + staged<true>(32 * q + lane, warp), r);
      }
    };
    if (e.kind == GATED_SILU)
      all([](float g, float u) { return __fmul_rn(silu_quick(g), u); });
    else if (e.kind == GATED_CLAMPED)
      all([&](float g, float u) { return clamped_gate(g, u, e.soft_cap, e.scale); });
    else
      all([&](float g, float u) { return __fmul_rn(activated(g, e.kind == GATED_GELU ? Act::GELU : Act::GELU_TANH), u); });
    ptx::bar_arrive(READY + group, 128 + STORERS);
    return;
  }
#pragma unroll
  for (int half = 0; half < TOKENS / 128; half++) {
    if (half * 128 >= limit) break;
    ptx::bar_sync(ROOM + group, 128 + STORERS);
#pragma unroll
    for (int q = 0; q < 8; q++) {  // 16 tokens, 16 rows
      const int i = half * 64 + q * 8;
      const u32 r[4] = {pair(i, 0), pair(i + 2, 1), pair(i + 4, 0), pair(i + 6, 1)};
      ptx::stmatrix_x4_trans(staging + staged<false>(16 * q + lane / 16 * 8 + lane % 8, warp * 2 + lane / 8 % 2), r);
    }
    ptx::bar_arrive(READY + group, 128 + STORERS);
  }
}

// What the storers do for one phase of one warpgroup: tokens token1 .. token1 + count - 1.
template <class T>
__device__ __forceinline__ void carry_out(const Epilogue& e, const u8* staging, int thread, int row0, int token1, int count) {
  const bool aligned = (e.pitch & 7) == 0;
  if (gated(e.kind)) {
    for (int item = thread; item < count * 4; item += STORERS) {
      const int t = item / 4, piece = item % 4, n = row0 / 2 + piece * 8;
      if (n >= e.rows / 2) continue;
      const auto value = *reinterpret_cast<const Pack<T, 8>*>(staging + staged<true>(t, piece));
      store(static_cast<T*>(e.out) + static_cast<size_t>(token1 + t) * e.pitch + n, value, 8, aligned);
    }
    return;
  }
  for (int item = thread; item < count * 8; item += STORERS) {
    const int t = item / 8, piece = item % 8, n = row0 + piece * 8, left = e.rows - n;
    if (left <= 0) continue;
    auto value = *reinterpret_cast<const Pack<T, 8>*>(staging + staged<false>(t, piece));
    const size_t to = static_cast<size_t>(token1 + t) * e.pitch + n;
    activate_all(value, e.kind);
    if (e.residual) add_residual(static_cast<const T*>(e.residual) + to, value, e.scale, left, aligned);
    store(static_cast<T*>(e.out) + to, value, left, aligned);
  }
}

// x: tensor map of [>= tokens, K] in boxes of 64 x (Layout::BOX, else TOKENS / CLUSTER), 128-byte swizzle. weights: packed.
// blocks: ceil(K / 64). The rest: see Epilogue.
template <class T, int TOKENS, Mode MODE, int CLUSTER>
__global__ void __launch_bounds__(Layout<TOKENS, MODE>::THREADS, 1)
    gemm(const __grid_constant__ TensorMap x, const u8* __restrict__ weights, void* out, const void* bias,
         const void* residual, int kind, int tokens, int rows, int pitch, float scale, float soft_cap, int blocks,
         int segments) {
  using L = Layout<TOKENS, MODE>;
  using namespace ptx;
  constexpr int REGS = TOKENS / 2;
  // A split product is launched with fewer stages where that lets the next kernel's blocks in beside its own.
  const int stages = MODE == SPLIT ? (dynamic_smem_bytes() - L::BARRIERS) / (L::WEIGHTS + L::X) : L::STAGES;
  constexpr bool SQUARE = CLUSTER == 4;  // blocks 0 and 1, then 2 and 3 have the same tokens
  constexpr int ROWS = SQUARE ? 2 : CLUSTER, SOURCES = SQUARE ? 3 : CLUSTER;  // of a load of x; of what a block receives
  const u16 neighbours = SQUARE ? 3 << (blockIdx.x & 2) : (1 << CLUSTER) - 1;
  extern __shared__ __align__(1024) u8 shared[];
  const u32 base = smem(shared), x_base = base + stages * L::WEIGHTS, bars = base + stages * (L::WEIGHTS + L::X) + L::STAGING;
  const auto full = [&](int s) { return bars + 16 * s; };
  const auto empty = [&](int s) { return bars + 16 * s + 8; };
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int tiles = (rows + TILE - 1) / TILE;
#ifdef RVLLM_GEMM_TRACE  // the residual is where clocks are written, [blocks][2][256]
  u64* const trace_log = static_cast<u64*>(const_cast<void*>(residual)) + (blockIdx.x * 2 + threadIdx.x / 128 % 2) * 256;
  int stamps = 4;
  const bool stamping = threadIdx.x < CONSUMERS && threadIdx.x % 128 == 0;
  long long stalled = 0;
#define RVLLM_STALL(what) { const long long t = clock64(); what stalled += clock64() - t; }
#define RVLLM_STALLED if (stamping && stamps < 256) trace_log[stamps++] = stalled; stalled = 0;
#define RVLLM_STAMP if (stamping && stamps < 256) trace_log[stamps++] = clock64();
#define RVLLM_STAMP_END if (stamping) trace_log[1] = global_time(), trace_log[2] = stamps;
  if (stamping) trace_log[0] = global_time();
  RVLLM_STAMP
  const Epilogue e{out, bias, nullptr, kind, tokens, rows, pitch, scale, soft_cap};
#else
#define RVLLM_STAMP
#define RVLLM_STALL(what) what
#define RVLLM_STALLED
#define RVLLM_STAMP_END
  const Epilogue e{out, bias, residual, kind, tokens, rows, pitch, scale, soft_cap};
#endif
  // SPLIT: the items of the sum that fall to a block of the cluster, and what a thread's first ones are finished with.
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
    tensor_map_prefetch(&x);
    for (int s = 0; s < stages; s++) {
      mbar_init(full(s), 1);
      mbar_init(empty(s), CONSUMERS / 32 * SOURCES);
    }
    mbar_init_fence();
  }
  if constexpr (CLUSTER > 1)
    cluster_sync();
  else
    __syncthreads();

  // The blocks of K this thread block sums, and its visits.
  int k0 = 0, k1 = blocks;
  if constexpr (MODE == SPLIT) {
    k0 = segment_start(blocks, segments, blockIdx.x);
    k1 = segment_start(blocks, segments, blockIdx.x + 1);
  }
  Walk<TOKENS, ROWS, CLUSTER / ROWS, MODE == FLOW> walk(rows, tokens);
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
    if constexpr (MODE == FLOW)
      registers_lower<88>();
    else if constexpr (L::MANY_REGISTERS)
      registers_lower<40>();
    if (threadIdx.x == CONSUMERS) {
      // Weights that are read again in a later round, for other tokens, may stay in L2.
      const u64 hint = walk.again() ? EVICT_NORMAL : EVICT_FIRST;
      const auto load_weights = [&](const Visit& v, int k, int stage) {
        mbar_arrive_expect(full(stage), v.count * TILE_BYTES + v.width * TILE * 2);
        if (SQUARE || (MODE == FLOW && v.piece)) {  // of the same rows as another block's, which loads the other tile
          const int i = SQUARE ? walk.rank / 2 : walk.rank;
          const u16 sharers = SQUARE ? 5 << walk.rank % 2 : neighbours;
          const u64 tile = min(v.tile + i, tiles - 1);
          bulk_load_multicast(base + stage * L::WEIGHTS + i * TILE_BYTES, weights + (tile * blocks + k) * TILE_BYTES,
                              TILE_BYTES, full(stage), sharers, hint);
          return;
        }
#pragma unroll
        for (int i = 0; i < 2; i++)
          if (i < v.count) {
            const u64 tile = min(v.tile + i, tiles - 1);
            bulk_load(base + stage * L::WEIGHTS + i * TILE_BYTES, weights + (tile * blocks + k) * TILE_BYTES,
                      TILE_BYTES, full(stage), hint);
          }
      };
      const auto load_x = [&](const Visit& v, int k, int stage) {
        constexpr int SHARE = TOKENS / ROWS;
        const u32 dst = x_base + stage * L::X;
        if constexpr (MODE == FLOW) {
          for (int t = v.piece ? 0 : walk.rank * BOX; t < v.width; t += v.piece ? BOX : CLUSTER * BOX) {
            if (v.piece)
              tensor_load_2d(dst + t * TILE * 2, &x, k * TILE, v.token0 + t, full(stage));
            else
              tensor_load_2d_multicast(dst + t * TILE * 2, &x, k * TILE, v.token0 + t, full(stage), neighbours);
          }
        } else if constexpr (CLUSTER > 1) {
          const int first = walk.rank % ROWS * SHARE;
          tensor_load_2d_multicast(dst + first * TILE * 2, &x, k * TILE, v.token0 + first, full(stage), neighbours);
        } else {
          tensor_load_2d(dst, &x, k * TILE, v.token0, full(stage));
        }
      };
      Visit v;
      Ring ring(stages);
      bool more = next(v);
      // Weights first: they depend on no kernel before this one.
      int ahead = more ? min(stages, k1 - k0) : 0;
      for (int s = 0; s < ahead; s++) load_weights(v, k0 + s, s);
      griddep_wait();
      for (int s = 0; s < ahead; s++) {
        load_x(v, k0 + s, s);
        ring.advance();
      }
      while (more) {
        for (int k = k0 + ahead; k < k1; k++) {
          wait(empty(ring.stage), ring.phase ^ 1);
          load_weights(v, k, ring.stage);
          load_x(v, k, ring.stage);
          ring.advance();
        }
        ahead = 0;
        more = next(v);
      }
    } else {
      griddep_wait();
      if constexpr (MODE == FLOW) {
        const int thread = threadIdx.x - CONSUMERS - 32;
        const u8* staging = shared + stages * (L::WEIGHTS + L::X);
        if (thread >= 0) {
          bar_arrive(ROOM, 128 + STORERS);
          bar_arrive(ROOM + 1, 128 + STORERS);
          Visit v;
          while (next(v)) {
            const int limit = min(v.width, tokens - v.token0), count = phases(e, limit);
            const int step = gated(kind) ? TOKENS : 128;
            for (int p = 0; p < count; p++)
              for (int g = 0; g < 2; g++) {
                bar_sync(READY + g, 128 + STORERS);
                carry_out<T>(e, staging + g * FLOW_STAGING, thread, (v.tile + g) * TILE, v.token0 + p * step,
                             min(step, limit - p * step));
                __syncwarp();
                bar_arrive(ROOM + g, 128 + STORERS);
              }
          }
        }
      }
    }
    __syncwarp();
  } else {
    if constexpr (MODE == FLOW)
      registers_raise<208>();
    else if constexpr (L::MANY_REGISTERS)
      registers_raise<232>();
    const int group = warp / 4, thread = threadIdx.x % 128;
    Ring ring(stages);
    Visit v;
    float acc[REGS];
    const auto release = [&](int stage) {
      if constexpr (CLUSTER > 1) {
        if (lane < SOURCES) mbar_arrive_remote(empty(stage), SQUARE ? walk.rank ^ lane : lane);
      } else {
        if (lane == 0) mbar_arrive(empty(stage));
      }
    };
    // Sums blocks [first, last) into acc, of as many tokens as it has columns.
    const auto segment = [&](auto& acc, int first, int last) {
      constexpr int WIDTH = sizeof(acc) / sizeof(float) * 2;
      int held = -1;
      for (int k = first; k < last; k++) {
        RVLLM_STALL(wait(full(ring.stage), ring.phase);)
        const u64 a = wgmma_operand(base + ring.stage * L::WEIGHTS + group * TILE_BYTES);
        const u64 b = wgmma_operand(x_base + ring.stage * L::X);
        wgmma_pin(acc);
        wgmma_fence();
#pragma unroll
        for (int j = 0; j < TILE / 16; j++) wgmma<WIDTH, T>(acc, a + 2 * j, b + 2 * j, j > 0 || k > first);
        wgmma_commit();
        wgmma_pin(acc);
        if (held >= 0) {
          wgmma_wait<1>();
          release(held);
        }
        held = ring.stage;
        ring.advance();
      }
      wgmma_wait<0>();
      wgmma_pin(acc);
      if (held >= 0) release(held);
    };
    griddep_wait();
    RVLLM_STAMP

    if constexpr (MODE == SPLIT) {
      next(v);
      if (can_hold(e)) hold_from(split_items(blockIdx.x) + threadIdx.x);
      segment(acc, k0, k1);
      // Both warpgroups have read their last stage before partial sums overwrite it.
      bar_sync(1, CONSUMERS);
      float* partial = reinterpret_cast<float*>(shared);
      const int row = group * TILE + thread / 32 * 16 + lane / 4, column = lane % 4 * 2;
#pragma unroll
      for (int j = 0; j < TOKENS / 8; j++)
#pragma unroll
        for (int i = 0; i < 4; i++)
          partial[(8 * j + column + i % 2) * L::SPLIT_PITCH + row + i / 2 * 8] = acc[4 * j + i];
    } else {
      [[maybe_unused]] u8* staging = shared + stages * (L::WEIGHTS + L::X) + group * L::PER_GROUP;
      while (next(v)) {
        if (group >= v.count) {  // nothing for this warpgroup: keep in step with the pipeline
          for (int k = 0; k < blocks; k++) {
            wait(full(ring.stage), ring.phase);
            release(ring.stage);
            ring.advance();
          }
          continue;
        }
        if constexpr (MODE == SUM) {
          float sum[REGS];
          segment(acc, 0, segment_start(blocks, segments, 1));
#pragma unroll
          for (int i = 0; i < REGS; i++) sum[i] = acc[i];
          for (int s = 1; s < segments; s++) {
            segment(acc, segment_start(blocks, segments, s), segment_start(blocks, segments, s + 1));
#pragma unroll
            for (int i = 0; i < REGS; i++) sum[i] += acc[i];
          }
#pragma unroll
          for (int i = 0; i < REGS; i++) acc[i] = sum[i];
        } else {
          if constexpr (MODE == FLOW) {  // narrow visits are summed in the first of the accumulators
            if (v.width == 64)
              segment(reinterpret_cast<float(&)[32]>(acc), 0, blocks);
            else if (v.width == 128)
              segment(reinterpret_cast<float(&)[64]>(acc), 0, blocks);
            else if (v.width == 192)
              segment(reinterpret_cast<float(&)[96]>(acc), 0, blocks);
            else
              segment(acc, 0, blocks);
          } else {
            segment(acc, 0, blocks);
          }
        }
        RVLLM_STAMP
        RVLLM_STALLED
        if constexpr (MODE == FLOW) {
          hand_over<T, TOKENS>(e, acc, smem(shared) + stages * (L::WEIGHTS + L::X) + group * FLOW_STAGING, group, thread,
                               (v.tile + group) * TILE, v.token0, min(v.width, tokens - v.token0));
        } else {
          finish_accumulators<T, TOKENS, L::CHUNK, L::STAGE_PITCH>(e, acc, staging, 1 + group, thread,
                                                                   (v.tile + group) * TILE, v.token0);
        }
        RVLLM_STAMP
      }
      if constexpr (MODE == FLOW) bar_sync(ROOM + group, 128 + STORERS);  // as often as the storers arrive
      RVLLM_STAMP_END
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
          float sum[L::HELD][4];
#pragma unroll
          for (int b = 0; b < L::HELD; b++) {
            const int item = min(i + b * CONSUMERS, last - 1);  // no branch, so that all loads are in flight at once
            load(item / (TILE / 2), item % (TILE / 2) * 4, sum[b]);
          }
          if (i >= first + L::HELD * CONSUMERS) hold_from(i);
          // What others have was read: said before results leave, which takes longer.
          if (i - static_cast<int>(threadIdx.x) + L::HELD * CONSUMERS >= last) cluster_arrive();
#pragma unroll
          for (int b = 0; b < L::HELD; b++) {
            const int item = i + b * CONSUMERS;
            if (item < last)
              finish_held<T>(e, token0 + item / (TILE / 2), row0 + item % (TILE / 2) * 4, sum[b], held[b]);
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
    cluster_wait();  // nobody leaves while its shared memory is being read
  } else if constexpr (CLUSTER > 1) {
    cluster_sync();
  }
}

}  // namespace rvllm::gemm

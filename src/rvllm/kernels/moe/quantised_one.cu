// Experts of a few tokens, whose weights keep their format: the kernels of one_token.cu with a format's decoder in front.
//
// A block has 16 packed rows of an expert's matrix, a token's column in all eight of the matrix instruction. Its warps
// bring slices, 16 rows of a chunk of 64 rows x 128 columns, into the place of the warp's own in a chunk, where the
// decoders of `quantised` read them.
//
// Sums are those of `quantised`. Where a group's sum is scaled in float32, each starts at zero, so warps share the groups
// as they come and one thread a row scales and adds them in ascending order; where numbers are rounded to 16 bits before
// they are multiplied, a warp has whole segments.
#include "moe/quantised.cuh"

namespace rvllm::experts {

using namespace ptx;

inline constexpr int MAX_WARPS = 8, SLICES = 4;         // of a block; of a chunk
inline constexpr int BESIDE = CHUNK_K * 2 + 16;         // bytes of a warp's stage besides weights: of x, and scales of blocks

// Where the slices of a chunk lie: vector v of 16 bytes of a slice, v < VECTORS.
template <class F>
struct Slices {
  static constexpr int BITS = F::UNIT / 512, UNIT_VECTORS = BITS * 8, VECTORS = F::RUNS * 4 + 2 * UNIT_VECTORS;
  static __device__ __forceinline__ int at(int v, int slice) {
    if (v < F::RUNS * 4) return v / 4 * 256 + slice * 64 + v % 4 * 16;
    const int unit = (v - F::RUNS * 4) / UNIT_VECTORS;
    int in = (v - F::RUNS * 4) % UNIT_VECTORS, base = F::SCALES + unit * F::UNIT;
    constexpr int FOURS = BITS / 4;  // planes of four bits
    if (in < FOURS * 32) return base + in / 32 * 2048 + slice * 512 + in % 32 * 16;
    in -= FOURS * 32, base += FOURS * 2048;
    if constexpr ((BITS & 2) != 0) {
      if (in < 16) return base + slice * 256 + in * 16;
      in -= 16, base += 1024;
    }
    return base + slice * 128 + in * 16;
  }
};
template <>
struct Slices<E4m3> {
  static constexpr int VECTORS = 128;
  static __device__ __forceinline__ int at(int v, int slice) { return slice * 2048 + v * 16; }
};

// What a block sums of a row: the sum of a group and its scale, or of a segment.
template <class F>
struct Partials {
  static constexpr bool CHAINED = !F::INTEGERS;
  static constexpr int RUNS = CHAINED ? 1 : F::RUNS;
  float2* at;  // [units][RUNS][SLICE]
  int chunks, segments;

  __device__ __forceinline__ int units() const { return CHAINED ? segments : chunks; }
  __device__ __forceinline__ int first_chunk(int unit) const { return CHAINED ? segment_start(chunks, segments, unit) : unit; }
  // The row's sum over all units from `unit` on; by: what E4M3 is multiplied by, a segment at a time.
  __device__ __forceinline__ float total(int unit, int row, float by) const {
    const float2* from = at + unit * RUNS * SLICE + row;
    float all = 0.f;
    for (int s = 0; s < segments; s++) {
      float sum = 0.f;
      if constexpr (CHAINED) {
        sum = from[s * SLICE].x;
      } else {
        const int end = segment_start(chunks, segments, s + 1) * RUNS;
#pragma unroll 8
        for (int i = segment_start(chunks, segments, s) * RUNS; i < end; i++) sum = fmaf(from[i * SLICE].y, from[i * SLICE].x, sum);
        if constexpr (IS_E4M3<F>) sum = __fmul_rn(sum, by);
      }
      all = s == 0 ? sum : all + sum;
    }
    return all;
  }
};

// A warp's ring of slices, and what it does with one.
template <class T, class F, int STAGES>
struct SliceRing {
  u32 weights, beside;  // of the first stage: the chunk that four warps share, and what is this warp's alone
  int slots, lane, place;
  int load_slot = 0, x_slot = 0, slot = 0;

  __device__ SliceRing(u32 base, int slots, int warp, int warps, int lane)
      : weights(base + warp / SLICES * slots * F::CHUNK),
        beside(base + (warps / SLICES) * slots * F::CHUNK + warp * slots * BESIDE), slots(slots), lane(lane), place(warp % SLICES) {}

  __device__ __forceinline__ void next(int& s) const {
    if (++s == slots) s = 0;
  }
  // scales: four scales of blocks, two of which are this slice's, or null.
  __device__ __forceinline__ void load(const u8* chunk, int slice, const float* scales) {
    const u32 to = weights + load_slot * F::CHUNK;
#pragma unroll
    for (int v = 0; v < Slices<F>::VECTORS; v += 32)
      if (v + 32 <= Slices<F>::VECTORS || v + lane < Slices<F>::VECTORS)
        cp_async16_once(to + Slices<F>::at(v + lane, place), chunk + Slices<F>::at(v + lane, slice));
    if (IS_E4M3<F> && scales && lane == 0) cp_async16(beside + load_slot * BESIDE + CHUNK_K * 2, scales);
    next(load_slot);
  }
  __device__ __forceinline__ void load_x(const T* x, int chunk, int k) {
    const int column = chunk * CHUNK_K + lane * 8;
    if (lane < CHUNK_K / 8) cp_async16(beside + x_slot * BESIDE + lane * 16, column < k ? x + column : x, column < k ? 16 : 0);
    next(x_slot);
  }
  // Adds the oldest slice times x to acc; done(run, scale's row, its step) after each group of columns whose sum is scaled.
  template <class Done>
  __device__ __forceinline__ void multiply(float (&acc)[4], Done done) const {
    const u32 at = weights + slot * F::CHUNK, x = beside + slot * BESIDE;
    const int row = place * SLICE + lane / 4;
#pragma unroll
    for (int u = 0; u < 2; u++) {
      u32 a[4][4], b[2][4];
#pragma unroll
      for (int i = 0; i < 2; i++) ldmatrix_x4(b[i], x + (8 * u + 4 * i + lane / 8) * 16);
      F::template decode<T>(a, at, u, place * 32 + lane, row);
#pragma unroll
      for (int step = 0; step < 4; step++) {
        mma_16816(acc, a[step], {b[step / 2][step % 2 * 2], b[step / 2][step % 2 * 2 + 1]}, T());
        if constexpr (F::INTEGERS && F::RUNS > 1) {
          if (step % F::STEPS == F::STEPS - 1) done((u * 4 + step) / F::STEPS, F::run_at(at, u, step) + 4 * row);
        }
      }
    }
    if constexpr (F::INTEGERS && F::RUNS == 1) done(0, at + 4 * row);
  }
  __device__ __forceinline__ float block_scale(int slice, int half) const {
    return __uint_as_float(shared_word(beside + slot * BESIDE + CHUNK_K * 2 + (slice % 2 * 2 + half) * 4));
  }
};

// The slice's sums of a chunk into `to`, its unit's partials, and what is left of them in acc.
template <class T, class F, int STAGES>
__device__ __forceinline__ void sum_slice(float (&acc)[4], SliceRing<T, F, STAGES>& ring, float2* to, bool ends, int slice, int kind) {
  const int lane = ring.lane;
  const auto leave = [&](int run, float low, float high) {
    if (lane % 4 == 0) {
      to[run * SLICE + lane / 4] = make_float2(acc[0], low);
      to[run * SLICE + lane / 4 + 8] = make_float2(acc[2], high);
    }
    acc[0] = acc[1] = acc[2] = acc[3] = 0.f;
  };
  ring.multiply(acc, [&](int run, u32 scale) {
    if constexpr (IS_E4M3<F>) {
      const bool blocks = kind == BLOCK_SCALES;
      leave(run, blocks ? ring.block_scale(slice, 0) : 1.f, blocks ? ring.block_scale(slice, 1) : 1.f);
    } else if constexpr (F::INTEGERS) {
      leave(run, low_half(shared_word(scale)), low_half(shared_word(scale + 32)));
    }
  });
  if (!F::INTEGERS && ends) leave(0, 1.f, 1.f);
  ring.next(ring.slot);
}

// Where the scales of an E4M3 matrix are, behind its tiles.
__device__ __forceinline__ const float* scales_of(const u8* matrix, int row_tiles, int chunks, int chunk_bytes) {
  return reinterpret_cast<const float*>(matrix + static_cast<u64>(row_tiles) * chunks * chunk_bytes);
}

// inner = act(up x) for each token's experts, as `one_up`; weights, stride, kind, chunks and segments as of `quantised`. x
// [tokens, k]; ids [tokens, top_k]; out: a row an entry. Tokens from *num_tokens on are left alone. warps: a multiple of 4.
// slots: stages a warp has memory for, STAGES or all its chunks if fewer.
// Grid: (ceil(rows / 16), tokens * top_k). Block: 32 * warps. Shared: warps * slots * (CHUNK / 4 + BESIDE) + 128 a unit and
// run. Bound by memory.
template <class T, class F, int STAGES>
__global__ void __launch_bounds__(32 * MAX_WARPS)
    quantised_one_up(T* out, const T* x, const u8* __restrict__ weights, const int* ids, const int* num_tokens, u64 stride,
                     int kind, int top_k, int always, int first_always, int k, int chunks, int segments, int rows, int pitch,
                     int act, int gated, int slots) {
  extern __shared__ __align__(1024) u8 shared[];
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, warps = blockDim.x / 32;
  const int token = blockIdx.y / top_k, row_tiles = (rows + TILE - 1) / TILE, slice = blockIdx.x % SLICES;
  // The experts that all tokens have come first: which they are is known before the others are chosen.
  const int j = (blockIdx.y + top_k - always) % top_k, common = j - (top_k - always), entry = token * top_k + j;
  const bool wait_first = common < 0;
  if (wait_first) {
    griddep_wait();
    griddep_launch();
  }
  if (token >= *num_tokens) return;
  const int expert = common >= 0 ? first_always + common : existing(__ldcg(ids + entry), first_always + always);
  const u8* const matrix = weights + expert * stride;
  const u8* const strip = matrix + static_cast<u64>(blockIdx.x / SLICES) * chunks * F::CHUNK;
  SliceRing<T, F, STAGES> ring(smem(shared), slots, warp, warps, lane);
  const Partials<F> partials{reinterpret_cast<float2*>(shared + warps * slots * (F::CHUNK / SLICES + BESIDE)), chunks, segments};
  int unit = segment_start(partials.units(), warps, warp);
  const int first = partials.first_chunk(unit), last = partials.first_chunk(segment_start(partials.units(), warps, warp + 1));
  const float *by_block = nullptr, *by_row = nullptr;
  if constexpr (IS_E4M3<F>) {
    const float* const scales = scales_of(matrix, row_tiles, chunks, F::CHUNK);
    if (kind == BLOCK_SCALES) by_block = scales + blockIdx.x / SLICES * 8 + slice / 2 * 4;
    if (kind == ROW_SCALES) by_row = scales + blockIdx.x * SLICE;
  }
  const auto load_weights = [&](int chunk) {
    if (chunk < last)
      ring.load(strip + static_cast<u64>(chunk) * F::CHUNK, slice, by_block ? by_block + static_cast<size_t>(chunk) * row_tiles * 8 : nullptr);
  };
  const auto load_x = [&](int chunk) {
    if (chunk < last) ring.load_x(x + static_cast<size_t>(token) * k, chunk, k);
    cp_async_commit();  // also when empty, so that the count of groups stays in step
  };
  for (int s = 0; s < STAGES - 1; s++) load_weights(first + s);
  if (!wait_first) {
    griddep_wait();
    griddep_launch();
  }
  for (int s = 0; s < STAGES - 1; s++) load_x(first + s);
  const float by = by_row && threadIdx.x < SLICE ? by_row[threadIdx.x] : 1.f;
  float acc[4] = {};
  for (int chunk = first; chunk < last; chunk++) {
    cp_async_wait<STAGES - 2>();
    __syncwarp();
    load_weights(chunk + STAGES - 1);
    load_x(chunk + STAGES - 1);
    const bool ends = chunk + 1 == partials.first_chunk(unit + 1);
    sum_slice(acc, ring, partials.at + unit * Partials<F>::RUNS * SLICE, ends, slice, kind);
    if (ends) unit++;
  }
  cp_async_wait<0>();
  __syncthreads();
  if (threadIdx.x >= 32) return;
  const float sum = partials.total(0, lane % SLICE, by), up = __shfl_down_sync(~0u, sum, SLICE / 2);
  const int height = gated ? SLICE / 2 : SLICE, at = blockIdx.x * height + lane;
  if (lane >= height || at >= (gated ? rows / 2 : rows)) return;
  out[static_cast<size_t>(entry) * pitch + at] = gated ? gated_value<T>(sum, up, act) : plain_value<T>(sum, act);
}

// The sum over each token's experts, with the residual or without, as `one_down`. inner [tokens * top_k, k]; out and residual
// [tokens, rows]. The rest as above; top_k <= 32.
// Grid: (ceil(rows / 16), tokens). Block: 32 * warps. Shared: warps * slots * (CHUNK / 4 + BESIDE) + 128 a unit and run of
// each of top_k experts. Bound by memory.
template <class T, class F, int STAGES>
__global__ void __launch_bounds__(32 * MAX_WARPS)
    quantised_one_down(T* out, const T* inner, const u8* __restrict__ weights, const int* ids, const float* shares,
                       const T* residual, const int* num_tokens, u64 stride, int kind, int experts, int top_k, int k, int chunks,
                       int segments, int rows, int slots, float scale) {
  extern __shared__ __align__(1024) u8 shared[];
  __shared__ float parts[32][SLICE];
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, warps = blockDim.x / 32;
  const int token = blockIdx.y, row_tiles = (rows + TILE - 1) / TILE, slice = blockIdx.x % SLICES;
  griddep_launch();
  if (token >= *num_tokens) return;
  // The launch before lets this one start when it has itself seen what the router wrote.
  const int chosen = lane < top_k ? existing(__ldcg(ids + token * top_k + lane), experts) : 0;
  const float share = lane < top_k ? __ldcg(shares + token * top_k + lane) : 0.f;
  SliceRing<T, F, STAGES> ring(smem(shared), slots, warp, warps, lane);
  const Partials<F> partials{reinterpret_cast<float2*>(shared + warps * slots * (F::CHUNK / SLICES + BESIDE)), chunks, segments};
  const int units = partials.units(), all = top_k * units;
  const u64 strip = static_cast<u64>(blockIdx.x / SLICES) * chunks * F::CHUNK;

  // Three walks over the same chunks, of all units of this warp: the weights may run ahead of the activations.
  struct Walk {
    int unit, j, chunk;  // unit: of all experts'
  };
  const int begin = segment_start(all, warps, warp), end = segment_start(all, warps, warp + 1);
  const Walk start{begin, begin / units, partials.first_chunk(begin % units)};
  Walk weights_at = start, x_at = start, at = start;
  const auto step = [&](Walk& walk) {  // whether the unit is complete
    const bool ends = ++walk.chunk == partials.first_chunk(walk.unit - walk.j * units + 1);
    if (ends) walk.unit++;
    if (walk.chunk == chunks) walk.chunk = 0, walk.j++;
    return ends;
  };
  const auto load_weights = [&]() {
    const int expert = __shfl_sync(~0u, chosen, weights_at.j % 32);
    if (weights_at.unit >= end) return;
    const u8* const matrix = weights + expert * stride;
    const float* by_block = nullptr;
    if (IS_E4M3<F> && kind == BLOCK_SCALES)
      by_block = scales_of(matrix, row_tiles, chunks, F::CHUNK) +
                 (static_cast<size_t>(weights_at.chunk) * row_tiles + blockIdx.x / SLICES) * 8 + slice / 2 * 4;
    ring.load(matrix + strip + static_cast<u64>(weights_at.chunk) * F::CHUNK, slice, by_block);
    step(weights_at);
  };
  const auto load_x = [&]() {
    if (x_at.unit < end) {
      ring.load_x(inner + static_cast<size_t>(token * top_k + x_at.j) * k, x_at.chunk, k);
      step(x_at);
    }
    cp_async_commit();  // also when empty, so that the count of groups stays in step
  };
  for (int s = 0; s < STAGES - 1; s++) load_weights();
  const int row = threadIdx.x % SLICE;
  float by = 1.f;  // of the first expert that this thread sums, which is the only one but for small blocks
  if (IS_E4M3<F> && kind == ROW_SCALES) {
    const int expert = __shfl_sync(~0u, chosen, threadIdx.x / SLICE % 32);
    by = scales_of(weights + expert * stride, row_tiles, chunks, F::CHUNK)[blockIdx.x * SLICE + row];
  }
  griddep_wait();
  for (int s = 0; s < STAGES - 1; s++) load_x();
  float acc[4] = {};
  while (at.unit < end) {
    cp_async_wait<STAGES - 2>();
    __syncwarp();
    load_weights();
    load_x();
    float2* const to = partials.at + at.unit * Partials<F>::RUNS * SLICE;
    sum_slice(acc, ring, to, step(at), slice, kind);
  }
  cp_async_wait<0>();
  __syncthreads();
  for (int i = threadIdx.x; i < top_k * SLICE; i += blockDim.x) {
    const int which = i / SLICE;
    if (IS_E4M3<F> && kind == ROW_SCALES && i >= static_cast<int>(blockDim.x))
      by = scales_of(weights + existing(__ldcg(ids + token * top_k + which), experts) * stride, row_tiles, chunks, F::CHUNK)[blockIdx.x * SLICE + row];
    parts[which][row] = gemm::to_float(gemm::rounded<T>(partials.total(which * units, row, by)));
  }
  __syncthreads();
  if (warp > 0) return;
  float total = 0.f;
  for (int e = 0; e < top_k; e++) total = weighted(total, parts[e][lane % SLICE], __shfl_sync(~0u, share, e), e == 0);
  const int column = blockIdx.x * SLICE + lane;
  if (lane >= SLICE || column >= rows) return;
  const size_t to = static_cast<size_t>(token) * rows + column;
  const T value = gemm::rounded<T>(total);
  out[to] = residual ? gemm::added<T>(residual[to], value, scale) : value;
}

}  // namespace rvllm::experts

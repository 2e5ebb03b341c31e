// One token through several products in one launch. Weights stream through shared memory, in rings of a few warps
// each (ring.cuh), which run on into the next step's weights while the block waits for that step's input.
//
// A block has groups of packed rows of every weight; as many warps as a group has slices of 16 rows take one segment of K
// of it at a time (a unit). The token stands for all eight columns of the matrix instruction. So sums are those of every
// other matrix kernel: a segment is consecutive 16-wide instructions into one accumulator, segments are added in ascending
// order.
//
// A norm may stand before a product: every block does it for itself. So it is with the choice of experts.
//
// Between two steps all blocks wait for each other, so all of them have to be resident: no more blocks than
// multiprocessors. A predecessor ends by itself, and a successor's blocks come when all blocks here have begun.
#include "decode/ring.cuh"
#include "decode/row.cuh"
#include "moe/choose.cuh"
#include "moe/moe.cuh"

namespace rvllm::decode {

// Four neighbouring rows of a group, its segments added up. partial: sums of a unit each, ROWS rows.
__device__ __forceinline__ void add_segments(float (&q)[4], const float* partial, int unit, int segments, int row) {
  const float4* const at = reinterpret_cast<const float4*>(partial + unit * ROWS + row);
  float4 total = at[0];
  for (int s = 1; s < segments; s++) {
    const float4 part = at[s * (ROWS / 4)];
    total.x += part.x, total.y += part.y, total.z += part.z, total.w += part.w;
  }
  q[0] = total.x, q[1] = total.y, q[2] = total.z, q[3] = total.w;
}
__device__ __forceinline__ float row_sum(const float* partial, int unit, int segments, int row) {
  float total = partial[unit * ROWS + row];
  for (int s = 1; s < segments; s++) total += partial[(unit + s) * ROWS + row];
  return total;
}

__device__ __forceinline__ gemm::Epilogue epilogue_of(const Step& s) {
  return {s.out, s.bias, s.residual, s.kind, 1, s.rows, s.pitch, s.scale, s.soft_cap};
}

// held: of a thread's first four outputs, where there is `hold`.
template <class T>
__device__ __forceinline__ void finish_product(const Step& s, const Share& share, const float* partial, bool hold,
                                               const gemm::Held<T>& held) {
  const gemm::Epilogue e = epilogue_of(s);
  const bool pairs = gemm::gated(s.kind);
  const int each = pairs ? ROWS / 8 : ROWS / 4;
  for (int i = threadIdx.x; i < share.count * each; i += THREADS) {
    const int unit = i / each * s.segments, q4 = i % each;
    const int row = pairs ? q4 / 2 * 16 + q4 % 2 * 4 : q4 * 4, at = (share.first + i / each) * ROWS + row;
    float q[4];
    add_segments(q, partial, unit, s.segments, row);
    if (pairs) {
      float up[4];
      add_segments(up, partial, unit, s.segments, row + 8);
      gemm::finish_gated<T>(e, 0, at, q, up);
    } else if (hold && i == threadIdx.x) {
      gemm::finish_held<T>(e, 0, at, q, held);
    } else {
      gemm::finish<T>(e, 0, at, q);
    }
  }
}

template <class T>
__device__ __forceinline__ void finish_up(const Step& s, const Share& share, const float* partial) {
  const int height = s.gated ? ROWS / 2 : ROWS, width = s.gated ? s.rows / 2 : s.rows;
  const int groups = (s.rows + ROWS - 1) / ROWS;
  for (int i = threadIdx.x; i < share.count * height; i += THREADS) {
    const int unit = i / height * s.segments, place = i % height, group = share.first + i / height;
    const int at = group % groups * height + place, row = s.gated ? place / 8 * 16 + place % 8 : place;
    if (at >= width) continue;
    const float sum = row_sum(partial, unit, s.segments, row);
    static_cast<T*>(s.out)[static_cast<size_t>(group / groups) * s.pitch + at] =
        s.gated ? experts::gated_value<T>(sum, row_sum(partial, unit, s.segments, row + 8), s.act)
                : experts::plain_value<T>(sum, s.act);
  }
}

template <class T>
__device__ __forceinline__ void finish_down(const Step& s, const Share& share, const float* partial, const float* shares) {
  for (int i = threadIdx.x; i < share.count * ROWS; i += THREADS) {
    const int row = i % ROWS, group = i / ROWS, at = (share.first + group) * ROWS + row;
    if (at >= s.rows) continue;
    float total = 0.f;
    for (int j = 0; j < s.entries; j++) {
      const float sum = row_sum(partial, (group * s.entries + j) * s.segments, s.segments, row);
      total = experts::weighted(total, gemm::to_float(gemm::rounded<T>(sum)), shares[j], j == 0);
    }
    const T value = gemm::rounded<T>(total);
    static_cast<T*>(s.out)[at] = s.residual ? gemm::added<T>(static_cast<const T*>(s.residual)[at], value, s.scale) : value;
  }
}

// chain: the steps, in order. arrivals: of blocks at the places where they wait for each other, ever; only used by
// chains of several steps, which all have one grid. MIXTURE: whether steps may be a mixture's.
// Grid: at most as many blocks as multiprocessors. Block: THREADS. Shared: WARPS * SLOTS * SLICE_BYTES + chain.x_bytes +
// 4 * ROWS * the most units a block has of a step. Bound by memory.
template <class T, int SLOTS, bool MIXTURE>
__global__ void __launch_bounds__(THREADS, 1) chain(const __grid_constant__ Chain chain, u64* arrivals) {
  extern __shared__ __align__(1024) u8 shared[];
  __shared__ float scratch[2][32];
  __shared__ u64 barriers[GROUPS * SLOTS * 2];
  __shared__ u32 keys[MIXTURE ? 32 * 16 : 1];
  __shared__ int ids[MIXTURE ? MAX_ENTRIES : 1];
  __shared__ float shares[MIXTURE ? MAX_ENTRIES : 1];
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  u8* const x = shared + WARPS * SLOTS * SLICE_BYTES;
  float* const partial = reinterpret_cast<float*>(x + chain.x_bytes);
  griddep_launch();
  Ring<SLOTS> ring(shared, barriers, warp, lane);
  Walk<MIXTURE> walk{chain, ids, warp / GROUP};
  const auto next = [&] { return walk.next(); };
  ring.prime(next);

  u64 target = 0;  // thread 0's: what `arrivals` comes to when all blocks are here
  for (int i = 0; i < chain.count; i++) {
    const Step& s = chain.steps[i];
    NormWeights norm;
    if (s.normed) norm.load(s.norm_weight, s.k / 8, warp, lane);
    if (i == 0) {
      griddep_wait();
      if (threadIdx.x == 0 && chain.count > 1) {
        const u64 now = load_acquire(arrivals);
        target = now - now % gridDim.x;
      }
    } else {
      __syncthreads();
      if (threadIdx.x == 0) {
        target += gridDim.x;
        add_release(arrivals, 1);
        while (load_acquire(arrivals) < target) {
        }
      }
      __syncthreads();
    }
    const Share share(s);
    const bool hold = s.type == PRODUCT && gemm::can_hold(epilogue_of(s));
    gemm::Held<T> held;
    if (hold && threadIdx.x < share.count * (ROWS / 4))
      held = gemm::hold<T>(epilogue_of(s), 0, share.first * ROWS + threadIdx.x * 4);
    if constexpr (MIXTURE) {
      if (s.type == UP) {
        const Step& route = chain.steps[i - 1];
        if (warp == 0) {
          const auto logit = [&](int e) { return __ldcg(static_cast<const float*>(route.out) + e); };
          const auto best = [&](auto lanes) {
            choose<decltype(lanes)::value>(logit, static_cast<const float*>(route.bias), keys, ids, shares, route.experts,
                                           s.entries - s.always, s.always, route.groups, route.kept, route.flags,
                                           route.share_scale);
          };
          if (route.experts <= 128)
            best(Number<4>());
          else
            best(Number<16>());
        }
        __syncthreads();
        walk.chosen = true;
        ring.prime(next);
      }
    }
    if (!MIXTURE || s.type != UP) load_x<T>(s, x, norm, scratch, warp, lane);
    const int each = Share::each(s);
    for (int unit = warp / GROUP; unit < share.count * each; unit += GROUPS) {
      const int segment = unit % s.segments, last = segment_start(s.blocks, s.segments, segment + 1);
      u32 row = smem(x);
      if (MIXTURE && s.type == DOWN) row += unit / s.segments % s.entries * s.blocks * (TILE * 2);
      float acc[4] = {};
      for (int block = segment_start(s.blocks, s.segments, segment); block < last; block++) {
        multiply<T>(acc, ring.wait(), row + block * (TILE * 2), lane, !MIXTURE || s.type != ROUTE);
        ring.refill(next);
      }
      if (lane % 4 == 0) {
        float* const to = partial + unit * ROWS + warp % GROUP * SLICE + lane / 4;
        to[0] = acc[0];
        to[8] = acc[2];
      }
    }
    __syncthreads();
    if (MIXTURE && s.type == ROUTE) {
      for (int r = threadIdx.x; r < share.count * ROWS; r += THREADS)
        __stcg(static_cast<float*>(s.out) + share.first * ROWS + r, row_sum(partial, r / ROWS * s.segments, s.segments, r % ROWS));
    } else if (MIXTURE && s.type == UP) {
      finish_up<T>(s, share, partial);
    } else if (MIXTURE && s.type == DOWN) {
      finish_down<T>(s, share, partial, shares);
    } else {
      finish_product<T>(s, share, partial, hold, held);
    }
  }
}

}  // namespace rvllm::decode

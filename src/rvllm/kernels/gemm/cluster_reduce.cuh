// Cluster reduce: the blocks of a cluster hold parts of the same tile's sums, and each finishes some of its tokens.
//
// A tile of 128 rows is cut into groups of 8 tokens, dealt to the blocks in turn. A thread sends its sums of a group,
// as wgmma leaves them, straight into the shared memory of the block that finishes it, into a slot of the thread at the
// same place there; that thread adds the parts in ascending order. Nothing is read from afar, and nobody waits for more
// than its own parts: bytes that arrive are counted by a barrier.
#pragma once

#include "gemm/gemm.cuh"

namespace rvllm::gemm {

// Two outputs of neighbouring rows as they lie in memory; `left` exist.
template <class T>
__device__ __forceinline__ u32 load_pair(const T* at, int left, bool aligned) {
  if (aligned && left >= 2) return *reinterpret_cast<const u32*>(at);
  Pack<T, 2> p{};
  if (left > 0) p.v[0] = at[0];
  if (left > 1) p.v[1] = at[1];
  return *reinterpret_cast<const u32*>(&p);
}
template <class T>
__device__ __forceinline__ u32 pair_of(float first, float second) {
  const Pack<T, 2> p{{rounded<T>(first), rounded<T>(second)}};
  return *reinterpret_cast<const u32*>(&p);
}

// PARTS: the most there can be. HELD: groups whose residuals are fetched before their sums are there. THREADS: that
// have sums, of both 64-row halves of a tile. Every part of the tile has a slot of 16 bytes a thread and group.
template <class T, int PARTS, int HELD, int THREADS>
struct ClusterReduce {
  Epilogue e;
  u32 slots, bar;
  int rank, owners, parts;  // of the cluster; how many blocks it has; parts of a sum
  int groups, each;         // groups of the tile; the most that fall to a block
  int thread, row, token;   // row: the first of this warp's 16; token: the tile's first
  float bias[2];
  u32 held[HELD][2];

  __device__ __forceinline__ ClusterReduce(const Epilogue& e_, u32 slots_, u32 bar_, int rank_, int owners_, int parts_,
                                           int row0, int token0, int width)
      : e(e_), slots(slots_), bar(bar_), rank(rank_), owners(owners_), parts(parts_), thread(threadIdx.x), token(token0) {
    groups = (max(0, min(width, e.tokens - token0)) + 7) / 8;
    each = (groups + owners - 1) / owners;
    row = row0 + thread / 32 * 16;
  }

  __device__ __forceinline__ int mine() const { return (groups - rank + owners - 1) / owners; }
  // By one thread, before any block sends: this many parts come from other blocks.
  __device__ __forceinline__ void expect(int remote) const {
    ptx::mbar_init(bar, 1);
    ptx::mbar_arrive_expect(bar, remote * mine() * THREADS * 16);
  }
  __device__ __forceinline__ u32 slot(int part, int index) const { return slots + ((part * each + index) * THREADS + thread) * 16; }

  // Sums of this block, as part number `part` of each.
  template <int REGS>
  __device__ __forceinline__ void send(const float (&acc)[REGS], int part) const {
    int owner = 0, index = 0;
#pragma unroll
    for (int j = 0; j < REGS / 4; j++) {
      if (j < groups) {
        const float4 v = make_float4(acc[4 * j], acc[4 * j + 1], acc[4 * j + 2], acc[4 * j + 3]);
        const u32 at = slot(part, index);
        if (owner == rank)
          ptx::store_shared(at, v);
        else
          ptx::store_async(ptx::cluster_map(at, owner), v, ptx::cluster_map(bar, owner));
      }
      if (++owner == owners) owner = 0, index++;
    }
  }

  // The first of two neighbouring outputs of this thread: token number lane / 4 of group `index`, two of the warp's rows,
  // or of those eight further on.
  __device__ __forceinline__ size_t place(int index, int half) const {
    const int lane = thread % 32, t = token + 8 * (index * owners + rank) + lane / 4;
    return static_cast<size_t>(t) * e.pitch + row + half * 8 + lane % 4 * 2;
  }
  __device__ __forceinline__ int left(int index, int half) const {
    const int lane = thread % 32, t = token + 8 * (index * owners + rank) + lane / 4;
    return t < e.tokens ? e.rows - (row + half * 8 + lane % 4 * 2) : 0;
  }

  __device__ __forceinline__ void hold_residuals(int first) {
    if (!e.residual) return;
#pragma unroll
    for (int b = 0; b < HELD; b++)
#pragma unroll
      for (int half = 0; half < 2; half++)
        if (first + b < mine())
          held[b][half] = load_pair(static_cast<const T*>(e.residual) + place(first + b, half), left(first + b, half), (e.pitch & 1) == 0);
  }
  // What does not depend on sums.
  __device__ __forceinline__ void prepare() {
    const int lane = thread % 32;
    bias[0] = bias_of<T>(e, row + lane / 4);
    bias[1] = bias_of<T>(e, row + lane / 4 + 8);
    hold_residuals(0);
  }

  // Writes group `index`: v has two tokens of row lane / 4, and the same of the row eight further on.
  __device__ __forceinline__ void finish(int index, const float4& v, const u32 (&residual)[2]) const {
    const int lane = thread % 32, t = token + 8 * (index * owners + rank);
    if (e.kind == LOGITS) {
      const float sums[4] = {v.x, v.y, v.z, v.w};
#pragma unroll
      for (int i = 0; i < 4; i++) {
        const int at = t + lane % 4 * 2 + i % 2, r = row + lane / 4 + i / 2 * 8;
        if (at < e.tokens && r < e.rows)
          static_cast<float*>(e.out)[static_cast<size_t>(at) * e.pitch + r] = logit(sums[i], bias[i / 2], e.scale, e.soft_cap);
      }
      return;
    }
    const bool aligned = (e.pitch & 1) == 0;
    const u32 low = pair_of<T>(v.x + bias[0], v.y + bias[0]), high = pair_of<T>(v.z + bias[1], v.w + bias[1]);
    const auto pack = [](u32 bits) { return *reinterpret_cast<const Pack<T, 2>*>(&bits); };
    if (gated(e.kind)) {  // gates and their ups are eight rows apart
      Pack<T, 2> value;
      gate_all(value, pack(low), pack(high), e);
      const u32 turned = ptx::matrix_transpose(*reinterpret_cast<const u32*>(&value));
      const int at = t + lane / 4, n = row / 2 + lane % 4 * 2;
      if (at < e.tokens) store(static_cast<T*>(e.out) + static_cast<size_t>(at) * e.pitch + n, pack(turned), e.rows / 2 - n, aligned);
      return;
    }
#pragma unroll
    for (int half = 0; half < 2; half++) {
      Pack<T, 2> value = pack(ptx::matrix_transpose(half ? high : low));
      activate_all(value, e.kind);
      if (e.residual) {
        const Pack<T, 2> r = pack(residual[half]);
#pragma unroll
        for (int i = 0; i < 2; i++) value.v[i] = added<T>(r.v[i], value.v[i], e.scale);
      }
      store(static_cast<T*>(e.out) + place(index, half), value, left(index, half), aligned);
    }
  }

  // Adds the parts of this block's groups and finishes them.
  __device__ __forceinline__ void finish_all() {
    ptx::mbar_wait(bar, 0);
#pragma unroll 1
    for (int first = 0; first < mine(); first += HELD) {
      if (first) hold_residuals(first);
#pragma unroll
      for (int b = 0; b < HELD; b++) {
        if (first + b >= mine()) break;
        float4 sum = ptx::load_shared(slot(0, first + b));
#pragma unroll
        for (int p = 1; p < PARTS; p++)
          if (p < parts) {
            const float4 v = ptx::load_shared(slot(p, first + b));
            sum.x += v.x, sum.y += v.y, sum.z += v.z, sum.w += v.w;
          }
        finish(first + b, sum, held[b]);
      }
    }
  }
};

}  // namespace rvllm::gemm

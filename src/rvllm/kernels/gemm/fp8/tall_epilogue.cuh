// How sums leave the registers of a warpgroup whose rows are 64 tokens: rounded, turned around in shared memory and finished
// from there in 16-byte pieces, by other threads while the warpgroup goes on.
#pragma once

#include "gemm/epilogue_overlap.cuh"
#include "gemm/tile_scheduler.cuh"

namespace rvllm::fp8 {

using namespace gemm;

// A warp's 16 tokens' sums of ROWS rows as logits: rows row0 .. of tokens token0 .. token0 + 15. First the sums, and then what
// becomes of them: in a loop, which keeps this short.
template <class T, int ROWS>
__device__ __forceinline__ void write_logits(const Epilogue& e, const float (&sum)[ROWS / 2], int lane, int row0, int token0) {
  const auto token = [&](int i) { return token0 + lane / 4 + i / 2 % 2 * 8; };
  const auto row = [&](int i) { return row0 + i / 4 * 8 + lane % 4 * 2 + i % 2; };
  const auto exists = [&](int i) { return token(i) < e.tokens && row(i) < e.rows; };
  float* const logits = static_cast<float*>(e.out);
#pragma unroll
  for (int i = 0; i < ROWS / 2; i++)
    if (exists(i)) logits[static_cast<size_t>(token(i)) * e.pitch + row(i)] = sum[i];
#pragma unroll 4
  for (int i = 0; i < ROWS / 2; i++)
    if (exists(i)) {
      float& at = logits[static_cast<size_t>(token(i)) * e.pitch + row(i)];
      at = logit(at, bias_of<T>(e, row(i)), e.scale, e.soft_cap);
    }
}

// Where a 16-byte piece of a warpgroup's 64 tokens is staged: 64 rows of all of them lie together.
__device__ __forceinline__ u32 staged_piece(int token, int piece) { return piece / 8 * (64 * TILE * 2) + staged<false>(token, piece % 8); }

// Leaves a warp's sums, rounded and with their bias, in its warpgroup's `staging`. Where there is no bias, zeros are added: -0
// becomes 0 in every kernel.
template <class T, int ROWS>
__device__ __forceinline__ void stage_tokens(const Epilogue& e, const float (&sum)[ROWS / 2], u32 staging, int warp, int lane, int row0) {
  float bias[ROWS / 8][2] = {};
  if (e.bias) {  // all of it at once: one by one each would wait for memory
#pragma unroll
    for (int j = 0; j < ROWS / 8; j++)
#pragma unroll
      for (int i = 0; i < 2; i++) bias[j][i] = bias_of<T>(e, row0 + 8 * j + lane % 4 * 2 + i);
  }
#pragma unroll
  for (int j = 0; j < ROWS / 8; j += 2) {
    const auto pair = [&](int j, int i) { return rounded_pair<T>(sum[4 * j + i] + bias[j][0], sum[4 * j + i + 1] + bias[j][1]); };
    ptx::stmatrix_x4(staging + staged_piece(warp % 4 * 16 + lane % 16, j + lane / 16), pair(j, 0), pair(j, 2), pair(j + 1, 0), pair(j + 1, 2));
  }
}

// What so many threads do with staged sums: rows row0 .. of tokens token0 .. token0 + count - 1.
template <class T, int ROWS>
__device__ __forceinline__ void store_tokens(const Epilogue& e, const u8* staging, int thread, int threads, int row0, int token0, int count) {
  using Out = Pack<T, 8>;
  constexpr int PIECES = ROWS / 8, EACH = 3;
  const bool aligned = (e.pitch & 7) == 0;
  const auto piece = [&](int token, int c) { return *reinterpret_cast<const Out*>(staging + staged_piece(token, c)); };
  if (gated(e.kind)) {
    const auto all = [&](auto act) {
#pragma unroll 1
      for (int i = thread; i < count * (PIECES / 2); i += threads) {
        const int token = i / (PIECES / 2), c = i % (PIECES / 2), n = row0 / 2 + c * 8;
        const Out gates = piece(token, 2 * c), ups = piece(token, 2 * c + 1);
        Out value;
        act(value, gates, ups);
        if (n < e.rows / 2) store(static_cast<T*>(e.out) + static_cast<size_t>(token0 + token) * e.pitch + n, value, 8, aligned);
      }
    };
    if (e.kind == GATED_SILU)
      all([](Out& value, const Out& gates, const Out& ups) {
#pragma unroll
        for (int v = 0; v < 8; v++)
          value.v[v] = rounded<T>(__fmul_rn(silu_quick(gemm::to_float(gates.v[v])), gemm::to_float(ups.v[v])));
      });
    else
      all([&](Out& value, const Out& gates, const Out& ups) { gate_all(value, gates, ups, e); });
    return;
  }
  const auto to = [&](int i) { return static_cast<size_t>(token0 + i / PIECES) * e.pitch + row0 + i % PIECES * 8; };
  if (e.kind == STORE && aligned && row0 + ROWS <= e.rows) {
    const int items = count * PIECES;
#pragma unroll 1
    for (int first = thread; first < items; first += EACH * threads) {
      Out held[EACH];
      if (e.residual) {
#pragma unroll
        for (int p = 0; p < EACH; p++)
          if (first + p * threads < items)
            held[p] = *reinterpret_cast<const Out*>(static_cast<const T*>(e.residual) + to(first + p * threads));
      }
#pragma unroll
      for (int p = 0; p < EACH; p++) {
        const int i = first + p * threads;
        if (i >= items) break;
        Out value = piece(i / PIECES, i % PIECES);
        if (e.residual) {
#pragma unroll
          for (int v = 0; v < 8; v++) value.v[v] = added<T>(held[p].v[v], value.v[v], e.scale);
        }
        *reinterpret_cast<Out*>(static_cast<T*>(e.out) + to(i)) = value;
      }
    }
    return;
  }
#pragma unroll 1
  for (int i = thread; i < count * PIECES; i += threads) {
    const int left = e.rows - (row0 + i % PIECES * 8);
    if (left <= 0) continue;
    Out value = piece(i / PIECES, i % PIECES);
    activate_all(value, e.kind);
    if (e.residual) add_residual(static_cast<const T*>(e.residual) + to(i), value, e.scale, left, aligned);
    store(static_cast<T*>(e.out) + to(i), value, left, aligned);
  }
}

// Who carries finished tiles from shared memory to global memory: STORERS threads, both warpgroups' parts of each tile but the
// last while the next one is summed; and in the end each warpgroup its own part of the last one.
template <class T, int ROWS, class L, class Scheduler>
__device__ __forceinline__ void store_tiles(const Epilogue& e, Scheduler scheduler, WorkTile t, const u8* room, int storer, int group) {
  using namespace ptx;
  const bool summed = storer < 0;
  WorkTile next = t;
  bool more = summed || scheduler.next(next);
  int g = summed ? group : 0;
  while (more) {
    if (!summed) {
      if (g == 0) {
        t = next;
        for (int i = 0; i < 2; i++) bar_arrive(ROOM + i, 128 + STORERS);
        more = scheduler.next(next);
        if (!more) break;
      }
      bar_sync(READY + g, 128 + STORERS);
    }
    const int token0 = t.token0 + g * 64;
    store_tokens<T, ROWS>(e, room + g * 4 * L::ROOM, summed ? threadIdx.x % 128 : storer, summed ? 128 : STORERS, t.row_tile * TILE,
                          token0, min(64, e.tokens - token0));
    if (summed) break;
    __syncwarp();
    g ^= 1;
  }
}

}  // namespace rvllm::fp8

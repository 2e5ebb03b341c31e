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
#pragma unroll
  for (int j = 0; j < ROWS / 8; j += 2) {
    float b[4];
#pragma unroll
    for (int i = 0; i < 4; i++) b[i] = bias_of<T>(e, row0 + 8 * j + i / 2 * 8 + lane % 4 * 2 + i % 2);
    const auto pair = [&](int i, const float* bias) { return rounded_pair<T>(sum[i] + bias[0], sum[i + 1] + bias[1]); };
    ptx::stmatrix_x4(staging + staged_piece(warp % 4 * 16 + lane % 16, j + lane / 16), pair(4 * j, b), pair(4 * j + 2, b),
                     pair(4 * j + 4, b + 2), pair(4 * j + 6, b + 2));
  }
}

// What THREADS threads do with staged sums: rows row0 .. of tokens token0 .. token0 + count - 1.
template <class T, int ROWS, int THREADS>
__device__ __forceinline__ void store_tokens(const Epilogue& e, const u8* staging, int thread, int row0, int token0, int count) {
  using Out = Pack<T, 8>;
  constexpr int PIECES = ROWS / 8, EACH = 4;
  const bool aligned = (e.pitch & 7) == 0;
  const auto piece = [&](int token, int c) { return *reinterpret_cast<const Out*>(staging + staged_piece(token, c)); };
  if (gated(e.kind)) {
    const auto all = [&](auto act) {
#pragma unroll 1
      for (int i = thread; i < count * (PIECES / 2); i += THREADS) {
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
    for (int first = thread; first < items; first += EACH * THREADS) {
      Out held[EACH];
      if (e.residual) {
#pragma unroll
        for (int p = 0; p < EACH; p++)
          if (first + p * THREADS < items)
            held[p] = *reinterpret_cast<const Out*>(static_cast<const T*>(e.residual) + to(first + p * THREADS));
      }
#pragma unroll
      for (int p = 0; p < EACH; p++) {
        const int i = first + p * THREADS;
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
  for (int i = thread; i < count * PIECES; i += THREADS) {
    const int left = e.rows - (row0 + i % PIECES * 8);
    if (left <= 0) continue;
    Out value = piece(i / PIECES, i % PIECES);
    activate_all(value, e.kind);
    if (e.residual) add_residual(static_cast<const T*>(e.residual) + to(i), value, e.scale, left, aligned);
    store(static_cast<T*>(e.out) + to(i), value, left, aligned);
  }
}

// 96 threads: carry finished tiles from shared memory to global memory while the next one is summed.
template <class T, int ROWS, class L, class Scheduler>
__device__ __forceinline__ void store_tiles(const Epilogue& e, Scheduler scheduler, const u8* room, int thread) {
  using namespace ptx;
  for (int g = 0; g < 2; g++) bar_arrive(ROOM + g, 128 + STORERS);
  WorkTile t;
  while (scheduler.next(t))
    for (int g = 0; g < 2; g++) {
      bar_sync(READY + g, 128 + STORERS);
      store_tokens<T, ROWS, STORERS>(e, room + g * 4 * L::ROOM, thread, t.row_tile * TILE, t.token0 + g * 64,
                                     min(64, e.tokens - t.token0 - g * 64));
      __syncwarp();
      bar_arrive(ROOM + g, 128 + STORERS);
    }
}

}  // namespace rvllm::fp8

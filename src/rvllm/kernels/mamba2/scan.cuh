// Parts of the scan of Mamba-2 layers: the state in registers, a convolution of one token, pieces of sequences.
#pragma once

#include "mamba2/conv.cuh"

inline constexpr int CHUNK = 16, TAPS = 4;  // TAPS: of a convolution that runs in here

// Elements of a row of the newest chunk in a slot: x of all heads, B of all groups, a step a head; whole vectors.
__device__ __forceinline__ int kept_pitch(int heads, int dim, int groups, int size) {
  return (heads * dim + groups * size + heads + 7) / 8 * 8;
}

// A float as two of tf32: hi + lo is it but for 2^-22 of it.
__device__ __forceinline__ void split(float v, u32& hi, u32& lo) {
  hi = __float_as_uint(v) & 0xffffe000u;
  lo = __float_as_uint(v - __uint_as_float(hi)) & 0xffffe000u;
}

// Eight elements of 16 bits as tf32, which holds them exactly.
template <typename T> __device__ __forceinline__ void load8(u32 (&v)[8], const T* p) {
  float f[8];
  unpack8<T>(*reinterpret_cast<const uint4*>(p), f);
#pragma unroll
  for (int i = 0; i < 8; i++) v[i] = __float_as_uint(f[i]);
}

template <typename T> __device__ __forceinline__ u32 load1(const T* p) { return __float_as_uint(to_float(*p)); }

// A slot's state: h [heads, dim, size] float32 at the start of the newest chunk, then what is known of that chunk,
// [16, kept_pitch] of T. Each thread holds, of a warp's 16 rows r and SIZE columns, h[u][v][2 half + e] at row
// lane / 4 + 8 half and column 64 u + 16 (lane % 4) + 8 e + v: an accumulator of mma_1688 whose column c of tile
// (u, v) stands for 64 u + 8 c + v, and, as it is, its operand b.
template <int SIZE> struct State {
  static constexpr int U = SIZE / 64;
  float h[U][8][4];

  __device__ __forceinline__ void clear() {
#pragma unroll
    for (int u = 0; u < U; u++)
#pragma unroll
      for (int v = 0; v < 8; v++) h[u][v][0] = h[u][v][1] = h[u][v][2] = h[u][v][3] = 0.f;
  }
  __device__ __forceinline__ float* at(float* rows, int u, int half, int lane) const {
    return rows + (size_t)(lane / 4 + 8 * half) * SIZE + 64 * u + 16 * (lane % 4);
  }
  __device__ __forceinline__ void load(float* rows, int lane) {
#pragma unroll
    for (int u = 0; u < U; u++)
#pragma unroll
      for (int half = 0; half < 2; half++)
#pragma unroll
        for (int i = 0; i < 4; i++) {
          const float4 x = reinterpret_cast<const float4*>(at(rows, u, half, lane))[i];
          const int v = i % 2 * 4, k = 2 * half + i / 2;
          h[u][v][k] = x.x, h[u][v + 1][k] = x.y, h[u][v + 2][k] = x.z, h[u][v + 3][k] = x.w;
        }
  }
  __device__ __forceinline__ void store(float* rows, int lane) const {
#pragma unroll
    for (int u = 0; u < U; u++)
#pragma unroll
      for (int half = 0; half < 2; half++)
#pragma unroll
        for (int i = 0; i < 4; i++) {
          const int v = i % 2 * 4, k = 2 * half + i / 2;
          reinterpret_cast<float4*>(at(rows, u, half, lane))[i] =
              make_float4(h[u][v][k], h[u][v + 1][k], h[u][v + 2][k], h[u][v + 3][k]);
        }
  }
};

// One sequence's part of a step.
struct Piece {
  int row, start, end;  // its first row; positions start .. end - 1
};
__device__ __forceinline__ Piece piece_of(int seq, const int* offsets, const int* kv_lens) {
  Piece p;
  p.row = offsets[seq];
  p.end = kv_lens[seq];
  p.start = p.end - (offsets[seq + 1] - p.row);
  return p;
}

// The convolution in front of a scan. x [T, pitch] from its first convolved column on; weight float32 [width, TAPS],
// bias float32 [width] or null; state float32 [slots, slot_elements], in use as T, see mamba2/conv.cuh. width, the scan's
// row, is that of x, B and C.
template <typename T> struct Conv {
  const T* x;
  const float *weight, *bias;
  float* state;
  int pitch, slot_elements;
};

// Four channels of it for one token, as mamba2/conv.cu computes them: what does not depend on the step first.
template <typename T> struct Four {
  float taps[4][TAPS], shift[4];
  uint2 before[TAPS - 1];

  __device__ __forceinline__ void recall(const Conv<T>& conv, const T* kept, int width, int column, int position) {
#pragma unroll
    for (int c = 0; c < 4; c++) {
      const float4 t = *reinterpret_cast<const float4*>(conv.weight + (size_t)(column + c) * TAPS);
      taps[c][0] = t.x, taps[c][1] = t.y, taps[c][2] = t.z, taps[c][3] = t.w;
      shift[c] = conv.bias ? conv.bias[column + c] : 0.f;
    }
#pragma unroll
    for (int j = 0; j < TAPS - 1; j++) {
      const int p = position - (TAPS - 1) + j;
      before[j] = make_uint2(0, 0);
      if (p >= 0) before[j] = *reinterpret_cast<const uint2*>(kept + (size_t)kept_row<TAPS>(p) * width + column);
    }
  }
  __device__ __forceinline__ uint2 output(uint2 x) const {
    float y[4];
#pragma unroll
    for (int c = 0; c < 4; c++) {
      float inputs[TAPS];
#pragma unroll
      for (int j = 0; j < TAPS; j++) {
        const uint2 v = j < TAPS - 1 ? before[j] : x;
        const float2 f = unpack2<T>(c < 2 ? v.x : v.y);
        inputs[j] = c % 2 ? f.y : f.x;
      }
      y[c] = convolved<TAPS, Act::SILU>(inputs, taps[c], shift[c]);
    }
    return make_uint2(pack2<T>(y[0], y[1]), pack2<T>(y[2], y[3]));
  }
};

// The time step of a head from what the projection gave for it.
__device__ __forceinline__ float time_step(float raw, float bias, float least) {
  const float x = raw + bias;
  return fmaxf(fmaxf(x, 0.f) + log1pf(__expf(-fabsf(x))), least);
}

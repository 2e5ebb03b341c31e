// What encoders do to rows besides matrix products and norms: positions at the front, one vector a text at the end.
#include "common/common.cuh"

// x[t] += positions[at[t] + offset] + kinds[kind[t]], rounded once. x [T, width], positions [places, width] and kinds
// [., width] of x's type, kinds null for none; at, kind int32 [T]; count: rows in use. width % 8 == 0.
// Grid: (T), any number of threads. Bound by latency.
template <typename T>
__global__ void add_positions(T* x, const T* __restrict__ positions, const T* __restrict__ kinds, const int* at,
                              const int* kind, const int* count, int width, int offset) {
  griddep_launch();
  const int row = blockIdx.x;
  const bool wanted = row < *count;
  const uint4* const place = reinterpret_cast<const uint4*>(positions + (size_t)((wanted ? at[row] : 0) + offset) * width);
  const uint4* const type = kinds ? reinterpret_cast<const uint4*>(kinds + (size_t)(wanted ? kind[row] : 0) * width) : nullptr;
  griddep_wait();
  if (!wanted) return;
  uint4* const mine = reinterpret_cast<uint4*>(x + (size_t)row * width);
  for (int i = threadIdx.x; i < width / 8; i += blockDim.x) {
    float a[8], b[8], c[8] = {};
    unpack8<T>(mine[i], a);
    unpack8<T>(place[i], b);
    if (type) unpack8<T>(type[i], c);
#pragma unroll
    for (int j = 0; j < 8; j++) a[j] = __fadd_rn(__fadd_rn(a[j], b[j]), c[j]);
    mine[i] = pack8<T>(a);
  }
}

enum Pooling { MEAN, CLS, LAST };
inline constexpr int POOL_THREADS = 512;

// out float32 [texts, width]: the mean of a text's rows of x [T, width], its first or its last row, divided by its
// length max(|v|, 1e-12) where normalise is not 0. offsets int32 [texts + 1]; count: texts in use. width % 8 == 0.
// Rows are dealt to groups of threads, and the groups' sums added in order: an order that the width alone decides.
// Grid: (texts), 512 threads. Bound by latency.
template <typename T>
__global__ void __launch_bounds__(POOL_THREADS)
pool(float* out, const T* __restrict__ x, const int* offsets, const int* count, int width, int how, int normalise) {
  griddep_launch();
  __shared__ float sums[POOL_THREADS][9];
  __shared__ float scratch[32];
  const int vectors = width / 8, text = blockIdx.x;
  if (text >= *count) {
    griddep_wait();
    return;
  }
  int first = offsets[text], last = offsets[text + 1];
  const int length = last - first;
  if (how == CLS) last = first + 1;
  if (how == LAST) first = last - 1;
  const int groups = max(1, POOL_THREADS / vectors), group = threadIdx.x / vectors;
  float* const mine = out + (size_t)text * width;
  float squares = 0.f;
  griddep_wait();
  for (int base = 0; base < vectors; base += POOL_THREADS) {  // more than once only where there is one group
    const int vector = groups > 1 ? threadIdx.x % vectors : base + threadIdx.x;
    const bool active = vector < vectors && (groups == 1 || group < groups);
    float sum[8] = {};
    if (active) {
#pragma unroll 4
      for (int row = first + (groups > 1 ? group : 0); row < last; row += groups) {
        float a[8];
        unpack8<T>(reinterpret_cast<const uint4*>(x + (size_t)row * width)[vector], a);
#pragma unroll
        for (int j = 0; j < 8; j++) sum[j] = __fadd_rn(sum[j], a[j]);
      }
    }
    __syncthreads();
#pragma unroll
    for (int j = 0; j < 8; j++) sums[threadIdx.x][j] = sum[j];
    __syncthreads();
    if (active && (groups == 1 || group == 0)) {
#pragma unroll
      for (int j = 0; j < 8; j++) {
        for (int g = 1; g < groups; g++) sum[j] = __fadd_rn(sum[j], sums[g * vectors + vector][j]);
        if (how == MEAN) sum[j] = __fdiv_rn(sum[j], (float)length);
        squares = __fmaf_rn(sum[j], sum[j], squares);
        mine[vector * 8 + j] = sum[j];
      }
    }
  }
  if (!normalise) return;
  const float over = fmaxf(sqrtf(block_sum(squares, scratch)), 1e-12f);
  for (int base = 0; base < vectors; base += POOL_THREADS) {
    const int vector = groups > 1 ? threadIdx.x : base + threadIdx.x;  // what this thread has written
    if (vector < vectors)
      for (int j = 0; j < 8; j++) mine[vector * 8 + j] = __fdiv_rn(mine[vector * 8 + j], over);
  }
}

// logits[s, id] = -infinity for n token ids, at most HIDDEN a launch. logits float32 [samples, stride]; count: rows
// in use. Grid: (samples), any number of threads. Bound by latency.
inline constexpr int HIDDEN = 256;
struct HiddenTokens {
  int ids[HIDDEN];
};
extern "C" __global__ void hide_tokens(float* logits, const int* count, int stride, int n, const HiddenTokens tokens) {
  griddep_launch();
  griddep_wait();
  if ((int)blockIdx.x >= *count) return;
  for (int i = threadIdx.x; i < n; i += blockDim.x) logits[(size_t)blockIdx.x * stride + tokens.ids[i]] = -INFINITY_F;
}

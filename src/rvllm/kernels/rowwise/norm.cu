// RMS and layer normalisation of rows, with the residual add fused in front when wanted, and of heads.
// All sums are float32 in an order that depends on the width alone.
#include "gemm/fp8/e4m3.cuh"
#include "rowwise/head_norm.cuh"
#include "rowwise/row_norm.cuh"

template <typename T, bool LAYER, bool ADD, int VECTORS>
__global__ void __launch_bounds__(1024)
norm(T* out, T* x, const T* __restrict__ y, const float* __restrict__ weight, const float* __restrict__ bias,
     int width, float eps, float scale) {
  uint4* const target = reinterpret_cast<uint4*>(out + (size_t)blockIdx.x * width);
  norm_row<T, LAYER, ADD, VECTORS>(x, row_of(y, width), weight, bias, width, eps, scale, [&](int i, bool in, const float(&v)[8]) {
    if (in) target[i] = pack8<T>(v);
  });
}

// The same, its result rounded to T and then quantised to E4M3, a scale for each 256 columns: the bytes and scales that
// gemm/fp8/quantise.cu gives. q [rows, pitch], zeros behind the columns; scales [ceil(pitch / 256), capacity].
template <typename T, bool LAYER, bool ADD, int VECTORS>
__global__ void __launch_bounds__(1024)
norm_e4m3(u8* q, float* scales, T* x, const T* __restrict__ y, const float* __restrict__ weight,
          const float* __restrict__ bias, int width, float eps, float scale, int pitch, int capacity) {
  uint2* const target = reinterpret_cast<uint2*>(q + (size_t)blockIdx.x * pitch);
  norm_row<T, LAYER, ADD, VECTORS>(x, row_of(y, width), weight, bias, width, eps, scale, [&](int i, bool in, const float(&v)[8]) {
    float r[8], amax = 0.f;
    unpack8<T>(pack8<T>(v), r);
#pragma unroll
    for (int j = 0; j < 8; j++) {
      if (!in) r[j] = 0.f;
      amax = fmaxf(amax, fabsf(r[j]));
    }
    amax = fp8::largest_of_group(amax);
    if (i >= pitch / 8) return;
    target[i] = fp8::codes_of(r, fp8::inverse_of(amax));
    if (i % 32 == 0) scales[(size_t)(i / 32) * capacity + blockIdx.x] = fp8::scale_of(amax);
  });
}

// x += norm(y) * scale, then out = norm(x) unless out is null (Gemma 2's norms around its blocks): RMS, with the
// roundings to T that three separate kernels would make, and their order of sums. before, after float32 [width].
// x, y, out [rows, width] as in norm; out may be y. Grid, block and limits as for norm.
template <typename T, int VECTORS>
__global__ void __launch_bounds__(1024)
norm_add_norm(T* out, T* x, const T* y, const float* __restrict__ before, const float* __restrict__ after, int width,
              float eps_before, float eps_after, float scale) {
  griddep_launch();
  __shared__ float scratch[32];
  const int vectors = width / 8;
  float v[VECTORS][8], sum = 0.f;
  alignas(16) float w[2][8];  // of the first norm and of the second
  const auto weights = [&](int which, int i) {
    const float* const weight = which == 0 ? before : after;
    if (i >= vectors || !weight) return;
    *reinterpret_cast<float4*>(w[which]) = *reinterpret_cast<const float4*>(weight + i * 8);
    *reinterpret_cast<float4*>(w[which] + 4) = *reinterpret_cast<const float4*>(weight + i * 8 + 4);
  };
  const auto normalised = [&](int k, int which, float factor) {
    if (VECTORS > 1) weights(which, threadIdx.x + k * blockDim.x);
#pragma unroll
    for (int j = 0; j < 8; j++) v[k][j] = finished(v[k][j], 0.f, factor, w[which][j], 0.f);
    return pack8<T>(v[k]);
  };
  if (VECTORS == 1) {  // they do not depend on the predecessor
    weights(0, threadIdx.x);
    weights(1, threadIdx.x);
  }
  griddep_wait();
  uint4* const row = reinterpret_cast<uint4*>(x + (size_t)blockIdx.x * width);
  const uint4* const other = reinterpret_cast<const uint4*>(y + (size_t)blockIdx.x * width);
#pragma unroll
  for (int k = 0; k < VECTORS; k++) {
    const int i = threadIdx.x + k * blockDim.x;
#pragma unroll
    for (int j = 0; j < 8; j++) v[k][j] = 0.f;
    if (i < vectors) unpack8<T>(other[i], v[k]);
#pragma unroll
    for (int j = 0; j < 8; j++) sum = plus_square(sum, v[k][j]);
  }
  sum = block_sum(sum, scratch);
  float factor = 1.f / sqrtf(sum / width + eps_before);
  sum = 0.f;
#pragma unroll
  for (int k = 0; k < VECTORS; k++) {
    const int i = threadIdx.x + k * blockDim.x;
    if (i < vectors) {
      float a[8];
      unpack8<T>(normalised(k, 0, factor), a);
      unpack8<T>(row[i], v[k]);
#pragma unroll
      for (int j = 0; j < 8; j++) v[k][j] = fmaf(a[j], scale, v[k][j]);
      const uint4 rounded = pack8<T>(v[k]);
      row[i] = rounded;
      unpack8<T>(rounded, v[k]);
    }
#pragma unroll
    for (int j = 0; j < 8; j++) sum = plus_square(sum, v[k][j]);
  }
  if (!out) return;
  sum = block_sum(sum, scratch);
  factor = 1.f / sqrtf(sum / width + eps_after);
  uint4* const target = reinterpret_cast<uint4*>(out + (size_t)blockIdx.x * width);
#pragma unroll
  for (int k = 0; k < VECTORS; k++) {
    const int i = threadIdx.x + k * blockDim.x;
    if (i < vectors) target[i] = normalised(k, 1, factor);
  }
}

// Normalises slices of `group` columns of x in place: columns start .. start + slices * group of rows of `pitch`
// elements (query and key heads inside a fused QKV). One warp a slice; group even and <= 256.
// weight float32 [group], or [slices * group] with weight_step = group; null is ones.
// Grid: (ceil(slices / warps), rows). Bound by latency at decode sizes, by memory at prefill.
template <typename T, bool LAYER>
__global__ void norm_groups(T* x, const float* __restrict__ weight, const float* __restrict__ bias, int pitch,
                            int start, int slices, int group, int weight_step, float eps) {
  griddep_launch();
  const int slice = blockIdx.x * (blockDim.x / 32) + threadIdx.x / 32, lane = threadIdx.x % 32;
  const int at = min(slice, slices - 1) * weight_step;
  const SliceWeights weights(weight ? weight + at : nullptr, LAYER && bias ? bias + at : nullptr, group, lane);
  griddep_wait();
  if (slice >= slices) return;
  u32* const words = reinterpret_cast<u32*>(x + (size_t)blockIdx.y * pitch + start + slice * group);
  norm_slice<T, LAYER>(words, words, weights, group, eps, lane);
}

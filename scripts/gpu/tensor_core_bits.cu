// Whether wgmma sums as mma.sync does, bit for bit; see tensor_core_bits.py.
#include "common/common.cuh"
#include "ptx/wgmma.cuh"

// A [64, 128] and start [64, N] row-major; B [N, 128] and V [128, N], its transpose. Sums start + A B^T over K in
// ascending steps of 16, by mma.sync (two of m16n8 a step) and by three kinds of wgmma: operands in shared
// memory, A in registers, A in registers with B stored along N.
// counts [4]: elements whose bits differ from mma.sync's, for each kind, and elements in all.
// worst [3]: the largest |difference| over |value|, as bits. One block of 128 threads an input.
template <typename T, int N>
__global__ void __launch_bounds__(128) compare(const T* as, const T* bs, const T* vs, const float* starts, int steps,
                                               unsigned* counts, int* worst) {
  constexpr int K = 128, HALF_A = 64 * 64, HALF_B = N * 64, HALF_V = K * 64;
  extern __shared__ __align__(1024) unsigned char shared[];
  T* const a_tile = reinterpret_cast<T*>(shared);
  T* const b_tile = a_tile + 2 * HALF_A;
  T* const v_tile = b_tile + 2 * HALF_B;
  const T* const a = as + (size_t)blockIdx.x * 64 * K;
  const T* const b = bs + (size_t)blockIdx.x * N * K;
  const T* const v = vs + (size_t)blockIdx.x * N * K;
  const float* const start = starts + (size_t)blockIdx.x * 64 * N;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, row = warp * 16 + lane / 4, pair = lane % 4 * 2;
  const auto at = [](int r, int c) { return r * 64 + ((c / 8) ^ (r % 8)) * 8 + c % 8; };
  for (int i = threadIdx.x; i < 64 * K; i += 128) a_tile[i % K / 64 * HALF_A + at(i / K, i % 64)] = a[i];
  for (int i = threadIdx.x; i < N * K; i += 128) b_tile[i % K / 64 * HALF_B + at(i / K, i % 64)] = b[i];
  for (int i = threadIdx.x; i < N * K; i += 128) v_tile[i % N / 64 * HALF_V + at(i / N, i % N % 64)] = v[i];
  fence_async_shared();
  __syncthreads();

  float first[N / 2], sum[N / 2], other[N / 2];
#pragma unroll
  for (int i = 0; i < N / 2; i++) first[i] = start[(row + (i & 2) * 4) * N + i / 4 * 8 + pair + (i & 1)];
#pragma unroll
  for (int i = 0; i < N / 2; i++) sum[i] = first[i];
  u32 fragments[8][4];
#pragma unroll
  for (int j = 0; j < 8; j++)
#pragma unroll
    for (int i = 0; i < 4; i++)
      fragments[j][i] = *reinterpret_cast<const u32*>(a + (row + (i & 1) * 8) * K + j * 16 + pair + (i & 2) * 4);
#pragma unroll
  for (int j = 0; j < 8; j++)
    if (j < steps) {
#pragma unroll
      for (int n = 0; n < N / 8; n++) {
        const T* const from = b + (n * 8 + lane / 4) * K + j * 16 + pair;
        const u32 operand[2] = {*reinterpret_cast<const u32*>(from), *reinterpret_cast<const u32*>(from + 8)};
        mma_16816(reinterpret_cast<float(&)[4]>(sum[4 * n]), fragments[j], operand, T());
      }
    }
  const auto check = [&](int kind) {
    wgmma_commit();
    wgmma_wait<0>();
    wgmma_pin(other);
    unsigned wrong = 0;
    float most = 0.f;
#pragma unroll
    for (int i = 0; i < N / 2; i++)
      if (__float_as_int(sum[i]) != __float_as_int(other[i]) && !(isnan(sum[i]) && isnan(other[i]))) {
        wrong++;
        most = fmaxf(most, fabsf(sum[i] - other[i]) / fmaxf(fabsf(sum[i]), 1e-37f));
      }
    atomicAdd(counts + kind, wrong);
    atomicMax(worst + kind, __float_as_int(most));
#pragma unroll
    for (int i = 0; i < N / 2; i++) other[i] = first[i];
    wgmma_pin(other);
    wgmma_fence();
  };
#pragma unroll
  for (int i = 0; i < N / 2; i++) other[i] = first[i];
  wgmma_pin(other);
  wgmma_fence();
#pragma unroll
  for (int j = 0; j < 8; j++)
    if (j < steps)
      wgmma<N, T>(other, wgmma_operand(smem(a_tile + j / 4 * HALF_A) + j % 4 * 32),
                  wgmma_operand(smem(b_tile + j / 4 * HALF_B) + j % 4 * 32), 1);
  check(0);
#pragma unroll
  for (int j = 0; j < 8; j++)
    if (j < steps) wgmma_rs<N, T, 0>(other, fragments[j], wgmma_operand(smem(b_tile + j / 4 * HALF_B) + j % 4 * 32), 1);
  check(1);
#pragma unroll
  for (int j = 0; j < 8; j++)
    if (j < steps) wgmma_rs<N, T, 1>(other, fragments[j], wgmma_operand_mn(smem(v_tile) + j * 2048, HALF_V * 2), 1);
  check(2);
  if (threadIdx.x == 0) atomicAdd(counts + 3, 64u * N);
}

// A small matrix product for each head, and what puts together the parts that latent attention leaves for it. The
// product is bound by memory at decode sizes (the weights are read once), by L2 at prefill.
#include "mla/head_gemm.cuh"

// out [tokens, heads * (N + tail)], x [tokens, heads * (K + tail)], weight [heads, N, K]; K and tail multiples of 8,
// N of 2, or of 8 with a tail; K <= 512. Grid: (heads * chunks, ceil(tokens / (8 * NB))), chunks = ceil(N / (16 * groups)). Shared memory: see
// specs.py.
template <typename T, int NB>
__global__ void __launch_bounds__(BLOCK_THREADS)
head_linear(T* out, const T* x, const T* __restrict__ weight, int tokens, int heads, int N, int K, int tail) {
  griddep_launch();
  extern __shared__ __align__(128) unsigned char memory[];
  const Shared<T, NB> shared(memory);
  const Share mine = share_of(blockIdx.x, N, K);
  const int first = blockIdx.y * NB * 8;
  load_weights(shared.weights, weight, mine, N, K);
  griddep_wait();
  load_x<T, NB>(shared.x, x, mine, first, tokens, heads * (K + tail), K, tail);
  cp_async_commit();
  if (mine.row == 0 && tail) {
    const int words = tail / 8;
    for (int e = threadIdx.x; e < words * NB * 8; e += BLOCK_THREADS) {
      const size_t row = (size_t)(first + e / words) * heads + mine.head;
      if (first + e / words < tokens)
        *reinterpret_cast<uint4*>(out + row * (N + tail) + N + e % words * 8) =
            *reinterpret_cast<const uint4*>(x + row * (K + tail) + K + e % words * 8);
    }
  }
  cp_async_wait<0>();
  __syncthreads();
  multiply<T, NB>(out, shared, mine, first, tokens, heads, N, K, tail);
}

// One token's mixed latents of one head, out of what several blocks of latent_decode left: splits in ascending order.
// BATCH: loads under way together.
template <typename T, int BATCH>
__device__ __forceinline__ void gather(T* into, const float* partial, const Gathering& from, int row, int rank, int blocks,
                                       int spare) {
  for (int column = threadIdx.x * 4; column < rank; column += BLOCK_THREADS * 4) {
    float M = 0.f, L = 0.f, x[4];
    bool begun = false;
    const auto add = [&](const float2& state, const float4& v) {
      const float w[4] = {v.x, v.y, v.z, v.w};
      if (!begun) {
        M = state.x;
        L = state.y;
#pragma unroll
        for (int i = 0; i < 4; i++) x[i] = w[i];
        begun = true;
        return;
      }
      const Factors f = merge_maximum(M, state.x);
      L = merge(L, state.y, f);
#pragma unroll
      for (int i = 0; i < 4; i++) x[i] = merge(x[i], w[i], f);
    };
    const auto slot = [&](int block, int index) { return partial + ((size_t)block * (spare + 1) + index) * slot_size(rank); };
    const auto state_of = [&](const float* at) { return *reinterpret_cast<const float2*>(at + 16 * rank + 2 * row); };
    const auto values_of = [&](const float* at) { return *reinterpret_cast<const float4*>(at + row * rank + column); };

    int owner = block_of(from.first, from.items, blocks);
    const float* const leading = slot(owner, spare);
    add(state_of(leading), values_of(leading));
    int begin = 0, bound = first_item(from.items, owner + 1, blocks);  // the first item that the leading block does not have
    const int end = from.first + from.splits;
    for (int item = bound; item < end; item += BATCH) {
      float2 state[BATCH];
      float4 v[BATCH];
#pragma unroll
      for (int b = 0; b < BATCH; b++) {
        const int index = min(item + b, end - 1);
        if (index >= bound) {
          owner = block_of(index, from.items, blocks);
          begin = first_item(from.items, owner, blocks);
          bound = first_item(from.items, owner + 1, blocks);
        }
        const float* const at = slot(owner, index - begin);
        state[b] = state_of(at);
        v[b] = values_of(at);
      }
#pragma unroll
      for (int b = 0; b < BATCH; b++)
        if (item + b < end) add(state[b], v[b]);
    }
    const float over = finish(L);
    *reinterpret_cast<uint2*>(into + column) =
        make_uint2(pack2<T>(__fmul_rn(x[0], over), __fmul_rn(x[1], over)), pack2<T>(__fmul_rn(x[2], over), __fmul_rn(x[3], over)));
  }
}

// That for each of the first *decodes tokens whose latents lie in parts: into mixed [tokens, heads * rank], which
// latent_decode has left without them. Grid: (heads, tokens), BLOCK_THREADS threads. Bound by latency.
template <typename T>
__global__ void __launch_bounds__(BLOCK_THREADS)
latent_merge(T* mixed, const float* partial, const Gathering* gatherings, const int* decodes, int heads, int rank, int blocks,
             int spare) {
  griddep_launch();
  const int head = blockIdx.x, token = blockIdx.y;
  const bool decoded = token < *decodes;
  griddep_wait();
  if (!decoded) return;
  const Gathering from = gatherings[token * ((heads + 15) / 16) + head / 16];
  if (from.splits) gather<T, 16>(mixed + ((size_t)token * heads + head) * rank, partial, from, head % 16, rank, blocks, spare);
}

// Both in one launch, for one token, of which every block of a head puts the parts together itself.
// out [tokens, heads * N] = weight[h] @ mixed[t, h]; mixed [tokens, heads * rank], weight [heads, N, rank]. The first
// *decodes tokens are sequences of latent_decode, launched on `blocks` blocks, and their latents may lie in parts:
// see mla/mla.cuh. Grid: (heads * chunks, ceil(tokens / (8 * NB))).
template <typename T, int NB>
__global__ void __launch_bounds__(BLOCK_THREADS)
latent_values(T* out, const T* mixed, const T* __restrict__ weight, const float* partial, const Gathering* gatherings,
              const int* decodes, int tokens, int heads, int N, int rank, int blocks, int spare) {
  griddep_launch();
  extern __shared__ __align__(128) unsigned char memory[];
  __shared__ Gathering from[NB * 8];
  const Shared<T, NB> shared(memory);
  const Share mine = share_of(blockIdx.x, N, rank);
  const int first = blockIdx.y * NB * 8, parts = (heads + 15) / 16;
  load_weights(shared.weights, weight, mine, N, rank);
  const int counted = min(NB * 8, *decodes - first);
  griddep_wait();
  load_x<T, NB>(shared.x, mixed, mine, first, tokens, heads * rank, rank, 0);
  cp_async_commit();
  if ((int)threadIdx.x < counted) from[threadIdx.x] = gatherings[(first + threadIdx.x) * parts + mine.head / 16];
  cp_async_wait<0>();
  __syncthreads();
  bool gathered = false;
  for (int token = 0; token < counted; token++) {
    if (from[token].splits == 0) continue;
    gather<T, 8>(shared.x + token * mine.pitch, partial, from[token], mine.head % 16, rank, blocks, spare);
    gathered = true;
  }
  if (gathered) __syncthreads();
  multiply<T, NB>(out, shared, mine, first, tokens, heads, N, rank, 0);
}

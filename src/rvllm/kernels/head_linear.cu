// A small matrix product for each head, and what latent attention needs done beside it.
//
// out[t, h] = weight[h] @ x[t, h][:K], then the rest of x[t, h]. A block of four warps takes rows of one head's
// matrix and 8 * NB tokens; weights are the M side of the tensor-core tile, tokens the N side. K is cut into
// segments of 128, one a warp, and a block has as many groups of 16 rows as segments leave warps for; an output is
// the sum of its segments in ascending order, so its bits do not depend on NB or on other tokens. Weights are on
// their way before the predecessor is done.
//
// `head_linear` is that and nothing else. `latent_prepare` makes the queries of latent attention: the rest of x is
// rotated on its way, and blocks of its own normalise each token's latent, rotate its key and write both to the
// cache. `latent_values` reads the mixed latents that latent_decode left in parts over several splits.
// Bound by memory at decode sizes (the weights are read once), by L2 at prefill.
#include "latent.cuh"

constexpr int SEGMENT = 128, ROW_WARPS = 4, BLOCK_THREADS = ROW_WARPS * 32;
constexpr int WEIGHT_PITCH = SEGMENT + PAD, SUMS_PITCH = 20;  // elements; floats of a token's 16 rows

// What a block of heads * chunks has to do: rows [row, row + 16 * groups) of the head, groups = 4 / segments.
struct Share {
  int head, row, segments, groups, group, segment, pitch;  // pitch: of a token's x in shared memory
  bool idle;                                               // a warp beyond groups * segments
};

__device__ __forceinline__ Share share_of(int block, int N, int K) {
  Share mine;
  mine.segments = (K + SEGMENT - 1) / SEGMENT;
  mine.groups = ROW_WARPS / mine.segments;
  const int chunks = (N + 16 * mine.groups - 1) / (16 * mine.groups), warp = threadIdx.x / 32;
  mine.head = block / chunks;
  mine.row = block % chunks * 16 * mine.groups;
  mine.group = warp / mine.segments;
  mine.segment = warp % mine.segments;
  mine.idle = mine.group >= mine.groups;
  mine.pitch = (K + 15) / 16 * 16 + PAD;
  return mine;
}

// Shared memory: the weights (later the sums), then the tokens' x.
template <typename T, int NB>
struct Shared {
  static constexpr int WEIGHTS = ROW_WARPS * 16 * WEIGHT_PITCH * 2, SUMS = ROW_WARPS * NB * 8 * SUMS_PITCH * 4;
  static constexpr int FRONT = WEIGHTS > SUMS ? WEIGHTS : SUMS;
  T* weights;
  float* sums;
  T* x;
  __device__ __forceinline__ explicit Shared(unsigned char* memory)
      : weights(reinterpret_cast<T*>(memory)), sums(reinterpret_cast<float*>(memory)), x(reinterpret_cast<T*>(memory + FRONT)) {}
};

// Sets each warp's weights on their way to shared memory, zeros where the matrix ends.
template <typename T>
__device__ __forceinline__ void load_weights(T* into, const T* weight, const Share& mine, int N, int K) {
  if (mine.idle) return;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, first = mine.row + mine.group * 16;
  for (int i = lane; i < 16 * (SEGMENT / 8); i += 32) {
    const int row = i / (SEGMENT / 8), column = i % (SEGMENT / 8) * 8, k = mine.segment * SEGMENT + column;
    const bool valid = first + row < N && k < K;
    const T* const source = valid ? weight + ((size_t)mine.head * N + first + row) * K + k : weight;
    cp_async16(smem(into + (warp * 16 + row) * WEIGHT_PITCH + column), source, valid ? 16 : 0);
  }
}

// Sets x of tokens first .. first + 8 * NB - 1 on its way; x [tokens, x_pitch], of which head h has the K + tail
// elements from h * (K + tail) on.
template <typename T, int NB>
__device__ __forceinline__ void load_x(T* into, const T* x, const Share& mine, int first, int tokens, size_t x_pitch,
                                       int K, int tail) {
  for (int token = threadIdx.x / 32; token < NB * 8; token += ROW_WARPS) {
    const bool valid = first + token < tokens;
    const T* const source = x + (first + token) * x_pitch + mine.head * (K + tail);
    for (int k = threadIdx.x % 32 * 8; k < mine.pitch - PAD; k += 256) {
      const bool in = valid && k < K;
      cp_async16(smem(into + token * mine.pitch + k), in ? source + k : x, in ? 16 : 0);
    }
  }
}

// The product of the block's rows and tokens, once weights and x are there. Every thread of the block calls it.
template <typename T, int NB>
__device__ __forceinline__ void multiply(T* out, const Shared<T, NB>& shared, const Share& mine, int first, int tokens,
                                         int heads, int N, int K, int tail) {
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int steps = mine.idle ? 0 : (min(SEGMENT, K - mine.segment * SEGMENT) + 15) / 16;
  const u32 a = smem(shared.weights + (warp * 16 + lane % 16) * WEIGHT_PITCH + lane / 16 * 8);
  const u32 b = smem(shared.x + lane % 8 * mine.pitch + mine.segment * SEGMENT + (lane / 8) % 2 * 8);
  float sum[NB][4] = {};
  for (int k = 0; k < steps; k++) {
    u32 w[4];
    ldmatrix_x4(w, a + k * 32);
#pragma unroll
    for (int n = 0; n < NB; n++) {
      if (first + n * 8 >= tokens) continue;
      u32 t[2];
      ldmatrix_x2(t, b + n * 8 * mine.pitch * 2 + k * 32);
      mma_16816(sum[n], w, t, T());
    }
  }
  __syncthreads();  // the weights have been read: sums lie where they were
  if (!mine.idle) {
#pragma unroll
    for (int n = 0; n < NB; n++)
#pragma unroll
      for (int i = 0; i < 4; i++) {
        const int token = n * 8 + lane % 4 * 2 + (i & 1), row = lane / 4 + i / 2 * 8;
        shared.sums[(warp * NB * 8 + token) * SUMS_PITCH + row] = sum[n][i];
      }
  }
  __syncthreads();
  const int pairs = mine.groups * 8;
  for (int e = threadIdx.x; e < pairs * NB * 8; e += BLOCK_THREADS) {
    const int token = e / pairs, row = e % pairs * 2;
    if (first + token >= tokens || mine.row + row >= N) continue;
    float2 total;
    for (int s = 0; s < mine.segments; s++) {
      const float* const part = shared.sums + ((row / 16 * mine.segments + s) * NB * 8 + token) * SUMS_PITCH + row % 16;
      const float2 v = *reinterpret_cast<const float2*>(part);
      total = s ? make_float2(__fadd_rn(total.x, v.x), __fadd_rn(total.y, v.y)) : v;
    }
    T* const target = out + ((size_t)(first + token) * heads + mine.head) * (N + tail) + mine.row + row;
    *reinterpret_cast<u32*>(target) = pack2<T>(total.x, total.y);
  }
}

// out [tokens, heads * (N + tail)], x [tokens, heads * (K + tail)], weight [heads, N, K]; K and tail multiples of 8,
// N of 2, or of 8 with a tail; K <= 512. Grid: (heads * chunks, ceil(tokens / (8 * NB))), chunks = ceil(N / (16 * groups)). Shared memory: see
// latent_manifest.
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

// Turns `rotated` elements by their position's angles; pairs are (2i, 2i + 1), or (i, i + rotated / 2) if not
// INTERLEAVED. One warp; source and target may be the same.
template <typename T, bool INTERLEAVED>
__device__ __forceinline__ void rotate(T* target, const T* source, const float* cos, const float* sin, int rotated) {
  const u32* const in = reinterpret_cast<const u32*>(source);
  u32* const out = reinterpret_cast<u32*>(target);
  const int lane = threadIdx.x % 32, half = rotated / 2;
  const auto turn = [](float a, float b, float c, float s) { return __fmaf_rn(a, c, -__fmul_rn(b, s)); };
  if (INTERLEAVED) {
    for (int i = lane; i < half; i += 32) {
      const float2 v = unpack2<T>(in[i]);
      out[i] = pack2<T>(turn(v.x, v.y, cos[i], sin[i]), turn(v.y, v.x, cos[i], -sin[i]));
    }
  } else {
    for (int i = lane; i < half / 2; i += 32) {
      const float2 a = unpack2<T>(in[i]), b = unpack2<T>(in[i + half / 2]);
      const float2 c = *reinterpret_cast<const float2*>(cos + 2 * i), s = *reinterpret_cast<const float2*>(sin + 2 * i);
      out[i] = pack2<T>(turn(a.x, b.x, c.x, s.x), turn(a.y, b.y, c.y, s.y));
      out[i + half / 2] = pack2<T>(turn(b.x, a.x, c.x, -s.x), turn(b.y, a.y, c.y, -s.y));
    }
  }
}

// The weights of the norm of two times eight elements a lane.
__device__ __forceinline__ void load_norm(float (&weights)[2][8], const float* norm, int rank) {
#pragma unroll
  for (int k = 0; k < 2; k++) {
    const int i = threadIdx.x % 32 + 32 * k;
#pragma unroll
    for (int j = 0; j < 8; j += 4)
      *reinterpret_cast<float4*>(&weights[k][j]) =
          i < rank / 8 ? *reinterpret_cast<const float4*>(norm + i * 8 + j) : make_float4(0.f, 0.f, 0.f, 0.f);
  }
}

// One token's latent and key into the cache: kv [rank + rotated], of which the latent is normalised by its root mean
// square and the key rotated. target: its place. One warp.
template <typename T, bool INTERLEAVED>
__device__ __forceinline__ void store_token(T* target, const T* kv, const float (&norm)[2][8], float eps, const float* cos,
                                            const float* sin, int rank, int rotated) {
  const int lane = threadIdx.x % 32;
  const uint4* const in = reinterpret_cast<const uint4*>(kv);
  float v[2][8], sum = 0.f;
#pragma unroll
  for (int k = 0; k < 2; k++) {
    const int i = lane + 32 * k;
#pragma unroll
    for (int j = 0; j < 8; j++) v[k][j] = 0.f;
    if (i < rank / 8) unpack8<T>(in[i], v[k]);
#pragma unroll
    for (int j = 0; j < 8; j++) sum = __fmaf_rn(v[k][j], v[k][j], sum);
  }
  const float factor = __fdiv_rn(1.f, sqrtf(__fadd_rn(__fdiv_rn(warp_sum(sum), rank), eps)));
#pragma unroll
  for (int k = 0; k < 2; k++) {
    const int i = lane + 32 * k;
    if (i >= rank / 8) continue;
#pragma unroll
    for (int j = 0; j < 8; j++) v[k][j] = __fmul_rn(__fmul_rn(v[k][j], factor), norm[k][j]);
    reinterpret_cast<uint4*>(target)[i] = pack8<T>(v[k]);
  }
  rotate<T, INTERLEAVED>(target + rank, kv + rank, cos, sin, rotated);
}

// out [tokens, heads * (rank + rotated)] = weight[h] @ q[:plain], then q's rotated rest; q [tokens, q_pitch] holds heads
// of plain + rotated elements, weight [heads, rank, plain]. kv [tokens, kv_pitch] of rank + rotated goes into cache [blocks, 16, rank + rotated] at
// (tables[slot][position / 16], position % 16), its first `rank` elements normalised with weights norm float32
// [rank]. cos, sin float32 [positions, rotated / 2]. positions, token_slots int32 [tokens]; count: rows in use. rank
// and rotated multiples of 16, plain of 8; rank and plain <= 512.
// Grid: (heads * chunks + NB, ceil(tokens / (8 * NB))): the last NB blocks take eight tokens' kv each.
template <typename T, bool INTERLEAVED, int NB>
__global__ void __launch_bounds__(BLOCK_THREADS)
latent_prepare(T* out, const T* q, const T* kv, const T* __restrict__ weight, T* cache, const float* __restrict__ norm,
               const float* __restrict__ cos, const float* __restrict__ sin, const int* tables, const int* positions,
               const int* token_slots, const int* count, int tokens, int q_pitch, int kv_pitch, int heads, int rank,
               int plain, int rotated, int table_stride, float eps) {
  griddep_launch();
  extern __shared__ __align__(128) unsigned char memory[];
  __shared__ int token_positions[NB * 8];  // -1 beyond the count
  const Shared<T, NB> shared(memory);
  const int first = blockIdx.y * NB * 8, warp = threadIdx.x / 32, extra = gridDim.x - NB, half = rotated / 2;
  if (blockIdx.x >= extra) {
    const int begin = first + (blockIdx.x - extra) * 8 + warp, end = *count;
    alignas(16) float weights[2][8];
    size_t at[2];  // of two tokens, ROW_WARPS apart: where their angles and their place in the cache are
    T* target[2];
    load_norm(weights, norm, rank);
#pragma unroll
    for (int i = 0; i < 2; i++) {
      const int token = begin + i * ROW_WARPS;
      if (token >= end) continue;
      const int position = positions[token];
      const int block = tables[(size_t)token_slots[token] * table_stride + position / KV_BLOCK];
      target[i] = cache + ((size_t)block * KV_BLOCK + position % KV_BLOCK) * (rank + rotated);
      at[i] = (size_t)position * half;
    }
    griddep_wait();
#pragma unroll
    for (int i = 0; i < 2; i++) {
      const int token = begin + i * ROW_WARPS;
      if (token >= end) continue;
      const T* const source = kv + (size_t)token * kv_pitch;
      store_token<T, INTERLEAVED>(target[i], source, weights, eps, cos + at[i], sin + at[i], rank, rotated);
    }
    return;
  }
  const Share mine = share_of(blockIdx.x, rank, plain);
  load_weights(shared.weights, weight, mine, rank, plain);
  if (threadIdx.x < NB * 8) token_positions[threadIdx.x] = first + threadIdx.x < *count ? positions[first + threadIdx.x] : -1;
  __syncthreads();
  griddep_wait();
  load_x<T, NB>(shared.x, q, mine, first, tokens, q_pitch, plain, rotated);
  cp_async_commit();
  if (mine.row == 0) {
    for (int i = warp; i < NB * 8 && token_positions[i] >= 0; i += ROW_WARPS) {
      const int token = first + i;
      const size_t row = (size_t)token * heads + mine.head, at = (size_t)token_positions[i] * half;
      const T* const source = q + (size_t)token * q_pitch + mine.head * (plain + rotated);
      rotate<T, INTERLEAVED>(out + row * (rank + rotated) + rank, source + plain, cos + at, sin + at, rotated);
    }
  }
  cp_async_wait<0>();
  __syncthreads();
  multiply<T, NB>(out, shared, mine, first, tokens, heads, rank, plain, rotated);
}

// One token's mixed latents of one head, out of what several blocks of latent_decode left: splits in ascending order.
template <typename T>
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

    int block = block_of(from.first, from.items, blocks);
    int item = first_item(from.items, block + 1, blocks);  // the first that the leading block does not have
    const float* const leading = slot(block, spare);
    add(state_of(leading), values_of(leading));
    const int end = from.first + from.splits;
    constexpr int BATCH = 8;
    while (item < end) {
      float2 state[BATCH];
      float4 v[BATCH];
      const int count = min(BATCH, end - item);
#pragma unroll
      for (int b = 0; b < BATCH; b++) {
        if (b >= count) continue;
        const int owner = block_of(item + b, from.items, blocks);
        const float* const at = slot(owner, item + b - first_item(from.items, owner, blocks));
        state[b] = state_of(at);
        v[b] = values_of(at);
      }
#pragma unroll
      for (int b = 0; b < BATCH; b++)
        if (b < count) add(state[b], v[b]);
      item += count;
    }
    const float over = finish(L);
    *reinterpret_cast<uint2*>(into + column) =
        make_uint2(pack2<T>(__fmul_rn(x[0], over), __fmul_rn(x[1], over)), pack2<T>(__fmul_rn(x[2], over), __fmul_rn(x[3], over)));
  }
}

// out [tokens, heads * N] = weight[h] @ mixed[t, h]; mixed [tokens, heads * rank], weight [heads, N, rank]. The first
// *decodes tokens are sequences of latent_decode, launched on `blocks` blocks, and their latents may lie in parts:
// see latent.cuh. Grid: (heads * chunks, ceil(tokens / (8 * NB))).
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
    gather(shared.x + token * mine.pitch, partial, from[token], mine.head % 16, rank, blocks, spare);
    gathered = true;
  }
  if (gathered) __syncthreads();
  multiply<T, NB>(out, shared, mine, first, tokens, heads, N, rank, 0);
}

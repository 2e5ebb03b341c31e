// The short convolution of Mamba-2 layers: each channel by itself over a sequence's own tokens.
#include "activations.cuh"
#include "common.cuh"

// The sequence whose rows hold `row`: the last one that begins at it or before. offsets int32 [seqs + 1], ascending.
__device__ __forceinline__ int sequence_of(int row, const int* offsets, int seqs) {
  int below = 0, above = seqs;
  while (above - below > 1) {
    const int middle = (below + above) / 2;
    (offsets[middle] <= row ? below : above) = middle;
  }
  return below;
}

template <typename T> __device__ __forceinline__ void read8(float (&v)[8], const T* p) { unpack8<T>(load_l2(p), v); }
template <> __device__ __forceinline__ void read8<float>(float (&v)[8], const float* p) {
  const float4 a = reinterpret_cast<const float4*>(p)[0], b = reinterpret_cast<const float4*>(p)[1];
  v[0] = a.x, v[1] = a.y, v[2] = a.z, v[3] = a.w, v[4] = b.x, v[5] = b.y, v[6] = b.z, v[7] = b.w;
}

// The last inputs of 8 channels, oldest first.
template <int BEFORE> struct Window {
  float v[BEFORE][8];

  // From a slot's state [BEFORE, width], which counts as zero before position 0.
  __device__ __forceinline__ void recall(const float* state, int width, bool nothing) {
#pragma unroll
    for (int j = 0; j < BEFORE; j++) {
      if (!nothing) read8(v[j], state + (size_t)j * width);
#pragma unroll
      for (int c = 0; c < 8; c++)
        if (nothing) v[j][c] = 0.f;
    }
  }
  __device__ __forceinline__ void push(const float (&x)[8]) {
#pragma unroll
    for (int c = 0; c < 8; c++) {
#pragma unroll
      for (int j = 0; j + 1 < BEFORE; j++) v[j][c] = v[j + 1][c];
      v[BEFORE - 1][c] = x[c];
    }
  }
  // What it will hold `length` rows of x after this, written to the slot.
  template <typename T>
  __device__ __forceinline__ void keep(float* state, int width, const T* x, int pitch, int length) const {
    Window next = *this;
    const int rows = min(length, BEFORE);
#pragma unroll
    for (int i = 0; i < BEFORE; i++) {
      if (i >= rows) continue;
      float w[8];
      read8(w, x + (size_t)(length - rows + i) * pitch);
      next.push(w);
    }
#pragma unroll
    for (int j = 0; j < BEFORE; j++) {
      const float(&w)[8] = next.v[j];
      float4* const to = reinterpret_cast<float4*>(state + (size_t)j * width);
      to[0] = make_float4(w[0], w[1], w[2], w[3]);
      to[1] = make_float4(w[4], w[5], w[6], w[7]);
    }
  }
};

// out[t, c] = act(bias[c] + sum over j of weight[c, j] * x[t - K + 1 + j, c]), taps in order. x [T, pitch] from its
// first convolved column on, out [T, width]; weight float32 [width, K], bias float32 [width] or null. state float32
// [slots, slot_elements]: of each slot the last K - 1 inputs, [K - 1, width], oldest first; before position 0 they
// count as zero. header: the step's metadata (tokens, sequences). positions, token_slots int32 [T], query_offsets
// int32 [sequences + 1]. width, pitch % 8 == 0.
// A thread has 8 channels and `tile` rows. The first K - 1 tokens of a sequence need its state, which the step
// replaces: they belong to the thread in whose tile the sequence begins, which alone touches the state.
// Grid: (ceil(width / 8 / threads), ceil(T / tile)). Bound by latency at decode sizes, by memory at prefill.
template <typename T, int K, Act A>
__global__ void causal_conv(T* out, const T* x, const float* __restrict__ weight, const float* __restrict__ bias,
                            float* state, const int* header, const int* positions, const int* token_slots,
                            const int* query_offsets, int width, int pitch, int slot_elements, int tile) {
  griddep_launch();
  constexpr int BEFORE = K - 1;
  const int tokens = header[0], seqs = header[1], column = (blockIdx.x * blockDim.x + threadIdx.x) * 8;
  const int begin = blockIdx.y * tile, end = min(begin + tile, tokens);
  if (column >= width || begin >= tokens) {
    griddep_wait();
    return;
  }
  const auto begins = [&](int row) { return row == 0 || token_slots[row] != token_slots[row - 1]; };
  float taps[K][8], shift[8];
#pragma unroll
  for (int c = 0; c < 8; c++) {
#pragma unroll
    for (int j = 0; j < K; j++) taps[j][c] = weight[(size_t)(column + c) * K + j];
    shift[c] = bias ? bias[column + c] : 0.f;
  }
  float* slot = state + (size_t)token_slots[begin] * slot_elements + column;
  Window<BEFORE> window;
  if (begins(begin)) window.recall(slot, width, positions[begin] == 0);
  griddep_wait();
  x += column;

  int row = begin, done = BEFORE;  // done: tokens of the sequence so far, BEFORE where it began in an earlier tile
  if (!begins(begin)) {
    int since = 1;  // tokens of this sequence before `row`; the first BEFORE are another tile's
    while (since < BEFORE && !begins(row - since)) since++;
    for (; row < end && since < BEFORE && !(row > begin && begins(row)); row++) since++;
    if (row < end && !begins(row)) {
#pragma unroll
      for (int j = 0; j < BEFORE; j++) read8(window.v[j], x + (size_t)(row - BEFORE + j) * pitch);
    }
  }
  uint4 next = load_l2(x + (size_t)min(row, tokens - 1) * pitch);
  for (; row < tokens; row++, done++) {
    const bool first = begins(row);
    if (row >= end && (first || done >= BEFORE)) break;
    if (first) {
      if (row != begin) {
        slot = state + (size_t)token_slots[row] * slot_elements + column;
        window.recall(slot, width, positions[row] == 0);
      }
      const int seq = tokens == seqs ? row : sequence_of(row, query_offsets, seqs);
      window.keep(slot, width, x + (size_t)row * pitch, pitch, query_offsets[seq + 1] - query_offsets[seq]);
      done = 0;
    }
    float v[8], sum[8];
    unpack8<T>(next, v);
    next = load_l2(x + (size_t)min(row + 1, tokens - 1) * pitch);
#pragma unroll
    for (int c = 0; c < 8; c++) {
      sum[c] = __fmul_rn(window.v[0][c], taps[0][c]);
#pragma unroll
      for (int j = 1; j < BEFORE; j++) sum[c] = fmaf(window.v[j][c], taps[j][c], sum[c]);
      sum[c] = activated<A>(__fadd_rn(fmaf(v[c], taps[BEFORE][c], sum[c]), shift[c]));
    }
    *reinterpret_cast<uint4*>(out + (size_t)row * width + column) = pack8<T>(sum);
    window.push(v);
  }
}

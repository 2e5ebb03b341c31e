// The short convolution of Mamba-2 layers: each channel by itself over a sequence's own tokens.
#include "mamba2/conv.cuh"

// The sequence whose rows hold `row`: the last one that begins at it or before. offsets int32 [seqs + 1], ascending.
__device__ __forceinline__ int sequence_of(int row, const int* offsets, int seqs) {
  int below = 0, above = seqs;
  while (above - below > 1) {
    const int middle = (below + above) / 2;
    (offsets[middle] <= row ? below : above) = middle;
  }
  return below;
}

// The last K - 1 inputs of 8 channels, oldest first.
template <typename T, int K> struct Window {
  float v[K - 1][8];

  // From a slot's rows, for a token at `position`; inputs before position 0 are zero.
  __device__ __forceinline__ void recall(const T* kept, int width, int position) {
#pragma unroll
    for (int j = 0; j < K - 1; j++) {
      const int p = position - (K - 1) + j;
      unpack8<T>(p < 0 ? make_uint4(0, 0, 0, 0) : load_l2(kept + (size_t)kept_row<K>(max(p, 0)) * width), v[j]);
    }
  }
  __device__ __forceinline__ void push(const float (&x)[8]) {
#pragma unroll
    for (int c = 0; c < 8; c++) {
#pragma unroll
      for (int j = 0; j + 1 < K - 1; j++) v[j][c] = v[j + 1][c];
      v[K - 2][c] = x[c];
    }
  }
};

// out[t, c] = act(bias[c] + sum over j of weight[c, j] * x[t - K + 1 + j, c]), taps in order. x [T, pitch] from its
// first convolved column on, out [T, width]; weight float32 [width, K], bias float32 [width] or null. state float32
// [slots, slot_elements], in use as T, see `kept_row`. header: the step's metadata (tokens, sequences). positions,
// token_slots int32 [T], query_offsets int32 [sequences + 1]. width, pitch % 8 == 0.
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
  const auto slot_of = [&](int row) {
    return reinterpret_cast<T*>(state + (size_t)token_slots[row] * slot_elements) + column;
  };
  float taps[8][K], shift[8];
#pragma unroll
  for (int c = 0; c < 8; c++) {
#pragma unroll
    for (int j = 0; j < K; j++) taps[c][j] = weight[(size_t)(column + c) * K + j];
    shift[c] = bias ? bias[column + c] : 0.f;
  }
  Window<T, K> window;
  if (begins(begin)) window.recall(slot_of(begin), width, positions[begin]);
  griddep_wait();
  x += column;

  int row = begin, done = BEFORE;  // done: tokens of the sequence so far, BEFORE where it began in an earlier tile
  if (!begins(begin)) {
    int since = 1;  // tokens of this sequence before `row`; the first BEFORE are another tile's
    while (since < BEFORE && !begins(row - since)) since++;
    for (; row < end && since < BEFORE && !(row > begin && begins(row)); row++) since++;
    if (row < end && !begins(row)) {
#pragma unroll
      for (int j = 0; j < BEFORE; j++) unpack8<T>(load_l2(x + (size_t)(row - BEFORE + j) * pitch), window.v[j]);
    }
  }
  uint4 next = load_l2(x + (size_t)min(row, tokens - 1) * pitch);
  for (; row < tokens; row++, done++) {
    const bool first = begins(row);
    if (row >= end && (first || done >= BEFORE)) break;
    if (first) {
      T* const kept = slot_of(row);
      const int position = positions[row];
      if (row != begin) window.recall(kept, width, position);
      const int seq = tokens == seqs ? row : sequence_of(row, query_offsets, seqs);
      const int length = query_offsets[seq + 1] - query_offsets[seq];
      for (int i = max(0, length - BEFORE); i < length; i++)
        *reinterpret_cast<uint4*>(kept + (size_t)kept_row<K>(position + i) * width) = load_l2(x + (size_t)(row + i) * pitch);
      done = 0;
    }
    float v[8], y[8];
    unpack8<T>(next, v);
    next = load_l2(x + (size_t)min(row + 1, tokens - 1) * pitch);
#pragma unroll
    for (int c = 0; c < 8; c++) {
      float inputs[K];
#pragma unroll
      for (int j = 0; j < BEFORE; j++) inputs[j] = window.v[j][c];
      inputs[BEFORE] = v[c];
      y[c] = convolved<K, A>(inputs, taps[c], shift[c]);
    }
    *reinterpret_cast<uint4*>(out + (size_t)row * width + column) = pack8<T>(y);
    window.push(v);
  }
}

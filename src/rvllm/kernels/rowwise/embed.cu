// Token embedding: the head of a step's chain of kernels.
#include "common/common.cuh"

// out[t] = table[token] * scale, rounded once. out [rows, width], table [vocab, width], width % 8 == 0.
// tokens int32 [rows]: an id, or -1 for the token that the row's slot sampled last (last_tokens int32 [slots]).
// count: rows in use; the others are left alone. Grid: (rows), any number of threads. Bound by latency at decode
// sizes, by memory at prefill.
// Unlike other kernels it lets its successors start only when its predecessor is done: what that one wrote
// (metadata, block tables) may then be read by the whole chain before any wait.
template <typename T>
__global__ void embed(T* __restrict__ out, const T* __restrict__ table, const int* tokens, const int* token_slots,
                      const int* last_tokens, const int* count, int width, float scale) {
  griddep_wait();
  griddep_launch();
  const int row = blockIdx.x;
  int token = tokens[row];
  if (row >= *count) return;
  if (token < 0) token = last_tokens[token_slots[row]];
  const uint4* const source = reinterpret_cast<const uint4*>(table + (size_t)token * width);
  uint4* const target = reinterpret_cast<uint4*>(out + (size_t)row * width);
  for (int i = threadIdx.x; i < width / 8; i += blockDim.x) {
    uint4 v = load_stream(source + i);
    if (scale != 1.f) {
      float x[8];
      unpack8<T>(v, x);
#pragma unroll
      for (int j = 0; j < 8; j++) x[j] *= scale;
      v = pack8<T>(x);
    }
    target[i] = v;
  }
}

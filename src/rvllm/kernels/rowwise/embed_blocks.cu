// Token embedding out of a table that stays in GGUF's blocks.
#include "common/common.cuh"
#include "loading/gguf.cuh"

// As `embed` in embed.cu, with rows of width / B::elements blocks of kind B: each number is rounded to T and then scaled, as
// if the table had been expanded as it was loaded. Eight neighbours a thread. Grid: (rows), any number of threads.
template <typename T, typename B>
__global__ void embed_blocks(T* __restrict__ out, const u8* __restrict__ table, const int* tokens, const int* token_slots,
                             const int* last_tokens, const int* count, int width, float scale) {
  griddep_wait();
  griddep_launch();
  const int row = blockIdx.x;
  int token = tokens[row];
  if (row >= *count) return;
  if (token < 0) token = last_tokens[token_slots[row]];
  const u8* const source = table + static_cast<size_t>(token) * (width / B::elements) * B::bytes;
  uint4* const target = reinterpret_cast<uint4*>(out + static_cast<size_t>(row) * width);
  for (int i = threadIdx.x; i < width / 8; i += blockDim.x) {
    float x[8];
#pragma unroll
    for (int j = 0; j < 8; j++) {
      const int at = 8 * i + j;
      x[j] = rvllm::gguf::element<B>(source + at / B::elements * B::bytes, at % B::elements);
    }
    uint4 v = pack8<T>(x);
    if (scale != 1.f) {
      unpack8<T>(v, x);
#pragma unroll
      for (int j = 0; j < 8; j++) x[j] *= scale;
      v = pack8<T>(x);
    }
    target[i] = v;
  }
}

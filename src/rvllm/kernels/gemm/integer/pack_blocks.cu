// GGUF blocks into chunks, as they are stored.
#include "gemm/integer/pack.cuh"
#include "loading/gguf.cuh"

namespace rvllm::gemm {

// blocks: rows of `row_bytes` bytes, ceil(k / elements) blocks of kind B each.
template <class B, class F>
__global__ void pack_blocks(u8* __restrict__ packed, long long first, long long rows, long long padded, int interleave,
                            int k, const u8* blocks, long long row_bytes) {
  ptx::griddep_launch();
  ptx::griddep_wait();
  constexpr int BITS = F::UNIT / 512, RUN = CHUNK_K / F::RUNS;
  constexpr bool PAIRS = B::group == 16 && RUN == 32;
  static_assert(RUN == (PAIRS ? 2 : 1) * B::group);
  struct Source {
    const u8* blocks;
    long long row_bytes;
    int k;
    __device__ const u8* block(long long n, int column) const {
      return blocks + n * row_bytes + column / B::elements * B::bytes;
    }
    __device__ u32 level(long long n, int column) const {
      return column < k ? B::level(block(n, column), column % B::elements) : 0;
    }
    __device__ u32 word(long long n, int column) const {
      if (column >= k) return 0;
      const u8* const b = block(n, column);
      const int g = column % B::elements / B::group;
      const float scale = B::scale(b, g);
      if constexpr (PAIRS)
        return halves(scale, column + 16 < k ? B::scale(b, g + 1) : 0.f);
      else  // Q8: levels are taken as signed bytes
        return halves(scale, fmaf(BITS == 8 ? 0.f : static_cast<float>(B::zero), scale, B::minimum(b, g)));
    }
  };
  pack_rows<F, BITS>(packed, Rows{first, rows, padded, interleave}, (k + CHUNK_K - 1) / CHUNK_K,
                     Source{blocks, row_bytes, k});
}

}  // namespace rvllm::gemm

// wgmma on e4m3 operands: d[64 x N] (+)= a[64 x 32] b[N x 32]^T, both in shared memory (sm_90a).
//
// Operands and accumulators lie as for 16-bit ones (ptx/wgmma.cuh): a row of 128 bytes holds 128 elements, a step of 32
// along K is 32 bytes. Hopper keeps about 13 bits of mantissa while it sums these products, whatever the type of d says,
// so sums of more than 128 along K belong in registers of their own (DeepSeek-V3, arXiv 2412.19437, section 3.3.2).
#pragma once

#include "ptx/wgmma.cuh"

namespace rvllm::ptx {

template <int N>
RVLLM_PTX void wgmma_e4m3(float (&d)[N / 2], u64 a, u64 b, u32 keep);

#define RVLLM_WGMMA_E4M3(N, REGS, A, B, KEEP, ...)                                                          \
  template <>                                                                                               \
  RVLLM_PTX void wgmma_e4m3<N>(float (&d)[N / 2], u64 a, u64 b, u32 keep) {                                 \
    asm volatile("{\n\t.reg .pred p;\n\tsetp.ne.b32 p, %" KEEP ", 0;\n\t"                                   \
                 "wgmma.mma_async.sync.aligned.m64n" #N "k32.f32.e4m3.e4m3 {" REGS "}, %" A ", %" B         \
                 ", p, 1, 1;\n\t}"                                                                          \
                 : __VA_ARGS__ : "l"(a), "l"(b), "r"(keep));                                                \
  }
RVLLM_WGMMA_E4M3(8, RVLLM_R4, "4", "5", "6", RVLLM_F4(0))
RVLLM_WGMMA_E4M3(16, RVLLM_R8, "8", "9", "10", RVLLM_F4(0), RVLLM_F4(4))
RVLLM_WGMMA_E4M3(32, RVLLM_R16, "16", "17", "18", RVLLM_F16(0))
RVLLM_WGMMA_E4M3(64, RVLLM_R32, "32", "33", "34", RVLLM_F32(0))
RVLLM_WGMMA_E4M3(96, RVLLM_R48, "48", "49", "50", RVLLM_F32(0), RVLLM_F16(32))
RVLLM_WGMMA_E4M3(128, RVLLM_R64, "64", "65", "66", RVLLM_F64(0))
RVLLM_WGMMA_E4M3(160, RVLLM_R80, "80", "81", "82", RVLLM_F64(0), RVLLM_F16(64))
RVLLM_WGMMA_E4M3(192, RVLLM_R96, "96", "97", "98", RVLLM_F64(0), RVLLM_F32(64))
}  // namespace rvllm::ptx

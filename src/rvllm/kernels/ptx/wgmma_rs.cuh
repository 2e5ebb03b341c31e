// wgmma with its first operand in registers: d[64 x N] (+)= a[64 x 16] b[N x 16]^T (sm_90a).
//
// Thread i of the warpgroup holds, of a, with g = i % 32 / 4 and c = i % 4: rows 16 * (i / 32) + g (registers 0, 2) and
// + 8 (registers 1, 3), columns 2c and 2c + 1 (registers 0, 1) and 2c + 8, 2c + 9 (registers 2, 3); the even column low.
#pragma once

#include "ptx/wgmma.cuh"

namespace rvllm::ptx {

#define RVLLM_WGMMA_RS(N, TYPE, NAME, REGS, A0, A1, A2, A3, B, KEEP, ...)                                          \
  template <>                                                                                                     \
  RVLLM_PTX void wgmma_rs<N, TYPE>(float (&d)[N / 2], const u32 (&a)[4], u64 b, u32 keep) {                         \
    asm volatile("{\n\t.reg .pred p;\n\tsetp.ne.b32 p, %" KEEP ", 0;\n\t"                                         \
                 "wgmma.mma_async.sync.aligned.m64n" #N "k16.f32." NAME "." NAME " {" REGS "}, {%" A0 ",%" A1 ",%" A2 \
                 ",%" A3 "}, %" B ", p, 1, 1, 0;\n\t}"                                                           \
                 : __VA_ARGS__ : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(keep));                    \
  }
#define RVLLM_WGMMA_RS_BOTH(N, REGS, A0, A1, A2, A3, B, KEEP, ...)                  \
  RVLLM_WGMMA_RS(N, bf16, "bf16", REGS, A0, A1, A2, A3, B, KEEP, __VA_ARGS__)       \
  RVLLM_WGMMA_RS(N, f16, "f16", REGS, A0, A1, A2, A3, B, KEEP, __VA_ARGS__)

template <int N, class T>
RVLLM_PTX void wgmma_rs(float (&d)[N / 2], const u32 (&a)[4], u64 b, u32 keep);
RVLLM_WGMMA_RS_BOTH(8, RVLLM_R4, "4", "5", "6", "7", "8", "9", RVLLM_F4(0))
RVLLM_WGMMA_RS_BOTH(16, RVLLM_R8, "8", "9", "10", "11", "12", "13", RVLLM_F4(0), RVLLM_F4(4))
RVLLM_WGMMA_RS_BOTH(32, RVLLM_R16, "16", "17", "18", "19", "20", "21", RVLLM_F16(0))
RVLLM_WGMMA_RS_BOTH(64, RVLLM_R32, "32", "33", "34", "35", "36", "37", RVLLM_F32(0))
RVLLM_WGMMA_RS_BOTH(96, RVLLM_R48, "48", "49", "50", "51", "52", "53", RVLLM_F32(0), RVLLM_F16(32))
RVLLM_WGMMA_RS_BOTH(128, RVLLM_R64, "64", "65", "66", "67", "68", "69", RVLLM_F64(0))
RVLLM_WGMMA_RS_BOTH(192, RVLLM_R96, "96", "97", "98", "99", "100", "101", RVLLM_F64(0), RVLLM_F32(64))
RVLLM_WGMMA_RS_BOTH(256, RVLLM_R128, "128", "129", "130", "131", "132", "133", RVLLM_F64(0), RVLLM_F64(64))
}  // namespace rvllm::ptx

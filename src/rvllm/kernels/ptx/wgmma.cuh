// wgmma: d[64 x N] (+)= a[64 x 16] b[N x 16]^T, a in shared memory or in registers, b in shared memory, float32
// sums (sm_90a).
//
// Thread i of the warpgroup holds, in d[4 * j + e], row 16 * (i / 32) + (i % 32) / 4 + 8 * (e / 2) and
// column 8 * j + 2 * (i % 4) + e % 2 (PTX ISA, "Register fragments for wgmma.mma_async.m64nNk16").
#pragma once

#include "ptx/ptx.cuh"

namespace rvllm::ptx {

// Both operands are "K-major": rows of 64 elements (128 bytes), 8 rows to a 1024-byte group, the eight
// 16-byte chunks of row r stored at chunk ^ (r % 8) (the 128-byte swizzle). `addr` is 1024-byte aligned
// plus 32 bytes for each step of 16 along K. Groups of 8 rows lie 1024 bytes apart.
RVLLM_PTX u64 wgmma_operand(u32 addr) {
  constexpr u32 SWIZZLE_128B = 1u << 30, GROUP_STRIDE = 1024 >> 4, UNUSED_LEADING = 1u << 16;  // the first two: high word
  u64 operand;
  asm("mov.b64 %0, {%1, %2};" : "=l"(operand) : "r"(UNUSED_LEADING | (addr & 0x3FFFF) >> 4), "n"(SWIZZLE_128B | GROUP_STRIDE));
  return operand;
}
// An operand that is stored along its other dimension ("MN-major"): rows are steps of K and hold 64 elements of N
// (128 bytes, swizzled as above). The next 64 elements of N lie `leading` bytes further, the next 8 rows 1024.
// `addr`: 1024-byte aligned plus 2048 for each step of 16 along K.
RVLLM_PTX u64 wgmma_operand_mn(u32 addr, u32 leading) {
  constexpr u32 SWIZZLE_128B = 1u << 30, GROUP_STRIDE = 1024 >> 4;
  u64 operand;
  asm("mov.b64 %0, {%1, %2};" : "=l"(operand) : "r"(leading >> 4 << 16 | (addr & 0x3FFFF) >> 4), "n"(SWIZZLE_128B | GROUP_STRIDE));
  return operand;
}
// The same operand `bytes` further on.
RVLLM_PTX u64 wgmma_further(u64 operand, u32 bytes) {
  u64 further;
  asm("{\n\t.reg .b32 low, high;\n\tmov.b64 {low, high}, %1;\n\tadd.u32 low, low, %2;\n\tmov.b64 %0, {low, high};\n\t}"
      : "=l"(further) : "l"(operand), "r"(bytes >> 4));
  return further;
}
RVLLM_PTX void wgmma_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
RVLLM_PTX void wgmma_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
template <int PENDING>
RVLLM_PTX void wgmma_wait() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" :: "n"(PENDING) : "memory");
}
// Keeps the compiler from moving accesses of accumulators across the asynchronous product.
template <int COUNT>
RVLLM_PTX void wgmma_pin(float (&d)[COUNT]) {
#pragma unroll
  for (int i = 0; i < COUNT; i++) asm volatile("" : "+f"(d[i])::"memory");
}

// Four 8x8 matrices of 16-bit elements, transposed, as stmatrix_x2_trans.
RVLLM_PTX void stmatrix_x4_trans(u32 addr, const u32 (&r)[4]) {
  asm volatile("stmatrix.sync.aligned.m8n8.x4.trans.shared.b16 [%0], {%1,%2,%3,%4};"
               :: "r"(addr), "r"(r[0]), "r"(r[1]), "r"(r[2]), "r"(r[3]) : "memory");
}

// wgmma<N, T>(d, a, b, keep): keep = 0 overwrites d, 1 adds to it.
#define RVLLM_F4(i) "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3])
#define RVLLM_F8(i) RVLLM_F4(i), RVLLM_F4(i + 4)
#define RVLLM_F16(i) RVLLM_F8(i), RVLLM_F8(i + 8)
#define RVLLM_F32(i) RVLLM_F16(i), RVLLM_F16(i + 16)
#define RVLLM_F64(i) RVLLM_F32(i), RVLLM_F32(i + 32)
#define RVLLM_R4 "%0,%1,%2,%3"
#define RVLLM_R8 RVLLM_R4 ",%4,%5,%6,%7"
#define RVLLM_R16 RVLLM_R8 ",%8,%9,%10,%11,%12,%13,%14,%15"
#define RVLLM_R24 RVLLM_R16 ",%16,%17,%18,%19,%20,%21,%22,%23"
#define RVLLM_R32 RVLLM_R24 ",%24,%25,%26,%27,%28,%29,%30,%31"
#define RVLLM_R36 RVLLM_R32 ",%32,%33,%34,%35"
#define RVLLM_R40 RVLLM_R36 ",%36,%37,%38,%39"
#define RVLLM_R48 RVLLM_R40 ",%40,%41,%42,%43,%44,%45,%46,%47"
#define RVLLM_R52 RVLLM_R48 ",%48,%49,%50,%51"
#define RVLLM_R56 RVLLM_R52 ",%52,%53,%54,%55"
#define RVLLM_R60 RVLLM_R56 ",%56,%57,%58,%59"
#define RVLLM_R64 RVLLM_R60 ",%60,%61,%62,%63"
#define RVLLM_R68 RVLLM_R64 ",%64,%65,%66,%67"
#define RVLLM_R72 RVLLM_R68 ",%68,%69,%70,%71"
#define RVLLM_R80 RVLLM_R72 ",%72,%73,%74,%75,%76,%77,%78,%79"
#define RVLLM_R88 RVLLM_R80 ",%80,%81,%82,%83,%84,%85,%86,%87"
#define RVLLM_R96 RVLLM_R88 ",%88,%89,%90,%91,%92,%93,%94,%95"
#define RVLLM_R104 RVLLM_R96 ",%96,%97,%98,%99,%100,%101,%102,%103"
#define RVLLM_R112 RVLLM_R104 ",%104,%105,%106,%107,%108,%109,%110,%111"
#define RVLLM_R120 RVLLM_R112 ",%112,%113,%114,%115,%116,%117,%118,%119"
#define RVLLM_R128 RVLLM_R120 ",%120,%121,%122,%123,%124,%125,%126,%127"
#define RVLLM_WGMMA(N, TYPE, NAME, REGS, A, B, KEEP, ...)                                                   \
  template <>                                                                                               \
  RVLLM_PTX void wgmma<N, TYPE>(float (&d)[N / 2], u64 a, u64 b, u32 keep) {                                \
    asm volatile("{\n\t.reg .pred p;\n\tsetp.ne.b32 p, %" KEEP ", 0;\n\t"                                   \
                 "wgmma.mma_async.sync.aligned.m64n" #N "k16.f32." NAME "." NAME " {" REGS                    \
                 "}, %" A ", %" B ", p, 1, 1, 0, 0;\n\t}"                                                   \
                 : __VA_ARGS__ : "l"(a), "l"(b), "r"(keep));                                                \
  }
#define RVLLM_WGMMA_BOTH(N, REGS, A, B, KEEP, ...)                  \
  RVLLM_WGMMA(N, bf16, "bf16", REGS, A, B, KEEP, __VA_ARGS__)       \
  RVLLM_WGMMA(N, f16, "f16", REGS, A, B, KEEP, __VA_ARGS__)

template <int N, class T>
RVLLM_PTX void wgmma(float (&d)[N / 2], u64 a, u64 b, u32 keep);
RVLLM_WGMMA_BOTH(8, RVLLM_R4, "4", "5", "6", RVLLM_F4(0))
RVLLM_WGMMA_BOTH(16, RVLLM_R8, "8", "9", "10", RVLLM_F8(0))
RVLLM_WGMMA_BOTH(32, RVLLM_R16, "16", "17", "18", RVLLM_F16(0))
RVLLM_WGMMA_BOTH(48, RVLLM_R24, "24", "25", "26", RVLLM_F16(0), RVLLM_F8(16))
RVLLM_WGMMA_BOTH(64, RVLLM_R32, "32", "33", "34", RVLLM_F32(0))
RVLLM_WGMMA_BOTH(72, RVLLM_R36, "36", "37", "38", RVLLM_F32(0), RVLLM_F4(32))
RVLLM_WGMMA_BOTH(80, RVLLM_R40, "40", "41", "42", RVLLM_F32(0), RVLLM_F8(32))
RVLLM_WGMMA_BOTH(96, RVLLM_R48, "48", "49", "50", RVLLM_F32(0), RVLLM_F16(32))
RVLLM_WGMMA_BOTH(104, RVLLM_R52, "52", "53", "54", RVLLM_F32(0), RVLLM_F16(32), RVLLM_F4(48))
RVLLM_WGMMA_BOTH(112, RVLLM_R56, "56", "57", "58", RVLLM_F32(0), RVLLM_F16(32), RVLLM_F8(48))
RVLLM_WGMMA_BOTH(120, RVLLM_R60, "60", "61", "62", RVLLM_F32(0), RVLLM_F16(32), RVLLM_F8(48), RVLLM_F4(56))
RVLLM_WGMMA_BOTH(128, RVLLM_R64, "64", "65", "66", RVLLM_F64(0))
RVLLM_WGMMA_BOTH(136, RVLLM_R68, "68", "69", "70", RVLLM_F64(0), RVLLM_F4(64))
RVLLM_WGMMA_BOTH(144, RVLLM_R72, "72", "73", "74", RVLLM_F64(0), RVLLM_F8(64))
RVLLM_WGMMA_BOTH(160, RVLLM_R80, "80", "81", "82", RVLLM_F64(0), RVLLM_F16(64))
RVLLM_WGMMA_BOTH(176, RVLLM_R88, "88", "89", "90", RVLLM_F64(0), RVLLM_F16(64), RVLLM_F8(80))
RVLLM_WGMMA_BOTH(192, RVLLM_R96, "96", "97", "98", RVLLM_F64(0), RVLLM_F32(64))
RVLLM_WGMMA_BOTH(208, RVLLM_R104, "104", "105", "106", RVLLM_F64(0), RVLLM_F32(64), RVLLM_F8(96))
RVLLM_WGMMA_BOTH(224, RVLLM_R112, "112", "113", "114", RVLLM_F64(0), RVLLM_F32(64), RVLLM_F16(96))
RVLLM_WGMMA_BOTH(240, RVLLM_R120, "120", "121", "122", RVLLM_F64(0), RVLLM_F32(64), RVLLM_F16(96), RVLLM_F8(112))
RVLLM_WGMMA_BOTH(256, RVLLM_R128, "128", "129", "130", RVLLM_F64(0), RVLLM_F64(64))

// wgmma_rs<N, T, MN>(d, a, b, keep): a in registers, laid out for each warp as the A operand of mma.m16n8k16 is.
// MN: b is an operand of wgmma_operand_mn, else of wgmma_operand.
#define RVLLM_WGMMA_RS(N, TYPE, NAME, MN, REGS, A, B, KEEP, ...)                                              \
  template <>                                                                                               \
  RVLLM_PTX void wgmma_rs<N, TYPE, MN>(float (&d)[N / 2], const u32 (&a)[4], u64 b, u32 keep) {              \
    asm volatile("{\n\t.reg .pred p;\n\tsetp.ne.b32 p, %" KEEP ", 0;\n\t"                                   \
                 "wgmma.mma_async.sync.aligned.m64n" #N "k16.f32." NAME "." NAME " {" REGS                    \
                 "}, {" A "}, %" B ", p, 1, 1, " #MN ";\n\t}"                                               \
                 : __VA_ARGS__ : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(keep));            \
  }
#define RVLLM_WGMMA_RS_ALL(N, REGS, A, B, KEEP, ...)                \
  RVLLM_WGMMA_RS(N, bf16, "bf16", 0, REGS, A, B, KEEP, __VA_ARGS__) \
  RVLLM_WGMMA_RS(N, bf16, "bf16", 1, REGS, A, B, KEEP, __VA_ARGS__) \
  RVLLM_WGMMA_RS(N, f16, "f16", 0, REGS, A, B, KEEP, __VA_ARGS__)   \
  RVLLM_WGMMA_RS(N, f16, "f16", 1, REGS, A, B, KEEP, __VA_ARGS__)

template <int N, class T, int MN>
RVLLM_PTX void wgmma_rs(float (&d)[N / 2], const u32 (&a)[4], u64 b, u32 keep);
RVLLM_WGMMA_RS_ALL(64, RVLLM_R32, "%32,%33,%34,%35", "36", "37", RVLLM_F32(0))
RVLLM_WGMMA_RS_ALL(96, RVLLM_R48, "%48,%49,%50,%51", "52", "53", RVLLM_F32(0), RVLLM_F16(32))
RVLLM_WGMMA_RS_ALL(128, RVLLM_R64, "%64,%65,%66,%67", "68", "69", RVLLM_F64(0))
}  // namespace rvllm::ptx

// PTX instructions as functions: an asm statement becomes a call of the function named after its opcode, dots as
// underscores, with the operands in the order of the instruction. Add one here when ptx.cuh gains a wrapper;
// `EMU_PTX` in front of it is what translate.py looks for.
#pragma once

#include "cuda.hpp"

#define EMU_PTX inline
namespace emu_ptx {
using emu::u32;
using emu::u64;
using emu::current;
using emu::Fiber;

inline char* shared_pointer(u32 address, u32 bytes, u32 alignment, const char* what) {
  char* const p = emu::dynamic_memory + static_cast<int>(address);
  const bool dynamic = p >= emu::dynamic_memory && p + bytes <= emu::dynamic_memory + emu::state.smem;
  const bool fixed = emu::__start_emu_shared && p >= emu::__start_emu_shared && p + bytes <= emu::__stop_emu_shared;
  if (!dynamic && !fixed) EMU_FAIL("%s at %d, outside the %u bytes of dynamic shared memory", what, (int)address, emu::state.smem);
  if (address % alignment) EMU_FAIL("%s at %d, which is no multiple of %u", what, (int)address, alignment);
  return p;
}
template <class P> inline P* aligned(P* p, u32 alignment, const char* what) {
  if (reinterpret_cast<uint64_t>(p) % alignment) EMU_FAIL("%s of %p, which is no multiple of %u", what, (const void*)p, alignment);
  return p;
}

// ---- registers, order, cache
EMU_PTX u32 sreg_laneid() { return current->id % 32; }
EMU_PTX u32 sreg_dynamic_smem_size() { return emu::state.smem; }
EMU_PTX void mov_u32(u32& d, u32 a) { d = a; }
EMU_PTX void fma_rn_bf16x2(u32& d, u32 a, u32 b, u32 c) {
  const auto half = [](u32 x, int h) { return emu::from_bf16(static_cast<unsigned short>(x >> 16 * h)); };
  const auto fma = [&](int h) { return emu::to_bf16(fmaf(half(a, h), half(b, h), half(c, h))); };
  d = fma(0) | static_cast<u32>(fma(1)) << 16;
}
EMU_PTX void sub_rn_f16x2(u32& d, u32 a, u32 b) {
  const auto half = [](u32 x, int h) { return emu::from_f16(static_cast<unsigned short>(x >> 16 * h)); };
  d = emu::to_f16(half(a, 0) - half(b, 0)) | static_cast<u32>(emu::to_f16(half(a, 1) - half(b, 1))) << 16;
}
EMU_PTX void cvt_rn_bf16x2_f32(u32& d, float high, float low) { d = emu::to_bf16(low) | static_cast<u32>(emu::to_bf16(high)) << 16; }
EMU_PTX void cvt_rn_f16x2_f32(u32& d, float high, float low) { d = emu::to_f16(low) | static_cast<u32>(emu::to_f16(high)) << 16; }
EMU_PTX void ex2_approx_ftz_f32(float& d, float a) { d = exp2f(a); }
EMU_PTX void ex2_approx_f32(float& d, float a) { d = exp2f(a); }
EMU_PTX void lg2_approx_ftz_f32(float& d, float a) { d = log2f(a); }
EMU_PTX void rcp_approx_ftz_f32(float& d, float a) { d = 1.f / a; }
EMU_PTX void rsqrt_approx_ftz_f32(float& d, float a) { d = rsqrtf(a); }
EMU_PTX void tanh_approx_f32(float& d, float a) { d = tanhf(a); }
EMU_PTX void prefetch_global_L2(const void*) {}
EMU_PTX void prefetch_global_L1(const void*) {}
EMU_PTX void griddepcontrol_launch_dependents() { emu::let_successors_start(); }
EMU_PTX void griddepcontrol_wait() { emu::wait_for_predecessors(); }

// ---- global memory
EMU_PTX void load4(u32& x, u32& y, u32& z, u32& w, const void* p) {
  const u32* const v = static_cast<const u32*>(aligned(p, 16, "a 16-byte load"));
  x = v[0], y = v[1], z = v[2], w = v[3];
}
EMU_PTX void ld_global_nc_L1__no_allocate_L2__256B_v4_u32(u32& x, u32& y, u32& z, u32& w, const void* p) { load4(x, y, z, w, p); }
EMU_PTX void ld_global_nc_L1__no_allocate_v4_u32(u32& x, u32& y, u32& z, u32& w, const void* p) { load4(x, y, z, w, p); }
EMU_PTX void ld_global_nc_v4_u32(u32& x, u32& y, u32& z, u32& w, const void* p) { load4(x, y, z, w, p); }
EMU_PTX void ld_global_cg_v4_u32(u32& x, u32& y, u32& z, u32& w, const void* p) { load4(x, y, z, w, p); }
EMU_PTX void st_global_L1__no_allocate_v4_u32(void* p, u32 x, u32 y, u32 z, u32 w) {
  u32* const v = static_cast<u32*>(aligned(p, 16, "a 16-byte store"));
  v[0] = x, v[1] = y, v[2] = z, v[3] = w;
}
EMU_PTX void ld_acquire_gpu_global_u32(u32& d, const u32* p) {
  if (++emu::state.spins > 1000000) EMU_FAIL("waits for another block, which may never run beside this one");
  d = *p;
}
EMU_PTX void st_release_gpu_global_u32(u32* p, u32 v) { *p = v; }
EMU_PTX void ld_acquire_gpu_global_u64(unsigned long long& d, const unsigned long long* p) {
  if (++emu::state.spins > 1000000) EMU_FAIL("waits for another block, which may never run beside this one");
  d = *p;
}
EMU_PTX void red_release_gpu_global_add_u64(unsigned long long* p, unsigned long long v) { *p += v; }
EMU_PTX void atom_add_acq_rel_gpu_global_u32(u32& old, u32* p, u32 v) { old = *p, *p += v; }

// ---- shared memory by its address
EMU_PTX void ld_shared_u16(unsigned short& d, u32 at) { memcpy(&d, shared_pointer(at, 2, 2, "a load"), 2); }
EMU_PTX void ld_shared_u32(u32& d, u32 at) { memcpy(&d, shared_pointer(at, 4, 4, "a load"), 4); }
EMU_PTX void ld_shared_v2_u32(u32& x, u32& y, u32 at) {
  const char* const p = shared_pointer(at, 8, 8, "an 8-byte load");
  memcpy(&x, p, 4), memcpy(&y, p + 4, 4);
}
EMU_PTX void ld_shared_v4_u32(u32& x, u32& y, u32& z, u32& w, u32 at) {
  const char* const p = shared_pointer(at, 16, 16, "a 16-byte load");
  memcpy(&x, p, 4), memcpy(&y, p + 4, 4), memcpy(&z, p + 8, 4), memcpy(&w, p + 12, 4);
}

// ---- cp.async: the data arrive when the thread waits for the group, and until then the place is poison
EMU_PTX void cp_async_cg_shared_global(u32 dst, const void* src, u32 size, u32 bytes) {
  Fiber* const f = current;
  if (f->copy_count == f->copy_room) {
    f->copy_room = f->copy_room ? 2 * f->copy_room : 64;
    f->copies = static_cast<emu::Copy*>(realloc(f->copies, f->copy_room * sizeof(emu::Copy)));
  }
  char* const target = shared_pointer(dst, size, size, "cp.async");
  memset(target, emu::POISON, size);
  f->copies[f->copy_count++] = {target, static_cast<const char*>(aligned(src, size, "cp.async")), bytes, f->groups};
}
EMU_PTX void cp_async_commit_group() { current->groups++; }
EMU_PTX void cp_async_wait_group(int pending) {
  Fiber* const f = current;
  u32 kept = 0;
  for (u32 i = 0; i < f->copy_count; i++) {
    const emu::Copy& c = f->copies[i];
    if (c.group + pending >= f->groups) {
      f->copies[kept++] = c;
      continue;
    }
    memcpy(c.target, c.source, c.bytes);
    memset(c.target + c.bytes, 0, 16 - c.bytes);
  }
  f->copy_count = kept;
}
EMU_PTX void cp_async_wait_all() {
  current->groups++;
  cp_async_wait_group(0);
}

// ---- barriers
EMU_PTX void bar_sync(u32 id, u32 threads) { emu::arrive(id, threads, true, 0); }
EMU_PTX void bar_arrive(u32 id, u32 threads) { emu::arrive(id, threads, false, 0); }

// ---- matrices of 8 x 8 elements of 16 bits; lane l's address is that of row l % 8 of matrix l / 8
template <int COUNT, bool TRANS> inline void load_matrices(Fiber* lanes, u32) {
  for (u32 j = 0; j < COUNT; j++) {
    const unsigned short* rows[8];
    for (u32 r = 0; r < 8; r++)
      rows[r] = reinterpret_cast<const unsigned short*>(shared_pointer(lanes[8 * j + r].in[0], 16, 16, "ldmatrix"));
    for (u32 i = 0; i < 32; i++) {
      const u32 a = i / 4, b = i % 4 * 2;
      lanes[i].out[j] = TRANS ? rows[b][a] | (u32)rows[b + 1][a] << 16 : rows[a][b] | (u32)rows[a][b + 1] << 16;
    }
  }
}
template <int COUNT, bool TRANS> inline const u32* loaded_matrices(u32 address) {
  current->in[0] = address;
  emu::together(~0u, load_matrices<COUNT, TRANS>, "ldmatrix");
  return current->out;
}
EMU_PTX void ldmatrix_sync_aligned_m8n8_x4_shared_b16(u32& a, u32& b, u32& c, u32& d, u32 address) {
  const u32* const v = loaded_matrices<4, false>(address);
  a = v[0], b = v[1], c = v[2], d = v[3];
}
EMU_PTX void ldmatrix_sync_aligned_m8n8_x4_trans_shared_b16(u32& a, u32& b, u32& c, u32& d, u32 address) {
  const u32* const v = loaded_matrices<4, true>(address);
  a = v[0], b = v[1], c = v[2], d = v[3];
}
EMU_PTX void ldmatrix_sync_aligned_m8n8_x2_shared_b16(u32& a, u32& b, u32 address) {
  const u32* const v = loaded_matrices<2, false>(address);
  a = v[0], b = v[1];
}
EMU_PTX void ldmatrix_sync_aligned_m8n8_x2_trans_shared_b16(u32& a, u32& b, u32 address) {
  const u32* const v = loaded_matrices<2, true>(address);
  a = v[0], b = v[1];
}
EMU_PTX void ldmatrix_sync_aligned_m8n8_x1_shared_b16(u32& a, u32 address) { a = loaded_matrices<1, false>(address)[0]; }
EMU_PTX void ldmatrix_sync_aligned_m8n8_x1_trans_shared_b16(u32& a, u32 address) { a = loaded_matrices<1, true>(address)[0]; }

// ---- mma: in[0..3] A, in[4..5] B, in[6..9] C. Sums run in float32 over k in ascending order.
inline float widened(u32 word, u32 half, __nv_bfloat16) { return emu::from_bf16(static_cast<unsigned short>(word >> 16 * half)); }
inline float widened(u32 word, u32 half, __half) { return emu::from_f16(static_cast<unsigned short>(word >> 16 * half)); }
// Most of the time goes here: vectorised, it takes less than half of -O1's.
template <class T, int K> __attribute__((optimize("O3"))) inline void multiply(Fiber* lanes, u32) {
  float a[16][K], b[K][8], c[16][8];
  for (u32 i = 0; i < 32; i++) {
    const u32* const in = lanes[i].in;
    const u32 g = i / 4, t = i % 4 * 2;
    for (u32 h = 0; h < 2; h++) {
      for (u32 k = 0; k < K / 8; k++) {
        a[g][8 * k + t + h] = widened(in[2 * k], h, T());
        a[g + 8][8 * k + t + h] = widened(in[2 * k + 1], h, T());
        b[8 * k + t + h][g] = widened(in[4 + k], h, T());
      }
      memcpy(&c[g][t + h], &in[6 + h], 4);
      memcpy(&c[g + 8][t + h], &in[8 + h], 4);
    }
  }
  for (u32 k = 0; k < K; k++)
    for (u32 m = 0; m < 16; m++) {
      const float factor = a[m][k];
#pragma GCC ivdep
      for (u32 n = 0; n < 8; n++) c[m][n] = __builtin_fmaf(factor, b[k][n], c[m][n]);
    }
  for (u32 i = 0; i < 32; i++) {
    const u32 g = i / 4, t = i % 4 * 2;
    for (u32 h = 0; h < 2; h++) {
      memcpy(&lanes[i].out[h], &c[g][t + h], 4);
      memcpy(&lanes[i].out[2 + h], &c[g + 8][t + h], 4);
    }
  }
}
inline void multiplied(emu::Complete operation, float& d0, float& d1, float& d2, float& d3, float c0, float c1, float c2, float c3) {
  Fiber* const f = current;
  const float c[4] = {c0, c1, c2, c3};
  memcpy(f->in + 6, c, 16);
  emu::together(~0u, operation, "mma");
  float d[4];
  memcpy(d, f->out, 16);
  d0 = d[0], d1 = d[1], d2 = d[2], d3 = d[3];
}
#define EMU_MMA_16816(T)                                                                                               \
  (float& d0, float& d1, float& d2, float& d3, u32 a0, u32 a1, u32 a2, u32 a3, u32 b0, u32 b1, float c0, float c1,     \
   float c2, float c3) {                                                                                               \
    u32* const in = current->in;                                                                                       \
    in[0] = a0, in[1] = a1, in[2] = a2, in[3] = a3, in[4] = b0, in[5] = b1;                                            \
    multiplied(multiply<T, 16>, d0, d1, d2, d3, c0, c1, c2, c3);                                                       \
  }
EMU_PTX void mma_sync_aligned_m16n8k16_row_col_f32_bf16_bf16_f32 EMU_MMA_16816(__nv_bfloat16)
EMU_PTX void mma_sync_aligned_m16n8k16_row_col_f32_f16_f16_f32 EMU_MMA_16816(__half)

// tf32: float32 words whose low 13 bits a caller has to clear
inline void multiply_tf32(Fiber* lanes, u32) {
  float a[16][8], b[8][8], c[16][8];
  const auto place = [](float& to, u32 word) {
    if (word & 0x1fffu) EMU_FAIL("mma in tf32 of %08x, which has more than 10 bits of mantissa", word);
    memcpy(&to, &word, 4);
  };
  for (u32 i = 0; i < 32; i++) {
    const u32* const in = lanes[i].in;
    const u32 g = i / 4, q = i % 4;
    for (u32 h = 0; h < 2; h++) {
      place(a[g + 8 * h][q], in[h]);
      place(a[g + 8 * h][q + 4], in[2 + h]);
      place(b[q + 4 * h][g], in[4 + h]);
      memcpy(&c[g][2 * q + h], &in[6 + h], 4);
      memcpy(&c[g + 8][2 * q + h], &in[8 + h], 4);
    }
  }
  for (u32 k = 0; k < 8; k++)
    for (u32 m = 0; m < 16; m++)
      for (u32 n = 0; n < 8; n++) c[m][n] = __builtin_fmaf(a[m][k], b[k][n], c[m][n]);
  for (u32 i = 0; i < 32; i++) {
    const u32 g = i / 4, t = i % 4 * 2;
    for (u32 h = 0; h < 2; h++) {
      memcpy(&lanes[i].out[h], &c[g][t + h], 4);
      memcpy(&lanes[i].out[2 + h], &c[g + 8][t + h], 4);
    }
  }
}
EMU_PTX void mma_sync_aligned_m16n8k8_row_col_f32_tf32_tf32_f32(float& d0, float& d1, float& d2, float& d3, u32 a0, u32 a1,
                                                                u32 a2, u32 a3, u32 b0, u32 b1, float c0, float c1,
                                                                float c2, float c3) {
  u32* const in = current->in;
  in[0] = a0, in[1] = a1, in[2] = a2, in[3] = a3, in[4] = b0, in[5] = b1;
  multiplied(multiply_tf32, d0, d1, d2, d3, c0, c1, c2, c3);
}
}  // namespace emu_ptx

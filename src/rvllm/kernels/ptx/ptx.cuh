// Thin wrappers over the PTX this project uses, one instruction each; no policy lives here.
//
// Everything is in namespace rvllm::ptx. Addresses of shared memory are 32-bit (`smem()` converts).
// What needs a given architecture is guarded, so one header serves sm_80 and sm_90a.
// Reference: the PTX ISA manual, sections on mbarrier, cp.async.bulk, wgmma and griddepcontrol.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

namespace rvllm {
using u8 = unsigned char;
using u16 = unsigned short;
using u32 = unsigned int;
using u64 = unsigned long long;
using bf16 = __nv_bfloat16;
using f16 = __half;

namespace ptx {
#define RVLLM_PTX __device__ __forceinline__

// ---------------------------------------------------------------- who am I
RVLLM_PTX u32 lane() {
  u32 v;
  asm("mov.u32 %0, %%laneid;" : "=r"(v));
  return v;
}
// Bytes of dynamic shared memory the kernel was launched with.
RVLLM_PTX int dynamic_smem_bytes() {
  u32 v;
  asm("mov.u32 %0, %%dynamic_smem_size;" : "=r"(v));
  return static_cast<int>(v);
}
// The 32-bit shared-state-space address of a generic pointer into shared memory.
RVLLM_PTX u32 smem(const void* p) { return static_cast<u32>(__cvta_generic_to_shared(p)); }

// ---------------------------------------------------------------- the special function unit
// 2^v and 1 / v as it gives them; denormal numbers are zero.
RVLLM_PTX float exp2_fast(float v) {
  float r;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(r) : "f"(v));
  return r;
}
RVLLM_PTX float log2_fast(float v) {
  float r;
  asm("lg2.approx.ftz.f32 %0, %1;" : "=f"(r) : "f"(v));
  return r;
}
RVLLM_PTX float reciprocal_fast(float v) {
  float r;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(r) : "f"(v));
  return r;
}

// ---------------------------------------------------------------- programmatic dependent launch
// Every kernel of a chain calls griddep_wait() in every thread before it touches anything an earlier
// kernel writes or reads. Weights may be read before it. Without the attribute both are no-ops.
RVLLM_PTX void griddep_launch() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}
RVLLM_PTX void griddep_wait() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

// ---------------------------------------------------------------- global loads and stores
// 16 bytes that are read once: not kept in L1.
RVLLM_PTX uint4 load_stream(const void* p) {
  uint4 v;
  asm volatile("ld.global.nc.L1::no_allocate.L2::256B.v4.u32 {%0,%1,%2,%3}, [%4];"
               : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w) : "l"(p));
  return v;
}
// 16 bytes from L2, for data another kernel has just written.
RVLLM_PTX uint4 load_l2(const void* p) {
  uint4 v;
  asm volatile("ld.global.cg.v4.u32 {%0,%1,%2,%3}, [%4];"
               : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w) : "l"(p) : "memory");
  return v;
}
RVLLM_PTX void store_stream(void* p, uint4 v) {
  asm volatile("st.global.L1::no_allocate.v4.u32 [%0], {%1,%2,%3,%4};"
               :: "l"(p), "r"(v.x), "r"(v.y), "r"(v.z), "r"(v.w) : "memory");
}
RVLLM_PTX u32 load_acquire(const u32* p) {
  u32 v;
  asm volatile("ld.acquire.gpu.global.u32 %0, [%1];" : "=r"(v) : "l"(p) : "memory");
  return v;
}
RVLLM_PTX void store_release(u32* p, u32 v) {
  asm volatile("st.release.gpu.global.u32 [%0], %1;" :: "l"(p), "r"(v) : "memory");
}
RVLLM_PTX u64 load_acquire(const u64* p) {
  u64 v;
  asm volatile("ld.acquire.gpu.global.u64 %0, [%1];" : "=l"(v) : "l"(p) : "memory");
  return v;
}
RVLLM_PTX void add_release(u64* p, u64 v) {
  asm volatile("red.release.gpu.global.add.u64 [%0], %1;" :: "l"(p), "l"(v) : "memory");
}
RVLLM_PTX u32 add_acq_rel(u32* p, u32 v) {
  u32 old;
  asm volatile("atom.add.acq_rel.gpu.global.u32 %0, [%1], %2;" : "=r"(old) : "l"(p), "r"(v) : "memory");
  return old;
}

// ---------------------------------------------------------------- shared loads and stores
RVLLM_PTX void store_shared(u32 addr, uint4 v) {
  asm volatile("st.shared.v4.u32 [%0], {%1,%2,%3,%4};" :: "r"(addr), "r"(v.x), "r"(v.y), "r"(v.z), "r"(v.w) : "memory");
}

// ---------------------------------------------------------------- cp.async (sm_80)
// 16 bytes global -> shared; `bytes` < 16 fills the rest with zeros (0 reads nothing).
RVLLM_PTX void cp_async16(u32 dst, const void* src, u32 bytes = 16) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" :: "r"(dst), "l"(src), "r"(bytes) : "memory");
}
// The same for what is read once: it need not stay in L2.
RVLLM_PTX void cp_async16_once(u32 dst, const void* src) {
#if __CUDA_ARCH__ >= 900
  asm volatile("cp.async.cg.shared.global.L2::cache_hint [%0], [%1], 16, %2;"
               :: "r"(dst), "l"(src), "l"(0x12F0000000000000ull) : "memory");
#else
  cp_async16(dst, src);
#endif
}
RVLLM_PTX void cp_async_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
template <int PENDING>
RVLLM_PTX void cp_async_wait() {
  asm volatile("cp.async.wait_group %0;" :: "n"(PENDING) : "memory");
}

// ---------------------------------------------------------------- barriers within a block
RVLLM_PTX void bar_sync(u32 id, u32 threads) { asm volatile("bar.sync %0, %1;" :: "r"(id), "r"(threads) : "memory"); }
RVLLM_PTX void bar_arrive(u32 id, u32 threads) {
  asm volatile("bar.arrive %0, %1;" :: "r"(id), "r"(threads) : "memory");
}

// ---------------------------------------------------------------- warp-level matrix instructions (sm_80)
RVLLM_PTX void ldmatrix_x4(u32 (&r)[4], u32 addr) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3]) : "r"(addr) : "memory");
}
RVLLM_PTX void ldmatrix_x4_trans(u32 (&r)[4], u32 addr) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3]) : "r"(addr) : "memory");
}
RVLLM_PTX void ldmatrix_x2(u32 (&r)[2], u32 addr) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x2.shared.b16 {%0,%1}, [%2];" : "=r"(r[0]), "=r"(r[1]) : "r"(addr) : "memory");
}
RVLLM_PTX void ldmatrix_x2_trans(u32 (&r)[2], u32 addr) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x2.trans.shared.b16 {%0,%1}, [%2];"
               : "=r"(r[0]), "=r"(r[1]) : "r"(addr) : "memory");
}
// d[16x8] += a[16x16] b[16x8], float32 sums. The type of the tag chooses bf16 or f16 operands.
RVLLM_PTX void mma_16816(float (&d)[4], const u32 (&a)[4], const u32 (&b)[2], bf16) {
  asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
               : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}
RVLLM_PTX void mma_16816(float (&d)[4], const u32 (&a)[4], const u32 (&b)[2], f16) {
  asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
               : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}
// d[16x8] += a[16x8] b[8x8] in tf32: operands are float32 bits whose low 13 bits are zero, sums float32. With
// g = lane / 4, q = lane % 4: a holds rows g, g + 8 of column q, then of column q + 4; b rows q and q + 4 of
// column g; d row g, columns 2q and 2q + 1, then the same of row g + 8.
RVLLM_PTX void mma_1688(float (&d)[4], const u32 (&a)[4], const u32 (&b)[2]) {
  asm volatile("mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
               : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

#if __CUDA_ARCH__ >= 900
// Two 8x8 matrices of 16-bit elements, transposed: lane i holds row i / 4, columns 2 (i % 4) and the next of
// matrix j in r[j]; column i % 8 of matrix i / 8 goes to the 16 bytes at lane i's address.
RVLLM_PTX void stmatrix_x2_trans(u32 addr, u32 r0, u32 r1) {
  asm volatile("stmatrix.sync.aligned.m8n8.x2.trans.shared.b16 [%0], {%1,%2};" :: "r"(addr), "r"(r0), "r"(r1) : "memory");
}
// Four of them as they are: matrix i has its row lane / 4, columns 2 (lane % 4) and the next, in register i; row lane % 8 of
// matrix lane / 8 goes to the 16 bytes at the lane's address.
RVLLM_PTX void stmatrix_x4(u32 addr, u32 r0, u32 r1, u32 r2, u32 r3) {
  asm volatile("stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1,%2,%3,%4};"
               :: "r"(addr), "r"(r0), "r"(r1), "r"(r2), "r"(r3) : "memory");
}
RVLLM_PTX void stmatrix_x1_trans(u32 addr, u32 r0) {
  asm volatile("stmatrix.sync.aligned.m8n8.x1.trans.shared.b16 [%0], {%1};" :: "r"(addr), "r"(r0) : "memory");
}

// ---------------------------------------------------------------- mbarrier
// `bar` is a shared address, 8-byte aligned. Phases alternate; wait(bar, parity) returns when the phase
// of that parity has completed (a fresh barrier counts as having completed parity 1).
RVLLM_PTX void mbar_init(u32 bar, u32 arrivals) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" :: "r"(bar), "r"(arrivals) : "memory");
}
// Makes initialised barriers visible to the copy engine and to the cluster.
RVLLM_PTX void mbar_init_fence() { asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory"); }
RVLLM_PTX void mbar_arrive(u32 bar) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" :: "r"(bar) : "memory");
}
RVLLM_PTX void mbar_arrive_expect(u32 bar, u32 bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" :: "r"(bar), "r"(bytes) : "memory");
}
RVLLM_PTX void mbar_expect(u32 bar, u32 bytes) {
  asm volatile("mbarrier.expect_tx.relaxed.cta.shared::cta.b64 [%0], %1;" :: "r"(bar), "r"(bytes) : "memory");
}
// Arrives on the barrier at the same offset in block `rank` of the cluster. It orders no ordinary accesses
// for the other block (a cluster-wide release costs about a microsecond): use it for slots that the copy
// engine fills and the tensor cores read.
RVLLM_PTX void mbar_arrive_remote(u32 bar, u32 rank) {
  asm volatile("{\n\t.reg .b32 peer;\n\tmapa.shared::cluster.u32 peer, %0, %1;\n\t"
               "mbarrier.arrive.shared::cluster.b64 _, [peer];\n\t}"
               :: "r"(bar), "r"(rank) : "memory");
}
RVLLM_PTX bool mbar_try_wait(u32 bar, u32 parity) {
  u32 done;
  asm volatile("{\n\t.reg .pred p;\n\tmbarrier.try_wait.parity.shared::cta.b64 p, [%1], %2;\n\tselp.u32 %0, 1, 0, p;\n\t}"
               : "=r"(done) : "r"(bar), "r"(parity) : "memory");
  return done != 0;
}
RVLLM_PTX void mbar_wait(u32 bar, u32 parity) {
  while (!mbar_try_wait(bar, parity)) {
  }
}

// Arrives on the barrier, which counts this arrival, once all cp.async copies of this thread so far are there.
RVLLM_PTX void cp_async_mbar_arrive(u32 bar) {
  asm volatile("cp.async.mbarrier.arrive.noinc.shared::cta.b64 [%0];" :: "r"(bar) : "memory");
}

// ---------------------------------------------------------------- the copy engine
// Cache hints are opaque policies of `createpolicy`; these words are the fractional 1.0 ones.
// inline: variables of internal linkage would carry a name that differs from one compilation to the next.
inline constexpr u64 EVICT_FIRST = 0x12F0000000000000ull, EVICT_NORMAL = 0x1000000000000000ull;
inline constexpr u64 EVICT_LAST = 0x14F0000000000000ull;

// Contiguous global -> shared; address and size multiples of 16.
RVLLM_PTX void bulk_load(u32 dst, const void* src, u32 bytes, u32 bar, u64 hint) {
  asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint [%0], [%1], %2, [%3], %4;"
               :: "r"(dst), "l"(src), "r"(bytes), "r"(bar), "l"(hint) : "memory");
}
// The same to every block of the cluster whose bit is set in `blocks`, at the same offsets.
RVLLM_PTX void bulk_load_multicast(u32 dst, const void* src, u32 bytes, u32 bar, u16 blocks, u64 hint) {
  asm volatile(
      "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes.multicast::cluster.L2::cache_hint [%0], [%1], %2, [%3], %4, %5;"
      :: "r"(dst), "l"(src), "r"(bytes), "r"(bar), "h"(blocks), "l"(hint) : "memory");
}
// A box of a 2D tensor map (x is the contiguous coordinate) -> shared.
RVLLM_PTX void tensor_load_2d(u32 dst, const void* map, int x, int y, u32 bar) {
  asm volatile("cp.async.bulk.tensor.2d.shared::cluster.global.tile.mbarrier::complete_tx::bytes [%0], [%1, {%2, %3}], [%4];"
               :: "r"(dst), "l"(map), "r"(x), "r"(y), "r"(bar) : "memory");
}
RVLLM_PTX void tensor_load_2d_multicast(u32 dst, const void* map, int x, int y, u32 bar, u16 blocks) {
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.tile.mbarrier::complete_tx::bytes.multicast::cluster [%0], [%1, {%2, %3}], [%4], %5;"
      :: "r"(dst), "l"(map), "r"(x), "r"(y), "r"(bar), "h"(blocks) : "memory");
}
RVLLM_PTX void tensor_map_prefetch(const void* map) {
  asm volatile("prefetch.tensormap [%0];" :: "l"(map) : "memory");
}
// Contiguous shared -> global; follow with bulk_commit and one of the waits.
RVLLM_PTX void bulk_store(void* dst, u32 src, u32 bytes) {
  asm volatile("cp.async.bulk.global.shared::cta.bulk_group [%0], [%1], %2;" :: "l"(dst), "r"(src), "r"(bytes) : "memory");
}
RVLLM_PTX void bulk_commit() { asm volatile("cp.async.bulk.commit_group;" ::: "memory"); }
template <int PENDING>
RVLLM_PTX void bulk_wait_read() {  // the shared source may be reused
  asm volatile("cp.async.bulk.wait_group.read %0;" :: "n"(PENDING) : "memory");
}
template <int PENDING>
RVLLM_PTX void bulk_wait() {  // the data is in global memory
  asm volatile("cp.async.bulk.wait_group %0;" :: "n"(PENDING) : "memory");
}
// Orders ordinary accesses of shared memory before those of the copy engine and the tensor cores.
RVLLM_PTX void fence_async_shared() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }

// ---------------------------------------------------------------- clusters
RVLLM_PTX u32 cluster_rank() {
  u32 v;
  asm volatile("mov.u32 %0, %%cluster_ctarank;" : "=r"(v));
  return v;
}
RVLLM_PTX u32 cluster_size() {
  u32 v;
  asm volatile("mov.u32 %0, %%cluster_nctarank;" : "=r"(v));
  return v;
}
RVLLM_PTX void cluster_arrive() { asm volatile("barrier.cluster.arrive.release.aligned;" ::: "memory"); }
RVLLM_PTX void cluster_wait() { asm volatile("barrier.cluster.wait.acquire.aligned;" ::: "memory"); }
RVLLM_PTX void cluster_sync() {
  cluster_arrive();
  cluster_wait();
}
// The address in block `rank`'s shared memory that corresponds to `addr` in mine.
RVLLM_PTX u32 cluster_map(u32 addr, u32 rank) {
  u32 v;
  asm volatile("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(v) : "r"(addr), "r"(rank));
  return v;
}
RVLLM_PTX float4 cluster_load(u32 addr) {
  float4 v;
  asm volatile("ld.shared::cluster.v4.f32 {%0,%1,%2,%3}, [%4];"
               : "=f"(v.x), "=f"(v.y), "=f"(v.z), "=f"(v.w) : "r"(addr) : "memory");
  return v;
}
RVLLM_PTX void cluster_store(u32 addr, float v) {
  asm volatile("st.shared::cluster.f32 [%0], %1;" :: "r"(addr), "f"(v) : "memory");
}
// Stores into a block of the cluster, which its barrier `bar` counts as 16 bytes; both addresses by cluster_map.
RVLLM_PTX void store_async(u32 addr, const float4& v, u32 bar) {
  asm volatile("st.async.shared::cluster.mbarrier::complete_tx::bytes.v4.f32 [%0], {%1,%2,%3,%4}, [%5];"
               :: "r"(addr), "f"(v.x), "f"(v.y), "f"(v.z), "f"(v.w), "r"(bar) : "memory");
}
RVLLM_PTX void store_async_pair(u32 addr, float a, float b, u32 bar) {  // 8 bytes
  asm volatile("st.async.shared::cluster.mbarrier::complete_tx::bytes.v2.f32 [%0], {%1,%2}, [%3];"
               :: "r"(addr), "f"(a), "f"(b), "r"(bar) : "memory");
}
RVLLM_PTX void store_shared(u32 addr, const float4& v) {
  asm volatile("st.shared.v4.f32 [%0], {%1,%2,%3,%4};" :: "r"(addr), "f"(v.x), "f"(v.y), "f"(v.z), "f"(v.w) : "memory");
}
RVLLM_PTX float4 load_shared(u32 addr) {
  float4 v;
  asm volatile("ld.shared.v4.f32 {%0,%1,%2,%3}, [%4];" : "=f"(v.x), "=f"(v.y), "=f"(v.z), "=f"(v.w) : "r"(addr) : "memory");
  return v;
}
// An 8x8 matrix of 16-bit elements, transposed: lane i holds row i / 4, columns 2 (i % 4) and the next, before and after.
RVLLM_PTX u32 matrix_transpose(u32 pair) {
  u32 v;
  asm volatile("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;" : "=r"(v) : "r"(pair));
  return v;
}

// ---------------------------------------------------------------- registers
template <int REGS>
RVLLM_PTX void registers_raise() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" :: "n"(REGS));
}
template <int REGS>
RVLLM_PTX void registers_lower() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" :: "n"(REGS));
}
#endif  // __CUDA_ARCH__ >= 900
}  // namespace ptx
}  // namespace rvllm

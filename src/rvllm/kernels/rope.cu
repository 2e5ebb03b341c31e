// Rotary embedding of queries and keys, fused with the write of keys and values into the paged cache.
#include "common.cuh"

constexpr int KV_BLOCK = 16;

// qkv [T, pitch]: heads query heads, kv_heads key heads, kv_heads value heads of D elements each. Queries are
// rotated in place; keys are rotated and, like values, written to k_cache / v_cache [blocks, kv_heads, 16, D] at
// (tables[slot][position / 16], position % 16). cos, sin float32 [positions, rotated / 2]; rotated: how many
// leading elements of a head turn, a multiple of 4, 0 for none. Pairs are (i, i + rotated / 2), or (2i, 2i + 1)
// when INTERLEAVED. positions, token_slots int32 [T]; count: rows in use.
// Grid: (ceil((heads + 2 kv_heads) / warps), T), one warp a head. Bound by latency at decode sizes.
template <typename T, bool INTERLEAVED>
__global__ void rope_kv(T* qkv, T* k_cache, T* v_cache, const float* __restrict__ cos, const float* __restrict__ sin,
                        const int* tables, const int* positions, const int* token_slots, const int* count, int pitch,
                        int table_stride, int heads, int kv_heads, int D, int rotated) {
  griddep_launch();
  const int head = blockIdx.x * (blockDim.x / 32) + threadIdx.x / 32, lane = threadIdx.x % 32, row = blockIdx.y;
  const int position = positions[row], slot = token_slots[row];
  const bool active = row < *count && head < heads + 2 * kv_heads;
  const bool query = head < heads, turns = head < heads + kv_heads;
  T* target = nullptr;
  const int half = rotated / 2;
  const float* const c = cos + (size_t)position * half;
  const float* const s = sin + (size_t)position * half;
  if (active && !query) {
    const int block = tables[(size_t)slot * table_stride + position / KV_BLOCK], kv = (head - heads) % kv_heads;
    target = (turns ? k_cache : v_cache) + (((size_t)block * kv_heads + kv) * KV_BLOCK + position % KV_BLOCK) * D;
  }
  griddep_wait();
  if (!active) return;
  T* const source = qkv + (size_t)row * pitch + (size_t)head * D;
  if (query) target = source;
  const u32* const in = reinterpret_cast<const u32*>(source);
  u32* const out = reinterpret_cast<u32*>(target);
  int plain = 0;  // words in front that have been rotated
  if (turns && rotated) {
    plain = half;
    if (INTERLEAVED) {
      for (int i = lane; i < half; i += 32) {
        const float2 v = unpack2<T>(in[i]);
        out[i] = pack2<T>(v.x * c[i] - v.y * s[i], v.y * c[i] + v.x * s[i]);
      }
    } else {
      for (int i = lane; i < half / 2; i += 32) {
        const float2 a = unpack2<T>(in[i]), b = unpack2<T>(in[i + half / 2]);
        const float2 cc = *reinterpret_cast<const float2*>(c + 2 * i), ss = *reinterpret_cast<const float2*>(s + 2 * i);
        out[i] = pack2<T>(a.x * cc.x - b.x * ss.x, a.y * cc.y - b.y * ss.y);
        out[i + half / 2] = pack2<T>(b.x * cc.x + a.x * ss.x, b.y * cc.y + a.y * ss.y);
      }
    }
  }
  if (!query)
    for (int i = plain + lane; i < D / 2; i += 32) out[i] = in[i];
}

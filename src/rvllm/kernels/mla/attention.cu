// Latent attention (MLA with its projections absorbed) over a paged cache of one vector a token.
//
// Two kernels with one arithmetic (mla/mla.cuh): `latent_decode` for sequences that compute one token, whose contexts
// are cut into splits over many blocks, and `latent_prefill` for those that compute several, where
// a block takes rows of one sequence and walks all positions they see. Tiles of keys come through one or two
// BUFFERS of shared memory, as many as the GPU has room for; the bits are the same.
// Decode is bound by memory at long contexts and by latency at short ones; prefill by the tensor cores (mma.sync).
#include "mla/mla.cuh"

// One tile of one item.
struct Place {
  int item, seq, part, split, splits, tile, position;  // part: which 16 heads; position: the query's
};

template <typename Lens>
__device__ __forceinline__ Place place_of(int item, const int* prefix, Lens lens, int seqs) {
  int below = 0, above = seqs;
  while (above - below > 1) {
    const int middle = (below + above) / 2;
    (prefix[middle] <= item ? below : above) = middle;
  }
  Place place;
  place.item = item;
  place.seq = below;
  place.position = lens(below) - 1;
  place.splits = split_of(place.position / TILE) + 1;
  const int within = item - prefix[below];
  place.part = within / place.splits;
  place.split = within % place.splits;
  place.tile = first_tile(place.split);
  return place;
}

// out [T, heads * rank]; q [T, heads * width]: row s is sequence s. cache [blocks, 16, width]. tables int32 [slots,
// table_stride], table_stride % 4 == 0. slots, kv_lens int32 [seqs]; kv_lens counts the newest token. count: how
// many sequences there are, at most max_seqs. partial: spare + 1 slots a block; gatherings [max_seqs * parts], parts
// = ceil(heads / 16): see mla/mla.cuh. width = rank + rotated, both multiples of 16, rank <= 512.
// Grid: any number of blocks of 256 threads. Shared memory: see specs.py. With one buffer a block leaves memory
// and registers for one of the product before it, so that it can begin while that still runs.
template <typename T, int BUFFERS>
__global__ void __maxnreg__(BUFFERS == 1 ? 152 : 255)
latent_decode(T* __restrict__ out, const T* __restrict__ q, const T* cache, const int* tables, const int* slots,
              const int* kv_lens, const int* count, float* partial, Gathering* gatherings, int width, int rank, int heads,
              int table_stride, float scale, int max_seqs, int spare) {
  griddep_launch();
  constexpr int WARPS = 8, UNITS = 4, NEAR = 128;  // NEAR: sequences whose lengths and slots are kept at hand
  extern __shared__ __align__(128) unsigned char shared[];
  __shared__ int warp_totals[WARPS], near_lens[NEAR], near_slots[NEAR];  // of the first sequences
  const int pitch = width + PAD, warp = threadIdx.x / 32, lane = threadIdx.x % 32, parts = (heads + 15) / 16;
  Exchange<T>& exchange = *reinterpret_cast<Exchange<T>*>(shared);
  T* const queries = reinterpret_cast<T*>(shared + sizeof exchange);
  T* const keys = queries + 16 * pitch;
  int* const prefix = reinterpret_cast<int*>(keys + BUFFERS * TILE * pitch);  // items before each sequence

  const int len = threadIdx.x < max_seqs ? kv_lens[threadIdx.x] : 0;  // on their way together
  const int slot = threadIdx.x < min(max_seqs, NEAR) ? slots[threadIdx.x] : 0;
  const int seqs = *count;
  if (threadIdx.x < NEAR) {
    near_lens[threadIdx.x] = len;
    near_slots[threadIdx.x] = slot;
  }
  const auto len_of = [&](int s) { return s < NEAR ? near_lens[s] : kv_lens[s]; };
  const auto slot_of = [&](int s) { return s < NEAR ? near_slots[s] : slots[s]; };
  int items = 0;
  for (int base = 0; base < seqs; base += 256) {
    const int s = base + threadIdx.x;
    const int mine = s < seqs ? (split_of(((base ? kv_lens[s] : len) - 1) / TILE) + 1) * parts : 0;
    int sum = mine;
#pragma unroll
    for (int o = 1; o < 32; o <<= 1) {
      const int other = __shfl_up_sync(~0u, sum, o);
      if (lane >= o) sum += other;
    }
    if (lane == 31) warp_totals[warp] = sum;
    __syncthreads();
    int before = items;
    for (int w = 0; w < WARPS; w++) {
      if (w < warp) before += warp_totals[w];
      items += warp_totals[w];
    }
    if (s < max_seqs) prefix[s] = before + sum - mine;
    __syncthreads();
  }
  const int begin = first_item(items, blockIdx.x, gridDim.x), end = first_item(items, blockIdx.x + 1, gridDim.x);
  if (begin == end) {
    if (blockIdx.x == 0) griddep_wait();
    return;
  }

  const auto fetch = [&](int buffer, const Place& place, bool newest_too) {
    const int start = place.tile * TILE, hi = min(TILE, place.position + 1 - start);
    const int* const table = tables + (size_t)slot_of(place.seq) * table_stride;
    const int4 ids = *reinterpret_cast<const int4*>(table + start / KV_BLOCK);
    const int newest = place.position < start + TILE ? place.position - start : -1;
    load_latents(keys + buffer * TILE * pitch, cache, ids, width, hi, newest_too ? -1 : newest);
    return ids;
  };
  const auto fetch_queries = [&](const Place& place) {
    load_queries(queries, q, (size_t)place.seq * heads + place.part * 16, min(16, heads - place.part * 16), 16, width);
  };

  Place place = place_of(begin, prefix, len_of, seqs);
  const int4 ids = fetch(0, place, false);  // all but the newest position has been there since the last step
  griddep_wait();
  fetch_queries(place);
  if (place.position < place.tile * TILE + TILE && warp == 0) {
    const int row = place.position % TILE;
    const int b = row / KV_BLOCK, block = b == 0 ? ids.x : b == 1 ? ids.y : b == 2 ? ids.z : ids.w;
    const T* const source = cache + ((size_t)block * KV_BLOCK + row % KV_BLOCK) * width;
    for (int c = lane; c < width / 8; c += 32) cp_async16(smem(keys + row * pitch + c * 8), source + c * 8);
  }
  cp_async_commit();

  const float factor = __fmul_rn(scale, LOG2E);
  Latents<UNITS> split, run;  // of this item, and of the items since the sequence's first one
  split.clear();
  run.clear();
  bool leading = place.split == 0;
  int buffer = 0;
  while (true) {
    Place next = place;
    if (place.tile < min(place.position / TILE, first_tile(place.split + 1) - 1)) {
      next.tile++;
    } else if (place.item + 1 < end) {
      if (place.split + 1 < place.splits) {
        next.item++;
        next.split++;
        next.tile = first_tile(next.split);
      } else {
        next = place_of(place.item + 1, prefix, len_of, seqs);
      }
    } else {
      next.item = end;
    }
    const bool more = next.item < end;
    cp_async_wait<0>();
    __syncthreads();  // this tile is there, and the one before has been used
    if (more && BUFFERS == 2) fetch(buffer ^ 1, next, true);
    cp_async_commit();

    const int last = place.position - place.tile * TILE, hi[2] = {last, last};
    latent_tile<T, WARPS, UNITS>(split, queries, keys + buffer * TILE * pitch, exchange, width, rank, hi, factor, warp, lane);

    if (next.item != place.item) {  // the item is done
      const int group = place.seq * parts + place.part, rows = min(16, heads - place.part * 16);
      const bool done = place.split + 1 == place.splits;
      if (leading) run.add(split);
      if (leading && done) {
        store_latents<T, WARPS, UNITS>(out, run, (size_t)place.seq * heads + place.part * 16, rows, rank, warp, lane);
        if (threadIdx.x == 0) gatherings[group] = {0, 0, 0, 0};
      } else if (!leading || !more) {
        float* const slots = partial + (size_t)blockIdx.x * (spare + 1) * slot_size(rank);
        if (leading)
          leave_latents<WARPS, UNITS>(slots + spare * slot_size(rank), run, rank, warp, lane);
        else
          leave_latents<WARPS, UNITS>(slots + (place.item - begin) * slot_size(rank), split, rank, warp, lane);
        if (done && threadIdx.x == 0) gatherings[group] = {place.item - place.split, place.splits, items, 0};
      }
      if (done) {
        leading = true;
        run.clear();
      }
      split.clear();
    }
    if (!more) break;
    if (next.seq != place.seq || next.part != place.part) fetch_queries(next);  // all scores have been computed
    if (BUFFERS == 1) {
      __syncthreads();  // all values have been read
      fetch(0, next, true);
    } else {
      buffer ^= 1;
    }
    cp_async_commit();
    place = next;
  }
}

// out, q, cache, tables, slots, kv_lens as above, for any rows. query_offsets int32 [seqs + 1]. work int32 [n, 2]:
// (sequence, first row) of each block, -1 for none; row r of a sequence is its token r / heads under head r % heads.
// Grid: (n). Block: WARPS * GROUPS warps, 16 * GROUPS rows.
template <typename T, int WARPS, int GROUPS, int BUFFERS>
__global__ void __launch_bounds__(WARPS* GROUPS * 32, 1)
latent_prefill(T* __restrict__ out, const T* __restrict__ q, const T* cache, const int* tables, const int* slots,
               const int* kv_lens, const int* query_offsets, const int2* work, int width, int rank, int heads,
               int table_stride, float scale) {
  griddep_launch();
  constexpr int UNITS = 32 / WARPS, ROWS = 16 * GROUPS;
  extern __shared__ __align__(128) unsigned char shared[];
  const int pitch = width + PAD, lane = threadIdx.x % 32, group = threadIdx.x / 32 / WARPS, warp = threadIdx.x / 32 % WARPS;
  Exchange<T>* const exchanges = reinterpret_cast<Exchange<T>*>(shared);
  T* const queries = reinterpret_cast<T*>(exchanges + GROUPS);
  T* const keys = queries + ROWS * pitch;

  const int2 mine = work[blockIdx.x];
  if (mine.x < 0) {  // a graph is captured for the most blocks its steps can have
    griddep_wait();
    return;
  }
  const int seq = mine.x, offset = query_offsets[seq], tokens = query_offsets[seq + 1] - offset;
  const int start = kv_lens[seq] - tokens, rows = min(ROWS, tokens * heads - mine.y);
  const int newest = start + (mine.y + rows - 1) / heads;  // the last position that any row sees
  const int* const table = tables + (size_t)slots[seq] * table_stride;
  const auto fetch = [&](int buffer, int tile) {
    const int4 ids = *reinterpret_cast<const int4*>(table + tile * (TILE / KV_BLOCK));
    load_latents(keys + buffer * TILE * pitch, cache, ids, width, min(TILE, newest + 1 - tile * TILE), -1);
  };

  griddep_wait();
  const size_t first = (size_t)offset * heads + mine.y;
  load_queries(queries, q, first, rows, ROWS, width);
  fetch(0, 0);
  cp_async_commit();

  int position[2];  // of this thread's two rows; -1 sees nothing
#pragma unroll
  for (int h = 0; h < 2; h++) {
    const int row = group * 16 + lane / 4 + 8 * h;
    position[h] = row < rows ? start + (mine.y + row) / heads : -1;
  }
  const float factor = __fmul_rn(scale, LOG2E);
  Latents<UNITS> split, run;
  split.clear();
  run.clear();
  const int last = newest / TILE;
  for (int t = 0; t <= last; t++) {
    const int buffer = BUFFERS == 2 ? t & 1 : 0;
    cp_async_wait<0>();
    __syncthreads();  // this tile is there, and the one before has been used
    if (t < last && BUFFERS == 2) fetch(buffer ^ 1, t + 1);
    cp_async_commit();
    const int hi[2] = {position[0] - t * TILE, position[1] - t * TILE};
    latent_tile<T, WARPS, UNITS>(split, queries + group * 16 * pitch, keys + buffer * TILE * pitch, exchanges[group], width,
                                 rank, hi, factor, warp, lane);
    if (t == last || split_of(t + 1) != split_of(t)) {
      run.add(split);
      split.clear();
    }
    if (t < last && BUFFERS == 1) {
      __syncthreads();  // all values have been read
      fetch(0, t + 1);
      cp_async_commit();
    }
  }
  store_latents<T, WARPS, UNITS>(out, run, first + group * 16, rows - group * 16, rank, warp, lane);
}

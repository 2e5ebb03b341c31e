// Drawing tokens on the device, in vLLM's order: mask, min_tokens, bias, penalties; arg max when greedy, else temperature
// and, where nothing filters, the arg max with Gumbel noise (common/slot.cuh), or min-p, top-k, top-p and a draw by
// inverting the cumulative distribution in order of token id. Weights are fixed-point numbers, so every sum is exact: a
// row's token does not depend on grid or batch.
#include "sampling/sampling.cuh"

// The random words of ids `at` .. `at` + 3, `at` = 4 * lane of something aligned: a lane and the second next, whose ids are 8
// further, make two calls each. A warp calls.
__device__ __forceinline__ void words_of_four(const Noise& noise, int at, int lane, u32 (&words)[4]) {
  const bool upper = lane & 2;
#pragma unroll
  for (int k = 0; k < 2; k++) {
    const uint2 both = noise.words(at + k + (upper ? 2 : 0));
    const u32 mine = upper ? both.y : both.x, other = __shfl_xor_sync(~0u, upper ? both.x : both.y, 2);
    words[k] = upper ? other : mine;
    words[k + 2] = upper ? mine : other;
  }
}

// Applies what changes logits whether or not the draw is greedy, writes the scaled values of rows that filter to `scaled`,
// and leaves each chunk's best in `bests` [rows, chunks], of rows that draw by temperature alone with their noise.
// logits, scaled float32 [rows, stride], stride % 4 == 0 and >= vocab. row_slots int32 [rows], -1
// for a row that draws nothing; count: rows in use.
// histories u16 [slots, history_stride] (even), or null; bias_ids, biases [slots, MAX_BIASES]; stops [slots, MAX_STOPS].
// masks u32 [.., mask_words], mask_rows int32 [rows] (-1: none), or null.
// best_only: null, or whether the head left bests instead of logits: nothing to do, then.
// Grid: (ceil(vocab / CHUNK / SCAN_WARPS), rows), 32 * SCAN_WARPS threads: a chunk a warp. Bound by memory: logits are
// read once.
extern "C" __global__ void __launch_bounds__(32 * SCAN_WARPS)
sample_scan(const float* logits, float* scaled, Best* bests, const Slot* slots, const int* row_slots, const int* count,
            const u16* histories, const int* bias_ids, const float* biases, const int* stops, const u32* masks,
            const int* mask_rows, const int* best_only, int vocab, int stride, int history_stride, int mask_words) {
  griddep_launch();
  constexpr int VECTORS = CHUNK / 128;  // of four logits, a lane
  __shared__ __align__(16) float changed[SCAN_WARPS][CHUNK];
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int row = blockIdx.y, chunk = blockIdx.x * SCAN_WARPS + warp, start = chunk * CHUNK, number = row_slots[row];
  if (row >= *count || number < 0 || start >= vocab || (best_only && *best_only)) {
    if (row == 0 && blockIdx.x == 0) griddep_wait();
    return;
  }
  const Slot slot = slots[number];
  const bool greedy = slot.temperature < GREEDY, noisy = !greedy && unfiltered(slot, vocab);
  const Noise noise = noise_of(slot);
  const bool forbid = slot.generated < slot.min_tokens && slot.stops > 0;
  const int mask_row = masks ? mask_rows[row] : -1;
  griddep_wait();

  float x[VECTORS][4];
#pragma unroll
  for (int j = 0; j < VECTORS; j++) {
    const int at = start + j * 128 + lane * 4;
    float4 v = make_float4(-INFINITY_F, -INFINITY_F, -INFINITY_F, -INFINITY_F);
    if (at < vocab) v = *reinterpret_cast<const float4*>(logits + (size_t)row * stride + at);
    x[j][0] = v.x, x[j][1] = v.y, x[j][2] = v.z, x[j][3] = v.w;
  }
#pragma unroll
  for (int j = 0; j < VECTORS; j++) {
    const int at = start + j * 128 + lane * 4;
    u32 allowed = 15;
    if (mask_row >= 0 && at < vocab) allowed = masks[(size_t)mask_row * mask_words + at / 32] >> at % 32;
#pragma unroll
    for (int k = 0; k < 4; k++)
      if (at + k >= vocab || !(allowed >> k & 1)) x[j][k] = -INFINITY_F;
  }
  if (forbid || slot.biases) {  // sparse changes, by way of shared memory
    float* const values = changed[warp];
#pragma unroll
    for (int j = 0; j < VECTORS; j++)
      *reinterpret_cast<float4*>(values + j * 128 + lane * 4) = make_float4(x[j][0], x[j][1], x[j][2], x[j][3]);
    __syncwarp();
    if (forbid)
      for (int i = lane; i < slot.stops; i += 32) {
        const int place = stops[(size_t)number * MAX_STOPS + i] - start;
        if (place >= 0 && place < CHUNK) values[place] = -INFINITY_F;
      }
    __syncwarp();
    for (int i = lane; i < slot.biases; i += 32) {
      const int place = bias_ids[(size_t)number * MAX_BIASES + i] - start;
      if (place >= 0 && place < CHUNK) values[place] += biases[(size_t)number * MAX_BIASES + i];
    }
    __syncwarp();
#pragma unroll
    for (int j = 0; j < VECTORS; j++)
#pragma unroll
      for (int k = 0; k < 4; k++) x[j][k] = values[j * 128 + lane * 4 + k];
  }
  Best best = no_candidate();
#pragma unroll
  for (int j = 0; j < VECTORS; j++) {
    const int at = start + j * 128 + lane * 4;
    u32 words[4];
    if (noisy) words_of_four(noise, at, lane, words);
    if (at >= vocab) continue;
#pragma unroll
    for (int k = 0; k < 4; k++) {
      float& value = x[j][k];
      if (slot.flags & HISTORY && at + k < vocab) {
        const u16 seen = histories[(size_t)number * history_stride + at + k];
        const float times = (float)(seen & ~IN_PROMPT);
        if (slot.repetition != 1.f && seen) value = value > 0.f ? __fdiv_rn(value, slot.repetition) : __fmul_rn(value, slot.repetition);
        value = __fsub_rn(value, __fmul_rn(slot.frequency, times));
        value = __fsub_rn(value, times > 0.f ? slot.presence : 0.f);
      }
      if (noisy)
        value = noise.drawn(value, words[k]);
      else if (!greedy)
        value = __fdiv_rn(value, slot.temperature);
      best = better(best, candidate(value, at + k));
    }
    if (!greedy && !noisy) *reinterpret_cast<float4*>(scaled + (size_t)row * stride + at) = make_float4(x[j][0], x[j][1], x[j][2], x[j][3]);
  }
#pragma unroll
  for (int o = 16; o; o >>= 1)
    best = better(best, {__shfl_xor_sync(~0u, best.value, o), __shfl_xor_sync(~0u, best.id, o)});
  if (lane == 0) bests[(size_t)row * ((vocab + CHUNK - 1) / CHUNK) + chunk] = best;
}

// Picks an index of the row by its weight: of keys above `edge` all, of those equal to it the first `ties`.
// Chunks are summed first; then the block looks closer at the chunk that holds the spot. Neighbours are added in
// float32, always the same four, and these sums as fixed-point numbers.
__device__ int draw(const Row& row, float maximum, u32 edge, u64 ties, u32 random, int fallback) {
  __shared__ u64 sums[MAX_CHUNKS], scratch[32], spot, ties_left;
  __shared__ int tied[MAX_CHUNKS], chosen, token;
  const int lane = threadIdx.x % 32, chunks = (row.vocab + CHUNK - 1) / CHUNK;
  const float edge_value = value_of(edge);
  const u64 edge_weight = weight_of(edge_value, maximum);
  const auto above = [&](float x) { return x > edge_value ? likelihood(x, maximum) : 0.f; };
  if (threadIdx.x == 0) {
    chosen = -1;
    token = fallback;
  }
  for (int c = threadIdx.x / 32; c < chunks; c += PICK_THREADS / 32) {
    u64 sum = 0;
    int same = 0;
    if (key_of(row.maxima[c]) >= edge)
      fours_of(row, c, [&](const float4& v, int) {
        sum += fixed_point(__fadd_rn(__fadd_rn(__fadd_rn(above(v.x), above(v.y)), above(v.z)), above(v.w)));
        same += (v.x == edge_value) + (v.y == edge_value) + (v.z == edge_value) + (v.w == edge_value);
      });
#pragma unroll
    for (int o = 16; o; o >>= 1) {
      sum += __shfl_xor_sync(~0u, sum, o);
      same += __shfl_xor_sync(~0u, same, o);
    }
    if (lane == 0) {
      sums[c] = sum;
      tied[c] = same;
    }
  }
  __syncthreads();
  const int c = threadIdx.x;
  u64 total, all_ties;
  const u64 ties_before = block_scan(c < chunks ? tied[c] : 0, scratch, all_ties);
  const u64 taken = c < chunks && ties_before < ties ? min((u64)tied[c], ties - ties_before) : 0;
  const u64 here = c < chunks ? sums[c] + taken * edge_weight : 0, before = block_scan(here, scratch, total);
  const u64 target = __umul64hi(total, (u64)random << 32);  // below total
  if (before <= target && target < before + here) {
    chosen = c;
    spot = target - before;
    ties_left = ties > ties_before ? ties - ties_before : 0;
  }
  __syncthreads();
  if (chosen >= 0) {
    const int i = chosen * CHUNK + threadIdx.x * 4;
    float w[4] = {}, sum = 0.f;
    bool tie[4] = {};
    u64 unused;
    if (threadIdx.x < CHUNK / 4 && i < row.vocab) {
      const float4 v = *reinterpret_cast<const float4*>(row.x + i);
      const float x[4] = {v.x, v.y, v.z, v.w};
#pragma unroll
      for (int k = 0; k < 4; k++) {
        w[k] = i + k < row.vocab ? above(x[k]) : 0.f;
        tie[k] = i + k < row.vocab && x[k] == edge_value;
      }
    }
    const u64 rank = block_scan(tie[0] + tie[1] + tie[2] + tie[3], scratch, unused);
    u64 taken_here = 0;  // ties among this thread's first k
    u64 upto[4];
#pragma unroll
    for (int k = 0; k < 4; k++) {
      sum = __fadd_rn(sum, w[k]);
      if (tie[k] && rank + taken_here < ties_left) taken_here++;
      upto[k] = fixed_point(sum) + taken_here * edge_weight;
    }
    const u64 run = block_scan(upto[3], scratch, unused);
    if (run <= spot && spot < run + upto[3])
      token = i + (spot < run + upto[0] ? 0 : spot < run + upto[1] ? 1 : spot < run + upto[2] ? 2 : 3);
  }
  __syncthreads();
  return token;
}

inline constexpr int BROKEN_ROW = -2;  // backends/base.py has it too

// Finishes each row from its chunks' bests: the arg max when greedy, else the draw. tokens int32 [rows] gets the
// token (-1 where the row draws nothing, BROKEN_ROW where a logit is infinite or no number), last_tokens [slots] too; the slot's count and history advance.
// host_tokens: null, or where the address is that the tokens go to as well.
// logits, best_only: where the head left bests of 64 logits, those are at the start of its rows, and no row filters.
// Grid: (rows), PICK_THREADS threads. Greedy rows are bound by latency; a draw reads its row once, and the
// parts that matter up to seven times.
extern "C" __global__ void __launch_bounds__(PICK_THREADS)
sample_pick(int* tokens, int* last_tokens, const float* scaled, const Best* bests, Slot* slots, const int* row_slots,
            const int* count, u16* histories, const float* logits, const int* best_only, int* const* host_tokens,
            int vocab, int stride, int history_stride, int chunks) {
  griddep_launch();
  __shared__ Histogram histogram;
  __shared__ Best scratch[32];
  __shared__ float maxima[MAX_CHUNKS];
  __shared__ u32 bound;
  const int row = blockIdx.x, number = row_slots[row];
  if (row >= *count || number < 0) {
    if (row == 0) griddep_wait();
    if (threadIdx.x == 0) tokens[row] = -1;
    return;
  }
  const Slot slot = slots[number];
  const bool from_head = best_only && *best_only;
  griddep_wait();
  Best best = no_candidate();
  if (from_head) {
    const Best* const tiles = reinterpret_cast<const Best*>(logits + (size_t)row * stride);
    for (int i = threadIdx.x; i < (vocab + HEAD_TILE - 1) / HEAD_TILE; i += PICK_THREADS) best = better(best, tiles[i]);
  } else if (threadIdx.x < chunks) {  // at most MAX_CHUNKS
    best = bests[(size_t)row * chunks + threadIdx.x];
    maxima[threadIdx.x] = best.value;
  }
  best = block_best(best, scratch);
  const bool broken = best.value == INFINITY_F;
  int token = broken || best.id >= vocab ? 0 : best.id;
  if (slot.temperature >= GREEDY && !unfiltered(slot, vocab) && best.value > -INFINITY_F && !broken) {
    const Row x = {scaled + (size_t)row * stride, vocab, maxima};
    const float maximum = best.value;
    u32 floor = LOWEST_KEY;
    if (slot.min_p > 0.f) floor = max(floor, key_of(__double2float_ru((double)maximum + log((double)slot.min_p))));
    u64 above = 0, ties = ~0ull, target = slot.top_k;
    if (slot.top_k > 0 && slot.top_k < vocab) {
      // At least k elements reach the k-th largest of the chunks' maxima: nothing below it can matter.
      if (threadIdx.x == 0) bound = floor;
      __syncthreads();
      if (threadIdx.x < chunks && slot.top_k <= chunks) {
        const float mine = maxima[threadIdx.x];
        int larger = 0;
        for (int c = 0; c < chunks; c++) larger += maxima[c] > mine || (maxima[c] == mine && c < threadIdx.x);
        if (larger + 1 == slot.top_k) bound = max(floor, key_of(mine));
      }
      __syncthreads();
      floor = max(floor, select_key<false>(x, maximum, bound, 0, target, histogram, above));
    }
    u32 edge = floor;
    if (slot.top_p < 1.f) {
      edge = select_key<true>(x, maximum, floor, slot.top_p, target, histogram, above);
      const u64 weight = max((u64)1, weight_of(value_of(edge), maximum));
      ties = (target - above + weight - 1) / weight;
    }
    token = draw(x, maximum, edge, ties, philox(slot.seed, slot.generated).x, best.id);
  }
  if (threadIdx.x) return;
  tokens[row] = broken ? BROKEN_ROW : token;
  if (host_tokens) (*host_tokens)[row] = broken ? BROKEN_ROW : token;
  last_tokens[number] = token;
  slots[number].generated = slot.generated + 1;
  if (slot.temperature >= GREEDY) {
    const uint4 next = philox(slot.seed, slot.generated + 1);
    slots[number].noise_key = next.y, slots[number].noise_high = next.z;
  }
  if (slot.flags & HISTORY) {
    u16* const seen = histories + (size_t)number * history_stride + token;
    if ((*seen & ~IN_PROMPT) != 0x7fff) ++*seen;
  }
}

// Sequences take slots. starts int32 [n, START_WORDS]: slot number, then where in `words` its tokens begin, how
// many there are and how many of them are prompt, where its biases (ids, then values) and stops begin, two spare
// words, then the slot's image. Grid: (n), 1024 threads. Bound by clearing the slot's history, where it has one.
inline constexpr int START_WORDS = 24;
extern "C" __global__ void __launch_bounds__(1024)
slot_start(Slot* slots, u16* histories, int* bias_ids, float* biases, int* stops, const int* starts, const int* words,
           int vocab, int history_stride) {
  griddep_wait();  // what it writes is read before any wait further down: successors start when it is done
  const int* const entry = starts + blockIdx.x * START_WORDS;
  const int number = entry[0], count = entry[2], prompt = entry[3];
  const Slot& slot = *reinterpret_cast<const Slot*>(entry + 8);
  constexpr int NOISE = 1;  // word of noise_key; noise_high follows
  if (threadIdx.x < sizeof(Slot) / 4) {
    int word = entry[8 + threadIdx.x];
    if (threadIdx.x == NOISE || threadIdx.x == NOISE + 1) {
      const uint4 first = philox(slot.seed, slot.generated);
      word = threadIdx.x == NOISE ? first.y : first.z;
    }
    reinterpret_cast<int*>(slots + number)[threadIdx.x] = word;
  }
  for (int i = threadIdx.x; i < slot.biases; i += blockDim.x) {
    bias_ids[(size_t)number * MAX_BIASES + i] = words[entry[4] + i];
    biases[(size_t)number * MAX_BIASES + i] = __int_as_float(words[entry[4] + slot.biases + i]);
  }
  for (int i = threadIdx.x; i < slot.stops; i += blockDim.x) stops[(size_t)number * MAX_STOPS + i] = words[entry[5] + i];
  if (!(slot.flags & HISTORY)) return;
  u32* const pairs = reinterpret_cast<u32*>(histories + (size_t)number * history_stride);
  for (int i = threadIdx.x; i < (vocab + 1) / 2; i += blockDim.x) pairs[i] = 0;
  __syncthreads();
  for (int i = threadIdx.x; i < count; i += blockDim.x) {
    const int token = words[entry[1] + i], shift = (token & 1) * 16;
    if (token < 0 || token >= vocab) continue;
    if (i < prompt)
      atomicOr(pairs + token / 2, (u32)IN_PROMPT << shift);
    else
      atomicAdd(pairs + token / 2, 1u << shift);
  }
}

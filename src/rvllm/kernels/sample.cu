// Drawing tokens on the device, in vLLM's order: mask, min_tokens, bias, penalties; arg max when greedy, else
// temperature, min-p, top-k, top-p and a draw by inverting the cumulative distribution in order of token id.
// Weights are fixed-point numbers, so every sum is exact: a row's token does not depend on grid or batch.
#include "sampling.cuh"

// Applies what changes logits whether or not the draw is greedy, writes the scaled values of rows that are not
// greedy to `scaled`, and leaves each chunk's best in `bests` [rows, chunks].
// logits, scaled float32 [rows, stride], stride % 4 == 0 and >= vocab. row_slots int32 [rows], -1
// for a row that draws nothing; count: rows in use.
// histories u16 [slots, history_stride] (even), or null; bias_ids, biases [slots, MAX_BIASES]; stops [slots, MAX_STOPS].
// masks u32 [.., mask_words], mask_rows int32 [rows] (-1: none), or null.
// Grid: (ceil(vocab / CHUNK), rows), 256 threads. Bound by memory: logits are read once.
extern "C" __global__ void __launch_bounds__(256)
sample_scan(const float* logits, float* scaled, Best* bests, const Slot* slots, const int* row_slots, const int* count,
            const u16* histories, const int* bias_ids, const float* biases, const int* stops, const u32* masks,
            const int* mask_rows, int vocab, int stride, int history_stride, int mask_words) {
  griddep_launch();
  __shared__ float values[CHUNK];
  __shared__ Best scratch[32];
  const int row = blockIdx.y, start = blockIdx.x * CHUNK, number = row_slots[row];
  if (row >= *count || number < 0) {
    if (row == 0 && blockIdx.x == 0) griddep_wait();
    return;
  }
  const Slot slot = slots[number];
  const bool greedy = slot.temperature < 1e-5f;
  const bool forbid = slot.generated < slot.min_tokens && slot.stops > 0;
  const int mask_row = masks ? mask_rows[row] : -1;
  griddep_wait();

  float x[8];
#pragma unroll
  for (int j = 0; j < 2; j++) {
    const int at = start + j * 1024 + threadIdx.x * 4;
    float4 v = make_float4(-INFINITY_F, -INFINITY_F, -INFINITY_F, -INFINITY_F);
    if (at < vocab) v = *reinterpret_cast<const float4*>(logits + (size_t)row * stride + at);
    x[4 * j] = v.x;
    x[4 * j + 1] = v.y;
    x[4 * j + 2] = v.z;
    x[4 * j + 3] = v.w;
#pragma unroll
    for (int k = 0; k < 4; k++)
      if (at + k >= vocab) x[4 * j + k] = -INFINITY_F;
    if (mask_row >= 0 && at < vocab) {
      const u32 word = masks[(size_t)mask_row * mask_words + at / 32] >> at % 32;
#pragma unroll
      for (int k = 0; k < 4; k++)
        if (!(word >> k & 1)) x[4 * j + k] = -INFINITY_F;
    }
  }
  if (forbid || slot.biases) {  // sparse changes, by way of shared memory
#pragma unroll
    for (int k = 0; k < 8; k++) values[k / 4 * 1024 + threadIdx.x * 4 + k % 4] = x[k];
    __syncthreads();
    if (forbid)
      for (int i = threadIdx.x; i < slot.stops; i += blockDim.x) {
        const int at = stops[(size_t)number * MAX_STOPS + i] - start;
        if (at >= 0 && at < CHUNK) values[at] = -INFINITY_F;
      }
    __syncthreads();
    for (int i = threadIdx.x; i < slot.biases; i += blockDim.x) {
      const int at = bias_ids[(size_t)number * MAX_BIASES + i] - start;
      if (at >= 0 && at < CHUNK) values[at] += biases[(size_t)number * MAX_BIASES + i];
    }
    __syncthreads();
#pragma unroll
    for (int k = 0; k < 8; k++) x[k] = values[k / 4 * 1024 + threadIdx.x * 4 + k % 4];
  }
  Best best = {-INFINITY_F, 0x7fffffff};
#pragma unroll
  for (int j = 0; j < 2; j++) {
    const int at = start + j * 1024 + threadIdx.x * 4;
    if (at >= vocab) break;
#pragma unroll
    for (int k = 0; k < 4; k++) {
      float v = x[4 * j + k];
      if (slot.flags & HISTORY && at + k < vocab) {
        const u16 seen = histories[(size_t)number * history_stride + at + k];
        const float times = (float)(seen & ~IN_PROMPT);
        if (slot.repetition != 1.f && seen) v = v > 0.f ? __fdiv_rn(v, slot.repetition) : __fmul_rn(v, slot.repetition);
        v = __fsub_rn(v, __fmul_rn(slot.frequency, times));
        v = __fsub_rn(v, times > 0.f ? slot.presence : 0.f);
      }
      if (!greedy) v = __fdiv_rn(v, slot.temperature);
      x[4 * j + k] = v;
      best = better(best, {v, at + k});
    }
    if (!greedy)
      *reinterpret_cast<float4*>(scaled + (size_t)row * stride + at) = make_float4(x[4 * j], x[4 * j + 1], x[4 * j + 2], x[4 * j + 3]);
  }
  best = block_best(best, scratch);
  if (threadIdx.x == 0) bests[(size_t)row * gridDim.x + blockIdx.x] = best;
}

// Picks an index of the row by its weight: of keys above `edge` all, of those equal to it the first `ties`.
// Each warp sums a consecutive part of the row; then the block looks closer at the part that holds the spot.
__device__ int draw(const float* row, int vocab, float maximum, u32 edge, u64 ties, u32 random, int fallback) {
  __shared__ u64 sums[32], tied[32], scratch[32], left, ties_left;
  __shared__ int chosen, token;
  constexpr int AHEAD = 4;
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int part = (vocab + 32 * 128 - 1) / (32 * 128) * 128, begin = min(warp * part, vocab), end = min(begin + part, vocab);
  const u64 edge_weight = weight_of(value_of(edge), maximum);
  const auto look = [&](const float4& v, int i, int stop, u64 (&w)[4], bool (&tie)[4]) {
    const float x[4] = {v.x, v.y, v.z, v.w};
#pragma unroll
    for (int k = 0; k < 4; k++) {
      const u32 key = i + k < stop ? key_of(x[k]) : 0;
      w[k] = key > edge ? weight_of(x[k], maximum) : 0;
      tie[k] = key == edge;
    }
  };
  u64 sum = 0, same = 0;
  for (int base = begin + lane * 4; base < end; base += AHEAD * 128) {
    float4 v[AHEAD];
#pragma unroll
    for (int a = 0; a < AHEAD; a++)
      if (base + a * 128 < end) v[a] = *reinterpret_cast<const float4*>(row + base + a * 128);
#pragma unroll
    for (int a = 0; a < AHEAD; a++) {
      u64 w[4];
      bool tie[4];
      look(v[a], base + a * 128, end, w, tie);
#pragma unroll
      for (int k = 0; k < 4; k++) {
        sum += w[k];
        same += tie[k];
      }
    }
  }
#pragma unroll
  for (int o = 16; o; o >>= 1) {
    sum += __shfl_xor_sync(~0u, sum, o);
    same += __shfl_xor_sync(~0u, same, o);
  }
  if (lane == 0) {
    sums[warp] = sum;
    tied[warp] = same;
  }
  __syncthreads();
  if (threadIdx.x == 0) {
    u64 total = 0, rest = ties;
    for (int w = 0; w < 32; w++) {
      const u64 taken = min(tied[w], rest);
      rest -= taken;
      total += sums[w] + taken * edge_weight;
    }
    u64 spot = __umul64hi(total, (u64)random << 32);  // below total
    rest = ties;
    chosen = -1;
    token = fallback;
    for (int w = 0; w < 32 && total; w++) {
      const u64 taken = min(tied[w], rest), here = sums[w] + taken * edge_weight;
      if (spot < here) {
        chosen = w;
        break;
      }
      spot -= here;
      rest -= taken;
    }
    left = spot;
    ties_left = rest;
  }
  __syncthreads();
  if (chosen >= 0) {
    u64 spot = left, rest = ties_left;
    const int stop = min((chosen + 1) * part, vocab);
    for (int base = chosen * part; base < stop; base += PICK_THREADS * 4) {
      const int i = base + threadIdx.x * 4;
      u64 w[4], strip_ties, strip;
      bool tie[4];
      float4 v = make_float4(0.f, 0.f, 0.f, 0.f);
      if (i < stop) v = *reinterpret_cast<const float4*>(row + i);
      look(v, i, stop, w, tie);
      u64 rank = block_scan(tie[0] + tie[1] + tie[2] + tie[3], scratch, strip_ties), mine = 0;
#pragma unroll
      for (int k = 0; k < 4; k++) {
        if (tie[k] && rank++ < rest) w[k] = edge_weight;
        mine += w[k];
      }
      u64 before = block_scan(mine, scratch, strip);
#pragma unroll
      for (int k = 0; k < 4; k++) {
        if (before <= spot && spot < before + w[k]) token = i + k;
        before += w[k];
      }
      if (spot < strip) break;
      spot -= strip;
      rest -= min(strip_ties, rest);
    }
  }
  __syncthreads();
  return token;
}

// Finishes each row from its chunks' bests: the arg max when greedy, else the draw. tokens int32 [rows] gets the
// token (-1 where the row draws nothing), last_tokens [slots] too; the slot's count and history advance.
// Grid: (rows), PICK_THREADS threads. Greedy rows are bound by latency; a draw reads its row two to nine times.
extern "C" __global__ void __launch_bounds__(PICK_THREADS)
sample_pick(int* tokens, int* last_tokens, const float* scaled, const Best* bests, Slot* slots, const int* row_slots,
            const int* count, u16* histories, int vocab, int stride, int history_stride, int chunks) {
  griddep_launch();
  __shared__ Histogram histogram;
  __shared__ Best scratch[32];
  __shared__ u64 sums[32];
  const int row = blockIdx.x, number = row_slots[row];
  if (row >= *count || number < 0) {
    if (row == 0) griddep_wait();
    if (threadIdx.x == 0) tokens[row] = -1;
    return;
  }
  const Slot slot = slots[number];
  griddep_wait();
  Best best = {-INFINITY_F, 0x7fffffff};
  for (int i = threadIdx.x; i < chunks; i += PICK_THREADS) best = better(best, bests[(size_t)row * chunks + i]);
  best = block_best(best, scratch);
  if (best.id >= vocab) best.id = 0;  // no number among the logits
  int token = best.id;
  if (slot.temperature >= 1e-5f && best.value > -INFINITY_F) {
    const float* const x = scaled + (size_t)row * stride;
    const float maximum = best.value;
    u32 floor = LOWEST_KEY;
    if (slot.min_p > 0.f) floor = max(floor, key_of(__double2float_ru((double)maximum + log((double)slot.min_p))));
    u64 above = 0, ties = ~0ull;
    if (slot.top_k > 0 && slot.top_k < vocab)
      floor = max(floor, select_key<false>(x, vocab, maximum, floor, slot.top_k, histogram, above));
    u32 edge = floor;
    if (slot.top_p < 1.f) {
      u64 sum = 0;
      each(x, vocab, [&](float v, int) { sum += key_of(v) >= floor ? weight_of(v, maximum) : 0; });
      sum = block_sum(sum, sums);
      const u64 target = max((u64)1, (u64)ceil((double)slot.top_p * (double)sum));
      edge = select_key<true>(x, vocab, maximum, floor, min(target, sum), histogram, above);
      const u64 each_weight = max((u64)1, weight_of(value_of(edge), maximum));
      ties = (min(target, sum) - above + each_weight - 1) / each_weight;
    }
    token = draw(x, vocab, maximum, edge, ties, philox(slot.seed, slot.generated), best.id);
  }
  if (threadIdx.x) return;
  tokens[row] = token;
  last_tokens[number] = token;
  slots[number].generated = slot.generated + 1;
  if (slot.flags & HISTORY) {
    u16* const seen = histories + (size_t)number * history_stride + token;
    if ((*seen & ~IN_PROMPT) != 0x7fff) ++*seen;
  }
}

// Sequences take slots. starts int32 [n, START_WORDS]: slot number, then where in `words` its tokens begin, how
// many there are and how many of them are prompt, where its biases (ids, then values) and stops begin, two spare
// words, then the slot's image. Grid: (n), 1024 threads. Bound by clearing the slot's history, where it has one.
constexpr int START_WORDS = 24;
extern "C" __global__ void __launch_bounds__(1024)
slot_start(Slot* slots, u16* histories, int* bias_ids, float* biases, int* stops, const int* starts, const int* words,
           int vocab, int history_stride) {
  griddep_wait();  // what it writes is read before any wait further down: successors start when it is done
  const int* const entry = starts + blockIdx.x * START_WORDS;
  const int number = entry[0], count = entry[2], prompt = entry[3];
  const Slot& slot = *reinterpret_cast<const Slot*>(entry + 8);
  if (threadIdx.x < sizeof(Slot) / 4) reinterpret_cast<int*>(slots + number)[threadIdx.x] = entry[8 + threadIdx.x];
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

// Log-probabilities of chosen rows: the token's own, its rank, and the most likely tokens, before temperature
// and filters.
#include "sampling/sampling.cuh"

// For entry i: row rows[i] of logits [.., stride], token targets[i], or where that is -1 the token drawn for the
// row; wanted[i] <= MAX_TOP most likely ones. Out: token float32 [n], ranks int32 [n], top_ids int32 [n, MAX_TOP],
// top float32 [n, MAX_TOP]; of equal logits the lower id comes first. count: entries in use.
// Grid: (n), PICK_THREADS threads. Bound by reading the row about six times, mostly from L2.
extern "C" __global__ void __launch_bounds__(PICK_THREADS)
logprobs(float* token, int* ranks, int* top_ids, float* top, const float* logits, const int* rows, const int* targets,
         const int* wanted, const int* drawn, const int* count, int vocab, int stride) {
  griddep_launch();
  __shared__ Histogram histogram;
  __shared__ float maxima[32];
  __shared__ double sums[32];
  __shared__ u64 ranked[32];
  __shared__ Best list[MAX_TOP], scratch[32];
  __shared__ int listed;
  const int entry = blockIdx.x;
  const bool used = entry < *count;
  griddep_wait();
  if (!used) return;
  const int row = rows[entry], target = targets[entry] >= 0 ? targets[entry] : drawn[row], k = min(min(wanted[entry], MAX_TOP), vocab);
  const Row x = {logits + (size_t)row * stride, vocab, nullptr};
  const float own = x.x[target];
  float maximum = -INFINITY_F;
  u64 larger = 0;
  each(x, 0, [&](float v, int) {
    maximum = fmaxf(maximum, v);
    larger += v > own;
  });
  maximum = block_max(maximum, maxima);
  larger = block_sum(larger, ranked);
  double sum = 0;
  each(x, 0, [&](float v, int) { sum += (double)expf(v - maximum); });
  sum = block_sum(sum, sums);
  const double norm = (double)maximum + log(sum);
  if (threadIdx.x == 0) {
    token[entry] = (float)((double)own - norm);
    ranks[entry] = 1 + (int)larger;
    listed = 0;
  }
  if (k <= 0) return;
  u64 above, count_wanted = k;
  const u32 edge = select_key<false>(x, maximum, 0, 0, count_wanted, histogram, above);
  __syncthreads();
  each(x, 0, [&](float v, int id) {
    if (key_of(v) > edge) list[atomicAdd(&listed, 1)] = {v, id};  // `above` of them, fewer than k
  });
  int last = -1;
  for (int n = (int)above; n < k; n++) {  // of those at the edge, the lowest ids
    Best lowest = {0.f, 0x7fffffff};
    each(x, 0, [&](float v, int id) {
      if (key_of(v) == edge && id > last) lowest = better(lowest, {0.f, id});
    });
    lowest = block_best(lowest, scratch);
    last = lowest.id;
    if (threadIdx.x == 0) list[n] = {value_of(edge), last};
  }
  __syncthreads();
  if (threadIdx.x < k) {
    const Best mine = list[threadIdx.x];
    int place = 0;
    for (int n = 0; n < k; n++) {
      const Best other = list[n];
      place += other.value > mine.value || (other.value == mine.value && other.id < mine.id);
    }
    top_ids[entry * MAX_TOP + place] = mine.id;
    top[entry * MAX_TOP + place] = (float)((double)mine.value - norm);
  }
}

// The best of a row: what greedy decoding draws.
#pragma once

struct Best {
  float value;
  int id;
};
__device__ __forceinline__ Best no_candidate() { return {__int_as_float(0xff800000), 0x7fffffff}; }
// No number counts as infinity, which is how a row that is broken is known.
__device__ __forceinline__ Best candidate(float value, int id) { return {value == value ? value : __int_as_float(0x7f800000), id}; }

// The larger value; of equal ones the lower id.
__device__ __forceinline__ Best better(Best a, Best b) {
  return b.value > a.value || (b.value == a.value && b.id < a.id) ? b : a;
}

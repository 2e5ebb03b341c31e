// What the persistent kernels of large tiles have in common: how their ring is filled, and how its barriers begin.
#pragma once

#include "gemm/mainloop.cuh"

namespace rvllm::gemm {

// One thread: fills the ring, block after block of K of one work tile after the other. load_weights(tile, k, ring)
// goes first, as weights depend on no kernel before this one; load_x(tile, k, ring) follows.
template <class Tile, class Scheduler, class LoadWeights, class LoadX>
__device__ __forceinline__ void fill_ring(Scheduler scheduler, Ring ring, int blocks, LoadWeights load_weights, LoadX load_x) {
  using namespace ptx;
  Tile t;
  bool more = scheduler.next(t);
  int ahead = more ? min(ring.stages, blocks) : 0;
  for (Ring r = ring; r.stage < ahead; r.stage++) load_weights(t, r.stage, r);
  griddep_wait();
  for (int k = 0; k < ahead; k++) {
    load_x(t, k, ring);
    ring.advance();
  }
  while (more) {
    for (int k = ahead; k < blocks; k++) {
      mbar_wait(ring.empty(ring.stage), ring.phase ^ 1);
      load_weights(t, k, ring);
      load_x(t, k, ring);
      ring.advance();
    }
    ahead = 0;
    more = scheduler.next(t);
  }
}

// One thread: the barriers of a ring that one producer fills and `consumers` threads of both blocks of a cluster read.
__device__ __forceinline__ void begin_ring(const TensorMap& x, const Ring& ring, int consumers) {
  using namespace ptx;
  tensor_map_prefetch(&x);
  for (int s = 0; s < ring.stages; s++) {
    mbar_init(ring.full(s), 1);
    mbar_init(ring.empty(s), consumers / 32 * 2);
  }
  mbar_init_fence();
}

}  // namespace rvllm::gemm

// How the ring of a wgmma kernel is filled, and how its barriers begin.
#pragma once

#include "gemm/mainloop.cuh"

namespace rvllm::gemm {

// One thread: fills the ring with blocks [first, last) of K of one work tile of the scheduler after the other.
// load_weights(tile, k, ring) goes first, as weights depend on no kernel before this one; load_x(tile, k, ring) follows.
template <class Tile, class Scheduler, class LoadWeights, class LoadX>
__device__ __forceinline__ void fill_ring(Scheduler& scheduler, Ring ring, int first, int last, LoadWeights load_weights, LoadX load_x) {
  using namespace ptx;
  Tile t;
  bool more = scheduler.next(t);
  int ahead = more ? min(ring.stages, last - first) : 0;
  for (Ring r = ring; r.stage < ahead; r.stage++) load_weights(t, first + r.stage, r);
  griddep_wait();
  for (int s = 0; s < ahead; s++) {
    load_x(t, first + s, ring);
    ring.advance();
  }
  while (more) {
    for (int k = first + ahead; k < last; k++) {
      mbar_wait(ring.empty(ring.stage), ring.phase ^ 1);
      load_weights(t, k, ring);
      load_x(t, k, ring);
      ring.advance();
    }
    ahead = 0;
    more = scheduler.next(t);
  }
}

// One thread: the barriers of a ring that one producer fills and `readers` warps, those of all blocks of a cluster, read.
__device__ __forceinline__ void begin_ring(const Ring& ring, int readers) {
  using namespace ptx;
  for (int s = 0; s < ring.stages; s++) {
    mbar_init(ring.full(s), 1);
    mbar_init(ring.empty(s), readers);
  }
  mbar_init_fence();
}

}  // namespace rvllm::gemm

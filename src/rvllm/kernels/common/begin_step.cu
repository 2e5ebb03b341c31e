// The head of every step: brings the slots' block tables up to date from the step's metadata.
#include <cuda_runtime.h>

// header: the step's metadata; word 3 counts the updates. updates: int32 [count, 3] rows (slot, index, block).
// tables: int32 [slots, stride]. Grid: any; bound by latency alone.
extern "C" __global__ void begin_step(const int* __restrict__ header, const int* __restrict__ updates,
                                      int* __restrict__ tables, int stride) {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;");
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
  const int count = header[3];
  for (int i = blockIdx.x * blockDim.x + threadIdx.x; i < count; i += gridDim.x * blockDim.x) {
    const int* row = updates + 3 * i;
    tables[row[0] * stride + row[1]] = row[2];
  }
}

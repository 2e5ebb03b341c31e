// What NVRTC's own std lacks and CUTLASS 4.8.1 names; included before its headers.
#pragma once

#include <cuda/std/algorithm>
#include <cuda/std/type_traits>

namespace std {
using ::cuda::std::is_const_v;
using ::cuda::std::is_pointer_v;
using ::cuda::std::max;
using ::cuda::std::min;
using ::cuda::std::void_t;
}  // namespace std

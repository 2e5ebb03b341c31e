// The size of a block of the paged cache: here alone, for kernels and, by kernels/constants.py, for all of Python.
#pragma once

inline constexpr int KV_BLOCK = 16;  // positions

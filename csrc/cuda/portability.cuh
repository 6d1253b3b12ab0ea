// What device code needs of its compiler: nvcc, or the host's with the emulator of the tests, which
// runs the same kernels without a GPU.
#pragma once

#include <cstdint>

#if defined(__CUDACC__)

#include <cuda_runtime.h>

// An array of the block in shared memory.
#define SHARED(type, name, count) __shared__ __align__(16) type name[count]

// Before a loop: its count is known, and its arrays then stay in registers.
#define UNROLL _Pragma("unroll")

// The kernel may be an expression; the arguments are its own.
#define LAUNCH(kernel, grid, block, stream, ...) (kernel)<<<grid, block, 0, stream>>>(__VA_ARGS__)

#else

#include "cuda_emulator/emulator.h"

#define UNROLL

#endif

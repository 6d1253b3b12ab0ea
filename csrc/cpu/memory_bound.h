// Kernels whose time is that of reading and writing memory: a table of them for each dtype. Arrays are
// contiguous; their elements are of the table's dtype where nothing else is said, "wide" ones fp64 for
// fp64 and fp32 for all others. Each call runs in one thread, on the rows that it is given.
#pragma once

#include "checks.h"

namespace torch_plugins {

// Of torch_plugins/ops/fake_quant.py.
struct Clips {
  double high, low;
  int64_t bits;
};

// The part of rows in the gradients of the clips.
struct ClipGradients {
  double high, low;
};

struct MemoryBound {
  // x, xhat and gradients [rows, d]; K and its gradient [rows], wide. What a pointer that is null
  // would give is neither computed nor added.
  void (*fake_quant_kurtosis)(const void* x, int64_t rows, int64_t d, const Clips& clips, double eps,
                              void* xhat, void* k, bool stream);
  ClipGradients (*fake_quant_kurtosis_backward)(const void* g_xhat, const void* g_k, const void* x,
                                                int64_t rows, int64_t d, const Clips& clips,
                                                double eps, void* dx, bool stream);
};

// The kernels for this dtype on this machine.
const MemoryBound& memory_bound(ScalarType type);

// Of each instruction set, by dtype: float32, bfloat16, float16, float64.
extern const MemoryBound memory_bound_portable[4], memory_bound_avx2[4], memory_bound_avx512[4];

}  // namespace torch_plugins

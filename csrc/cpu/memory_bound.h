// Kernels whose time is that of reading and writing memory: a table of them for each dtype. Arrays
// are contiguous; their elements are of the table's dtype where nothing else is said, "wide" ones
// fp64 for fp64 and fp32 for all others. Each call runs in one thread, on the rows that it is
// given.
#pragma once

#include <algorithm>

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
  void (*fake_quant_kurtosis)(const void* x, int64_t rows, int64_t d, const Clips& clips,
                              double eps, void* xhat, void* k, bool past_caches);
  ClipGradients (*fake_quant_kurtosis_backward)(const void* g_xhat, const void* g_k, const void* x,
                                                int64_t rows, int64_t d, const Clips& clips,
                                                double eps, void* dx, bool past_caches);

  // Rows [rows, d]; rstd [rows], wide. The weight [d] is `same`, of the dtype of rows, or `wide`,
  // or both are null.
  void (*residual_add_rms_norm)(const void* residual, const void* update, const void* same,
                                const void* wide, int64_t rows, int64_t d, double eps, void* sum,
                                void* normed, void* rstd);
  // g_sum may be null. Adds to d_weight [d], wide, unless it is null.
  void (*residual_add_rms_norm_backward)(const void* g_sum, const void* g_normed, const void* sum,
                                         const void* rstd, const void* same, const void* wide,
                                         int64_t rows, int64_t d, void* dx, void* d_weight);
};

// The kernels for this dtype on this machine.
const MemoryBound& memory_bound(ScalarType type);

constexpr std::initializer_list<ScalarType> FLOATING = {ScalarType::Float, ScalarType::BFloat16,
                                                        ScalarType::Half, ScalarType::Double};

// fp64 of fp64, fp32 of all others: what is computed in.
ScalarType wide(ScalarType type);

// All but the last dimension are rows.
struct Rows {
  int64_t rows, d;
};
Rows rows_of(const Tensor& x);

// Checks the dtype of an argument, and that it has features.
void check_rows(const Tensor& x, const char* what);

// Checks that an argument has the dtype and shape of `x`.
void check_like(const Tensor& tensor, const char* what, const Tensor& x);

// Fresh memory of the first `dim` sizes of x, contiguous; without the dispatcher, which takes
// longer than a row of features.
Tensor fresh(const Tensor& x, int64_t dim, ScalarType type);
inline Tensor empty_of_rows(const Tensor& x) {
  return fresh(x, x.dim() - 1, wide(x.scalar_type()));
}

// Fresh memory of the shape, dtype and, where dense, strides of `tensor`. Large ones ask for huge
// pages: to map one takes about as long as to map a page of 4 KiB.
Tensor fresh_like(const Tensor& tensor);

// `tensor`, copied where its elements do not lie in the order of those of `like`, which is dense.
Tensor laid_out_like(const Tensor& tensor, const Tensor& like);

// Whether stores of rows of d elements shall go past the caches: that saves reading the memory that
// is written. Worth it from `least` bytes on: of the second-level caches where a kernel computes so
// much that it need not wait for the stores, of all caches where it does not.
constexpr int64_t SECOND_LEVEL = int64_t(4) << 20, ALL_CACHES = int64_t(32) << 20;
bool past_caches(const Tensor& output, int64_t d, int64_t least);

// Rows in chunks of about 8192 elements: what one thread takes at least, and the parts of sums over
// all rows. They are the same for any number of threads, and so are the sums.
constexpr int64_t CHUNK = 8192;

inline int64_t rows_of_a_chunk(int64_t d) { return d >= CHUNK ? 1 : CHUNK / (d > 0 ? d : 1); }
inline int64_t chunks_of(Rows x) {
  return (x.rows + rows_of_a_chunk(x.d) - 1) / rows_of_a_chunk(x.d);
}

// f(first row, rows) for the rows of each thread.
template <class F>
void each_range(Rows x, const F& f) {
  const int64_t size = rows_of_a_chunk(x.d);
  torch::stable::parallel_for(0, chunks_of(x), 4, [&](int64_t begin, int64_t end) {
    f(begin * size, std::min(end * size, x.rows) - begin * size);
  });
}

// f(first row, rows, number of the chunk) for each chunk.
template <class F>
void each_chunk(Rows x, const F& f) {
  const int64_t size = rows_of_a_chunk(x.d);
  each_range(x, [&](int64_t first, int64_t rows) {
    for (int64_t row = first; row < first + rows; row += size)
      f(row, std::min(size, first + rows - row), row / size);
  });
}

// Of each instruction set, by dtype: float32, bfloat16, float16, float64.
extern const MemoryBound memory_bound_portable[4], memory_bound_avx2[4], memory_bound_avx512[4];

}  // namespace torch_plugins

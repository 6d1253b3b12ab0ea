// Products with the experts' weights in floats, y = x W^T, accumulated in their own precision: for
// fp32, whose digits tensor cores do not have, and fp64. Tiles of 16 features in shared memory.
#pragma once

#include "numbers.cuh"

namespace torch_plugins::cuda {

constexpr int DENSE_THREADS = 256, DENSE_COLUMNS = 64, DENSE_FEATURES = 16;

template <class T>
struct DenseLinear {
  using W = typename Wide<T>::type;
  const T* x;             // [.., features]: row m of expert e is row_of[e * rows + m] of it,
  const int32_t* row_of;  // or e * rows + m without row_of,
  const int32_t* counts;  // for m < counts[e]
  int64_t rows, features;
  const T* weight;  // [experts, outputs, features], with these strides in elements
  int64_t expert_stride, output_stride;
  int64_t outputs, experts;
  W* y;  // row e * rows + m, y_stride elements each
  int64_t y_stride;
};

__device__ inline float multiply_add(float a, float b, float c) { return fmaf(a, b, c); }
__device__ inline double multiply_add(double a, double b, double c) { return fma(a, b, c); }

// A block makes ROWS x 64 outputs, a thread every 16th row and every 16th column of them.
template <class T, int ROWS>
__global__ void __launch_bounds__(DENSE_THREADS) dense_linear_kernel(DenseLinear<T> p) {
  using W = typename Wide<T>::type;
  constexpr int STRIDE = DENSE_FEATURES + 1, M = ROWS / 16, N = DENSE_COLUMNS / 16;
  SHARED(W, a, ROWS * STRIDE);
  SHARED(W, b, DENSE_COLUMNS * STRIDE);
  const int64_t across = ceil_div(p.outputs, DENSE_COLUMNS);
  const int64_t expert = blockIdx.z, count = p.counts[expert];
  const int64_t row = blockIdx.x / across * ROWS, column = blockIdx.x % across * DENSE_COLUMNS;
  if (row >= count) return;  // the whole block
  const int at = threadIdx.x / 16, c = threadIdx.x % 16;
  W sums[M][N] = {};
  for (int64_t k = 0; k < p.features; k += DENSE_FEATURES) {
    __syncthreads();  // the tiles before have been read
    const bool there = k + c < p.features;
    for (int i = at; i < ROWS; i += 16) {
      const int64_t m = expert * p.rows + row + i;
      const bool mine = there && row + i < count;
      const int64_t from = mine && p.row_of ? p.row_of[m] : m;
      a[i * STRIDE + c] = mine ? static_cast<W>(p.x[from * p.features + k + c]) : W(0);
    }
    for (int i = at; i < DENSE_COLUMNS; i += 16) {
      const int64_t o = column + i;
      const T* weight = p.weight + expert * p.expert_stride + o * p.output_stride;
      b[i * STRIDE + c] = there && o < p.outputs ? static_cast<W>(weight[k + c]) : W(0);
    }
    __syncthreads();
    UNROLL
    for (int i = 0; i < DENSE_FEATURES; ++i) UNROLL
    for (int m = 0; m < M; ++m) UNROLL
    for (int n = 0; n < N; ++n)
      sums[m][n] =
          multiply_add(a[(at + 16 * m) * STRIDE + i], b[(c + 16 * n) * STRIDE + i], sums[m][n]);
  }
  UNROLL
  for (int m = 0; m < M; ++m) UNROLL
  for (int n = 0; n < N; ++n) {
    const int64_t r = row + at + 16 * m, o = column + c + 16 * n;
    if (r < count && o < p.outputs) p.y[(expert * p.rows + r) * p.y_stride + o] = sums[m][n];
  }
}

template <class T>
void dense_linear(const DenseLinear<T>& p, cudaStream_t stream) {
  if (p.rows == 0 || p.outputs == 0 || p.experts == 0) return;
  const bool few = p.rows <= 16;
  const int64_t blocks = ceil_div(p.rows, few ? 16 : 64) * ceil_div(p.outputs, DENSE_COLUMNS);
  const auto kernel = few ? dense_linear_kernel<T, 16> : dense_linear_kernel<T, 64>;
  LAUNCH(kernel, dim3(blocks, 1, p.experts), dim3(DENSE_THREADS), stream, p);
}

}  // namespace torch_plugins::cuda

// Addition to the residual stream and RMSNorm of the sum, forward and backward: the formula is that
// of torch_plugins/ops/residual_add_rms_norm.py. A block, or a warp where rows are short, makes a
// row.
#pragma once

#include "numbers.cuh"

namespace torch_plugins::cuda {

constexpr int NORM_THREADS = 256, MOST_SPLITS = 64;

template <class T, int COUNT, class W = typename Wide<T>::type>
__global__ void __launch_bounds__(COUNT)
    add_norm_kernel(const T* residual, const T* update, Floats weight, int64_t d, double eps,
                    T* total, T* normed, W* rstd) {
  SHARED(W, memory, COUNT / WARP);
  const int64_t row = blockIdx.x, first = row * d;
  W squares = 0;
  for (int64_t i = threadIdx.x; i < d; i += COUNT) {
    const W sum = static_cast<W>(residual[first + i]) + static_cast<W>(update[first + i]);
    total[first + i] = static_cast<T>(sum);
    const W kept = static_cast<W>(total[first + i]);
    squares += kept * kept;
  }
  const W mean = over_block<COUNT>(squares, memory, Add()) / d;
  const W r = 1 / root(mean + static_cast<W>(eps));
  for (int64_t i = threadIdx.x; i < d; i += COUNT) {
    W n = static_cast<W>(total[first + i]) * r;  // this thread's own
    if (weight.data) n *= weight.get<W>(i);
    normed[first + i] = static_cast<T>(n);
  }
  if (threadIdx.x == 0) rstd[row] = r;
}

// What the backward kernels are given; g_sum and weight may be null.
template <class T, class W = typename Wide<T>::type>
struct AddNormBackward {
  const T *g_sum, *g_normed, *total;
  const W* rstd;
  Floats weight;
  int64_t rows, d;
  T* dx;
  Output d_weight;
  W* partial;  // [splits, d]: sums of every splits-th row; only with a weight
  int64_t splits;
};

template <class T, int COUNT>
__global__ void __launch_bounds__(COUNT) add_norm_backward_kernel(AddNormBackward<T> p) {
  using W = typename Wide<T>::type;
  SHARED(W, memory, COUNT / WARP);
  const int64_t row = blockIdx.x, first = row * p.d;
  const W r = p.rstd[row];
  const auto weighted = [&](int64_t i) {
    const W g = static_cast<W>(p.g_normed[first + i]);
    return p.weight.data ? g * p.weight.template get<W>(i) : g;
  };
  W sum = 0;
  for (int64_t i = threadIdx.x; i < p.d; i += COUNT)
    sum += weighted(i) * (static_cast<W>(p.total[first + i]) * r);
  const W mean = over_block<COUNT>(sum, memory, Add()) / p.d;
  for (int64_t i = threadIdx.x; i < p.d; i += COUNT) {
    const W n = static_cast<W>(p.total[first + i]) * r;
    W dx = r * (weighted(i) - n * mean);
    if (p.g_sum) dx += static_cast<W>(p.g_sum[first + i]);
    p.dx[first + i] = static_cast<T>(dx);
  }
}

// A thread a feature, a row of blocks a split of the rows.
template <class T>
__global__ void __launch_bounds__(NORM_THREADS) weight_partial_kernel(AddNormBackward<T> p) {
  using W = typename Wide<T>::type;
  const int64_t i = blockIdx.x * int64_t(NORM_THREADS) + threadIdx.x;
  if (i >= p.d) return;
  W sum = 0;
  for (int64_t row = blockIdx.y; row < p.rows; row += p.splits) {
    const W n = static_cast<W>(p.total[row * p.d + i]) * p.rstd[row];
    sum += static_cast<W>(p.g_normed[row * p.d + i]) * n;
  }
  p.partial[blockIdx.y * p.d + i] = sum;
}

template <class T>
__global__ void __launch_bounds__(NORM_THREADS) weight_gradient_kernel(AddNormBackward<T> p) {
  const int64_t i = blockIdx.x * int64_t(NORM_THREADS) + threadIdx.x;
  if (i >= p.d) return;
  typename Wide<T>::type sum = 0;
  for (int64_t split = 0; split < p.splits; ++split) sum += p.partial[split * p.d + i];
  p.d_weight.set(i, sum);
}

inline bool short_norm_rows(int64_t d) { return d <= 512; }

inline int64_t weight_splits(int64_t rows) {
  const int64_t splits = ceil_div(rows, 32);
  return splits < MOST_SPLITS ? splits : MOST_SPLITS;
}

template <class T, class W = typename Wide<T>::type>
void residual_add_rms_norm(const T* residual, const T* update, const Floats& weight, int64_t rows,
                           int64_t d, double eps, T* total, T* normed, W* rstd,
                           cudaStream_t stream) {
  if (rows == 0) return;
  const bool warp = short_norm_rows(d);
  const auto kernel = warp ? add_norm_kernel<T, WARP> : add_norm_kernel<T, NORM_THREADS>;
  LAUNCH(kernel, dim3(rows), dim3(warp ? WARP : NORM_THREADS), stream, residual, update, weight, d,
         eps, total, normed, rstd);
}

template <class T>
void residual_add_rms_norm_backward(const AddNormBackward<T>& p, cudaStream_t stream) {
  if (p.d == 0) return;
  const bool warp = short_norm_rows(p.d);
  const auto kernel =
      warp ? add_norm_backward_kernel<T, WARP> : add_norm_backward_kernel<T, NORM_THREADS>;
  if (p.rows > 0) LAUNCH(kernel, dim3(p.rows), dim3(warp ? WARP : NORM_THREADS), stream, p);
  if (!p.weight.data) return;
  const int64_t across = ceil_div(p.d, NORM_THREADS);
  const auto partial = weight_partial_kernel<T>;
  if (p.splits > 0) LAUNCH(partial, dim3(across, p.splits), dim3(NORM_THREADS), stream, p);
  const auto last = weight_gradient_kernel<T>;
  LAUNCH(last, dim3(across), dim3(NORM_THREADS), stream, p);
}

}  // namespace torch_plugins::cuda

// Kurtosis of rows, forward and backward: the formula is that of torch_plugins/ops/kurtosis.py. One
// block, or one warp where rows are short, goes through a row; a row is read again and not kept.
#pragma once

#include "numbers.cuh"

namespace torch_plugins::cuda {

constexpr int ROW_THREADS = 256;

// Of one row of d features, computed by all threads of a block: the same in all of them.
template <class W>
struct Moments {
  W mean, m_2, m_3, m_4, below;

  // m_3 only where asked for.
  template <int COUNT, class T>
  __device__ Moments(const T* row, int64_t d, double eps, bool third, W* memory,
                     std::integral_constant<int, COUNT>)
      : m_3(0) {
    W sum = 0;
    for (int64_t i = threadIdx.x; i < d; i += COUNT) sum += static_cast<W>(row[i]);
    mean = over_block<COUNT>(sum, memory, Add()) / d;
    W squares = 0, cubes = 0, fourths = 0;
    for (int64_t i = threadIdx.x; i < d; i += COUNT) {
      const W z = static_cast<W>(row[i]) - mean, square = z * z;
      squares += square;
      cubes += square * z;
      fourths += square * square;
    }
    m_2 = over_block<COUNT>(squares, memory, Add()) / d;
    if (third) m_3 = over_block<COUNT>(cubes, memory, Add()) / d;
    m_4 = over_block<COUNT>(fourths, memory, Add()) / d;
    below = m_2 * m_2 + static_cast<W>(eps);
  }

  __device__ W kurtosis() const { return m_4 / below; }

  // dK / dx of a feature.
  __device__ W slope(W x, W four_by_d) const {
    const W z = x - mean;
    return (z * z * z - m_3 - m_4 / below * m_2 * z) * four_by_d / below;
  }
};

template <int COUNT>
using Threads = std::integral_constant<int, COUNT>;

template <class T, int COUNT, class W = typename Wide<T>::type>
__global__ void __launch_bounds__(COUNT)
    kurtosis_kernel(const T* y, int64_t d, double eps, W* out) {
  SHARED(W, memory, COUNT / WARP);
  const int64_t row = blockIdx.x;
  const Moments<W> moments(y + row * d, d, eps, false, memory, Threads<COUNT>());
  if (threadIdx.x == 0) out[row] = moments.kurtosis();
}

template <class T, int COUNT, class W = typename Wide<T>::type>
__global__ void __launch_bounds__(COUNT)
    kurtosis_backward_kernel(const W* gradient, const T* y, int64_t d, double eps, T* dy) {
  SHARED(W, memory, COUNT / WARP);
  const int64_t row = blockIdx.x;
  const Moments<W> moments(y + row * d, d, eps, true, memory, Threads<COUNT>());
  const W four_by_d = W(4) / d, g = gradient[row];
  for (int64_t i = threadIdx.x; i < d; i += COUNT) {
    const W slope = moments.slope(static_cast<W>(y[row * d + i]), four_by_d);
    dy[row * d + i] = static_cast<T>(g * slope);
  }
}

inline bool short_rows(int64_t d) { return d <= 512; }

template <class T, class W = typename Wide<T>::type>
void kurtosis(const T* y, int64_t rows, int64_t d, double eps, W* out, cudaStream_t stream) {
  if (rows == 0) return;
  const auto kernel = short_rows(d) ? kurtosis_kernel<T, WARP> : kurtosis_kernel<T, ROW_THREADS>;
  const dim3 threads(short_rows(d) ? WARP : ROW_THREADS);
  LAUNCH(kernel, dim3(rows), threads, stream, y, d, eps, out);
}

template <class T, class W = typename Wide<T>::type>
void kurtosis_backward(const W* gradient, const T* y, int64_t rows, int64_t d, double eps, T* dy,
                       cudaStream_t stream) {
  if (rows == 0 || d == 0) return;
  const auto kernel =
      short_rows(d) ? kurtosis_backward_kernel<T, WARP> : kurtosis_backward_kernel<T, ROW_THREADS>;
  const dim3 threads(short_rows(d) ? WARP : ROW_THREADS);
  LAUNCH(kernel, dim3(rows), threads, stream, gradient, y, d, eps, dy);
}

}  // namespace torch_plugins::cuda

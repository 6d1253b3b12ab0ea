// Both at once, forward and backward: torch_plugins/ops/fake_quant_kurtosis.py.
#pragma once

#include "fake_quant.cuh"
#include "kurtosis.cuh"

namespace torch_plugins::cuda {

template <class T, int COUNT, class W = typename Wide<T>::type>
__global__ void __launch_bounds__(COUNT)
    fake_quant_kurtosis_kernel(const T* x, int64_t d, ClipArguments arguments, double eps,
                               T* quantized, W* out) {
  SHARED(W, memory, COUNT / WARP);
  const Clips<W> clips(arguments);
  const int64_t row = blockIdx.x;
  const Moments<W> moments(x + row * d, d, eps, false, memory, Threads<COUNT>());
  for (int64_t i = threadIdx.x; i < d; i += COUNT)
    quantized[row * d + i] = static_cast<T>(clips.quantized(static_cast<W>(x[row * d + i])));
  if (threadIdx.x == 0) out[row] = moments.kurtosis();
}

// A block goes through every gridDim.x-th row.
template <class T, int COUNT, class W = typename Wide<T>::type>
__global__ void __launch_bounds__(COUNT)
    fake_quant_kurtosis_backward_kernel(const T* g_quantized, const W* g_kurtosis, const T* x,
                                        int64_t rows, int64_t d, ClipArguments arguments,
                                        double eps, T* dx, W* partial) {
  SHARED(W, memory, COUNT / WARP);
  const Clips<W> clips(arguments);
  const W four_by_d = W(4) / d;
  ClipSums<W> sums;
  for (int64_t row = blockIdx.x; row < rows; row += gridDim.x) {
    const Moments<W> moments(x + row * d, d, eps, true, memory, Threads<COUNT>());
    const W of_kurtosis = g_kurtosis[row];
    for (int64_t i = threadIdx.x; i < d; i += COUNT) {
      const W value = static_cast<W>(x[row * d + i]);
      const W g = static_cast<W>(g_quantized[row * d + i]);
      const W through = clips.inside(value) ? g : W(0);
      dx[row * d + i] = static_cast<T>(through + of_kurtosis * moments.slope(value, four_by_d));
      sums.add(clips, value, g);
    }
  }
  sums.template store<COUNT>(partial, memory);
}

template <class T, class W = typename Wide<T>::type>
void fake_quant_kurtosis(const T* x, int64_t rows, int64_t d, const ClipArguments& clips,
                         double eps, T* quantized, W* out, cudaStream_t stream) {
  if (rows == 0) return;
  const auto kernel = short_rows(d) ? fake_quant_kurtosis_kernel<T, WARP>
                                    : fake_quant_kurtosis_kernel<T, ROW_THREADS>;
  const dim3 threads(short_rows(d) ? WARP : ROW_THREADS);
  LAUNCH(kernel, dim3(rows), threads, stream, x, d, clips, eps, quantized, out);
}

// partial: [blocks_for(rows), 3].
template <class T, class W = typename Wide<T>::type>
void fake_quant_kurtosis_backward(const T* g_quantized, const W* g_kurtosis, const T* x,
                                  int64_t rows, int64_t d, const ClipArguments& clips, double eps,
                                  T* dx, Output d_high, Output d_low, W* partial,
                                  cudaStream_t stream) {
  const int64_t blocks = d == 0 ? 0 : blocks_for(rows);
  const auto kernel = short_rows(d) ? fake_quant_kurtosis_backward_kernel<T, WARP>
                                    : fake_quant_kurtosis_backward_kernel<T, ROW_THREADS>;
  const dim3 threads(short_rows(d) ? WARP : ROW_THREADS);
  if (blocks > 0)
    LAUNCH(kernel, dim3(blocks), threads, stream, g_quantized, g_kurtosis, x, rows, d, clips, eps,
           dx, partial);
  const auto last = clip_gradients_kernel<W>;
  LAUNCH(last, dim3(1), dim3(THREADS), stream, partial, blocks, clips.bits, d_high, d_low);
}

}  // namespace torch_plugins::cuda

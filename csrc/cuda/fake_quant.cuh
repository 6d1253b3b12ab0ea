// Fake quantization between two clips, forward and backward: the formula is that of
// torch_plugins/ops/fake_quant.py.
#pragma once

#include "numbers.cuh"

namespace torch_plugins::cuda {

constexpr int THREADS = 256, MOST_BLOCKS = 1024;

// What a kernel is given, and what its threads make of it.
struct ClipArguments {
  Floats high, low;  // one element each
  int bits;
};

template <class W>
struct Clips {
  W high, low, steps, scale;

  __device__ explicit Clips(const ClipArguments& p)
      : high(p.high.get<W>(0)), low(p.low.get<W>(0)), steps((1 << p.bits) - 1) {
    scale = 1 / (high - low) * steps;
  }

  // NaN stays NaN.
  __device__ W quantized(W x) const {
    W place = x < low ? low : x;
    place = place > high ? high : place;
    return nearest((place - low) * scale) / scale + low;
  }

  __device__ bool above(W x) const { return x >= high; }
  __device__ bool below(W x) const { return x <= low; }
  __device__ bool inside(W x) const { return !above(x) && !below(x); }
};

// Sums over elements of what the clips' gradients are made of.
template <class W>
struct ClipSums {
  W rounding = 0, above = 0, below = 0;

  __device__ void add(const Clips<W>& clips, W x, W gradient) {
    if (clips.above(x)) above += gradient;
    if (clips.below(x)) below += gradient;
    if (clips.inside(x)) {
      const W place = (x - clips.low) * clips.scale;
      rounding += (place - nearest(place)) * gradient;
    }
  }

  // Those of a block, by all of its threads, as one row of `partial` [blocks, 3].
  template <int COUNT>
  __device__ void store(W* partial, W* memory) const {
    const W sums[3] = {over_block<COUNT>(rounding, memory, Add()),
                       over_block<COUNT>(above, memory, Add()),
                       over_block<COUNT>(below, memory, Add())};
    if (threadIdx.x == 0)
      for (int i = 0; i < 3; ++i) partial[blockIdx.x * 3 + i] = sums[i];
  }
};

template <class T>
__global__ void __launch_bounds__(THREADS)
    fake_quant_kernel(const T* x, int64_t count, ClipArguments arguments, T* out) {
  using W = typename Wide<T>::type;
  const Clips<W> clips(arguments);
  for (int64_t i = blockIdx.x * int64_t(THREADS) + threadIdx.x; i < count;
       i += gridDim.x * int64_t(THREADS))
    out[i] = static_cast<T>(clips.quantized(static_cast<W>(x[i])));
}

template <class T>
__global__ void __launch_bounds__(THREADS)
    fake_quant_backward_kernel(const T* gradient, const T* x, int64_t count,
                               ClipArguments arguments, T* dx, typename Wide<T>::type* partial) {
  using W = typename Wide<T>::type;
  SHARED(W, memory, THREADS / WARP);
  const Clips<W> clips(arguments);
  ClipSums<W> sums;
  for (int64_t i = blockIdx.x * int64_t(THREADS) + threadIdx.x; i < count;
       i += gridDim.x * int64_t(THREADS)) {
    const W value = static_cast<W>(x[i]), g = static_cast<W>(gradient[i]);
    dx[i] = static_cast<T>(clips.inside(value) ? g : W(0));
    sums.add(clips, value, g);
  }
  sums.template store<THREADS>(partial, memory);
}

// One block: partial sums [blocks, 3] to the gradients of the clips.
template <class W>
__global__ void __launch_bounds__(THREADS)
    clip_gradients_kernel(const W* partial, int64_t blocks, int bits, Output d_high, Output d_low) {
  SHARED(W, memory, THREADS / WARP);
  W sums[3] = {};
  for (int64_t i = threadIdx.x; i < blocks; i += THREADS)
    for (int k = 0; k < 3; ++k) sums[k] += partial[i * 3 + k];
  for (int k = 0; k < 3; ++k) sums[k] = over_block<THREADS>(sums[k], memory, Add());
  if (threadIdx.x == 0) {
    const W rounding = sums[0] / ((1 << bits) - 1);
    d_high.set(0, sums[1] - rounding);
    d_low.set(0, sums[2] + rounding);
  }
}

// Of work that loops, whatever the GPU: sums are then the same on all.
inline int64_t blocks_for(int64_t items) { return items < MOST_BLOCKS ? items : MOST_BLOCKS; }

inline int64_t fake_quant_blocks(int64_t count) { return blocks_for(ceil_div(count, 4 * THREADS)); }

template <class T>
void fake_quant(const T* x, int64_t count, const ClipArguments& clips, T* out,
                cudaStream_t stream) {
  if (count == 0) return;
  const auto kernel = fake_quant_kernel<T>;
  LAUNCH(kernel, dim3(ceil_div(count, 4 * THREADS)), dim3(THREADS), stream, x, count, clips, out);
}

// partial: [fake_quant_blocks(count), 3].
template <class T, class W = typename Wide<T>::type>
void fake_quant_backward(const T* gradient, const T* x, int64_t count, const ClipArguments& clips,
                         T* dx, Output d_high, Output d_low, W* partial, cudaStream_t stream) {
  const int64_t blocks = fake_quant_blocks(count);
  const auto kernel = fake_quant_backward_kernel<T>;
  if (blocks > 0)
    LAUNCH(kernel, dim3(blocks), dim3(THREADS), stream, gradient, x, count, clips, dx, partial);
  const auto last = clip_gradients_kernel<W>;
  LAUNCH(last, dim3(1), dim3(THREADS), stream, partial, blocks, clips.bits, d_high, d_low);
}

}  // namespace torch_plugins::cuda

// Products with the experts' weights in bf16 and fp16, y = x W^T, by tensor cores, accumulated in
// fp32. A block makes ROWS x 64 outputs, a warp ROWS x 16 of them.
#pragma once

#include <type_traits>

#include "dense_linear.cuh"
#include "mma.cuh"
#include "tiles.cuh"

namespace torch_plugins::cuda {

constexpr int HALF_THREADS = 128, HALF_FEATURES = TILE_BYTES / 2;

__device__ inline void mma(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], bf16) {
  mma_bf16(d, a, b);
}

__device__ inline void mma(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], half) {
  mma_f16(d, a, b);
}

// Numbers of 16 bits whose rows, `stride` apart, begin where vectors of the GPU may.
template <class T>
__device__ bool aligned(const T* at, int64_t stride) {
  return reinterpret_cast<uintptr_t>(at) % 16 == 0 && stride % 8 == 0;
}

template <class T, int ROWS>
__global__ void __launch_bounds__(HALF_THREADS) half_linear_kernel(DenseLinear<T> p) {
  constexpr int M = ROWS / 16, N = 2;
  SHARED(uint8_t, a, (ROWS * TILE_STRIDE));
  SHARED(uint8_t, b, (DENSE_COLUMNS * TILE_STRIDE));
  const int64_t across = ceil_div(p.outputs, DENSE_COLUMNS);
  const int64_t expert = blockIdx.z, count = p.counts[expert];
  const int64_t row = blockIdx.x / across * ROWS, column = blockIdx.x % across * DENSE_COLUMNS;
  if (row >= count) return;  // the whole block
  const uint16_t* x = reinterpret_cast<const uint16_t*>(p.x);
  const uint16_t* weight = reinterpret_cast<const uint16_t*>(p.weight) + expert * p.expert_stride;
  const bool vectors_a = aligned(x, p.features), vectors_b = aligned(weight, p.output_stride);
  const int warp = threadIdx.x / WARP, r = threadIdx.x % WARP / 4, c = threadIdx.x % 4 * 4;

  const auto of_input = [&](int64_t k) {
    return [&, k](int i, int part) -> uint4 {
      const int64_t m = expert * p.rows + row + i, from = k + part * 8;
      if (row + i >= count || from >= p.features) return {0, 0, 0, 0};
      const uint16_t* of_row = x + (p.row_of ? p.row_of[m] : m) * p.features;
      return from_16_bits(of_row, from, p.features, vectors_a && from + 8 <= p.features);
    };
  };
  const auto of_weight = [&](int64_t k) {
    return [&, k](int i, int part) -> uint4 {
      const int64_t o = column + i, from = k + part * 8;
      if (o >= p.outputs || from >= p.features) return {0, 0, 0, 0};
      return from_16_bits(weight + o * p.output_stride, from, p.features,
                          vectors_b && from + 8 <= p.features);
    };
  };

  TilesUnderWay<ROWS, DENSE_COLUMNS, HALF_THREADS> next;
  next.fetch(of_input(0), of_weight(0));
  float sums[M][N][4] = {};
  for (int64_t k = 0; k < p.features; k += HALF_FEATURES) {
    __syncthreads();  // the tiles before have been read
    next.put(a, b);
    __syncthreads();
    const int64_t then = k + HALF_FEATURES;
    if (then < p.features) next.fetch(of_input(then), of_weight(then));
    UNROLL
    for (int step = 0; step < TILE_BYTES; step += 32) {
      uint32_t right[N][2];
      UNROLL
      for (int n = 0; n < N; ++n) UNROLL
      for (int i = 0; i < 2; ++i) right[n][i] = word(b, (warp * N + n) * 8 + r, step + c + 16 * i);
      UNROLL
      for (int m = 0; m < M; ++m) {
        uint32_t left[4];
        UNROLL
        for (int i = 0; i < 4; ++i)
          left[i] = word(a, m * 16 + r + i % 2 * 8, step + c + i / 2 * 16);
        UNROLL
        for (int n = 0; n < N; ++n) mma(sums[m][n], left, right[n], T());
      }
    }
  }
  UNROLL
  for (int m = 0; m < M; ++m) UNROLL
  for (int n = 0; n < N; ++n) UNROLL
  for (int i = 0; i < 4; ++i) {
    const int64_t t = row + m * 16 + r + i / 2 * 8;
    const int64_t o = column + (warp * N + n) * 8 + c / 2 + i % 2;
    if (t < count && o < p.outputs) p.y[(expert * p.rows + t) * p.y_stride + o] = sums[m][n][i];
  }
}

// By tensor cores where they have the precision of T.
template <class T>
void experts_linear(const DenseLinear<T>& p, cudaStream_t stream) {
  if constexpr (std::is_same_v<T, float> || std::is_same_v<T, double>) {
    dense_linear<T>(p, stream);
  } else if (p.rows > 0 && p.outputs > 0 && p.experts > 0) {
    const bool few = p.rows <= 16;
    const int64_t blocks = ceil_div(p.rows, few ? 16 : 64) * ceil_div(p.outputs, DENSE_COLUMNS);
    const auto kernel = few ? half_linear_kernel<T, 16> : half_linear_kernel<T, 64>;
    LAUNCH(kernel, dim3(blocks, 1, p.experts), dim3(HALF_THREADS), stream, p);
  }
}

}  // namespace torch_plugins::cuda

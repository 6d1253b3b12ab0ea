// Activations to integer codes, row by row: torch_plugins/ops/int4.py has the formula.
#pragma once

#include "numbers.cuh"

namespace torch_plugins::cuda {

constexpr int QUANTIZE_THREADS = 256;

struct QuantizeRows {
  Floats x;  // [rows, columns]
  int64_t columns;
  int input_bits;
  Floats given_scale;  // one element, or null: 2 max|x| / (2 ** bits - 1) of each row
  Floats zero;         // one element, or null: 0
  uint8_t* codes;      // [rows, stride]; columns beyond the last: code 0
  int64_t stride;      // in bytes, a multiple of 16
  float* scale;        // [rows]; NaN where an element is
  int64_t first = 0;   // the element of x where the first row begins
  // With experts: only counts[e] of the rows_of_each rows of expert e.
  const int32_t* counts = nullptr;
  int64_t rows_of_each = 1;
};

// The code of x. Codes have no NaN: `lost` says that there was one.
__device__ inline int code_of(float x, float scale, float zero, bool shifted, int most,
                              bool& lost) {
  float place = x / scale;
  if (shifted) place += zero;
  lost |= place != place;
  place = place > most - 1 ? most - 1 : place < -most ? -most : place;
  return place == place ? static_cast<int>(nearest(place)) : 0;
}

// One block a row. BITS = 4: two codes a byte, as weights are stored; BITS = 8: int8.
template <int BITS>
__global__ void __launch_bounds__(QUANTIZE_THREADS) quantize_rows_kernel(QuantizeRows p) {
  SHARED(uint32_t, memory, QUANTIZE_THREADS / WARP);
  const int64_t row = blockIdx.x, first = p.first + row * p.columns;
  if (p.counts && row % p.rows_of_each >= p.counts[row / p.rows_of_each]) return;
  float scale = 1;
  if (p.given_scale.data) {
    scale = p.given_scale[0];
  } else {
    // Floats without a sign are in the order of their bits, and NaN is the largest.
    uint32_t largest = 0;
    for (int64_t i = threadIdx.x; i < p.columns; i += QUANTIZE_THREADS) {
      const uint32_t bits = __float_as_uint(p.x[first + i]) & 0x7fffffff;
      largest = bits > largest ? bits : largest;
    }
    largest = over_block<QUANTIZE_THREADS>(largest, memory, Larger());
    scale = 2 * __uint_as_float(largest) / static_cast<float>((1 << p.input_bits) - 1);
    if (scale == 0) scale = 1;
  }
  const bool shifted = p.zero.data != nullptr;
  const float zero = shifted ? p.zero[0] : 0;
  const int most = 1 << (p.input_bits - 1);
  bool lost = false;
  constexpr int EACH = 8 / BITS;
  for (int64_t byte = threadIdx.x; byte < p.stride; byte += QUANTIZE_THREADS) {
    int value[EACH];
    for (int i = 0; i < EACH; ++i) {
      const int64_t column = byte * EACH + i;
      const bool there = column < p.columns;
      value[i] = there ? code_of(p.x[first + column], scale, zero, shifted, most, lost) : 0;
    }
    p.codes[row * p.stride + byte] =
        BITS == 8 ? value[0] : (value[0] + 8) | (value[EACH - 1] + 8) << 4;
  }
  const uint32_t any_lost = over_block<QUANTIZE_THREADS>(uint32_t(lost), memory, Larger());
  if (threadIdx.x == 0) p.scale[row] = any_lost ? __uint_as_float(0x7fc00000) : scale;
}

inline int64_t code_stride(int64_t columns, bool int4) {
  return ceil_div(int4 ? ceil_div(columns, 2) : columns, 16) * 16;
}

inline void quantize_rows(const QuantizeRows& p, int64_t rows, bool int4, cudaStream_t stream) {
  if (rows == 0) return;
  const auto kernel = int4 ? quantize_rows_kernel<4> : quantize_rows_kernel<8>;
  LAUNCH(kernel, dim3(rows), dim3(QUANTIZE_THREADS), stream, p);
}

}  // namespace torch_plugins::cuda

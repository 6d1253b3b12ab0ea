// The kernels of experts.h, for the instructions that a file is compiled for.
#pragma once

#include "cpu/experts.h"
#include "cpu/vec.h"

namespace torch_plugins {
namespace {

void activate_all(Activation kind, float* x, const float* other, int64_t count) {
  for (int64_t i = 0; i < count; i += WIDTH) {
    const int64_t left = count - i < WIDTH ? count - i : WIDTH;
    Floats value = activate(kind, load(x + i, left));
    if (other != nullptr) value = value * load(other + i, left);
    store(x + i, value, left);
  }
}

constexpr int ROWS = 4, OUTPUTS = 4;

// ROWS_ inputs by OUTPUTS_ rows of the weight, which are read once.
template <class W, int ROWS_, int OUTPUTS_>
INLINE void products_tile(const float* x, int64_t x_stride, const W* w, int64_t w_stride,
                          int64_t count, float* y, int64_t y_stride) {
  Floats sums[ROWS_][OUTPUTS_] = {};
  auto step = [&](int64_t k, auto... left) __attribute__((always_inline)) {
    Floats of_row[ROWS_];
#pragma GCC unroll 4
    for (int i = 0; i < ROWS_; ++i) of_row[i] = load(x + i * x_stride + k, left...);
#pragma GCC unroll 4
    for (int j = 0; j < OUTPUTS_; ++j) {
      const Floats weight = load(w + j * w_stride + k, left...);
#pragma GCC unroll 4
      for (int i = 0; i < ROWS_; ++i) sums[i][j] = fma(of_row[i], weight, sums[i][j]);
    }
  };
  int64_t k = 0;
  for (; k + WIDTH <= count; k += WIDTH) step(k);
  if (k < count) step(k, count - k);
#pragma GCC unroll 4
  for (int i = 0; i < ROWS_; ++i)
#pragma GCC unroll 4
    for (int j = 0; j < OUTPUTS_; ++j) y[i * y_stride + j] = sum(sums[i][j]);
}

template <class W, int OUTPUTS_>
INLINE void products_rows(const float* x, int64_t x_stride, int64_t rows, const W* w,
                          int64_t w_stride, int64_t count, float* y, int64_t y_stride) {
  for (; rows > 0; rows -= ROWS, x += ROWS * x_stride, y += ROWS * y_stride) switch (rows) {
      case 1:
        products_tile<W, 1, OUTPUTS_>(x, x_stride, w, w_stride, count, y, y_stride);
        break;
      case 2:
        products_tile<W, 2, OUTPUTS_>(x, x_stride, w, w_stride, count, y, y_stride);
        break;
      case 3:
        products_tile<W, 3, OUTPUTS_>(x, x_stride, w, w_stride, count, y, y_stride);
        break;
      default:
        products_tile<W, ROWS, OUTPUTS_>(x, x_stride, w, w_stride, count, y, y_stride);
    }
}

template <class W>
void products(const float* x, int64_t x_stride, int64_t rows, const W* w, int64_t w_stride,
              int64_t outputs, int64_t count, float* y, int64_t y_stride) {
  int64_t j = 0;
  for (; j + OUTPUTS <= outputs; j += OUTPUTS)
    products_rows<W, OUTPUTS>(x, x_stride, rows, w + j * w_stride, w_stride, count, y + j,
                              y_stride);
  for (; j < outputs; ++j)
    products_rows<W, 1>(x, x_stride, rows, w + j * w_stride, w_stride, count, y + j, y_stride);
}

void products_bf16(const float* x, int64_t x_stride, int64_t rows, const uint16_t* w,
                   int64_t w_stride, int64_t outputs, int64_t count, float* y, int64_t y_stride) {
  products(x, x_stride, rows, reinterpret_cast<const bf16*>(w), w_stride, outputs, count, y,
           y_stride);
}

constexpr ExpertKernels EXPERT_KERNELS{activate_all, products<float>, products_bf16};

}  // namespace
}  // namespace torch_plugins

// What sparse_moe needs of one instruction set.
#pragma once

#include <cstdint>

#include "cpu/activation.h"

namespace torch_plugins {

struct ExpertKernels {
  // x = act(x) * other, or act(x) where other is null.
  void (*activate)(Activation kind, float* x, const float* other, int64_t count);
  // y[row, i] = sum over k of x[row, k] w[i, k] for few rows, w in fp32, bf16.
  void (*products)(const float* x, int64_t x_stride, int64_t rows, const float* w, int64_t w_stride,
                   int64_t outputs, int64_t count, float* y, int64_t y_stride);
  void (*products_bf16)(const float* x, int64_t x_stride, int64_t rows, const uint16_t* w,
                        int64_t w_stride, int64_t outputs, int64_t count, float* y,
                        int64_t y_stride);
};

const ExpertKernels& experts_portable();
#if defined(__x86_64__)
const ExpertKernels& experts_avx2();
const ExpertKernels& experts_avx512();
#elif defined(__aarch64__)
const ExpertKernels& experts_neon();
#endif

}  // namespace torch_plugins

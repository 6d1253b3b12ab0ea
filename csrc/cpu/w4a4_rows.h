// Memory for inputs as codes.
#pragma once

#include <cstdlib>
#include <memory>
#include <new>

#include "cpu/w4a4.h"

namespace torch_plugins {

class QuantizedRows {
 public:
  Codes codes;

  // Uninitialized; `kernels.height` - 1 rows more than asked for may be read.
  QuantizedRows(const Kernels& kernels, int64_t rows, const Quantization& how) {
    const int64_t size = how.columns / how.groups, aligned = kernels.alignment;
    const int64_t group = (size + aligned - 1) / aligned * aligned;
    // Rows a multiple of 4096 bytes apart would meet in the same lines of the cache.
    const int64_t stride = (group * how.groups + 63) / 64 * 64 + 64;
    const int64_t all = rows + kernels.height - 1;
    values_ = take<int8_t>(all * stride);
    sums_ = take<int32_t>(rows * how.groups);
    scales_ = take<float>(rows);
    codes = {values_.get(), sums_.get(), scales_.get(), how.zero, stride, group};
  }

 private:
  struct Free {
    void operator()(void* memory) const { std::free(memory); }
  };
  template <class T>
  using Memory = std::unique_ptr<T[], Free>;

  template <class T>
  static Memory<T> take(int64_t count) {
    const size_t bytes = (static_cast<size_t>(count) * sizeof(T) + 64) / 64 * 64;
    void* memory = std::aligned_alloc(64, bytes);
    if (memory == nullptr) throw std::bad_alloc();
    return Memory<T>(static_cast<T*>(memory));
  }

  Memory<int8_t> values_;
  Memory<int32_t> sums_;
  Memory<float> scales_;
};

}  // namespace torch_plugins

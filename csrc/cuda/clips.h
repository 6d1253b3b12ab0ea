// What operators with clips check and return.
#pragma once

#include "cuda/fake_quant.cuh"
#include "cuda/launch.h"

namespace torch_plugins::cuda {

// `high` and `low` are "operator: argument".
inline ClipArguments clips_of(const Tensor& x, const Tensor& clip_high, const char* high,
                              const Tensor& clip_low, const char* low, int64_t bits,
                              const char* what) {
  check_one(clip_high, high, x);
  check_one(clip_low, low, x);
  if (bits < 1 || bits > 30) fail(what, " is ", bits, ": must be 1 to 30");
  return {floats(clip_high), floats(clip_low), static_cast<int>(bits)};
}

inline Output output(Tensor& tensor) { return {tensor.mutable_data_ptr(), kind_of(tensor)}; }

inline void check_gradient(const Tensor& gradient, const char* what, const Tensor& x) {
  check_device(gradient, what, x);
  check_dtype(gradient, what, {x.scalar_type()});
  check_same_shape(gradient, what, x);
}

}  // namespace torch_plugins::cuda

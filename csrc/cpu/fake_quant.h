// What fake_quant and fake_quant_kurtosis share: arguments in, gradients out.
#pragma once

#include <tuple>
#include <vector>

#include "cpu/memory_bound.h"

namespace torch_plugins {

// Checks x, the clips and bits; `op` is the operator.
Clips checked_clips(const char* op, const Tensor& x, const Tensor& high, const Tensor& low,
                    int64_t bits);

// The sum over the chunks, each as its clip is.
std::tuple<Tensor, Tensor> sum_of(const std::vector<ClipGradients>& chunks, const Tensor& high,
                                  const Tensor& low);

}  // namespace torch_plugins

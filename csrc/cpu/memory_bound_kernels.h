// The table of memory_bound.h for the instruction set of the file that includes this.
#pragma once

#include "cpu/fake_quant_kernel.h"
#include "cpu/residual_add_rms_norm_kernel.h"

namespace torch_plugins {
namespace {

template <class T>
constexpr MemoryBound kernels_of() {
  return {fake_quant_kurtosis<T>, fake_quant_kurtosis_backward<T>, residual_add_rms_norm<T>,
          residual_add_rms_norm_backward<T>};
}

}  // namespace
}  // namespace torch_plugins

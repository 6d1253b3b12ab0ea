// The table of memory_bound.h for the instruction set of the file that includes this.
#pragma once

#include "cpu/fake_quant_kernel.h"

namespace torch_plugins {
namespace {

template <class T>
constexpr MemoryBound kernels_of() {
  return {fake_quant_kurtosis<T>, fake_quant_kurtosis_backward<T>};
}

}  // namespace
}  // namespace torch_plugins

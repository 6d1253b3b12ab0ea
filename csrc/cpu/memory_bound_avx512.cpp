#include "cpu/memory_bound_kernels.h"

namespace torch_plugins {

const MemoryBound memory_bound_avx512[4] = {kernels_of<float>(), kernels_of<bf16>(),
                                            kernels_of<f16>(), kernels_of<double>()};

}  // namespace torch_plugins

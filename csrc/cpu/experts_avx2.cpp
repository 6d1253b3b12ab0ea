#include "cpu/experts_kernel.h"

namespace torch_plugins {

const ExpertKernels& experts_avx2() { return EXPERT_KERNELS; }

}  // namespace torch_plugins

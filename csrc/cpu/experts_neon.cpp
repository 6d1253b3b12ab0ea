#include "cpu/experts_kernel.h"

namespace torch_plugins {

const ExpertKernels& experts_neon() { return EXPERT_KERNELS; }

}  // namespace torch_plugins

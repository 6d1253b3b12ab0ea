// Which instructions this machine has. Kernels exist once for each level; cpuid picks at run time.
#pragma once

namespace torch_plugins {

enum class Level { portable = 0, neon = 1, avx2 = 2, avx512 = 3, amx = 4 };

// The best level of this machine, or the one named by TORCH_PLUGINS_CPU (portable, neon, avx2,
// avx512, amx) where the machine has it. Found once; the same in every thread.
Level level();

const char* name_of(Level level);

}  // namespace torch_plugins

// The CPU library's own word on what it runs on, for Python, which asks by ctypes. Each operator
// registers itself, beside its driver.
#include "cpu/level.h"

extern "C" __attribute__((visibility("default"))) const char* torch_plugins_cpu_level() {
  return torch_plugins::name_of(torch_plugins::level());
}

// The CPU library: what it is and what it runs on. Each operator registers itself, beside its
// driver.
#include "checks.h"
#include "cpu/level.h"

namespace torch_plugins {
namespace {

// Exported for Python, which asks by ctypes: no tensor is involved.
}  // namespace
}  // namespace torch_plugins

extern "C" __attribute__((visibility("default"))) const char* torch_plugins_cpu_level() {
  return torch_plugins::name_of(torch_plugins::level());
}

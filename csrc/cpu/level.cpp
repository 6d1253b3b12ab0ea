#include "cpu/level.h"

#include <cstdlib>
#include <cstring>
#include <initializer_list>

#if defined(__x86_64__)
#include <cpuid.h>
#endif
#if defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif
#if defined(__aarch64__) && defined(__linux__)
#include <sys/auxv.h>
#endif

namespace torch_plugins {
namespace {

#if defined(__x86_64__)
// The kernel of the operating system saves tile registers only of processes that ask for them.
bool may_use_tiles() {
#if defined(__linux__)
  constexpr long request_permission = 0x1023, tile_data = 18;
  return syscall(SYS_arch_prctl, request_permission, tile_data) == 0;
#else
  return false;
#endif
}

Level detect() {
  __builtin_cpu_init();
  if (!__builtin_cpu_supports("avx2") || !__builtin_cpu_supports("fma")) return Level::portable;
  bool avx512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") &&
                __builtin_cpu_supports("avx512vnni");
  if (!avx512) return Level::avx2;
#if defined(AMX_EMULATED)
  return Level::amx;
#endif
  unsigned a = 0, b = 0, c = 0, d = 0;
  __get_cpuid_count(7, 0, &a, &b, &c, &d);
  const bool tiles = (d >> 24 & 1) && (d >> 25 & 1);  // AMX-TILE, AMX-INT8
  return tiles && may_use_tiles() ? Level::amx : Level::avx512;
}
#elif defined(__aarch64__)
Level detect() {
#if defined(__linux__)
  constexpr unsigned long dot_products = 1UL << 20;  // HWCAP_ASIMDDP
  return getauxval(AT_HWCAP) & dot_products ? Level::neon : Level::portable;
#elif defined(__APPLE__)
  return Level::neon;  // every Apple silicon has them
#else
  return Level::portable;
#endif
}
#else
Level detect() { return Level::portable; }
#endif

Level choose() {
  const Level best = detect();
  const char* asked = std::getenv("TORCH_PLUGINS_CPU");
  if (asked == nullptr) return best;
  for (Level other : {Level::portable, Level::neon, Level::avx2, Level::avx512, Level::amx}) {
    const bool has = other <= best && (other != Level::neon || best == Level::neon);
    if (has && std::strcmp(asked, name_of(other)) == 0) return other;
  }
  return best;
}

}  // namespace

Level level() {
  static const Level chosen = choose();
  return chosen;
}

const char* name_of(Level level) {
  switch (level) {
    case Level::neon:
      return "neon";
    case Level::avx2:
      return "avx2";
    case Level::avx512:
      return "avx512";
    case Level::amx:
      return "amx";
    default:
      return "portable";
  }
}

}  // namespace torch_plugins

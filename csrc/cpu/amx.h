// The five instructions of AMX that the kernels use; or, where AMX_EMULATED is defined, the same in
// plain C++, as the processor's manual defines them, for machines without.
#pragma once

#include <cstdint>
#include <cstring>

namespace torch_plugins {
namespace {

// What ldtilecfg reads: palette 1, and the shape of each of the eight tiles.
struct alignas(64) TileShapes {
  uint8_t palette = 1, start_row = 0, reserved[14] = {};
  uint16_t row_bytes[16] = {};
  uint8_t rows[16] = {};
};

#if defined(AMX_EMULATED)

struct Tiles {
  TileShapes shapes;
  uint8_t bytes[8][16][64];
};
thread_local Tiles emulated;

inline void tile_configure(const TileShapes& shapes) {
  emulated.shapes = shapes;
  std::memset(emulated.bytes, 0, sizeof emulated.bytes);
}
inline void tile_release() { emulated.shapes = TileShapes(); }
template <int TILE_>
inline void tile_zero() {
  std::memset(emulated.bytes[TILE_], 0, sizeof emulated.bytes[TILE_]);
}
template <int TILE_>
inline void tile_load(const void* from, int64_t stride) {
  tile_zero<TILE_>();
  for (int row = 0; row < emulated.shapes.rows[TILE_]; ++row)
    std::memcpy(emulated.bytes[TILE_][row], static_cast<const uint8_t*>(from) + row * stride,
                emulated.shapes.row_bytes[TILE_]);
}
template <int TILE_>
inline void tile_store(void* to, int64_t stride) {
  for (int row = 0; row < emulated.shapes.rows[TILE_]; ++row)
    std::memcpy(static_cast<uint8_t*>(to) + row * stride, emulated.bytes[TILE_][row],
                emulated.shapes.row_bytes[TILE_]);
}
// tdpbssd: C[m][n] += sum over k and i < 4 of A[m][4 k + i] * B[k][4 n + i].
template <int C, int A, int B>
inline void tile_dot() {
  const TileShapes& shapes = emulated.shapes;
  for (int m = 0; m < shapes.rows[C]; ++m)
    for (int n = 0; n < shapes.row_bytes[C] / 4; ++n) {
      int32_t total;
      std::memcpy(&total, &emulated.bytes[C][m][4 * n], 4);
      for (int k = 0; k < shapes.row_bytes[A] / 4; ++k)
        for (int i = 0; i < 4; ++i)
          total += static_cast<int8_t>(emulated.bytes[A][m][4 * k + i]) *
                   static_cast<int8_t>(emulated.bytes[B][k][4 * n + i]);
      std::memcpy(&emulated.bytes[C][m][4 * n], &total, 4);
    }
}

#else

// Written as text: the intrinsics of GCC take no template arguments, and its ldtilecfg tells the
// compiler of eight bytes of the shapes only, so that the stores to the others are dropped.
inline void tile_configure(const TileShapes& shapes) { asm volatile("ldtilecfg %0" ::"m"(shapes)); }
inline void tile_release() { asm volatile("tilerelease"); }
template <int TILE_>
inline void tile_zero() {
  asm volatile("tilezero %%tmm%c0" ::"i"(TILE_));
}
template <int TILE_>
inline void tile_load(const void* from, int64_t stride) {
  asm volatile("tileloadd (%0,%1,1), %%tmm%c2" ::"r"(from), "r"(stride), "i"(TILE_) : "memory");
}
template <int TILE_>
inline void tile_store(void* to, int64_t stride) {
  asm volatile("tilestored %%tmm%c2, (%0,%1,1)" ::"r"(to), "r"(stride), "i"(TILE_) : "memory");
}
template <int C, int A, int B>
inline void tile_dot() {
  asm volatile("tdpbssd %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"i"(C), "i"(A), "i"(B));
}

#endif

}  // namespace
}  // namespace torch_plugins

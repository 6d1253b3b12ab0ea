// mma.sync with int8 and int4, written from the tables of the PTX manual ("Matrix Fragments for
// mma.m16n8k32" and "... mma.m16n8k64"): for each element that a lane holds, its row and its
// column.
#pragma once

#include "emulator.h"

namespace emulator {

struct Fragments {
  uint32_t a[4], b[2];
};

// Element i of a register that holds 32 / BITS of them, with its sign.
template <int BITS>
int element(uint32_t word, int i) {
  return int32_t(word << (32 - BITS * (i + 1))) >> (32 - BITS);
}

// The product of the matrices that the lanes hold together.
template <int BITS>
void multiply(Warp& warp, unsigned side) {
  constexpr int EACH = 32 / BITS, K = 8 * EACH;
  int left[16][K], right[K][8];
  for (int lane = 0; lane < WARP; ++lane) {
    const Fragments held = of_lane<Fragments>(side, lane);
    const int group = lane >> 2, in_group = lane & 3;
    for (int i = 0; i < 4 * EACH; ++i) {  // elements a0, a1, ... of the manual
      const int row = i / EACH % 2 == 0 ? group : group + 8;
      const int column = in_group * EACH + i % EACH + (i < 2 * EACH ? 0 : K / 2);
      left[row][column] = element<BITS>(held.a[i / EACH], i % EACH);
    }
    for (int i = 0; i < 2 * EACH; ++i) {
      const int row = in_group * EACH + i % EACH + (i < EACH ? 0 : K / 2);
      right[row][group] = element<BITS>(held.b[i / EACH], i % EACH);
    }
  }
  for (int row = 0; row < 16; ++row)
    for (int column = 0; column < 8; ++column) {
      int sum = 0;
      for (int k = 0; k < K; ++k) sum += left[row][k] * right[k][column];
      warp.product[side][row * 8 + column] = sum;
    }
}

template <int BITS>
void mma(const char* what, int32_t (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  Fragments mine;
  std::memcpy(mine.a, a, sizeof a);
  std::memcpy(mine.b, b, sizeof b);
  Warp& warp = *now().warp;
  const unsigned side = exchange(what, mine, [&](unsigned side) { multiply<BITS>(warp, side); });
  const int group = now().lane >> 2, in_group = now().lane & 3;
  for (int i = 0; i < 4; ++i) {  // c0 to c3
    const int row = i < 2 ? group : group + 8, column = in_group * 2 + (i & 1);
    d[i] = int32_t(uint32_t(d[i]) + uint32_t(warp.product[side][row * 8 + column]));
  }
}

inline void mma_s8(int32_t (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  mma<8>("mma s8", d, a, b);
}

inline void mma_s4(int32_t (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  mma<4>("mma s4", d, a, b);
}

}  // namespace emulator

// mma.sync with int8, int4, bf16 and fp16, written from the tables of the PTX manual ("Matrix
// Fragments for mma.m16n8k32", "... mma.m16n8k64" and "... mma.m16n8k16"): for each element that a
// lane holds, its row and its column.
#pragma once

#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include "emulator.h"

namespace emulator {

struct Fragments {
  uint32_t a[4], b[2];
};

// Registers of 32 / BITS integers with their signs.
template <int BITS>
struct Integers {
  using Number = int32_t;
  static constexpr int EACH = 32 / BITS;

  static Number element(uint32_t word, int i) {
    return int32_t(word << (32 - BITS * (i + 1))) >> (32 - BITS);
  }
  // Wraps, as without .satfinite.
  static Number add(Number a, Number b) { return int32_t(uint32_t(a) + uint32_t(b)); }
};

template <class T>
struct Floats16 {
  using Number = float;
  static constexpr int EACH = 2;

  static Number element(uint32_t word, int i) {
    return T(uint16_t(word >> 16 * i), T::from_bits());
  }
  static Number add(Number a, Number b) { return a + b; }
};

// The product of the matrices that the lanes hold together.
template <class Format>
void multiply(Warp& warp, unsigned side) {
  using Number = typename Format::Number;
  constexpr int EACH = Format::EACH, K = 8 * EACH;
  Number left[16][K], right[K][8];
  for (int lane = 0; lane < WARP; ++lane) {
    const Fragments held = of_lane<Fragments>(side, lane);
    const int group = lane >> 2, in_group = lane & 3;
    for (int i = 0; i < 4 * EACH; ++i) {  // elements a0, a1, ... of the manual
      const int row = i / EACH % 2 == 0 ? group : group + 8;
      const int column = in_group * EACH + i % EACH + (i < 2 * EACH ? 0 : K / 2);
      left[row][column] = Format::element(held.a[i / EACH], i % EACH);
    }
    for (int i = 0; i < 2 * EACH; ++i) {
      const int row = in_group * EACH + i % EACH + (i < EACH ? 0 : K / 2);
      right[row][group] = Format::element(held.b[i / EACH], i % EACH);
    }
  }
  for (int row = 0; row < 16; ++row)
    for (int column = 0; column < 8; ++column) {
      Number sum = 0;
      for (int k = 0; k < K; ++k) sum += left[row][k] * right[k][column];
      std::memcpy(&warp.product[side][row * 8 + column], &sum, sizeof sum);
    }
}

template <class Format, class Number>
void mma(const char* what, Number (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  Fragments mine;
  std::memcpy(mine.a, a, sizeof a);
  std::memcpy(mine.b, b, sizeof b);
  Warp& warp = *now().warp;
  const unsigned side = exchange(what, mine, [&](unsigned side) { multiply<Format>(warp, side); });
  const int group = now().lane >> 2, in_group = now().lane & 3;
  for (int i = 0; i < 4; ++i) {  // c0 to c3
    const int row = i < 2 ? group : group + 8, column = in_group * 2 + (i & 1);
    Number product;
    std::memcpy(&product, &warp.product[side][row * 8 + column], sizeof product);
    d[i] = Format::add(d[i], product);
  }
}

inline void mma_s8(int32_t (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  mma<Integers<8>>("mma s8", d, a, b);
}

inline void mma_s4(int32_t (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  mma<Integers<4>>("mma s4", d, a, b);
}

inline void mma_bf16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  mma<Floats16<c10::BFloat16>>("mma bf16", d, a, b);
}

inline void mma_f16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  mma<Floats16<c10::Half>>("mma f16", d, a, b);
}

}  // namespace emulator

// Vectors of floats as wide as the instructions that a file is compiled for, in the vector types of
// GCC and Clang: 16 with AVX-512, 8 with AVX2, else 4 (NEON, SSE2, or whatever the compiler makes).
//
// A kernel is a header of templates that files of each instruction set include. Everything here is
// static or in the unnamed namespace, on purpose: the linker keeps one copy of an inline function
// of the same name, and must not give the one with AVX-512 to a machine without. For the same
// reason files of one instruction set use no containers of the standard library.
#pragma once

#include <cstdint>
#include <cstring>

#if defined(__SSE2__)
#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wpragmas"
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"  // GCC 12 warns of its own
#include <immintrin.h>
#pragma GCC diagnostic pop
#endif

namespace torch_plugins {
namespace {

#if defined(__AVX512F__)
constexpr int WIDTH = 16;
#elif defined(__AVX2__)
constexpr int WIDTH = 8;
#else
constexpr int WIDTH = 4;
#endif

using Floats = float __attribute__((vector_size(4 * WIDTH)));
using Ints = int32_t __attribute__((vector_size(4 * WIDTH)));
using Shorts = uint16_t __attribute__((vector_size(2 * WIDTH)));

// bfloat16 as it lies in memory.
struct bf16 {
  uint16_t bits;
};

#define INLINE static inline __attribute__((always_inline, unused))

INLINE Floats splat(float x) { return Floats{} + x; }

INLINE Floats from_bits(Ints x) {
  Floats out;
  std::memcpy(&out, &x, sizeof out);
  return out;
}

INLINE Ints to_bits(Floats x) {
  Ints out;
  std::memcpy(&out, &x, sizeof out);
  return out;
}

INLINE Floats load(const float* from) {
  Floats out;
  std::memcpy(&out, from, sizeof out);
  return out;
}

INLINE Floats load(const bf16* from) {
  Shorts half;
  std::memcpy(&half, from, sizeof half);
  return from_bits(__builtin_convertvector(half, Ints) << 16);
}

INLINE void store(float* to, Floats x) { std::memcpy(to, &x, sizeof x); }

// Rounds to the nearest, ties to even; NaN stays NaN.
INLINE void store(bf16* to, Floats x) {
  const Ints bits = to_bits(x);
  const Ints rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
  const Ints out = x == x ? rounded : (bits >> 16) | 0x40;
  const Shorts half = __builtin_convertvector(out, Shorts);
  std::memcpy(to, &half, sizeof half);
}

// The first `count` elements, the others 0.
template <class T>
INLINE Floats load(const T* from, int64_t count) {
  T whole[WIDTH] = {};
  std::memcpy(whole, from, count * sizeof(T));
  return load(whole);
}

template <class T>
INLINE void store(T* to, Floats x, int64_t count) {
  T whole[WIDTH];
  store(whole, x);
  std::memcpy(to, whole, count * sizeof(T));
}

INLINE Floats absolute(Floats x) { return from_bits(to_bits(x) & 0x7fffffff); }

// Where either is NaN: b.
INLINE Floats max(Floats a, Floats b) { return a > b ? a : b; }
INLINE Floats min(Floats a, Floats b) { return a < b ? a : b; }

// a * b + c, rounded once where the machine can.
INLINE Floats fma(Floats a, Floats b, Floats c) {
#if defined(__AVX512F__)
  return (Floats)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c);
#elif defined(__AVX2__)
  return (Floats)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c);
#else
  return a * b + c;
#endif
}

// To the nearest whole number, ties to even; for |x| <= 2 ** 22.
INLINE Floats round_even(Floats x) {
  const Floats shift = splat(12582912.0f);  // 1.5 * 2 ** 23: its last bit counts ones
  return (x + shift) - shift;
}

INLINE float sum(Floats x) {
  using Quad = float __attribute__((vector_size(16)));
  Quad parts[WIDTH / 4];
  std::memcpy(parts, &x, sizeof parts);
  Quad all = parts[0];
  for (int i = 1; i < WIDTH / 4; ++i) all += parts[i];
  return (all[0] + all[2]) + (all[1] + all[3]);
}

}  // namespace
}  // namespace torch_plugins

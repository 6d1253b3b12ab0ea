// The vectors of vec.h for every dtype, for kernels that read and write memory and compute little:
// fp32 for float, bf16 and f16; fp64 for double. A step takes a pair of vectors. Those of bf16 are the
// even and the odd elements: one 32-bit word holds one of each, so that nothing is shuffled.
#pragma once

#include "cpu/vec.h"

#if !defined(__AVX2__) && !defined(__AVX512F__)
#include <torch/headeronly/util/Half.h>  // never in files of an instruction set, see vec.h
#endif

#include <type_traits>

namespace torch_plugins {
namespace {

using Doubles = double __attribute__((vector_size(4 * WIDTH)));
using Longs = int64_t __attribute__((vector_size(4 * WIDTH)));

// IEEE half precision as it lies in memory.
struct f16 {
  uint16_t bits;
};

template <class T>
struct Computed {
  using Scalar = float;
  using Lanes = Floats;
};

template <>
struct Computed<double> {
  using Scalar = double;
  using Lanes = Doubles;
};

template <class T>
using Lanes = typename Computed<T>::Lanes;
template <class T>
using Scalar = typename Computed<T>::Scalar;

#define INLINE_MEMBER inline __attribute__((always_inline))

template <class V>
struct Pair {
  V of[2];
};

// Elements of a step: all, or the first `count`.
template <class T>
constexpr int STEP = 2 * sizeof(Lanes<T>) / sizeof(Scalar<T>);
struct Whole {};
struct Part {
  int64_t count;
};

// f(i, Whole) for each step that fits into `count` elements, f(i, Part) for what is left.
template <class T, class F>
INLINE void each_step(int64_t count, const F& f) {
  int64_t i = 0;
  for (; i + STEP<T> <= count; i += STEP<T>) f(i, Whole{});
  if (i < count) f(i, Part{count - i});
}

INLINE Pair<Floats> load(const float* from, Whole) { return {{load(from), load(from + WIDTH)}}; }

INLINE Pair<Doubles> load(const double* from, Whole) {
  Pair<Doubles> out;
  std::memcpy(&out, from, sizeof out);
  return out;
}

INLINE Pair<Floats> load(const bf16* from, Whole) {
  Ints words;
  std::memcpy(&words, from, sizeof words);
  return {{from_bits(words << 16), from_bits(words & (int32_t)0xffff0000)}};
}

INLINE Pair<Floats> load(const f16* from, Whole) {
  Pair<Floats> out;
#if defined(__AVX512F__)
  for (int h = 0; h < 2; ++h)
    out.of[h] = (Floats)_mm512_cvtph_ps(_mm256_loadu_si256((const __m256i*)from + h));
#elif defined(__AVX2__)
  for (int h = 0; h < 2; ++h)
    out.of[h] = (Floats)_mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)from + h));
#else
  for (int i = 0; i < 2 * WIDTH; ++i)
    out.of[i / WIDTH][i % WIDTH] = c10::detail::fp16_ieee_to_fp32_value(from[i].bits);
#endif
  return out;
}

// As it lies in memory.
template <class T>
struct Stored {
  Ints words[STEP<T> * sizeof(T) / sizeof(Ints)];
};

template <class T>
INLINE Stored<T> stored(const T*, Pair<Lanes<T>> x) {
  Stored<T> out;
  std::memcpy(&out, &x, sizeof out);
  return out;
}

// In the upper half, rounded to the nearest, ties to even; NaN stays NaN.
INLINE Ints rounded_to_bf16(Floats x) {
  const Ints bits = to_bits(x);
  const Ints rounded = bits + ((bits & 0x10000) != 0 ? Ints{} + 0x8000 : Ints{} + 0x7fff);
  return x == x ? rounded : bits | 0x400000;
}

INLINE Stored<bf16> stored(const bf16*, Pair<Floats> x) {
  const Ints even = rounded_to_bf16(x.of[0]), odd = rounded_to_bf16(x.of[1]);
  return {{((even >> 16) & 0xffff) | (odd & (int32_t)0xffff0000)}};
}

INLINE Stored<f16> stored(const f16*, Pair<Floats> x) {
  uint16_t bits[2 * WIDTH];
#if defined(__AVX512F__)
  for (int h = 0; h < 2; ++h)
    _mm256_storeu_si256((__m256i*)bits + h, _mm512_cvtps_ph((__m512)x.of[h], 0));
#elif defined(__AVX2__)
  for (int h = 0; h < 2; ++h)
    _mm_storeu_si128((__m128i*)bits + h, _mm256_cvtps_ph((__m256)x.of[h], 0));
#else
  for (int i = 0; i < 2 * WIDTH; ++i)
    bits[i] = c10::detail::fp16_ieee_from_fp32_value(x.of[i / WIDTH][i % WIDTH]);
#endif
  Stored<f16> out;
  std::memcpy(&out, bits, sizeof out);
  return out;
}

template <class T>
INLINE void store(T* to, Pair<Lanes<T>> x, Whole) {
  const Stored<T> out = stored(to, x);
  std::memcpy(to, &out, sizeof out);
}

// Past the caches, where the machine can: for more than they hold. `to` is aligned to 64 bytes; after
// the last one comes fence().
INLINE void stream(Ints* to, Ints x) {
#if defined(__AVX512F__)
  _mm512_stream_si512((__m512i*)to, (__m512i)x);
#elif defined(__AVX2__)
  _mm256_stream_si256((__m256i*)to, (__m256i)x);
#elif defined(__SSE2__)
  _mm_stream_si128((__m128i*)to, (__m128i)x);
#else
  *to = x;
#endif
}

INLINE void fence() {
#if defined(__SSE2__)
  _mm_sfence();
#endif
}

template <class T>
INLINE void store(T* to, Pair<Lanes<T>> x, Whole, bool past_caches) {
  const Stored<T> out = stored(to, x);
  if (!past_caches) {
    std::memcpy(to, &out, sizeof out);
    return;
  }
  for (unsigned i = 0; i < sizeof out / sizeof(Ints); ++i) stream((Ints*)to + i, out.words[i]);
}

// Those that are left out are 0.
template <class T>
INLINE Pair<Lanes<T>> load(const T* from, Part part) {
  T whole[STEP<T>] = {};
  std::memcpy(whole, from, part.count * sizeof(T));
  return load(whole, Whole{});
}

template <class T>
INLINE void store(T* to, Pair<Lanes<T>> x, Part part) {
  T whole[STEP<T>];
  store(whole, x, Whole{});
  std::memcpy(to, whole, part.count * sizeof(T));
}

template <class T>
INLINE void store(T* to, Pair<Lanes<T>> x, Part part, bool) {
  store(to, x, part);
}

// x where elements of the step are, 0 elsewhere.
template <class T, class V>
INLINE Pair<V> keep(Pair<V> x, Whole) {
  return x;
}

template <class T, class V>
INLINE Pair<V> keep(Pair<V> x, Part part) {
  T ones[STEP<T>] = {};
  std::memset(ones, 0x3c, part.count * sizeof(T));  // some number above 0 in every dtype
  const Pair<V> there = load(ones, Whole{});
  for (int h = 0; h < 2; ++h) x.of[h] = there.of[h] > 0 ? x.of[h] : V{};
  return x;
}

template <class V>
INLINE V all(double x) {
  using S = std::remove_reference_t<decltype(V{}[0])>;
  return V{} + (S)x;
}

// To the nearest whole number, ties to even; for x >= 0.
template <class V>
INLINE V round_positive(V x) {
  const V shift = all<V>(sizeof(x[0]) == 8 ? 4503599627370496.0 : 8388608.0);  // above: whole
  return x < shift ? (x + shift) - shift : x;
}

// A sum over many elements: in the lanes for a while, then in fp64.
template <class V>
struct Sum {
  V lanes = {};
  double total = 0;

  void flush() {
    for (unsigned i = 0; i < sizeof(V) / sizeof(lanes[0]); ++i) total += lanes[i];
    lanes = V{};
  }
};

}  // namespace
}  // namespace torch_plugins

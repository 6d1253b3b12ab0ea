// The vectors of vec.h for every dtype, for kernels that read and write memory and compute little:
// fp32 for float, bf16 and f16; fp64 for double. A step takes a pair of vectors. Those of bf16 are
// the even and the odd elements: a 32-bit word holds one of each, so that nothing is shuffled.
#pragma once

#include "cpu/vec.h"

#if !defined(__AVX2__) && !defined(__AVX512F__)
#include <torch/headeronly/util/Half.h>  // never in files of an instruction set, see vec.h
#endif

#include <type_traits>
#include <utility>

namespace torch_plugins {
namespace {

using Doubles = double __attribute__((vector_size(4 * WIDTH)));
using Longs = int64_t __attribute__((vector_size(4 * WIDTH)));

using Halves = uint16_t __attribute__((vector_size(4 * WIDTH)));

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
  Doubles out[2];
  std::memcpy(&out[0], from, sizeof out[0]);
  std::memcpy(&out[1], from + WIDTH / 2, sizeof out[1]);
  return {{out[0], out[1]}};
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
  return {{(Ints)x.of[0], (Ints)x.of[1]}};
}

// In the upper half, rounded to the nearest, ties to even. NaN stays NaN where its lower half is 0,
// as in those of bf16 elements and of operations; what else comes in passes through quiet().
INLINE Ints rounded_to_bf16(Floats x) {
  const Ints bits = to_bits(x), down = bits + 0x7fff;
#if defined(__AVX512F__)
  const __mmask16 odd = _mm512_test_epi32_mask((__m512i)bits, _mm512_set1_epi32(0x10000));
  return (Ints)_mm512_mask_add_epi32((__m512i)down, odd, (__m512i)down, _mm512_set1_epi32(1));
#else
  return down + ((bits >> 16) & 1);
#endif
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

// One vector at a time: of larger pieces, compilers keep a copy in memory.
template <class T>
INLINE void copy(T* to, const Stored<T>& x) {
  for (unsigned i = 0; i < sizeof x / sizeof(Ints); ++i)
    std::memcpy((char*)to + i * sizeof(Ints), &x.words[i], sizeof(Ints));
}

template <class T>
INLINE void store(T* to, Pair<Lanes<T>> x, Whole) {
  copy(to, stored(to, x));
}

// Past the caches, where the machine can: for more than they hold. `to` is aligned to 64 bytes;
// after the last one comes fence().
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
  if (!past_caches) return copy(to, out);
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

// Stores x and gives what a load would give.
template <class T, class P>
INLINE Pair<Lanes<T>> rounded_store(T* to, Pair<Lanes<T>> x, P part) {
  const Stored<T> out = stored(to, x);
  store(to, x, part);
  T whole[STEP<T>];
  copy(whole, out);
  return load(whole, Whole{});
}

// Wide elements, in the lanes in which a load of T puts its elements, and back. I counts to WIDTH.
template <int... I>
INLINE Pair<Floats> split_even_odd(Pair<Floats> x, std::integer_sequence<int, I...>) {
  return {{__builtin_shufflevector(x.of[0], x.of[1], (2 * I)...),
           __builtin_shufflevector(x.of[0], x.of[1], (2 * I + 1)...)}};
}

template <int... I>
INLINE Pair<Floats> join_even_odd(Pair<Floats> x, std::integer_sequence<int, I...>) {
  constexpr int half = WIDTH / 2;
  return {{__builtin_shufflevector(x.of[0], x.of[1], (I / 2 + I % 2 * WIDTH)...),
           __builtin_shufflevector(x.of[0], x.of[1], (half + I / 2 + I % 2 * WIDTH)...)}};
}

template <class T, class V>
INLINE Pair<V> in_lanes_of(Pair<V> x) {
  if constexpr (std::is_same_v<T, bf16>)
    return split_even_odd(x, std::make_integer_sequence<int, WIDTH>());
  else
    return x;
}

template <class T, class V>
INLINE Pair<V> in_order(Pair<V> x) {
  if constexpr (std::is_same_v<T, bf16>)
    return join_even_odd(x, std::make_integer_sequence<int, WIDTH>());
  else
    return x;
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

// NaN of any kind becomes the usual one.
template <class V>
INLINE V quiet(V x) {
  return x == x ? x : V{} + __builtin_nanf("");
}

INLINE Doubles fma(Doubles a, Doubles b, Doubles c) {
#if defined(__AVX512F__)
  return (Doubles)_mm512_fmadd_pd((__m512d)a, (__m512d)b, (__m512d)c);
#elif defined(__AVX2__)
  return (Doubles)_mm256_fmadd_pd((__m256d)a, (__m256d)b, (__m256d)c);
#else
  return a * b + c;
#endif
}

// To the nearest whole number, ties to even; for any x >= 0.
INLINE Floats round_positive(Floats x) {
#if defined(__AVX512F__)
  return (Floats)_mm512_roundscale_ps((__m512)x, 0);
#elif defined(__AVX2__)
  return (Floats)_mm256_round_ps((__m256)x, 0);
#else
  const Floats shift = splat(8388608.0f);  // 2 ** 23: from here on all are whole
  return x < shift ? (x + shift) - shift : x;
#endif
}

INLINE Doubles round_positive(Doubles x) {
  const Doubles shift = all<Doubles>(4503599627370496.0);  // 2 ** 52
  return x < shift ? (x + shift) - shift : x;
}

// A sum over many elements: in the lanes of a pair for a while, then in fp64.
template <class V>
struct Sum {
  V of[2] = {};
  double total = 0;

  void flush() {
    constexpr int lanes = sizeof(V) / sizeof(of[0][0]);
    const V both = of[0] + of[1];
    double part[lanes < 4 ? lanes : 4] = {};  // sums that do not wait for each other
    for (int i = 0; i < lanes; ++i) part[i % 4] += both[i];
    for (double one : part) total += one;
    of[0] = of[1] = V{};
  }
};

// f(first, count) for blocks of elements whose sum may stay in the lanes.
constexpr int64_t BLOCK = 4096;

template <class F>
INLINE void each_block(int64_t count, const F& f) {
  for (int64_t i = 0; i < count; i += BLOCK) f(i, count - i < BLOCK ? count - i : BLOCK);
}

}  // namespace
}  // namespace torch_plugins

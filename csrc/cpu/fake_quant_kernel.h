// Fake quantization and kurtosis of rows, alone and together: the formulas of
// torch_plugins/ops/fake_quant.py and kurtosis.py, in their order of operations. A row is read from
// memory once and then again from the cache.
#pragma once

#include "cpu/lanes.h"
#include "cpu/memory_bound.h"

namespace torch_plugins {
namespace {

template <class S>
S steps_per_unit(const Clips& clips) {
  return quiet(S(1) / (S(clips.high) - S(clips.low)) * S((int64_t(1) << clips.bits) - 1));
}

template <class V>
struct Quantizer {
  V high, low, scale;

  template <class S>
  explicit Quantizer(const Clips& clips, S scale)
      : high(all<V>(quiet(clips.high))), low(all<V>(quiet(clips.low))), scale(V{} + scale) {}

  // In steps from c-; NaN stays NaN.
  INLINE_MEMBER V place(V x) const {
    x = x < low ? low : x;
    x = x > high ? high : x;
    return (x - low) * scale;
  }

  INLINE_MEMBER V operator()(V x) const { return round_positive(place(x)) / scale + low; }
};

// 16 levels at most, looked up: the same values without a division of each.
struct LookUp {
  Quantizer<Floats> quantizer;
  Floats levels[16 / WIDTH];

  LookUp(const Clips& clips, float scale) : quantizer(clips, scale) {
    for (int i = 0; i < 16; ++i) levels[i / WIDTH][i % WIDTH] = (float)i / scale + (float)clips.low;
  }

  static bool serves(const Clips& clips, float scale) {
    return WIDTH >= 8 && clips.bits <= 4 && scale > 0 && scale < __builtin_inff();
  }

  INLINE_MEMBER Floats operator()(Floats x) const {
    const Floats place = quantizer.place(x);
    Floats level = place;
#if defined(__AVX512F__)
    level = (Floats)_mm512_permutexvar_ps(_mm512_cvtps_epi32((__m512)place), (__m512)levels[0]);
#elif defined(__AVX2__)
    const __m256i index = _mm256_cvtps_epi32((__m256)place);
    level = (Floats)_mm256_blendv_ps(_mm256_permutevar8x32_ps((__m256)levels[0], index),
                                     _mm256_permutevar8x32_ps((__m256)levels[1], index),
                                     (__m256)_mm256_slli_epi32(index, 28));
#endif
    return place == place ? level : place;
  }
};

template <class S>
struct Moments {
  S mean, m_2, m_3, m_4;
};

// Without THIRD, m_3 is 0.
template <bool THIRD, class T>
INLINE Moments<Scalar<T>> moments_of(const T* y, int64_t d) {
  using V = Lanes<T>;
  using S = Scalar<T>;
  Sum<V> first, second, third, fourth;
  each_block(d, [&](int64_t begin, int64_t count) {
    each_step<T>(count, [&](int64_t i, auto part) {
      const Pair<V> here = load(y + begin + i, part);
      for (int h = 0; h < 2; ++h) first.of[h] += here.of[h];
    });
    first.flush();
  });
  const S mean = (S)(first.total / d);
  each_block(d, [&](int64_t begin, int64_t count) {
    each_step<T>(count, [&](int64_t i, auto part) {
      Pair<V> z = load(y + begin + i, part);
      for (V& half : z.of) half -= mean;
      z = keep<T>(z, part);
      for (int h = 0; h < 2; ++h) {
        const V square = z.of[h] * z.of[h];
        second.of[h] += square;
        if (THIRD) third.of[h] = fma(square, z.of[h], third.of[h]);
        fourth.of[h] = fma(square, square, fourth.of[h]);
      }
    });
    for (Sum<V>* sum : {&second, &third, &fourth}) sum->flush();
  });
  return {mean, (S)(second.total / d), (S)(third.total / d), (S)(fourth.total / d)};
}

// xhat and k may be null.
template <class T, class Quantize>
void forward_rows(const T* x, int64_t rows, int64_t d, double eps, const Quantize& quantize,
                  T* xhat, Scalar<T>* k, bool past_caches) {
  using V = Lanes<T>;
  for (int64_t row = 0; row < rows; ++row, x += d) {
    if (k != nullptr) {
      const auto m = moments_of<false>(x, d);
      k[row] = m.m_4 / (m.m_2 * m.m_2 + (Scalar<T>)eps);
    }
    if (xhat == nullptr) continue;
    each_step<T>(d, [&](int64_t i, auto part) {
      Pair<V> here = load(x + i, part);
      for (V& half : here.of) half = quantize(half);
      store(xhat + row * d + i, here, part, past_caches);
    });
  }
  if (past_caches) fence();
}

template <class T>
void fake_quant_kurtosis(const void* x, int64_t rows, int64_t d, const Clips& clips, double eps,
                         void* xhat, void* k, bool past_caches) {
  using S = Scalar<T>;
  const S scale = steps_per_unit<S>(clips);
  const auto run = [&](const auto& quantize) {
    forward_rows((const T*)x, rows, d, eps, quantize, (T*)xhat, (S*)k, past_caches);
  };
  if constexpr (sizeof(S) == sizeof(float)) {
    if (LookUp::serves(clips, scale)) return run(LookUp(clips, scale));
  }
  run(Quantizer<Lanes<T>>(clips, scale));
}

// The straight-through gradient of a pair, and what it adds to the gradients of the clips.
template <class V>
struct StraightThrough {
  Quantizer<V> quantizer;
  Sum<V> above, below, rounding;

  template <class T, class P>
  INLINE_MEMBER Pair<V> gradient(Pair<V> g, Pair<V> x, P part) {
    Pair<V> moved = g;
    for (int h = 0; h < 2; ++h) {
      const V place = (x.of[h] - quantizer.low) * quantizer.scale;
      const auto high = x.of[h] >= quantizer.high, low = x.of[h] <= quantizer.low;
      above.of[h] += high ? g.of[h] : V{};
      below.of[h] += low ? g.of[h] : V{};
      moved.of[h] = high | low ? V{} : (place - round_positive(place)) * g.of[h];
      g.of[h] = high | low ? V{} : g.of[h];
    }
    moved = keep<T>(moved, part);
    for (int h = 0; h < 2; ++h) rounding.of[h] += moved.of[h];
    return g;
  }

  void flush() {
    for (Sum<V>* sum : {&above, &below, &rounding}) sum->flush();
  }
};

// dK / dx of a row times the gradient of K, added to a gradient:
// f z (z ** 2 - K m_2) - f m_3 with f = 4 g / (d (m_2 ** 2 + eps)).
template <class T>
struct Slope {
  using S = Scalar<T>;
  S mean, k_m_2, factor, constant;

  Slope(const T* x, int64_t d, S g, double eps) {
    const Moments<S> m = moments_of<true>(x, d);
    const S below = m.m_2 * m.m_2 + (S)eps;
    mean = m.mean;
    k_m_2 = m.m_4 / below * m.m_2;
    factor = quiet(g) * (S)(4.0 / d) / below;
    constant = -factor * m.m_3;
  }

  INLINE_MEMBER Pair<Lanes<T>> operator()(Pair<Lanes<T>> x, Pair<Lanes<T>> gradient) const {
    using V = Lanes<T>;
    for (int h = 0; h < 2; ++h) {
      const V z = x.of[h] - mean;
      gradient.of[h] += fma(fma(z, z, V{} - k_m_2) * z, V{} + factor, V{} + constant);
    }
    return gradient;
  }
};

// g_xhat, with x in the place of clips, and g_k may be null.
template <class T>
ClipGradients fake_quant_kurtosis_backward(const void* g_xhat, const void* g_k, const void* from,
                                           int64_t rows, int64_t d, const Clips& clips, double eps,
                                           void* dx, bool past_caches) {
  using V = Lanes<T>;
  using S = Scalar<T>;
  const T *x = (const T*)from, *g = (const T*)g_xhat;
  T* out = (T*)dx;
  StraightThrough<V> clipped{Quantizer<V>(clips, steps_per_unit<S>(clips)), {}, {}, {}};
  for (int64_t row = 0; row < rows; ++row, x += d, out += d) {
    const auto write = [&](const auto& gradient) {
      each_block(d, [&](int64_t begin, int64_t count) {
        each_step<T>(count, [&](int64_t i, auto part) {
          i += begin;
          store(out + i, gradient(i, load(x + i, part), part), part, past_caches);
        });
        if (count == BLOCK) clipped.flush();
      });
    };
    const auto through = [&](int64_t i, Pair<V> here, auto part) {
      return clipped.template gradient<T>(load(g + row * d + i, part), here, part);
    };
    if (g_k == nullptr) {
      write(through);
      continue;
    }
    const Slope<T> slope(x, d, ((const S*)g_k)[row], eps);
    if (g == nullptr)
      write([&](int64_t, Pair<V> here, auto) { return slope(here, {}); });
    else
      write([&](int64_t i, Pair<V> x_i, auto part) { return slope(x_i, through(i, x_i, part)); });
  }
  if (past_caches) fence();
  clipped.flush();
  const double rounding = clipped.rounding.total / (double)((int64_t(1) << clips.bits) - 1);
  return {clipped.above.total - rounding, clipped.below.total + rounding};
}

}  // namespace
}  // namespace torch_plugins

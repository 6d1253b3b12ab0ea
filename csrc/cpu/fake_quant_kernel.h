// Fake quantization and kurtosis of rows, alone and together: the formulas of
// torch_plugins/ops/fake_quant.py and kurtosis.py, in their order of operations. A row is read from
// memory once and then again from the cache.
#pragma once

#include "cpu/lanes.h"
#include "cpu/memory_bound.h"

namespace torch_plugins {
namespace {

constexpr int64_t BLOCK = 4096;  // elements whose sum stays in the lanes

template <class F>
INLINE void each_block(int64_t count, const F& f) {
  for (int64_t i = 0; i < count; i += BLOCK) f(i, count - i < BLOCK ? count - i : BLOCK);
}

template <class S>
S steps_per_unit(const Clips& clips) {
  return S(1) / (S(clips.high) - S(clips.low)) * S((int64_t(1) << clips.bits) - 1);
}

template <class V>
struct Quantizer {
  V high, low, scale;

  template <class S>
  explicit Quantizer(const Clips& clips, S scale)
      : high(all<V>(clips.high)), low(all<V>(clips.low)), scale(V{} + scale) {}

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

template <class T>
INLINE Moments<Scalar<T>> moments_of(const T* y, int64_t d) {
  using V = Lanes<T>;
  using S = Scalar<T>;
  Sum<V> first, second, third, fourth;
  each_block(d, [&](int64_t begin, int64_t count) {
    each_step<T>(count, [&](int64_t i, auto part) {
      const Pair<V> here = load(y + begin + i, part);
      first.lanes += here.of[0] + here.of[1];
    });
    first.flush();
  });
  const S mean = (S)(first.total / d);
  each_block(d, [&](int64_t begin, int64_t count) {
    each_step<T>(count, [&](int64_t i, auto part) {
      Pair<V> z = load(y + begin + i, part);
      for (V& half : z.of) half -= mean;
      for (V half : keep<T>(z, part).of) {
        const V square = half * half;
        second.lanes += square;
        third.lanes += square * half;
        fourth.lanes += square * square;
      }
    });
    for (Sum<V>* sum : {&second, &third, &fourth}) sum->flush();
  });
  return {mean, (S)(second.total / d), (S)(third.total / d), (S)(fourth.total / d)};
}

// xhat and k may be null.
template <class T, class Quantize>
void forward_rows(const T* x, int64_t rows, int64_t d, double eps, const Quantize& quantize, T* xhat,
                  Scalar<T>* k, bool past_caches) {
  using V = Lanes<T>;
  for (int64_t row = 0; row < rows; ++row, x += d) {
    if (k != nullptr) {
      const auto m = moments_of(x, d);
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
      above.lanes += high ? g.of[h] : V{};
      below.lanes += low ? g.of[h] : V{};
      moved.of[h] = high | low ? V{} : (place - round_positive(place)) * g.of[h];
      g.of[h] = high | low ? V{} : g.of[h];
    }
    for (V half : keep<T>(moved, part).of) rounding.lanes += half;
    return g;
  }

  void flush() {
    for (Sum<V>* sum : {&above, &below, &rounding}) sum->flush();
  }
};

// dK / dx of a row, times the gradient of K.
template <class T>
struct Slope {
  using S = Scalar<T>;
  S mean, m_3, k_m_2, factor;

  Slope(const T* x, int64_t d, S g, double eps) {
    const Moments<S> m = moments_of(x, d);
    const S below = m.m_2 * m.m_2 + (S)eps;
    mean = m.mean, m_3 = m.m_3, k_m_2 = m.m_4 / below * m.m_2;
    factor = g * (S)(4.0 / d) / below;
  }

  INLINE_MEMBER Lanes<T> operator()(Lanes<T> x) const {
    const Lanes<T> z = x - mean;
    return (z * z * z - m_3 - k_m_2 * z) * factor;
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
    const auto of_k = [&](Pair<V> here) {
      for (V& half : here.of) half = slope(half);
      return here;
    };
    if (g == nullptr) {
      write([&](int64_t, Pair<V> here, auto) { return of_k(here); });
      continue;
    }
    write([&](int64_t i, Pair<V> here, auto part) {
      Pair<V> sum = through(i, here, part);
      const Pair<V> more = of_k(here);
      for (int h = 0; h < 2; ++h) sum.of[h] += more.of[h];
      return sum;
    });
  }
  if (past_caches) fence();
  clipped.flush();
  const double rounding = clipped.rounding.total / (double)((int64_t(1) << clips.bits) - 1);
  return {clipped.above.total - rounding, clipped.below.total + rounding};
}

}  // namespace
}  // namespace torch_plugins

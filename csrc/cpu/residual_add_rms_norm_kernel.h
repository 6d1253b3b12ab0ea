// Sum and RMS norm of rows: the formulas of torch_plugins/ops/residual_add_rms_norm.py. A row is
// read from memory once and then again from the cache.
#pragma once

#include "cpu/lanes.h"
#include "cpu/memory_bound.h"

namespace torch_plugins {
namespace {

INLINE float root(float x) { return __builtin_sqrtf(x); }
INLINE double root(double x) { return __builtin_sqrt(x); }

// A weight of T or wide, or none.
template <class T>
struct Weight {
  const T* same;
  const Scalar<T>* wide;

  // x w at the elements i on.
  template <class P>
  INLINE_MEMBER Pair<Lanes<T>> times(Pair<Lanes<T>> x, int64_t i, P part) const {
    if (same == nullptr && wide == nullptr) return x;
    if (same != nullptr) {
      const Pair<Lanes<T>> w = load(same + i, part);
      for (int h = 0; h < 2; ++h) x.of[h] *= w.of[h];
    } else {
      const Pair<Lanes<T>> w = in_lanes_of<T>(load(wide + i, part));
      for (int h = 0; h < 2; ++h) x.of[h] *= quiet(w.of[h]);
    }
    return x;
  }
};

template <class T>
void residual_add_rms_norm(const void* residual, const void* update, const void* same,
                           const void* wide, int64_t rows, int64_t d, double eps, void* sum,
                           void* normed, void* rstd) {
  using V = Lanes<T>;
  using S = Scalar<T>;
  const Weight<T> weight{(const T*)same, (const S*)wide};
  for (int64_t row = 0; row < rows; ++row) {
    const T *a = (const T*)residual + row * d, *b = (const T*)update + row * d;
    T *s = (T*)sum + row * d, *out = (T*)normed + row * d;
    Sum<V> squares;
    each_block(d, [&](int64_t begin, int64_t count) {
      V first = {}, second = {};
      each_step<T>(count, [&](int64_t i, auto part) {
        i += begin;
        Pair<V> x = load(a + i, part);
        const Pair<V> y = load(b + i, part);
        for (int h = 0; h < 2; ++h) x.of[h] += y.of[h];
        x = rounded_store(s + i, x, part);
        first = fma(x.of[0], x.of[0], first);
        second = fma(x.of[1], x.of[1], second);
      });
      squares.of[0] = first, squares.of[1] = second;
      squares.flush();
    });
    const S r = S(1) / root((S)(squares.total / d) + (S)eps);
    ((S*)rstd)[row] = r;
    each_step<T>(d, [&](int64_t i, auto part) {
      Pair<V> x = load(s + i, part);
      for (int h = 0; h < 2; ++h) x.of[h] *= r;
      store(out + i, weight.times(x, i, part), part);
    });
  }
}

// Adds to d_weight [d], wide; it and the weight may be null, and so may g_sum.
template <class T>
void residual_add_rms_norm_backward(const void* g_sum, const void* g_normed, const void* sum,
                                    const void* rstd, const void* same, const void* wide,
                                    int64_t rows, int64_t d, void* dx, void* d_weight) {
  using V = Lanes<T>;
  using S = Scalar<T>;
  const Weight<T> weight{(const T*)same, (const S*)wide};
  S* dw = (S*)d_weight;
  for (int64_t row = 0; row < rows; ++row) {
    const T *g = (const T*)g_normed + row * d, *s = (const T*)sum + row * d;
    const T* more = g_sum ? (const T*)g_sum + row * d : nullptr;
    T* out = (T*)dx + row * d;
    const S r = quiet(((const S*)rstd)[row]);
    Sum<V> products;
    each_block(d, [&](int64_t begin, int64_t count) {
      V first = {}, second = {};
      each_step<T>(count, [&](int64_t i, auto part) {
        i += begin;
        Pair<V> n = load(s + i, part);
        const Pair<V> here = load(g + i, part), weighted = weight.times(here, i, part);
        for (int h = 0; h < 2; ++h) n.of[h] *= r;
        first = fma(weighted.of[0], n.of[0], first);
        second = fma(weighted.of[1], n.of[1], second);
        if (dw == nullptr) return;
        Pair<V> total = in_lanes_of<T>(load(dw + i, part));
        for (int h = 0; h < 2; ++h) total.of[h] = fma(here.of[h], n.of[h], total.of[h]);
        store(dw + i, in_order<T>(total), part);
      });
      products.of[0] = first, products.of[1] = second;
      products.flush();
    });
    const S mean = (S)(products.total / d);
    each_step<T>(d, [&](int64_t i, auto part) {
      const Pair<V> n = load(s + i, part), weighted = weight.times(load(g + i, part), i, part);
      Pair<V> x{};
      if (more != nullptr) x = load(more + i, part);
      for (int h = 0; h < 2; ++h) x.of[h] += (weighted.of[h] - n.of[h] * r * mean) * r;
      store(out + i, x, part);
    });
  }
}

}  // namespace
}  // namespace torch_plugins

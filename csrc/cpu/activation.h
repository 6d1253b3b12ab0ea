// Activations of experts over vectors of floats, to a few units in the last place of fp32.
#pragma once

#include "cpu/vec.h"

namespace torch_plugins {

enum class Activation { silu, gelu, gelu_tanh, relu };

namespace {

// e ** x; 0 below the smallest normal number, infinity above the largest.
INLINE Floats exponential(Floats x) {
  const Floats bounded = min(max(x, splat(-87.3f)), splat(88.7f));
  const Floats whole = round_even(bounded * 1.44269504f);
  // log 2 in two parts, of which the first has few digits: whole times it is exact.
  const Floats rest = fma(whole, splat(2.12194440e-4f), fma(whole, splat(-0.693359375f), bounded));
  Floats sum = splat(1.0f / 5040);
  constexpr float terms[] = {1.0f / 720, 1.0f / 120, 1.0f / 24, 1.0f / 6, 0.5f, 1.0f, 1.0f};
  for (float term : terms) sum = fma(sum, rest, splat(term));
  const Ints exponent = __builtin_convertvector(whole, Ints) << 23;
  const Floats out = from_bits(to_bits(sum) + exponent);
  const Floats below = x < splat(-87.3f) ? splat(0.0f) : out;
  const Floats above = x > splat(88.7f) ? splat(__builtin_inff()) : below;
  return x == x ? above : x;
}

// e ** (x ** 2) erfc(x) for x >= 0: t P(t) with t = 1 / (1 + x / 2), fitted for the smallest
// largest relative error on 0 to 9.5, which is 4e-8; 3e-7 in this arithmetic.
INLINE Floats scaled_complement(Floats x) {
  const Floats t = 1 / (1 + 0.5f * x);
  constexpr float terms[] = {0.283689409f, -0.485361308f, 0.275956362f, -0.0251649823f,
                             0.202065274f, 0.243262008f,  0.282353371f, 0.282087684f};
  Floats sum = splat(-0.0588878356f);
  for (float term : terms) sum = fma(sum, t, splat(term));
  return sum * t;
}

// The normal distribution, below 0 without the loss of digits of 1 + erf.
INLINE Floats normal(Floats x) {
  const Floats size = absolute(x) * 0.70710678f;
  const Floats tail = 0.5f * scaled_complement(size) * exponential(-size * size);
  return x < 0 ? tail : 1 - tail;
}

INLINE Floats activate(Activation kind, Floats x) {
  switch (kind) {
    case Activation::silu:
      return x / (1 + exponential(-x));
    case Activation::gelu:
      return x * normal(x);
    case Activation::gelu_tanh: {
      // 0.5 (1 + tanh u) = 1 / (1 + e ** -2u)
      const Floats u = 0.79788456f * x * (1 + 0.044715f * x * x);
      return x / (1 + exponential(-2 * u));
    }
    default:
      return x < 0 ? splat(0.0f) : x;
  }
}

}  // namespace
}  // namespace torch_plugins

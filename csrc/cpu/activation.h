// Activations of experts over vectors of floats, to about one unit in the last place of fp32.
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

// The error function, from its series in 1 / (1 + p |x|) (Abramowitz and Stegun, 7.1.26): absolute
// error 1.5e-7.
INLINE Floats error_function(Floats x) {
  const Floats size = absolute(x), t = 1 / (1 + 0.3275911f * size);
  Floats sum = splat(1.061405429f);
  constexpr float terms[] = {-1.453152027f, 1.421413741f, -0.284496736f, 0.254829592f};
  for (float term : terms) sum = fma(sum, t, splat(term));
  const Floats value = 1 - sum * t * exponential(-size * size);
  return x < 0 ? -value : value;
}

INLINE Floats activate(Activation kind, Floats x) {
  switch (kind) {
    case Activation::silu: return x / (1 + exponential(-x));
    case Activation::gelu: return 0.5f * x * (1 + error_function(x * 0.70710678f));
    case Activation::gelu_tanh: {
      // 0.5 (1 + tanh u) = 1 / (1 + e ** -2u)
      const Floats u = 0.79788456f * x * (1 + 0.044715f * x * x);
      return x / (1 + exponential(-2 * u));
    }
    default: return x < 0 ? splat(0.0f) : x;
  }
}

}  // namespace
}  // namespace torch_plugins

// What mixtures of experts need around their products: which tokens an expert has, the function
// between its two matrices, and the sum over experts. torch_plugins/ops/sparse_moe.py has the
// formula.
//
// With E experts and T tokens, expert e's rows are counts[e] tokens in their order: row m is token
// row_of[e * T + m], and belongs at row e * T + m of what the experts compute. slot[t * E + e] is m
// again, or -1. The host never waits for these numbers.
#pragma once

#include "numbers.cuh"

namespace torch_plugins::cuda {

constexpr int EXPERT_THREADS = 256;

struct ExpertRows {
  int32_t *counts, *row_of, *slot;  // [E], [E, T], [T, E]
};

// One block an expert.
__global__ void __launch_bounds__(EXPERT_THREADS)
    expert_rows_kernel(const bool* kept, int64_t tokens, int64_t experts, ExpertRows out) {
  SHARED(int32_t, of_warp, EXPERT_THREADS / WARP);
  const int64_t expert = blockIdx.x;
  const int warp = threadIdx.x / WARP, lane = threadIdx.x % WARP;
  int32_t found = 0;
  for (int64_t first = 0; first < tokens; first += EXPERT_THREADS) {
    const int64_t token = first + threadIdx.x;
    const bool mine = token < tokens && kept[token * experts + expert];
    const uint32_t votes = __ballot_sync(0xffffffffu, mine);
    if (lane == 0) of_warp[warp] = __popc(votes);
    __syncthreads();
    int32_t row = found + __popc(votes & ((1u << lane) - 1));
    for (int i = 0; i < EXPERT_THREADS / WARP; ++i) {
      if (i < warp) row += of_warp[i];
      found += of_warp[i];
    }
    if (mine) out.row_of[expert * tokens + row] = static_cast<int32_t>(token);
    if (token < tokens) out.slot[token * experts + expert] = mine ? row : -1;
    __syncthreads();
  }
  if (threadIdx.x == 0) out.counts[expert] = found;
}

// By type, for compilers whose functions of these names are those of doubles.
__device__ inline float exp_of(float x) { return expf(x); }
__device__ inline double exp_of(double x) { return exp(x); }
__device__ inline float erf_of(float x) { return erff(x); }
__device__ inline double erf_of(double x) { return erf(x); }
__device__ inline float tanh_of(float x) { return tanhf(x); }
__device__ inline double tanh_of(double x) { return tanh(x); }

enum class Activation : int32_t { silu, gelu, gelu_tanh, relu };

template <class W>
__device__ W activated(Activation activation, W x) {
  switch (activation) {
    case Activation::silu:
      return x / (1 + exp_of(-x));
    case Activation::gelu:
      return x * W(0.5) * (1 + erf_of(x * W(0.70710678118654752440)));
    case Activation::gelu_tanh: {
      const W inner = W(0.79788456080286535588) * (x + W(0.044715) * x * x * x);
      return W(0.5) * x * (1 + tanh_of(inner));
    }
    default:
      return x < 0 ? W(0) : x;  // NaN stays NaN
  }
}

// A block a row, of those that there may be: inner [E * T, width or 2 width] to h [E * T, width].
template <class W, class H>
__global__ void __launch_bounds__(EXPERT_THREADS)
    activate_kernel(const W* inner, const int32_t* counts, int64_t tokens, int64_t width,
                    bool gated, Activation activation, H* h) {
  const int64_t row = blockIdx.x;
  if (row % tokens >= counts[row / tokens]) return;
  const W* from = inner + row * width * (gated ? 2 : 1);
  for (int64_t i = threadIdx.x; i < width; i += EXPERT_THREADS) {
    const W value = activated(activation, from[i]);
    h[row * width + i] = static_cast<H>(gated ? value * from[width + i] : value);
  }
}

// A block a token: y[t] = sum over e of S[t, e] parts[e * T + slot], in the order of the experts.
template <class W>
__global__ void __launch_bounds__(EXPERT_THREADS)
    combine_kernel(const W* parts, const int32_t* slot, Floats scores, int64_t tokens,
                   int64_t experts, int64_t features, int64_t first_token, Output y) {
  const int64_t token = blockIdx.x;
  for (int64_t i = threadIdx.x; i < features; i += EXPERT_THREADS) {
    W sum = 0;
    for (int64_t e = 0; e < experts; ++e) {
      const int32_t row = slot[token * experts + e];
      if (row < 0) continue;
      const W score = scores.get<W>((first_token + token) * experts + e);
      sum += score * parts[(e * tokens + row) * features + i];
    }
    y.set((first_token + token) * features + i, sum);
  }
}

}  // namespace torch_plugins::cuda

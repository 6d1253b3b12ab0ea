// The steps of a mixture of experts, for weights in floats and in int4. Some tokens after the
// others: an expert may have all of them, and what the experts compute must find room for that.
#pragma once

#include "experts.cuh"
#include "half_linear.cuh"
#include "linear.cuh"
#include "quantize_rows.cuh"

namespace torch_plugins::cuda {

constexpr int64_t SCRATCH_BYTES = int64_t(256) << 20;  // about, of one part of the tokens

struct Mixture {
  Floats x;          // [tokens, hidden]
  Floats scores;     // [tokens, experts]
  const bool* kept;  // [tokens, experts]
  int64_t tokens, hidden, experts, width, outputs;
  bool gated;
  Activation activation;
  Output y;  // [tokens, outputs]

  int64_t inner() const { return gated ? 2 * width : width; }

  // Tokens that are computed at a time, with `bytes` for each number of an expert's.
  int64_t part(int64_t bytes) const {
    const int64_t of_token = experts * (inner() + width + outputs) * bytes;
    const int64_t fit = SCRATCH_BYTES / (of_token > 0 ? of_token : 1);
    return fit < 1 ? 1 : fit < tokens ? fit : tokens;
  }
};

// Weights of experts in floats; gate is null without gates.
template <class T>
struct DenseExperts {
  const T *gate, *up, *down;  // [experts, width, hidden] twice, [experts, outputs, width]
  int64_t gate_strides[2], up_strides[2], down_strides[2];  // of experts and of rows
};

struct Int4Experts {
  const uint8_t *gate_up, *down;  // plain storage: rows of gates first
  Floats gate_up_scale, down_scale;
  int64_t gate_up_groups, down_groups;
  int input_bits;
  bool int4;  // products: else int8
};

// Memory that lives until the kernels have run: allocate(bytes) returns it.
template <class Allocate>
struct Scratch {
  Allocate& allocate;

  template <class N>
  N* of(int64_t count) {
    return static_cast<N*>(allocate(count * static_cast<int64_t>(sizeof(N))));
  }
};

// Calls compute(first token, number of tokens, rows) and adds up the parts that it fills.
template <class W, class Allocate, class Compute>
void each_part(const Mixture& p, int64_t most, Scratch<Allocate> scratch, const W* parts,
               cudaStream_t stream, Compute compute) {
  const ExpertRows rows{scratch.template of<int32_t>(p.experts),
                        scratch.template of<int32_t>(p.experts * most),
                        scratch.template of<int32_t>(p.experts * most)};
  for (int64_t first = 0; first < p.tokens; first += most) {
    const int64_t tokens = p.tokens - first < most ? p.tokens - first : most;
    if (p.experts > 0) {
      LAUNCH(expert_rows_kernel, dim3(p.experts), dim3(EXPERT_THREADS), stream,
             p.kept + first * p.experts, tokens, p.experts, rows);
      compute(first, tokens, rows);
    }
    const auto combine = combine_kernel<W>;
    LAUNCH(combine, dim3(tokens), dim3(EXPERT_THREADS), stream, parts, rows.slot, p.scores, tokens,
           p.experts, p.outputs, first, p.y);
  }
}

template <class W, class H>
void activate(const Mixture& p, int64_t tokens, const W* inner, const ExpertRows& rows, H* h,
              cudaStream_t stream) {
  const auto kernel = activate_kernel<W, H>;
  LAUNCH(kernel, dim3(p.experts * tokens), dim3(EXPERT_THREADS), stream, inner, rows.counts, tokens,
         p.width, p.gated, p.activation, h);
}

template <class T, class Allocate>
void sparse_moe(const Mixture& p, const DenseExperts<T>& of, Allocate allocate,
                cudaStream_t stream) {
  using W = typename Wide<T>::type;
  if (p.tokens == 0 || p.outputs == 0) return;
  Scratch<Allocate> scratch{allocate};
  const int64_t most = p.part(sizeof(W)), all = p.experts * most;
  W* inner = scratch.template of<W>(all * p.inner());
  T* h = scratch.template of<T>(all * p.width);
  W* parts = scratch.template of<W>(all * p.outputs);
  const T* x = static_cast<const T*>(p.x.data);
  each_part<W>(
      p, most, scratch, parts, stream, [&](int64_t first, int64_t tokens, ExpertRows rows) {
        const T* of_part = x + first * p.hidden;
        const auto enter = [&](const T* weight, const int64_t (&strides)[2], W* y) {
          experts_linear<T>({of_part, rows.row_of, rows.counts, tokens, p.hidden, weight,
                             strides[0], strides[1], p.width, p.experts, y, p.inner()},
                            stream);
        };
        if (p.gated) enter(of.gate, of.gate_strides, inner);
        enter(of.up, of.up_strides, inner + (p.gated ? p.width : 0));
        activate(p, tokens, inner, rows, h, stream);
        experts_linear<T>({h, nullptr, rows.counts, tokens, p.width, of.down, of.down_strides[0],
                           of.down_strides[1], p.outputs, p.experts, parts, p.outputs},
                          stream);
      });
}

template <class Allocate>
void w4a4_sparse_moe(const Mixture& p, const Int4Experts& of, Allocate allocate,
                     cudaStream_t stream) {
  if (p.tokens == 0 || p.outputs == 0) return;
  Scratch<Allocate> scratch{allocate};
  const int64_t most = p.part(sizeof(float)), all = p.experts * most;
  const int64_t x_stride = code_stride(p.hidden, of.int4), h_stride = code_stride(p.width, of.int4);
  float* inner = scratch.template of<float>(all * p.inner());
  float* h = scratch.template of<float>(all * p.width);
  float* parts = scratch.template of<float>(all * p.outputs);
  uint8_t* x_codes = scratch.template of<uint8_t>(most * x_stride);
  uint8_t* h_codes = scratch.template of<uint8_t>(all * h_stride);
  float *x_scale = scratch.template of<float>(most), *h_scale = scratch.template of<float>(all);

  each_part<float>(
      p, most, scratch, parts, stream, [&](int64_t first, int64_t tokens, ExpertRows rows) {
        QuantizeRows quantize{p.x, p.hidden, of.input_bits, {}, {}, x_codes, x_stride, x_scale};
        quantize.first = first * p.hidden;
        quantize_rows(quantize, tokens, of.int4, stream);
        Linear linear_of;
        linear_of.rows = tokens, linear_of.experts = p.experts, linear_of.counts = rows.counts;
        linear_of.codes = x_codes, linear_of.code_stride = x_stride, linear_of.scale = x_scale;
        linear_of.row_of = rows.row_of;
        linear_of.weight = of.gate_up, linear_of.weight_stride = (p.hidden + 1) / 2;
        linear_of.weight_scale = of.gate_up_scale, linear_of.groups = of.gate_up_groups;
        linear_of.features = p.hidden, linear_of.outputs = p.inner();
        linear_of.y = {inner, Kind::f32};
        linear(linear_of, of.int4, stream);
        activate(p, tokens, inner, rows, h, stream);

        quantize = {{h, Kind::f32}, p.width, of.input_bits, {}, {}, h_codes, h_stride, h_scale};
        quantize.counts = rows.counts, quantize.rows_of_each = tokens;
        quantize_rows(quantize, p.experts * tokens, of.int4, stream);
        linear_of.codes = h_codes, linear_of.code_stride = h_stride, linear_of.scale = h_scale;
        linear_of.row_of = nullptr;
        linear_of.weight = of.down, linear_of.weight_stride = (p.width + 1) / 2;
        linear_of.weight_scale = of.down_scale, linear_of.groups = of.down_groups;
        linear_of.features = p.width, linear_of.outputs = p.outputs;
        linear_of.y = {parts, Kind::f32};
        linear(linear_of, of.int4, stream);
      });
}

}  // namespace torch_plugins::cuda

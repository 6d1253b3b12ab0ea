// torch_plugins::sparse_moe, w4a4_sparse_moe and w4a4_sparse_moe_prepacked on the CPU.
#include <algorithm>
#include <cstring>
#include <memory>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "checks.h"
#include "cpu/sparse_moe.h"
#include "cpu/w4a4_rows.h"
#include "cpu/w4a4_weight.h"

namespace torch_plugins {
namespace {

// Four-bit weights: rows of inputs and of activations are quantized, each with its own scale.
class PackedExperts final : public Experts {
 public:
  PackedExperts(std::vector<Weight> into, std::vector<Weight> out_of, const float* x, int bits)
      : into_(std::move(into)),
        out_of_(std::move(out_of)),
        x_(x),
        kernels_(w4a4_kernels()),
        first_{into_[0].columns, into_[0].groups, bits, false, 0, 0},
        second_{out_of_[0].columns, out_of_[0].groups, bits, false, 0, 0},
        inputs_(kernels_, WAVE, first_),
        inner_(kernels_, WAVE, second_) {}

  void take(int64_t row, int64_t token) override {
    quantize(first_, inputs_, row, x_ + token * first_.columns);
  }
  void enter(const Segment& segment, int64_t first, int64_t last, float* h,
             int64_t stride) override {
    kernels_.multiply(into_[segment.expert], inputs_.codes, nullptr, segment.first, segment.last,
                      first / BLOCK, (last + BLOCK - 1) / BLOCK, h, stride);
  }
  void keep(int64_t row, const float* h) override { quantize(second_, inner_, row, h); }
  void leave(const Segment& segment, int64_t first_row, int64_t last_row, int64_t first,
             int64_t last, float* y, int64_t stride) override {
    kernels_.multiply(out_of_[segment.expert], inner_.codes, nullptr, first_row, last_row,
                      first / BLOCK, (last + BLOCK - 1) / BLOCK, y, stride);
  }

 private:
  // `row` of the codes from one row at `from`.
  void quantize(const Quantization& how, const QuantizedRows& rows, int64_t row,
                const float* from) {
    Codes codes = rows.codes;
    codes.values += row * codes.stride;
    codes.sums += row * how.groups;
    codes.scales += row;
    kernels_.quantize(from, how.columns, how, 0, 1, codes);
  }

  std::vector<Weight> into_, out_of_;
  const float* x_;
  const Kernels& kernels_;
  Quantization first_, second_;
  QuantizedRows inputs_, inner_;
};

// Weights in fp32 or bf16, multiplied in fp32.
class PlainExperts final : public Experts {
 public:
  // Rows of W `stride` elements apart, experts `expert_stride`.
  struct Matrices {
    const void* at;
    int64_t expert_stride, stride;
  };
  PlainExperts(const Mixture& mixture, const ExpertKernels& kernels, bool half, Matrices gate,
               Matrices up, Matrices down, const float* x)
      : mixture_(mixture),
        kernels_(kernels),
        half_(half),
        gate_(gate),
        up_(up),
        down_(down),
        x_(x),
        inputs_(new float[WAVE * mixture.hidden]),
        inner_(new float[WAVE * mixture.width]) {}

  void take(int64_t row, int64_t token) override {
    const float* from = x_ + token * mixture_.hidden;
    std::copy(from, from + mixture_.hidden, inputs_.get() + row * mixture_.hidden);
  }
  void enter(const Segment& segment, int64_t first, int64_t last, float* h,
             int64_t stride) override {
    const int64_t gates = mixture_.gated ? mixture_.width : 0;
    const float* x = inputs_.get() + segment.first * mixture_.hidden;
    const int64_t rows = segment.last - segment.first, border = std::clamp(gates, first, last);
    multiply(gate_, segment.expert, first, border, x, mixture_.hidden, rows, h, stride);
    multiply(up_, segment.expert, border - gates, last - gates, x, mixture_.hidden, rows,
             h + border - first, stride);
  }
  void keep(int64_t row, const float* h) override {
    std::copy(h, h + mixture_.width, inner_.get() + row * mixture_.width);
  }
  void leave(const Segment& segment, int64_t first_row, int64_t last_row, int64_t first,
             int64_t last, float* y, int64_t stride) override {
    multiply(down_, segment.expert, first, last, inner_.get() + first_row * mixture_.width,
             mixture_.width, last_row - first_row, y, stride);
  }

 private:
  void multiply(const Matrices& of, int64_t expert, int64_t first, int64_t last, const float* x,
                int64_t count, int64_t rows, float* y, int64_t stride) {
    if (first >= last) return;
    const int64_t at = expert * of.expert_stride + first * of.stride;
    if (half_)
      kernels_.products_bf16(x, count, rows, static_cast<const uint16_t*>(of.at) + at, of.stride,
                             last - first, count, y, stride);
    else
      kernels_.products(x, count, rows, static_cast<const float*>(of.at) + at, of.stride,
                        last - first, count, y, stride);
  }

  Mixture mixture_;
  const ExpertKernels& kernels_;
  bool half_;
  Matrices gate_, up_, down_;
  const float* x_;
  std::unique_ptr<float[]> inputs_, inner_;
};

Activation activation_of(const char* op, const std::string& name) {
  if (name == "silu") return Activation::silu;
  if (name == "gelu") return Activation::gelu;
  if (name == "gelu_tanh") return Activation::gelu_tanh;
  if (name == "relu") return Activation::relu;
  fail(op, ": activation is ", name, ": must be silu, gelu, gelu_tanh or relu");
}

// Tokens, scores and what is kept, checked, as fp32 and bool without gaps.
struct Tokens {
  Tensor x, scores, kept;
};

Tokens check_tokens(const std::string& op, const Tensor& x, const Tensor& scores,
                    const Tensor& kept, int64_t experts) {
  const std::string of_x = op + ": x", of_scores = op + ": scores", of_kept = op + ": kept";
  check_dtype(x, of_x.c_str(), {ScalarType::Float, ScalarType::BFloat16, ScalarType::Half});
  check_dim(x, of_x.c_str(), 2);
  check_dtype(kept, of_kept.c_str(), {ScalarType::Bool});
  for (const auto& [tensor, what] : {std::pair(&scores, &of_scores), std::pair(&kept, &of_kept)}) {
    check_cpu(*tensor, what->c_str());
    check_dim(*tensor, what->c_str(), 2);
    check_size(*tensor, what->c_str(), 0, x.size(0));
    check_size(*tensor, what->c_str(), 1, experts);
  }
  return {as_contiguous(torch::stable::to(x, ScalarType::Float)),
          as_contiguous(torch::stable::to(scores, ScalarType::Float)), as_contiguous(kept)};
}

Tensor finish(const Tensor& x, const Tensor& y) {
  return x.scalar_type() == ScalarType::Float ? y : torch::stable::to(y, x.scalar_type());
}

Tensor packed(const char* op, const Tensor& x, const Tokens& tokens, const Mixture& mixture,
              std::vector<Weight> into, std::vector<Weight> out_of, int64_t bits) {
  if (bits < 2 || bits > 8) fail(op, ": input_bits is ", bits, ": must be 2 to 8");
  Tensor y = empty(tokens.x, {mixture.tokens, mixture.hidden}, ScalarType::Float);
  if (mixture.experts == 0) {
    torch::stable::zero_(y);
    return finish(x, y);
  }
  PackedExperts experts(std::move(into), std::move(out_of), data<float>(tokens.x),
                        static_cast<int>(bits));
  compute_experts(mixture, data<float>(tokens.scores), data<bool>(tokens.kept), expert_kernels(),
                  experts, mutable_data<float>(y));
  return finish(x, y);
}

// The experts' weights in [N, bytes], all of the same sizes and groups.
std::vector<Weight> read_experts(const char* op, const char* name, const Tensor& all, int64_t rows,
                                 int64_t columns) {
  std::vector<Weight> out;
  for (int64_t i = 0; i < all.size(0); ++i) {
    out.push_back(
        read_prepacked(op, name, data<uint8_t>(all) + i * all.size(1), all.size(1), rows, columns));
    if (out.back().groups != out.front().groups)
      fail(op, ": ", name, " has experts of ", out.front().groups, " and of ", out.back().groups,
           " groups: must be the same for all");
  }
  return out;
}

Tensor w4a4_sparse_moe_prepacked(Tensor x, Tensor scores, Tensor kept, Tensor gate_up, Tensor down,
                                 int64_t width, bool gated, std::string activation,
                                 int64_t input_bits) {
  constexpr auto op = "w4a4_sparse_moe_prepacked";
  for (const auto& [tensor, what] : {std::pair(&gate_up, "w4a4_sparse_moe_prepacked: gate_up"),
                                     std::pair(&down, "w4a4_sparse_moe_prepacked: down")}) {
    check_cpu(*tensor, what);
    check_dtype(*tensor, what, {ScalarType::Byte});
    check_dim(*tensor, what, 2);
  }
  check_size(down, "w4a4_sparse_moe_prepacked: down", 0, gate_up.size(0));
  if (width < 0) fail(op, ": width is ", width, ": must be the width of an expert");
  const Tokens tokens = check_tokens(op, x, scores, kept, gate_up.size(0));
  const Mixture mixture{x.size(0), gate_up.size(0), x.size(1),
                        width,     gated,           activation_of(op, activation)};
  const Tensor first = as_contiguous(gate_up), second = as_contiguous(down);
  auto into = read_experts(op, "gate_up", first, mixture.inner(), mixture.hidden);
  auto out_of = read_experts(op, "down", second, mixture.hidden, width);
  return packed(op, x, tokens, mixture, std::move(into), std::move(out_of), input_bits);
}

// Experts in plain storage, [N, O, ceil(I / 2)] with scales [N, O, G], prepacked.
Tensor prepack_experts(const char* op, const char* name, const Tensor& weight, const Tensor& scale,
                       int64_t columns) {
  const std::string what = std::string(op) + ": " + name, of_scale = what + "_scale";
  check_cpu(weight, what.c_str());
  check_cpu(scale, of_scale.c_str());
  check_dtype(weight, what.c_str(), {ScalarType::Byte});
  check_dim(weight, what.c_str(), 3);
  check_size(weight, what.c_str(), 2, (columns + 1) / 2);
  check_dim(scale, of_scale.c_str(), 3);
  check_size(scale, of_scale.c_str(), 0, weight.size(0));
  check_size(scale, of_scale.c_str(), 1, weight.size(1));
  const int64_t experts = weight.size(0), rows = weight.size(1), groups = scale.size(2);
  if (groups < 1 || columns % groups != 0)
    fail(of_scale, " has ", groups, " columns: their number, that of groups, must divide the ",
         columns, " input features");
  check_sizes(what, rows, columns, groups);
  const int64_t bytes = prepacked_bytes(rows, columns, groups);
  const Tensor plain = as_contiguous(weight);
  const Tensor scales = as_contiguous(torch::stable::to(scale, ScalarType::Float));
  Tensor out = empty(plain, {experts, bytes}, ScalarType::Byte);
  uint8_t* to = mutable_data<uint8_t>(out);
  torch::stable::parallel_for(0, experts, 1, [&](int64_t i, int64_t end) {
    for (; i < end; ++i) {
      write_header(rows, columns, groups, to + i * bytes);
      write_blocks(data<uint8_t>(plain) + i * rows * plain.size(2),
                   data<float>(scales) + i * rows * groups, rows, columns, groups, 0,
                   (rows + BLOCK - 1) / BLOCK, to + i * bytes);
    }
  });
  return out;
}

Tensor w4a4_sparse_moe(Tensor x, Tensor scores, Tensor kept, Tensor gate_up, Tensor gate_up_scale,
                       Tensor down, Tensor down_scale, bool gated, std::string activation,
                       int64_t input_bits) {
  constexpr auto op = "w4a4_sparse_moe";
  check_dim(x, "w4a4_sparse_moe: x", 2);
  check_dim(gate_up, "w4a4_sparse_moe: gate_up", 3);
  const int64_t inner = gate_up.size(1), width = gated ? inner / 2 : inner;
  if (gated && inner % 2 != 0)
    fail(op, ": gate_up has ", inner, " rows: must be even, gates before the others");
  const Tensor first = prepack_experts(op, "gate_up", gate_up, gate_up_scale, x.size(1));
  const Tensor second = prepack_experts(op, "down", down, down_scale, width);
  check_size(down, "w4a4_sparse_moe: down", 1, x.size(1));
  return w4a4_sparse_moe_prepacked(x, scores, kept, first, second, width, gated, activation,
                                   input_bits);
}

// A stack of matrices [N, rows, columns] whose rows are without gaps.
PlainExperts::Matrices matrices(const std::string& what, const Tensor& like, Tensor& stack,
                                int64_t experts, int64_t rows, int64_t columns) {
  check_cpu(stack, what.c_str());
  check_dtype(stack, what.c_str(), {like.scalar_type()});
  check_dim(stack, what.c_str(), 3);
  check_size(stack, what.c_str(), 0, experts);
  check_size(stack, what.c_str(), 1, rows);
  check_size(stack, what.c_str(), 2, columns);
  if (stack.stride(2) != 1) stack = torch::stable::contiguous(stack);
  return {stack.const_data_ptr(), stack.stride(0), stack.stride(1)};
}

// Many rows of an expert: torch's own matrix products, which no code here is faster than.
class ByMatrixProducts {
 public:
  ByMatrixProducts(const Mixture& mixture, const Tensor& x, const std::optional<Tensor>& gate,
                   const Tensor& up, const Tensor& down)
      : mixture_(mixture), x_(x), gate_(gate), up_(up), down_(down) {}

  // From this many rows of an expert on, measured by `make bench-csrc`.
  static bool is_faster(const Mixture& mixture, const bool* kept) {
    constexpr int64_t rows = 6;
    const int64_t pairs = std::count(kept, kept + mixture.tokens * mixture.experts, true);
    return pairs >= rows * mixture.experts;
  }

  void add(int64_t expert, const float* scores, const bool* kept, float* y) const {
    std::vector<Row> rows;
    for (int64_t token = 0, at = expert; token < mixture_.tokens; ++token, at += mixture_.experts)
      if (kept[at]) rows.push_back({token, scores[at]});
    if (rows.empty()) return;
    Tensor tokens = empty(x_, {static_cast<int64_t>(rows.size())}, ScalarType::Long);
    for (size_t i = 0; i < rows.size(); ++i) mutable_data<int64_t>(tokens)[i] = rows[i].token;
    const Tensor x = torch::stable::index_select(x_, 0, tokens);
    Tensor h = wide(product(x, gate_ ? *gate_ : up_, expert));
    activate(h, gate_ ? std::optional(wide(product(x, up_, expert))) : std::nullopt);
    const Tensor out = wide(product(torch::stable::to(h, x_.scalar_type()), down_, expert));
    const float* from = data<float>(out);
    torch::stable::parallel_for(0, rows.size(), 16, [&](int64_t i, int64_t end) {
      for (; i < end; ++i) {
        float* to = y + rows[i].token * mixture_.hidden;
        for (int64_t c = 0; c < mixture_.hidden; ++c)
          to[c] += rows[i].score * from[i * mixture_.hidden + c];
      }
    });
  }

 private:
  static Tensor wide(const Tensor& tensor) {
    return as_contiguous(torch::stable::to(tensor, ScalarType::Float));
  }
  static Tensor product(const Tensor& x, const Tensor& stack, int64_t expert) {
    const Tensor weight = torch::stable::select(stack, 0, expert);
    return torch::stable::matmul(x, torch::stable::transpose(weight, 0, 1));
  }
  void activate(Tensor& h, const std::optional<Tensor>& other) const {
    const int64_t count = mixture_.width;
    float* at = mutable_data<float>(h);
    const float* times = other ? data<float>(*other) : nullptr;
    torch::stable::parallel_for(0, h.size(0), 16, [&](int64_t row, int64_t end) {
      for (; row < end; ++row)
        expert_kernels().activate(mixture_.activation, at + row * count,
                                  times ? times + row * count : nullptr, count);
    });
  }

  const Mixture& mixture_;
  const Tensor& x_;
  const std::optional<Tensor>& gate_;
  const Tensor& up_;
  const Tensor& down_;
};

Tensor sparse_moe(Tensor x, Tensor scores, Tensor kept, std::optional<Tensor> gate, Tensor up,
                  Tensor down, std::string activation) {
  constexpr auto op = "sparse_moe";
  check_dim(up, "sparse_moe: up", 3);
  const int64_t experts = up.size(0), width = up.size(1);
  const Tokens tokens = check_tokens(op, x, scores, kept, experts);
  const Mixture mixture{x.size(0), experts,          x.size(1),
                        width,     gate.has_value(), activation_of(op, activation)};
  const auto into = matrices("sparse_moe: up", x, up, experts, width, x.size(1));
  const auto gates =
      gate ? matrices("sparse_moe: gate", x, *gate, experts, width, x.size(1)) : into;
  const auto out_of = matrices("sparse_moe: down", x, down, experts, x.size(1), width);
  Tensor y = empty(tokens.x, {mixture.tokens, mixture.hidden}, ScalarType::Float);
  const bool half = x.scalar_type() == ScalarType::BFloat16;
  if (x.scalar_type() == ScalarType::Half ||
      ByMatrixProducts::is_faster(mixture, data<bool>(tokens.kept))) {
    torch::stable::zero_(y);
    const ByMatrixProducts products(mixture, x, gate, up, down);
    for (int64_t expert = 0; expert < experts; ++expert)
      products.add(expert, data<float>(tokens.scores), data<bool>(tokens.kept),
                   mutable_data<float>(y));
    return finish(x, y);
  }
  PlainExperts plain(mixture, expert_kernels(), half, gates, into, out_of, data<float>(tokens.x));
  compute_experts(mixture, data<float>(tokens.scores), data<bool>(tokens.kept), expert_kernels(),
                  plain, mutable_data<float>(y));
  return finish(x, y);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(torch_plugins, CPU, m) {
  m.impl("sparse_moe", TORCH_BOX(&sparse_moe));
  m.impl("w4a4_sparse_moe", TORCH_BOX(&w4a4_sparse_moe));
  m.impl("w4a4_sparse_moe_prepacked", TORCH_BOX(&w4a4_sparse_moe_prepacked));
}

}  // namespace torch_plugins

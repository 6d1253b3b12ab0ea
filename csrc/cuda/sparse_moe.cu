// torch_plugins::sparse_moe and w4a4_sparse_moe on GPUs.
#include "cuda/sparse_moe.cuh"

#include <string>

#include "cuda/launch.h"

namespace torch_plugins {
namespace {

using namespace cuda;

// Scratch of torch's allocator. Freed when the call returns: what comes later on this stream may
// use it, and runs after the kernels.
class Memory {
 public:
  explicit Memory(const Tensor& beside) : beside_(beside) {}

  void* operator()(int64_t bytes) {
    all_.push_back(empty(beside_, {bytes}, ScalarType::Byte));
    return all_.back().mutable_data_ptr();
  }

 private:
  const Tensor& beside_;
  std::vector<Tensor> all_;
};

Activation activation_of(const std::string& op, const std::string& name) {
  if (name == "silu") return Activation::silu;
  if (name == "gelu") return Activation::gelu;
  if (name == "gelu_tanh") return Activation::gelu_tanh;
  if (name == "relu") return Activation::relu;
  fail(op, ": activation is ", name, ": must be silu, gelu, gelu_tanh or relu");
}

void check_tokens(const std::string& op, const Tensor& x, const Tensor& scores, const Tensor& kept,
                  int64_t experts) {
  const std::string of_scores = op + ": scores", of_kept = op + ": kept", of_x = op + ": x";
  check_floating(x, of_x.c_str());
  check_dim(x, of_x.c_str(), 2);
  check_floating(scores, of_scores.c_str());
  check_dtype(kept, of_kept.c_str(), {ScalarType::Bool});
  for (const auto& [tensor, what] : {std::pair(&scores, &of_scores), std::pair(&kept, &of_kept)}) {
    check_device(*tensor, what->c_str(), x);
    check_dim(*tensor, what->c_str(), 2);
    check_size(*tensor, what->c_str(), 0, x.size(0));
    check_size(*tensor, what->c_str(), 1, experts);
  }
  check_rows(of_x.c_str(), x.size(0));
  if (experts > 65535) fail(op, ": there are ", experts, " experts: must be at most 65535");
}

// What is the same for both operators; x, scores and kept have no gaps.
Mixture mixture_of(const Tensor& x, const Tensor& scores, const Tensor& kept, int64_t width,
                   bool gated, Activation activation, Tensor& y) {
  Mixture p;
  p.x = floats(x), p.scores = floats(scores), p.kept = data<bool>(kept);
  p.tokens = x.size(0), p.hidden = x.size(1), p.experts = kept.size(1);
  p.width = width, p.outputs = y.size(1), p.gated = gated, p.activation = activation;
  p.y = {y.mutable_data_ptr(), kind_of(y)};
  return p;
}

// A stack of matrices [experts, rows, columns], any strides but of columns.
Tensor stack_of(const std::string& what, const Tensor& x, const Tensor& stack, int64_t experts,
                int64_t rows, int64_t columns) {
  check_device(stack, what.c_str(), x);
  check_dtype(stack, what.c_str(), {x.scalar_type()});
  check_dim(stack, what.c_str(), 3);
  check_size(stack, what.c_str(), 0, experts);
  check_size(stack, what.c_str(), 1, rows);
  check_size(stack, what.c_str(), 2, columns);
  return stack.stride(2) == 1 ? stack : torch::stable::contiguous(stack);
}

Tensor sparse_moe_op(Tensor x, Tensor scores, Tensor kept, std::optional<Tensor> gate, Tensor up,
                     Tensor down, std::string activation) {
  check_dim(up, "sparse_moe: up", 3);
  const int64_t experts = up.size(0), width = up.size(1);
  check_tokens("sparse_moe", x, scores, kept, experts);
  up = stack_of("sparse_moe: up", x, up, experts, width, x.size(1));
  if (gate) gate = stack_of("sparse_moe: gate", x, *gate, experts, width, x.size(1));
  check_dim(down, "sparse_moe: down", 3);
  down = stack_of("sparse_moe: down", x, down, experts, down.size(1), width);
  const Activation function = activation_of("sparse_moe", activation);

  const Device device(x);
  const Tensor from = as_contiguous(x), s = as_contiguous(scores), k = as_contiguous(kept);
  Tensor y = empty(x, {x.size(0), down.size(1)}, x.scalar_type());
  const Mixture p = mixture_of(from, s, k, width, gate.has_value(), function, y);
  Memory memory(x);
  by_kind(kind_of(x), [&](auto t) {
    using T = decltype(t);
    const Tensor& g = gate ? *gate : up;
    const DenseExperts<T> weights{data<T>(g),
                                  data<T>(up),
                                  data<T>(down),
                                  {g.stride(0), g.stride(1)},
                                  {up.stride(0), up.stride(1)},
                                  {down.stride(0), down.stride(1)}};
    sparse_moe<T>(p, weights, [&](int64_t bytes) { return memory(bytes); }, device.stream());
  });
  check_launches("sparse_moe");
  return y;
}

// Bytes [experts, rows, ceil(columns / 2)] with scales [experts, rows, groups]; the number of
// groups.
int64_t check_int4(const std::string& what, const Tensor& x, const Tensor& weight,
                   const Tensor& scale, int64_t experts, int64_t columns) {
  const std::string of_scale = what + "_scale";
  check_device(weight, what.c_str(), x);
  check_device(scale, of_scale.c_str(), x);
  check_dtype(weight, what.c_str(), {ScalarType::Byte});
  check_floating(scale, of_scale.c_str());
  check_dim(weight, what.c_str(), 3);
  check_size(weight, what.c_str(), 0, experts);
  check_size(weight, what.c_str(), 2, (columns + 1) / 2);
  check_dim(scale, of_scale.c_str(), 3);
  check_size(scale, of_scale.c_str(), 0, experts);
  check_size(scale, of_scale.c_str(), 1, weight.size(1));
  const int64_t groups = scale.size(2);
  if (groups < 1 || columns % groups)
    fail(of_scale, " has ", groups, " columns: their number, that of groups, must divide the ",
         columns, " input features");
  return groups;
}

Tensor w4a4_sparse_moe_op(Tensor x, Tensor scores, Tensor kept, Tensor gate_up,
                          Tensor gate_up_scale, Tensor down, Tensor down_scale, bool gated,
                          std::string activation, int64_t input_bits) {
  const std::string op = "w4a4_sparse_moe";
  check_dim(gate_up, "w4a4_sparse_moe: gate_up", 3);
  const int64_t experts = gate_up.size(0), inner = gate_up.size(1);
  check_tokens(op, x, scores, kept, experts);
  if (gated && inner % 2)
    fail(op, ": gate_up has ", inner, " rows: must be even, gates before the others");
  const int64_t width = gated ? inner / 2 : inner;
  Int4Experts weights;
  weights.gate_up_groups =
      check_int4(op + ": gate_up", x, gate_up, gate_up_scale, experts, x.size(1));
  weights.down_groups = check_int4(op + ": down", x, down, down_scale, experts, width);
  if (input_bits < 2 || input_bits > 8)
    fail(op, ": input_bits is ", input_bits, ": must be 2 to 8");
  const Activation function = activation_of(op, activation);

  const Device device(x);
  const Tensor from = as_contiguous(x), s = as_contiguous(scores), k = as_contiguous(kept);
  const Tensor into = as_contiguous(gate_up), into_scale = as_contiguous(gate_up_scale);
  const Tensor out_of = as_contiguous(down), out_scale = as_contiguous(down_scale);
  weights.gate_up = data<uint8_t>(into), weights.down = data<uint8_t>(out_of);
  weights.gate_up_scale = floats(into_scale), weights.down_scale = floats(out_scale);
  weights.input_bits = static_cast<int>(input_bits);
  weights.int4 = input_bits <= 4 && device.has_int4();
  Tensor y = empty(x, {x.size(0), down.size(1)}, x.scalar_type());
  Memory memory(x);
  w4a4_sparse_moe(
      mixture_of(from, s, k, width, gated, function, y), weights,
      [&](int64_t bytes) { return memory(bytes); }, device.stream());
  check_launches("w4a4_sparse_moe");
  return y;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(torch_plugins, CUDA, m) {
  m.impl("sparse_moe", TORCH_BOX(&sparse_moe_op));
  m.impl("w4a4_sparse_moe", TORCH_BOX(&w4a4_sparse_moe_op));
}

}  // namespace torch_plugins

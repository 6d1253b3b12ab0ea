#include "cuda_emulator/serve.h"

#include "cuda/linear.cuh"
#include "cuda/quantize_rows.cuh"

using namespace torch_plugins::cuda;

namespace {

// One product of a warp of what its lanes hold: a [32, 4] and b [32, 2] to d [32, 4].
template <class Number, class Mma>
void mma_fragments(emulator::Case& c, Mma mma) {
  const auto *a = c.buffer<uint32_t>(0), *b = c.buffer<uint32_t>(1);
  auto* d = c.buffer<Number>(2);
  const auto kernel = [=] {
    const int lane = threadIdx.x;
    uint32_t left[4], right[2];
    std::copy_n(a + 4 * lane, 4, left);
    std::copy_n(b + 2 * lane, 2, right);
    Number sums[4] = {};
    mma(sums, left, right);
    std::copy_n(sums, 4, d + 4 * lane);
  };
  emulator::launch(1, 32, kernel);
}

Floats floats(emulator::Case& c, size_t buffer, size_t kind) {
  return {c.buffer<char>(buffer), static_cast<Kind>(c.numbers.at(kind))};
}

// x, weight, weight_scale, input_scale, zero, bias, y; the kinds of x, the scales and the bias,
// sizes.
void w4a4_linear(emulator::Case& c) {
  const auto& n = c.numbers;
  const int64_t rows = n.at(3), features = n.at(4), outputs = n.at(5), groups = n.at(6);
  const int bits = n.at(7);
  const bool int4 = n.at(8) == 4;
  const int64_t stride = code_stride(features, int4);
  std::unique_ptr<uint8_t[]> codes(new uint8_t[rows * stride]);
  std::unique_ptr<float[]> scale(new float[rows]);
  emulator::rubbish(codes.get(), rows * stride);
  emulator::rubbish(scale.get(), 4 * rows);
  QuantizeRows quantize{floats(c, 0, 0), features,    bits,   floats(c, 3, 1),
                        floats(c, 4, 1), codes.get(), stride, scale.get()};
  quantize_rows(quantize, rows, int4, nullptr);
  Linear p{};
  p.codes = codes.get(), p.code_stride = stride, p.scale = scale.get();
  p.zero = floats(c, 4, 1), p.rows = rows;
  p.weight = c.buffer<uint8_t>(1) + n.at(9), p.weight_stride = (features + 1) / 2;
  p.weight_scale = floats(c, 2, 1), p.bias = floats(c, 5, 2);
  p.outputs = outputs, p.features = features, p.groups = groups;
  p.y = {c.buffer<char>(6), static_cast<Kind>(n.at(0))};
  p.experts = 1;
  linear(p, int4, nullptr);
}

}  // namespace

int main() {
  return emulator::serve(
      {{"mma s4", [](emulator::Case& c) { mma_fragments<int32_t>(c, mma_s4); }},
       {"mma s8", [](emulator::Case& c) { mma_fragments<int32_t>(c, mma_s8); }},
       {"mma bf16", [](emulator::Case& c) { mma_fragments<float>(c, mma_bf16); }},
       {"mma f16", [](emulator::Case& c) { mma_fragments<float>(c, mma_f16); }},
       {"w4a4_linear", w4a4_linear}});
}

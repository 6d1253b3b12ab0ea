// The kernels for NEON against the portable ones, without torch; test_neon.py builds and runs it.
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <random>
#include <vector>

#include "cpu/experts.h"
#include "cpu/w4a4_rows.h"
#include "cpu/w4a4_weight.h"

using namespace torch_plugins;

std::mt19937 generator(0);

std::vector<float> normal(int64_t count) {
  std::normal_distribution<float> draw;
  std::vector<float> out(count);
  for (float& x : out) x = draw(generator);
  return out;
}

std::vector<float> product(const Kernels& kernels, const std::vector<float>& x,
                           const Weight& weight, const Quantization& how, int64_t rows,
                           const float* bias) {
  const QuantizedRows inputs(kernels, rows, how);
  kernels.quantize(x.data(), how.columns, how, 0, rows, inputs.codes);
  std::vector<float> y(rows * weight.rows);
  kernels.multiply(weight, inputs.codes, bias, 0, rows, 0, weight.blocks(), y.data(), weight.rows);
  return y;
}

int linear(int64_t rows, int64_t outputs, int64_t columns, int64_t groups, int bits, bool fixed) {
  std::vector<uint8_t> plain(outputs * ((columns + 1) / 2)),
      packed(prepacked_bytes(outputs, columns, groups));
  for (uint8_t& byte : plain) byte = static_cast<uint8_t>(generator());
  const std::vector<float> scales = normal(outputs * groups), x = normal(rows * columns),
                           bias = normal(outputs);
  write_header(outputs, columns, groups, packed.data());
  write_blocks(plain.data(), scales.data(), outputs, columns, groups, 0,
               (outputs + BLOCK - 1) / BLOCK, packed.data());
  const Weight weight =
      read_prepacked("test", "weight", packed.data(), packed.size(), outputs, columns);
  const Quantization how{columns, groups, bits, fixed, 0.3f, fixed ? 1.4f : 0.0f};
  const auto a = product(w4a4_neon(), x, weight, how, rows, bias.data());
  const auto b = product(w4a4_portable(), x, weight, how, rows, bias.data());
  return std::memcmp(a.data(), b.data(), a.size() * 4) != 0;
}

int experts(int64_t rows, int64_t outputs, int64_t count) {
  const std::vector<float> x = normal(rows * count), w = normal(outputs * count);
  std::vector<float> a(rows * outputs), b(rows * outputs);
  experts_neon().products(x.data(), count, rows, w.data(), count, outputs, count, a.data(),
                          outputs);
  experts_portable().products(x.data(), count, rows, w.data(), count, outputs, count, b.data(),
                              outputs);
  for (Activation kind :
       {Activation::silu, Activation::gelu, Activation::gelu_tanh, Activation::relu}) {
    experts_neon().activate(kind, a.data(), nullptr, a.size());
    experts_portable().activate(kind, b.data(), nullptr, b.size());
  }
  for (size_t i = 0; i < a.size(); ++i)
    if (!(std::abs(a[i] - b[i]) <= 1e-4f)) return 1;
  return 0;
}

int main() {
  int tried = 0, wrong = 0;
  for (int64_t rows : {1, 2, 3, 4, 5, 9})
    for (int64_t outputs : {1, 16, 33, 64})
      for (int64_t columns : {8, 40, 77, 256})
        for (int bits : {2, 4, 8})
          for (bool fixed : {false, true}) {
            ++tried, wrong += linear(rows, outputs, columns, columns % 4 == 0 ? 4 : 1, bits, fixed);
            ++tried, wrong += linear(rows, outputs, columns, 1, bits, fixed);
          }
  for (int64_t rows : {1, 3, 6})
    for (int64_t count : {1, 7, 64}) ++tried, wrong += experts(rows, 5, count);
  std::printf("%d of %d differ\n", wrong, tried);
  return wrong != 0 || tried < 1000;
}

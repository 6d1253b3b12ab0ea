// torch_plugins::prepack_w4, unprepack_w4, w4a4_linear and w4a4_linear_prepacked on the CPU.
#include <algorithm>
#include <cstring>
#include <optional>
#include <string>
#include <vector>

#include "checks.h"
#include "cpu/level.h"
#include "cpu/w4a4_rows.h"
#include "cpu/w4a4_weight.h"

namespace torch_plugins {

const Kernels& w4a4_kernels() {
  switch (level()) {
#if defined(__x86_64__)
    case Level::amx:
      return w4a4_amx();
    case Level::avx512:
      return w4a4_avx512();
    case Level::avx2:
      return w4a4_avx2();
#elif defined(__aarch64__)
    case Level::neon:
      return w4a4_neon();
#endif
    default:
      return w4a4_portable();
  }
}

namespace {

// Inputs of a chunk of rows stay in the second-level cache while all weights pass by.
constexpr int64_t CHUNK_BYTES = 512 * 1024;
// Blocks of weights that a thread takes at a time, and the products that are worth a thread.
constexpr int64_t STRIP = 4, PRODUCTS_OF_A_TASK = 1 << 18;

// Sizes of a plain weight and its scales.
struct Sizes {
  int64_t rows, columns, groups;
};

Sizes check_plain(const char* op, const Tensor& weight, const Tensor& scale, int64_t columns) {
  const std::string what = std::string(op) + ": weight", of_scale = what + "_scale";
  check_cpu(weight, what.c_str());
  check_cpu(scale, of_scale.c_str());
  check_dtype(weight, what.c_str(), {ScalarType::Byte});
  check_dim(weight, what.c_str(), 2);
  check_size(weight, what.c_str(), 1, (columns + 1) / 2);
  check_dim(scale, of_scale.c_str(), 2);
  check_size(scale, of_scale.c_str(), 0, weight.size(0));
  const int64_t groups = scale.size(1);
  if (groups < 1 || columns % groups != 0)
    fail(of_scale, " has ", groups, " columns: their number, that of groups, must divide the ",
         columns, " input features");
  check_sizes(what, weight.size(0), columns, groups);
  return {weight.size(0), columns, groups};
}

// The one element of a scale or zero point.
float only(const char* op, const char* name, const Tensor& tensor) {
  const std::string what = std::string(op) + ": " + name;
  check_cpu(tensor, what.c_str());
  if (tensor.numel() != 1) fail(what, " has the shape ", shape_of(tensor), ": must be one element");
  const Tensor wide = torch::stable::to(tensor, ScalarType::Float);
  return *data<float>(wide);
}

Quantization how(const char* op, int64_t columns, int64_t groups, int64_t bits,
                 const std::optional<Tensor>& scale, const std::optional<Tensor>& zero) {
  if (bits < 2 || bits > 8) fail(op, ": input_bits is ", bits, ": must be 2 to 8");
  Quantization out{columns, groups, static_cast<int>(bits), scale.has_value(), 0, 0};
  if (scale) out.scale = only(op, "input_scale", *scale);
  if (zero) out.zero = only(op, "input_zero_point", *zero);
  return out;
}

// x W^T + bias; x [rows, columns] and y [rows, weight.rows] contiguous, fp32 or bf16.
void linear(const Tensor& x, const Quantization& quantization, const Weight& weight,
            const float* bias, Tensor& y) {
  const Kernels& kernels = w4a4_kernels();
  const int64_t rows = weight.columns ? x.numel() / weight.columns : y.numel() / weight.rows;
  const QuantizedRows inputs(kernels, rows, quantization);
  const bool half = x.scalar_type() == ScalarType::BFloat16;
  const int64_t worth = std::max<int64_t>(1, PRODUCTS_OF_A_TASK / 16 / (weight.columns + 1));
  torch::stable::parallel_for(0, rows, worth, [&](int64_t first, int64_t last) {
    if (half)
      kernels.quantize_bf16(data<uint16_t>(x), weight.columns, quantization, first, last,
                            inputs.codes);
    else
      kernels.quantize(data<float>(x), weight.columns, quantization, first, last, inputs.codes);
  });

  const int64_t chunks = (rows * inputs.codes.stride + CHUNK_BYTES - 1) / CHUNK_BYTES;
  const int64_t chunk = (rows + chunks - 1) / std::max<int64_t>(1, chunks);
  const int64_t blocks = weight.blocks(), strips = (blocks + STRIP - 1) / STRIP;
  const int64_t products = chunk * (weight.columns + 1) * STRIP * BLOCK;
  const int64_t grain = std::max<int64_t>(1, PRODUCTS_OF_A_TASK / products);
  torch::stable::parallel_for(0, chunks * strips, grain, [&](int64_t task, int64_t end) {
    while (task < end) {
      // Neighbouring strips of one chunk are one call.
      const int64_t part = task / strips, last = std::min(end, (part + 1) * strips);
      const int64_t row = part * chunk, last_row = std::min(rows, row + chunk);
      const int64_t block = (task - part * strips) * STRIP;
      const int64_t last_block = std::min(blocks, (last - part * strips) * STRIP);
      const int64_t at = row * weight.rows + block * BLOCK;
      if (half)
        kernels.multiply_bf16(weight, inputs.codes, bias, row, last_row, block, last_block,
                              mutable_data<uint16_t>(y) + at, weight.rows);
      else
        kernels.multiply(weight, inputs.codes, bias, row, last_row, block, last_block,
                         mutable_data<float>(y) + at, weight.rows);
      task = last;
    }
  });
}

Tensor run(const char* op, const Tensor& x, const Weight& weight,
           const std::optional<Tensor>& input_scale, const std::optional<Tensor>& input_zero_point,
           const std::optional<Tensor>& bias, int64_t input_bits) {
  const Quantization quantization =
      how(op, weight.columns, weight.groups, input_bits, input_scale, input_zero_point);
  std::vector<int64_t> shape(x.sizes().begin(), x.sizes().end());
  shape.back() = weight.rows;
  std::optional<Tensor> of_bias;
  if (bias) {
    const std::string what = std::string(op) + ": bias";
    check_cpu(*bias, what.c_str());
    check_dim(*bias, what.c_str(), 1);
    check_size(*bias, what.c_str(), 0, weight.rows);
    of_bias = as_contiguous(torch::stable::to(*bias, ScalarType::Float));
  }
  const bool narrow = x.scalar_type() == ScalarType::Half;
  Tensor input = as_contiguous(narrow ? torch::stable::to(x, ScalarType::Float) : x);
  Tensor y = torch::stable::new_empty(input, shape, input.scalar_type());
  if (y.numel() != 0)
    linear(input, quantization, weight, of_bias ? data<float>(*of_bias) : nullptr, y);
  return narrow ? torch::stable::to(y, ScalarType::Half) : y;
}

void check_input(const char* op, const Tensor& x) {
  const std::string what = std::string(op) + ": x";
  check_dtype(x, what.c_str(), {ScalarType::Float, ScalarType::BFloat16, ScalarType::Half});
  if (x.dim() < 1) fail(what, " has no dimensions: must be [..., I]");
}

Tensor prepack_w4(Tensor weight, Tensor weight_scale, int64_t in_features) {
  const Sizes sizes = check_plain("prepack_w4", weight, weight_scale, in_features);
  const Tensor plain = as_contiguous(weight);
  const Tensor scales = as_contiguous(torch::stable::to(weight_scale, ScalarType::Float));
  const int64_t bytes = prepacked_bytes(sizes.rows, sizes.columns, sizes.groups);
  Tensor out = empty(plain, {bytes}, ScalarType::Byte);
  uint8_t* to = mutable_data<uint8_t>(out);
  write_header(sizes.rows, sizes.columns, sizes.groups, to);
  torch::stable::parallel_for(0, (sizes.rows + BLOCK - 1) / BLOCK, 1, [&](int64_t a, int64_t b) {
    write_blocks(data<uint8_t>(plain), data<float>(scales), sizes.rows, sizes.columns, sizes.groups,
                 a, b, to);
  });
  return out;
}

Tensor w4a4_linear_prepacked(Tensor x, Tensor prepacked, int64_t out_features,
                             std::optional<Tensor> input_scale,
                             std::optional<Tensor> input_zero_point, std::optional<Tensor> bias,
                             int64_t input_bits) {
  constexpr auto op = "w4a4_linear_prepacked";
  check_input(op, x);
  check_cpu(prepacked, "w4a4_linear_prepacked: prepacked");
  check_dtype(prepacked, "w4a4_linear_prepacked: prepacked", {ScalarType::Byte});
  check_dim(prepacked, "w4a4_linear_prepacked: prepacked", 1);
  const Tensor bytes = as_contiguous(prepacked);
  const Weight weight = read_prepacked(op, "prepacked", data<uint8_t>(bytes), bytes.numel(),
                                       out_features, x.size(x.dim() - 1));
  return run(op, x, weight, input_scale, input_zero_point, bias, input_bits);
}

Tensor w4a4_linear(Tensor x, Tensor weight, Tensor weight_scale, std::optional<Tensor> input_scale,
                   std::optional<Tensor> input_zero_point, std::optional<Tensor> bias,
                   int64_t input_bits) {
  check_input("w4a4_linear", x);
  const int64_t columns = x.size(x.dim() - 1);
  const Sizes sizes = check_plain("w4a4_linear", weight, weight_scale, columns);
  const Tensor packed = prepack_w4(weight, weight_scale, columns);
  const Weight read = read_prepacked("w4a4_linear", "weight", data<uint8_t>(packed), packed.numel(),
                                     sizes.rows, columns);
  return run("w4a4_linear", x, read, input_scale, input_zero_point, bias, input_bits);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(torch_plugins, CPU, m) {
  m.impl("prepack_w4", TORCH_BOX(&prepack_w4));
  m.impl("w4a4_linear_prepacked", TORCH_BOX(&w4a4_linear_prepacked));
  m.impl("w4a4_linear", TORCH_BOX(&w4a4_linear));
}

}  // namespace torch_plugins

// torch_plugins::w4a4_linear on GPUs. int4 products where the tensor cores have them (sm_80, 86,
// 89) and the input has at most 4 bits; elsewhere the weights' codes become int8 on their way into
// shared memory.
//
// FP4, which sm_100 and sm_120 multiply, is left to libraries: FlashInfer and CUTLASS (its examples
// 72 and 79) have kernels for NVFP4 and MXFP4, and TransformerEngine a recipe for NVFP4.
#include "cuda/linear.cuh"

#include "cuda/launch.h"
#include "cuda/quantize_rows.cuh"

#include <vector>

namespace torch_plugins {
namespace {

void check(const Tensor& x, const Tensor& weight, const Tensor& scale,
           const std::optional<Tensor>& input_scale, const std::optional<Tensor>& input_zero_point,
           const std::optional<Tensor>& bias, int64_t input_bits) {
  using namespace cuda;
  check_floating(x, "w4a4_linear: x");
  if (x.dim() < 1) fail("w4a4_linear: x has no dimensions: must be [..., I]");
  const int64_t features = x.size(x.dim() - 1), outputs = weight.size(0);
  check_device(weight, "w4a4_linear: weight", x);
  check_dtype(weight, "w4a4_linear: weight", {ScalarType::Byte});
  check_dim(weight, "w4a4_linear: weight", 2);
  check_size(weight, "w4a4_linear: weight", 1, (features + 1) / 2);
  check_device(scale, "w4a4_linear: weight_scale", x);
  check_floating(scale, "w4a4_linear: weight_scale");
  check_dim(scale, "w4a4_linear: weight_scale", 2);
  check_size(scale, "w4a4_linear: weight_scale", 0, outputs);
  const int64_t groups = scale.size(1);
  if (groups < 1 || features % groups)
    fail("w4a4_linear: weight_scale has ", groups, " columns: their number, that of groups, must ",
         "divide the ", features, " input features");
  check_one(input_scale, "w4a4_linear: input_scale", x);
  check_one(input_zero_point, "w4a4_linear: input_zero_point", x);
  if (bias) {
    check_device(*bias, "w4a4_linear: bias", x);
    check_floating(*bias, "w4a4_linear: bias");
    check_dim(*bias, "w4a4_linear: bias", 1);
    check_size(*bias, "w4a4_linear: bias", 0, outputs);
  }
  if (input_bits < 2 || input_bits > 8)
    fail("w4a4_linear: input_bits is ", input_bits, ": must be 2 to 8");
}

Tensor w4a4_linear(Tensor x, Tensor weight, Tensor weight_scale, std::optional<Tensor> input_scale,
                   std::optional<Tensor> input_zero_point, std::optional<Tensor> bias,
                   int64_t input_bits) {
  using namespace cuda;
  check(x, weight, weight_scale, input_scale, input_zero_point, bias, input_bits);
  const int64_t features = x.size(x.dim() - 1), outputs = weight.size(0);
  const Device device(x);
  const cudaStream_t stream = device.stream();
  std::vector<int64_t> shape(x.sizes().begin(), x.sizes().end());
  shape.back() = outputs;
  Tensor y = torch::stable::new_empty(x, shape, x.scalar_type());
  if (y.numel() == 0) return y;

  const int64_t rows = y.numel() / outputs;
  check_rows("w4a4_linear: x", rows);
  const bool int4 = input_bits <= 4 && device.has_int4();
  const int64_t stride = code_stride(features, int4);
  const Tensor from = as_contiguous(x), plain = as_contiguous(weight);
  const Tensor scales = as_contiguous(weight_scale);
  if (bias) bias = as_contiguous(*bias);
  Tensor codes = empty(x, {rows, stride}, ScalarType::Byte);
  Tensor scale = empty(x, {rows}, ScalarType::Float);
  QuantizeRows quantize{floats(from),
                        features,
                        static_cast<int>(input_bits),
                        floats(input_scale),
                        floats(input_zero_point),
                        mutable_data<uint8_t>(codes),
                        stride,
                        mutable_data<float>(scale)};
  quantize_rows(quantize, rows, int4, stream);

  Linear p;
  p.codes = data<uint8_t>(codes), p.code_stride = stride, p.scale = data<float>(scale);
  p.zero = floats(input_zero_point), p.rows = rows;
  p.weight = data<uint8_t>(plain), p.weight_stride = plain.size(1);
  p.weight_scale = floats(scales), p.bias = floats(bias);
  p.outputs = outputs, p.features = features, p.groups = weight_scale.size(1);
  p.y = {y.mutable_data_ptr(), kind_of(y)};
  linear(p, int4, stream);
  check_launches("w4a4_linear");
  return y;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(torch_plugins, CUDA, m) {
  m.impl("w4a4_linear", TORCH_BOX(&w4a4_linear));
}

}  // namespace torch_plugins

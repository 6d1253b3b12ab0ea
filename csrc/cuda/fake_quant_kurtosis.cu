// torch_plugins::fake_quant_kurtosis and fake_quant_kurtosis_backward on GPUs.
#include "cuda/fake_quant_kurtosis.cuh"

#include <tuple>

#include "cuda/clips.h"

namespace torch_plugins {
namespace {

using namespace cuda;

std::tuple<Tensor, Tensor> fake_quant_kurtosis_op(Tensor x, Tensor clip_high, Tensor clip_low,
                                                  int64_t bits, double eps) {
  check_floating(x, "fake_quant_kurtosis: x");
  const Rows rows(x, "fake_quant_kurtosis: x");
  const ClipArguments clips =
      clips_of(x, clip_high, "fake_quant_kurtosis: clip_high", clip_low,
               "fake_quant_kurtosis: clip_low", bits, "fake_quant_kurtosis: bits");
  const Device device(x);
  const Tensor from = as_contiguous(x);
  Tensor quantized = fresh(x), out = torch::stable::new_empty(x, rows.shape, wide_type(x));
  by_kind(kind_of(x), [&](auto t) {
    using T = decltype(t);
    fake_quant_kurtosis<T>(data<T>(from), rows.count, rows.d, clips, eps,
                           mutable_data<T>(quantized), mutable_data<typename Wide<T>::type>(out),
                           device.stream());
  });
  check_launches("fake_quant_kurtosis");
  return {laid_out_as(x, quantized), out};
}

std::tuple<Tensor, Tensor, Tensor> fake_quant_kurtosis_backward_op(Tensor g_xhat, Tensor g_k,
                                                                   Tensor x, Tensor clip_high,
                                                                   Tensor clip_low, int64_t bits,
                                                                   double eps) {
  check_floating(x, "fake_quant_kurtosis_backward: x");
  const Rows rows(x, "fake_quant_kurtosis_backward: x");
  check_gradient(g_xhat, "fake_quant_kurtosis_backward: g_xhat", x);
  check_device(g_k, "fake_quant_kurtosis_backward: g_k", x);
  check_dtype(g_k, "fake_quant_kurtosis_backward: g_k", {wide_type(x)});
  check_row_numbers(g_k, "fake_quant_kurtosis_backward: g_k", rows);
  const ClipArguments clips = clips_of(x, clip_high, "fake_quant_kurtosis_backward: clip_high",
                                       clip_low, "fake_quant_kurtosis_backward: clip_low", bits,
                                       "fake_quant_kurtosis_backward: bits");
  const Device device(x);
  const Tensor from = as_contiguous(x), g = as_contiguous(g_xhat), h = as_contiguous(g_k);
  Tensor dx = fresh(x), d_high = fresh(clip_high), d_low = fresh(clip_low);
  Tensor partial = empty(x, {blocks_for(rows.count), 3}, wide_type(x));
  by_kind(kind_of(x), [&](auto t) {
    using T = decltype(t);
    using W = typename Wide<T>::type;
    fake_quant_kurtosis_backward<T>(data<T>(g), data<W>(h), data<T>(from), rows.count, rows.d,
                                    clips, eps, mutable_data<T>(dx), output(d_high), output(d_low),
                                    mutable_data<W>(partial), device.stream());
  });
  check_launches("fake_quant_kurtosis_backward");
  return {laid_out_as(x, dx), d_high, d_low};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(torch_plugins, CUDA, m) {
  m.impl("fake_quant_kurtosis", TORCH_BOX(&fake_quant_kurtosis_op));
  m.impl("fake_quant_kurtosis_backward", TORCH_BOX(&fake_quant_kurtosis_backward_op));
}

}  // namespace torch_plugins

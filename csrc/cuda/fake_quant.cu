// torch_plugins::fake_quant and fake_quant_backward on GPUs.
#include "cuda/fake_quant.cuh"

#include <tuple>

#include "cuda/clips.h"

namespace torch_plugins {
namespace {

using namespace cuda;

Tensor fake_quant_op(Tensor x, Tensor clip_high, Tensor clip_low, int64_t bits) {
  check_floating(x, "fake_quant: x");
  const ClipArguments clips = clips_of(x, clip_high, "fake_quant: clip_high", clip_low,
                                       "fake_quant: clip_low", bits, "fake_quant: bits");
  const Device device(x);
  const Tensor from = as_contiguous(x);
  Tensor out = fresh(x);
  by_kind(kind_of(x), [&](auto t) {
    using T = decltype(t);
    fake_quant(data<T>(from), x.numel(), clips, mutable_data<T>(out), device.stream());
  });
  check_launches("fake_quant");
  return laid_out_as(x, out);
}

std::tuple<Tensor, Tensor, Tensor> fake_quant_backward_op(Tensor gradient, Tensor x,
                                                          Tensor clip_high, Tensor clip_low,
                                                          int64_t bits) {
  check_floating(x, "fake_quant_backward: x");
  check_gradient(gradient, "fake_quant_backward: gradient", x);
  const ClipArguments clips =
      clips_of(x, clip_high, "fake_quant_backward: clip_high", clip_low,
               "fake_quant_backward: clip_low", bits, "fake_quant_backward: bits");
  const Device device(x);
  const Tensor from = as_contiguous(x), g = as_contiguous(gradient);
  Tensor dx = fresh(x), d_high = fresh(clip_high), d_low = fresh(clip_low);
  Tensor partial = empty(x, {fake_quant_blocks(x.numel()), 3}, wide_type(x));
  by_kind(kind_of(x), [&](auto t) {
    using T = decltype(t);
    fake_quant_backward(data<T>(g), data<T>(from), x.numel(), clips, mutable_data<T>(dx),
                        output(d_high), output(d_low),
                        mutable_data<typename Wide<T>::type>(partial), device.stream());
  });
  check_launches("fake_quant_backward");
  return {laid_out_as(x, dx), d_high, d_low};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(torch_plugins, CUDA, m) {
  m.impl("fake_quant", TORCH_BOX(&fake_quant_op));
  m.impl("fake_quant_backward", TORCH_BOX(&fake_quant_backward_op));
}

}  // namespace torch_plugins

// torch_plugins::kurtosis and kurtosis_backward on GPUs.
#include "cuda/kurtosis.cuh"

#include "cuda/launch.h"

namespace torch_plugins {
namespace {

using namespace cuda;

Tensor kurtosis_op(Tensor y, double eps) {
  check_floating(y, "kurtosis: y");
  const Rows rows(y, "kurtosis: y");
  const Device device(y);
  const Tensor from = as_contiguous(y);
  Tensor out = torch::stable::new_empty(y, rows.shape, wide_type(y));
  by_kind(kind_of(y), [&](auto t) {
    using T = decltype(t);
    kurtosis<T>(data<T>(from), rows.count, rows.d, eps, mutable_data<typename Wide<T>::type>(out),
                device.stream());
  });
  check_launches("kurtosis");
  return out;
}

Tensor kurtosis_backward_op(Tensor gradient, Tensor y, double eps) {
  check_floating(y, "kurtosis_backward: y");
  const Rows rows(y, "kurtosis_backward: y");
  check_device(gradient, "kurtosis_backward: gradient", y);
  check_dtype(gradient, "kurtosis_backward: gradient", {wide_type(y)});
  check_row_numbers(gradient, "kurtosis_backward: gradient", rows);
  const Device device(y);
  const Tensor from = as_contiguous(y), g = as_contiguous(gradient);
  Tensor dy = fresh(y);
  by_kind(kind_of(y), [&](auto t) {
    using T = decltype(t);
    kurtosis_backward<T>(data<typename Wide<T>::type>(g), data<T>(from), rows.count, rows.d, eps,
                         mutable_data<T>(dy), device.stream());
  });
  check_launches("kurtosis_backward");
  return laid_out_as(y, dy);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(torch_plugins, CUDA, m) {
  m.impl("kurtosis", TORCH_BOX(&kurtosis_op));
  m.impl("kurtosis_backward", TORCH_BOX(&kurtosis_backward_op));
}

}  // namespace torch_plugins

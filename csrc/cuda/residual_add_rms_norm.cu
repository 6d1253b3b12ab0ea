// torch_plugins::residual_add_rms_norm and its backward on GPUs.
#include "cuda/residual_add_rms_norm.cuh"

#include <tuple>

#include "cuda/launch.h"

namespace torch_plugins {
namespace {

using namespace cuda;

void check_beside(const Tensor& tensor, const char* what, const Tensor& x) {
  check_device(tensor, what, x);
  check_dtype(tensor, what, {x.scalar_type()});
  check_same_shape(tensor, what, x);
}

void check_weight(const std::optional<Tensor>& weight, const char* what, const Tensor& x,
                  int64_t d) {
  if (!weight) return;
  check_device(*weight, what, x);
  check_floating(*weight, what);
  check_dim(*weight, what, 1);
  check_size(*weight, what, 0, d);
}

std::tuple<Tensor, Tensor, Tensor> forward(Tensor residual, Tensor update,
                                           std::optional<Tensor> weight, double eps) {
  check_floating(residual, "residual_add_rms_norm: residual");
  const Rows rows(residual, "residual_add_rms_norm: residual");
  check_beside(update, "residual_add_rms_norm: update", residual);
  check_weight(weight, "residual_add_rms_norm: weight", residual, rows.d);
  const Device device(residual);
  const Tensor a = as_contiguous(residual), b = as_contiguous(update);
  if (weight) weight = as_contiguous(*weight);
  Tensor total = fresh(residual), normed = fresh(residual);
  Tensor rstd = torch::stable::new_empty(residual, rows.shape, wide_type(residual));
  by_kind(kind_of(residual), [&](auto t) {
    using T = decltype(t);
    residual_add_rms_norm<T>(data<T>(a), data<T>(b), floats(weight), rows.count, rows.d, eps,
                             mutable_data<T>(total), mutable_data<T>(normed),
                             mutable_data<typename Wide<T>::type>(rstd), device.stream());
  });
  check_launches("residual_add_rms_norm");
  return {total, normed, rstd};
}

std::tuple<Tensor, Tensor> backward(std::optional<Tensor> g_sum, Tensor g_normed, Tensor total,
                                    Tensor rstd, std::optional<Tensor> weight) {
  check_floating(total, "residual_add_rms_norm_backward: total");
  const Rows rows(total, "residual_add_rms_norm_backward: total");
  if (g_sum) check_beside(*g_sum, "residual_add_rms_norm_backward: g_sum", total);
  check_beside(g_normed, "residual_add_rms_norm_backward: g_normed", total);
  check_device(rstd, "residual_add_rms_norm_backward: rstd", total);
  check_dtype(rstd, "residual_add_rms_norm_backward: rstd", {wide_type(total)});
  check_row_numbers(rstd, "residual_add_rms_norm_backward: rstd", rows);
  check_weight(weight, "residual_add_rms_norm_backward: weight", total, rows.d);
  const Device device(total);
  if (g_sum) g_sum = as_contiguous(*g_sum);
  const Tensor g = as_contiguous(g_normed), of_total = as_contiguous(total);
  const Tensor r = as_contiguous(rstd);
  if (weight) weight = as_contiguous(*weight);
  Tensor dx = fresh(total);
  Tensor d_weight = weight ? fresh(*weight) : empty(total, {0}, total.scalar_type());
  const int64_t splits = weight_splits(rows.count);
  Tensor partial = empty(total, {weight ? splits : 0, rows.d}, wide_type(total));
  by_kind(kind_of(total), [&](auto t) {
    using T = decltype(t);
    using W = typename Wide<T>::type;
    AddNormBackward<T> p{g_sum ? data<T>(*g_sum) : nullptr,
                         data<T>(g),
                         data<T>(of_total),
                         data<W>(r),
                         floats(weight),
                         rows.count,
                         rows.d,
                         mutable_data<T>(dx),
                         {d_weight.mutable_data_ptr(), kind_of(d_weight)},
                         mutable_data<W>(partial),
                         splits};
    residual_add_rms_norm_backward(p, device.stream());
  });
  check_launches("residual_add_rms_norm_backward");
  return {dx, d_weight};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(torch_plugins, CUDA, m) {
  m.impl("residual_add_rms_norm", TORCH_BOX(&forward));
  m.impl("residual_add_rms_norm_backward", TORCH_BOX(&backward));
}

}  // namespace torch_plugins

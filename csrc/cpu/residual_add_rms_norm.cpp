// torch_plugins::residual_add_rms_norm and its backward on the CPU:
// torch_plugins/ops/residual_add_rms_norm.py.
#include <optional>
#include <tuple>

#include "cpu/memory_bound.h"

namespace torch_plugins {
namespace {

using Maybe = std::optional<Tensor>;

// The gradient of the weight is summed over groups of rows first, the same ones for any number of
// threads.
constexpr int64_t ROWS_OF_A_SUM = 32, MOST_SUMS = 256;

// The weight [d] for the kernels: of the dtype of x, or wide.
struct Weight {
  Maybe kept;
  const void *same = nullptr, *wide = nullptr;

  Weight(const Maybe& weight, const Tensor& x, const char* what) {
    if (!weight) return;
    check_cpu(*weight, what);
    check_dim(*weight, what, 1);
    check_size(*weight, what, 0, x.size(x.dim() - 1));
    check_dtype(*weight, what, FLOATING);
    kept = as_contiguous(*weight);
    if (weight->scalar_type() == x.scalar_type()) {
      same = kept->const_data_ptr();
    } else {
      kept = torch::stable::to(*kept, torch_plugins::wide(x.scalar_type()));
      wide = kept->const_data_ptr();
    }
  }
};

// parallel_for over rows, of which a thread takes some thousand elements at least.
template <class F>
void each_rows(Rows shape, const F& f) {
  torch::stable::parallel_for(0, shape.rows, std::max<int64_t>(1, 4 * CHUNK / (shape.d + 1)), f);
}

std::tuple<Tensor, Tensor, Tensor> forward(const Tensor& residual, const Tensor& update,
                                           const Maybe& weight, double eps) {
  check_rows(residual, "residual_add_rms_norm: residual");
  check_like(update, "residual_add_rms_norm: update", residual);
  const Weight w(weight, residual, "residual_add_rms_norm: weight");
  const MemoryBound& kernels = memory_bound(residual.scalar_type());
  const Rows shape = rows_of(residual);
  const Tensor a = as_contiguous(residual), b = as_contiguous(update);
  const Tensor sum = fresh_like(a), normed = fresh_like(a), rstd = empty_of_rows(residual);
  const int64_t row = shape.d * residual.element_size(), of_rstd = rstd.element_size();
  const char *in = data<char>(a), *more = data<char>(b);
  char *s = mutable_data<char>(sum), *n = mutable_data<char>(normed), *r = mutable_data<char>(rstd);
  each_rows(shape, [&](int64_t first, int64_t last) {
    kernels.residual_add_rms_norm(in + first * row, more + first * row, w.same, w.wide,
                                  last - first, shape.d, eps, s + first * row, n + first * row,
                                  r + first * of_rstd);
  });
  return {sum, normed, rstd};
}

// Sums over groups [groups, d] are added up in their order.
template <class S>
void add_up(const S* groups, int64_t count, int64_t d, S* out) {
  torch::stable::parallel_for(0, d, CHUNK, [&](int64_t first, int64_t last) {
    for (int64_t group = 0; group < count; ++group)
      for (int64_t i = first; i < last; ++i) out[i] += groups[group * d + i];
  });
}

// d_weight is empty without a weight.
std::tuple<Tensor, Tensor> backward(const Maybe& g_sum, const Tensor& g_normed, const Tensor& sum,
                                    const Tensor& rstd, const Maybe& weight) {
  check_rows(sum, "residual_add_rms_norm_backward: sum");
  check_like(g_normed, "residual_add_rms_norm_backward: g_normed", sum);
  if (g_sum) check_like(*g_sum, "residual_add_rms_norm_backward: g_sum", sum);
  check_like(rstd, "residual_add_rms_norm_backward: rstd", empty_of_rows(sum));
  const Weight w(weight, sum, "residual_add_rms_norm_backward: weight");
  const MemoryBound& kernels = memory_bound(sum.scalar_type());
  const Rows shape = rows_of(sum);
  const Tensor s = as_contiguous(sum), g = as_contiguous(g_normed), r = as_contiguous(rstd);
  const Tensor more = g_sum ? as_contiguous(*g_sum) : s, dx = fresh_like(s);
  const int64_t row = shape.d * sum.element_size(), of_rstd = rstd.element_size();
  const char *g_in = data<char>(g), *s_in = data<char>(s), *r_in = data<char>(r);
  const char* more_in = g_sum ? data<char>(more) : nullptr;
  char* out = mutable_data<char>(dx);
  const auto run = [&](int64_t first, int64_t last, char* d_weight) {
    kernels.residual_add_rms_norm_backward(
        more_in ? more_in + first * row : nullptr, g_in + first * row, s_in + first * row,
        r_in + first * of_rstd, w.same, w.wide, last - first, shape.d, out + first * row, d_weight);
  };
  if (!weight) {
    each_rows(shape, [&](int64_t first, int64_t last) { run(first, last, nullptr); });
    return {dx, torch::stable::new_empty(sum, {0})};
  }
  const int64_t size = std::max(ROWS_OF_A_SUM, (shape.rows + MOST_SUMS - 1) / MOST_SUMS);
  const Rows groups{(shape.rows + size - 1) / size, shape.d};
  const ScalarType type = rstd.scalar_type();
  const Tensor parts = torch::stable::new_zeros(sum, {groups.rows, groups.d}, type);
  const Tensor d_weight = torch::stable::new_zeros(sum, {groups.d}, type);
  char* sums = mutable_data<char>(parts);
  torch::stable::parallel_for(0, groups.rows, 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i)
      run(i * size, std::min((i + 1) * size, shape.rows), sums + i * groups.d * of_rstd);
  });
  if (type == ScalarType::Double)
    add_up(data<double>(parts), groups.rows, groups.d, mutable_data<double>(d_weight));
  else
    add_up(data<float>(parts), groups.rows, groups.d, mutable_data<float>(d_weight));
  return {dx, torch::stable::to(d_weight, weight->scalar_type())};
}

}  // namespace
}  // namespace torch_plugins

STABLE_TORCH_LIBRARY_IMPL(torch_plugins, CPU, m) {
  m.impl("residual_add_rms_norm", TORCH_BOX(&torch_plugins::forward));
  m.impl("residual_add_rms_norm_backward", TORCH_BOX(&torch_plugins::backward));
}

// torch_plugins::kurtosis and kurtosis_backward, fake_quant_kurtosis and its backward on the CPU:
// torch_plugins/ops/kurtosis.py and fake_quant_kurtosis.py.
#include "cpu/fake_quant.h"

namespace torch_plugins {
namespace {

constexpr Clips NO_CLIPS{1, 0, 1};

// Checks the gradient of K.
Tensor checked_g_k(const Tensor& g_k, const char* what, const Tensor& x) {
  check_like(g_k, what, empty_of_rows(x));
  return as_contiguous(g_k);
}

// Rows that lie one after another, like x or in memory of their own.
Tensor as_rows(const Tensor& like_x) {
  if (like_x.is_contiguous()) return like_x;
  return torch::stable::new_empty(like_x, like_x.sizes());
}

// `rows` in the place of `like_x`, where it has memory of its own.
Tensor in_place_of(Tensor like_x, const Tensor& rows) {
  return like_x.is_contiguous() ? like_x : torch::stable::copy_(like_x, rows);
}

// Writes k, and xhat unless it is null; both contiguous.
void forward(const Tensor& x, const Clips& clips, double eps, const Tensor* xhat, const Tensor& k) {
  const MemoryBound& kernels = memory_bound(x.scalar_type());
  const Rows shape = rows_of(x);
  const Tensor from = as_contiguous(x);
  const int64_t bytes = shape.d * x.element_size(), of_k = k.element_size();
  const char* in = data<char>(from);
  char *out = xhat ? mutable_data<char>(*xhat) : nullptr, *out_k = mutable_data<char>(k);
  const bool past = xhat && past_caches(*xhat, shape.d, SECOND_LEVEL);
  each_range(shape, [&](int64_t first, int64_t rows) {
    kernels.fake_quant_kurtosis(in + first * bytes, rows, shape.d, clips, eps,
                                out ? out + first * bytes : nullptr, out_k + first * of_k, past);
  });
}

Tensor kurtosis(const Tensor& y, double eps) {
  check_rows(y, "kurtosis: y");
  const Tensor k = empty_of_rows(y);
  forward(y, NO_CLIPS, eps, nullptr, k);
  return k;
}

std::tuple<Tensor, Tensor> fake_quant_kurtosis(const Tensor& x, const Tensor& clip_high,
                                               const Tensor& clip_low, int64_t bits, double eps) {
  check_rows(x, "fake_quant_kurtosis: x");
  const Clips clips = checked_clips("fake_quant_kurtosis", x, clip_high, clip_low, bits);
  const Tensor k = empty_of_rows(x), like_x = fresh_like(x), xhat = as_rows(like_x);
  forward(x, clips, eps, &xhat, k);
  return {in_place_of(like_x, xhat), k};
}

// g_xhat may be null; dx.
Tensor backward(const Tensor* g_xhat, const Tensor& g_k, const Tensor& x, const Clips& clips,
                double eps, std::vector<ClipGradients>& sums) {
  const MemoryBound& kernels = memory_bound(x.scalar_type());
  const Rows shape = rows_of(x);
  const Tensor from = as_contiguous(x), g = g_xhat ? as_contiguous(*g_xhat) : from;
  const Tensor like_x = fresh_like(x), dx = as_rows(like_x);
  const int64_t bytes = shape.d * x.element_size(), of_k = g_k.element_size();
  const char *in = data<char>(from), *in_k = data<char>(g_k);
  const char* in_g = g_xhat ? data<char>(g) : nullptr;
  char* out = mutable_data<char>(dx);
  const bool past = past_caches(dx, shape.d, SECOND_LEVEL);
  sums.resize(chunks_of(shape));
  each_chunk(shape, [&](int64_t first, int64_t rows, int64_t chunk) {
    const int64_t begin = first * bytes;
    sums[chunk] = kernels.fake_quant_kurtosis_backward(in_g ? in_g + begin : nullptr,
                                                       in_k + first * of_k, in + begin, rows,
                                                       shape.d, clips, eps, out + begin, past);
  });
  return in_place_of(like_x, dx);
}

Tensor kurtosis_backward(const Tensor& gradient, const Tensor& y, double eps) {
  check_rows(y, "kurtosis_backward: y");
  const Tensor g_k = checked_g_k(gradient, "kurtosis_backward: gradient", y);
  std::vector<ClipGradients> sums;
  return backward(nullptr, g_k, y, NO_CLIPS, eps, sums);
}

std::tuple<Tensor, Tensor, Tensor> fake_quant_kurtosis_backward(const Tensor& g_xhat,
                                                                const Tensor& g_k, const Tensor& x,
                                                                const Tensor& clip_high,
                                                                const Tensor& clip_low,
                                                                int64_t bits, double eps) {
  check_rows(x, "fake_quant_kurtosis_backward: x");
  const Clips clips = checked_clips("fake_quant_kurtosis_backward", x, clip_high, clip_low, bits);
  check_like(g_xhat, "fake_quant_kurtosis_backward: g_xhat", x);
  const Tensor k = checked_g_k(g_k, "fake_quant_kurtosis_backward: g_k", x);
  std::vector<ClipGradients> sums;
  const Tensor dx = backward(&g_xhat, k, x, clips, eps, sums);
  const auto [d_high, d_low] = sum_of(sums, clip_high, clip_low);
  return {dx, d_high, d_low};
}

}  // namespace
}  // namespace torch_plugins

STABLE_TORCH_LIBRARY_IMPL(torch_plugins, CPU, m) {
  m.impl("kurtosis", TORCH_BOX(&torch_plugins::kurtosis));
  m.impl("kurtosis_backward", TORCH_BOX(&torch_plugins::kurtosis_backward));
  m.impl("fake_quant_kurtosis", TORCH_BOX(&torch_plugins::fake_quant_kurtosis));
  m.impl("fake_quant_kurtosis_backward", TORCH_BOX(&torch_plugins::fake_quant_kurtosis_backward));
}

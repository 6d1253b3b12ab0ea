// torch_plugins::fake_quant and fake_quant_backward on the CPU: torch_plugins/ops/fake_quant.py.
#include "cpu/fake_quant.h"

#include <torch/headeronly/util/Half.h>

#include <cstring>
#include <string>

namespace torch_plugins {
namespace {

double value_of(const Tensor& clip, const std::string& what) {
  check_cpu(clip, what.c_str());
  if (clip.numel() != 1) fail(what, " has the shape ", shape_of(clip), ": must be one element");
  switch (clip.scalar_type()) {
    case ScalarType::Float:
      return *data<float>(clip);
    case ScalarType::Double:
      return *data<double>(clip);
    case ScalarType::Half:
      return float(*data<torch::headeronly::Half>(clip));
    case ScalarType::BFloat16: {
      const uint32_t bits = uint32_t(*data<uint16_t>(clip)) << 16;
      float out;
      std::memcpy(&out, &bits, sizeof out);
      return out;
    }
    default:
      fail(what, " is ", name_of(clip.scalar_type()), ": must be floating point");
  }
}

// All elements as rows of CHUNK, the last one shorter.
Rows pieces_of(const Tensor& x) { return {(x.numel() + CHUNK - 1) / CHUNK, CHUNK}; }

}  // namespace

Clips checked_clips(const char* op, const Tensor& x, const Tensor& high, const Tensor& low,
                    int64_t bits) {
  const std::string name = op;
  check_dtype(x, (name + ": x").c_str(), FLOATING);
  if (bits < 1 || bits > 31) fail(op, ": bits is ", bits, ": must be 1 to 31");
  return {value_of(high, name + ": clip_high"), value_of(low, name + ": clip_low"), bits};
}

std::tuple<Tensor, Tensor> sum_of(const std::vector<ClipGradients>& chunks, const Tensor& high,
                                  const Tensor& low) {
  ClipGradients sum{0, 0};
  for (const ClipGradients& chunk : chunks) sum.high += chunk.high, sum.low += chunk.low;
  return {torch::stable::fill_(torch::stable::empty_like(high), sum.high),
          torch::stable::fill_(torch::stable::empty_like(low), sum.low)};
}

namespace {

Tensor fake_quant(const Tensor& x, const Tensor& clip_high, const Tensor& clip_low, int64_t bits) {
  const Clips clips = checked_clips("fake_quant", x, clip_high, clip_low, bits);
  const MemoryBound& kernels = memory_bound(x.scalar_type());
  const Tensor xhat = fresh_like(x), from = laid_out_like(x, xhat);
  const int64_t bytes = x.element_size();
  const char* in = data<char>(from);
  char* out = mutable_data<char>(xhat);
  const bool past = past_caches(xhat, CHUNK, ALL_CACHES);
  each_range(pieces_of(x), [&](int64_t first, int64_t pieces) {
    const int64_t begin = first * CHUNK, count = std::min(pieces * CHUNK, x.numel() - begin);
    kernels.fake_quant_kurtosis(in + begin * bytes, 1, count, clips, 0, out + begin * bytes,
                                nullptr, past);
  });
  return xhat;
}

std::tuple<Tensor, Tensor, Tensor> fake_quant_backward(const Tensor& gradient, const Tensor& x,
                                                       const Tensor& clip_high,
                                                       const Tensor& clip_low, int64_t bits) {
  const Clips clips = checked_clips("fake_quant_backward", x, clip_high, clip_low, bits);
  check_like(gradient, "fake_quant_backward: gradient", x);
  const MemoryBound& kernels = memory_bound(x.scalar_type());
  const Tensor dx = fresh_like(x), from = laid_out_like(x, dx), g = laid_out_like(gradient, dx);
  const int64_t bytes = x.element_size();
  const char *in = data<char>(from), *g_in = data<char>(g);
  char* out = mutable_data<char>(dx);
  const bool past = past_caches(dx, CHUNK, SECOND_LEVEL);
  std::vector<ClipGradients> sums(pieces_of(x).rows);
  each_chunk(pieces_of(x), [&](int64_t piece, int64_t, int64_t chunk) {
    const int64_t count = std::min(CHUNK, x.numel() - piece * CHUNK), begin = piece * CHUNK * bytes;
    sums[chunk] = kernels.fake_quant_kurtosis_backward(g_in + begin, nullptr, in + begin, 1, count,
                                                       clips, 0, out + begin, past);
  });
  const auto [d_high, d_low] = sum_of(sums, clip_high, clip_low);
  return {dx, d_high, d_low};
}

}  // namespace
}  // namespace torch_plugins

STABLE_TORCH_LIBRARY_IMPL(torch_plugins, CPU, m) {
  m.impl("fake_quant", TORCH_BOX(&torch_plugins::fake_quant));
  m.impl("fake_quant_backward", TORCH_BOX(&torch_plugins::fake_quant_backward));
}

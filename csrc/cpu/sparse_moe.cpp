#include "cpu/sparse_moe.h"

#include <algorithm>
#include <memory>

#include "checks.h"
#include "cpu/level.h"

namespace torch_plugins {
namespace {

// Columns that a thread takes at a time, and rows whose results it holds before it adds them up.
constexpr int64_t STRIP = 64, CHUNK = 48;

struct Wave {
  std::vector<Segment> segments;
  std::vector<Row> rows;
};

// Experts in order, an expert's tokens in order, cut into waves.
std::vector<Wave> plan(const Mixture& mixture, const float* scores, const bool* kept) {
  std::vector<Wave> waves;
  int64_t in_wave = WAVE;
  for (int64_t expert = 0; expert < mixture.experts; ++expert) {
    bool open = false;  // whether the last segment is this expert's
    for (int64_t token = 0; token < mixture.tokens; ++token) {
      if (!kept[token * mixture.experts + expert]) continue;
      if (in_wave == WAVE) waves.emplace_back(), in_wave = 0, open = false;
      Wave& wave = waves.back();
      if (!open) wave.segments.push_back({expert, in_wave, in_wave}), open = true;
      wave.rows.push_back({token, scores[token * mixture.experts + expert]});
      wave.segments.back().last = ++in_wave;
    }
  }
  return waves;
}

// The second matrices, and the sums over experts.
void leave(const Mixture& mixture, const Wave& wave, Experts& experts, float* y) {
  const int64_t strips = (mixture.hidden + STRIP - 1) / STRIP;
  torch::stable::parallel_for(0, strips, 1, [&](int64_t strip, int64_t end) {
    alignas(64) float part[CHUNK * STRIP];
    for (; strip < end; ++strip) {
      const int64_t first = strip * STRIP, last = std::min(mixture.hidden, first + STRIP);
      for (const Segment& segment : wave.segments)
        for (int64_t row = segment.first; row < segment.last; row += CHUNK) {
          const int64_t last_row = std::min(segment.last, row + CHUNK);
          experts.leave(segment, row, last_row, first, last, part, STRIP);
          for (int64_t i = 0; i < last_row - row; ++i) {
            const Row& of_row = wave.rows[row + i];
            float* to = y + of_row.token * mixture.hidden + first;
            for (int64_t c = 0; c < last - first; ++c) to[c] += of_row.score * part[i * STRIP + c];
          }
        }
    }
  });
}

void compute(const Mixture& mixture, const Wave& wave, const ExpertKernels& kernels,
             Experts& experts, float* h, float* y) {
  const int64_t rows = static_cast<int64_t>(wave.rows.size()), inner = mixture.inner();
  torch::stable::parallel_for(0, rows, 16, [&](int64_t row, int64_t end) {
    for (; row < end; ++row) experts.take(row, wave.rows[row].token);
  });
  const int64_t strips = (inner + STRIP - 1) / STRIP;
  const int64_t tasks = static_cast<int64_t>(wave.segments.size()) * strips;
  torch::stable::parallel_for(0, tasks, 1, [&](int64_t task, int64_t end) {
    for (; task < end; ++task) {
      const Segment& segment = wave.segments[task / strips];
      const int64_t first = task % strips * STRIP, last = std::min(inner, first + STRIP);
      experts.enter(segment, first, last, h + segment.first * inner + first, inner);
    }
  });
  torch::stable::parallel_for(0, rows, 16, [&](int64_t row, int64_t end) {
    for (; row < end; ++row) {
      float* of_row = h + row * inner;
      kernels.activate(mixture.activation, of_row, mixture.gated ? of_row + mixture.width : nullptr,
                       mixture.width);
      experts.keep(row, of_row);
    }
  });
  leave(mixture, wave, experts, y);
}

}  // namespace

void compute_experts(const Mixture& mixture, const float* scores, const bool* kept,
                     const ExpertKernels& kernels, Experts& experts, float* y) {
  std::fill(y, y + mixture.tokens * mixture.hidden, 0.0f);
  const std::vector<Wave> waves = plan(mixture, scores, kept);
  int64_t most = 0;
  for (const Wave& wave : waves) most = std::max<int64_t>(most, wave.rows.size());
  const std::unique_ptr<float[]> h(new float[most * mixture.inner()]);
  for (const Wave& wave : waves) compute(mixture, wave, kernels, experts, h.get(), y);
}

const ExpertKernels& expert_kernels() {
  switch (level()) {
#if defined(__x86_64__)
    case Level::amx:
    case Level::avx512:
      return experts_avx512();
    case Level::avx2:
      return experts_avx2();
#elif defined(__aarch64__)
    case Level::neon:
      return experts_neon();
#endif
    default:
      return experts_portable();
  }
}

}  // namespace torch_plugins

// The order in which a few chosen experts are computed, whatever their weights are made of.
//
// Every pair of a token and an expert that it keeps is a row; rows of one expert lie beside each
// other and are a segment. Rows go through in waves that a cache holds: inputs are taken,
// multiplied by the first matrices, activated, and multiplied by the second, whose results are
// added to their tokens at once. A thread owns columns of the output, so sums are in the order of
// experts whatever the number of threads.
#pragma once

#include <cstdint>
#include <vector>

#include "cpu/experts.h"

namespace torch_plugins {

struct Segment {
  int64_t expert, first, last;  // rows of the wave
};

struct Row {
  int64_t token;
  float score;
};

class Experts {
 public:
  virtual ~Experts() = default;
  // Row `row` of the wave is this token: make its input ready.
  virtual void take(int64_t row, int64_t token) = 0;
  // Columns of gate_i x and up_i x, side by side, of all rows of a segment: into h, rows of
  // `stride`, beginning with the first of both.
  virtual void enter(const Segment& segment, int64_t first_column, int64_t last_column, float* h,
                     int64_t stride) = 0;
  // The activated row, to be what `leave` reads.
  virtual void keep(int64_t row, const float* h) = 0;
  // Columns of down_i h for rows from first to last of the wave.
  virtual void leave(const Segment& segment, int64_t first_row, int64_t last_row,
                     int64_t first_column, int64_t last_column, float* y, int64_t stride) = 0;
};

struct Mixture {
  int64_t tokens, experts, hidden, width;
  bool gated;
  Activation activation;
  int64_t inner() const { return gated ? 2 * width : width; }
};

// Rows of one wave, at most; `take` and `keep` see no larger number.
constexpr int64_t WAVE = 512;

// y [tokens, hidden], fp32; scores and kept [tokens, experts].
void compute_experts(const Mixture& mixture, const float* scores, const bool* kept,
                     const ExpertKernels& kernels, Experts& experts, float* y);

const ExpertKernels& expert_kernels();

}  // namespace torch_plugins

// The linear layer of codes, for one weight or for many (the experts of a layer): formula and
// storage are those of torch_plugins/ops/int4.py.
//
// A block makes ROWS x 32 N outputs, a warp ROWS x 8 N of them: few where rows are few, so that
// there are blocks for all of the GPU. It goes through the features in tiles that end with a group
// of the weight's scales: whatever the size of the groups, what lies beyond their end is 0 in
// shared memory. Sums of a group are int32, exact; groups are added in fp32, in their order.
#pragma once

#include "mma.cuh"
#include "numbers.cuh"
#include "tiles.cuh"

namespace torch_plugins::cuda {

constexpr int LINEAR_THREADS = 128;

struct Linear {
  // Of the input.
  const uint8_t* codes;  // [rows, code_stride]: int4 as weights are stored, or int8
  int64_t code_stride;   // in bytes, a multiple of 16
  const float* scale;    // [rows]
  Floats zero;           // one element, or null: 0
  int64_t rows;
  // Of the weight; expert e begins at its output e * outputs.
  const uint8_t* weight;  // [experts * outputs, weight_stride]
  int64_t weight_stride;
  Floats weight_scale;  // [experts * outputs, groups]
  Floats bias;          // [outputs], or null
  int64_t outputs, features, groups;
  Output y{};  // [rows, outputs]
  // With experts: row m of expert e is row_of[e * rows + m] of the input, for m < counts[e]; its
  // output is row e * rows + m of y. Without row_of, its input is that row too.
  int64_t experts = 1;
  const int32_t* counts = nullptr;
  const int32_t* row_of = nullptr;
};

// int4 with 64 features an instruction, int8 with 32: both are 32 bytes of a tile.
template <int BITS>
__device__ void mma(int32_t (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  if constexpr (BITS == 4)
    mma_s4(d, a, b);
  else
    mma_s8(d, a, b);
}

template <int ROWS, int N, int BITS>
struct LinearBlock {
  static constexpr int FEATURES = TILE_BYTES * 8 / BITS, EACH = 128 / BITS;  // a tile's, a part's
  static constexpr int COLUMNS = 32 * N, M = ROWS / 16;  // a warp makes M x N products
  using UnderWay = TilesUnderWay<ROWS, COLUMNS, LINEAR_THREADS>;

  const Linear& p;
  uint8_t *a, *b;                      // tiles of the input and of the weight
  int64_t expert, row, count, column;  // of the first output; rows of the expert
  bool vectors_a, vectors_b;

  __device__ int64_t input_row(int64_t m) const {
    return p.row_of ? p.row_of[expert * p.rows + m] : expert * p.rows + m;
  }

  // Asks for the tiles of the features from k on.
  __device__ void fetch(UnderWay& next, int64_t k, int64_t end) const {
    const auto input = [&](int i, int part) -> uint4 {
      const int64_t m = row + i, from = k + part * EACH;
      if (m >= count || from >= end) return {0, 0, 0, 0};
      const uint8_t* codes = p.codes + input_row(m) * p.code_stride;
      return BITS == 4 ? from_int4<4>(codes, from, end, vectors_a)
                       : from_int8(codes, from, end, vectors_a);
    };
    const auto weight = [&](int i, int part) -> uint4 {
      const int64_t o = column + i, from = k + part * EACH;
      if (o >= p.outputs || from >= end) return {0, 0, 0, 0};
      const uint8_t* codes = p.weight + (expert * p.outputs + o) * p.weight_stride;
      return from_int4<BITS>(codes, from, end, vectors_b);
    };
    next.fetch(input, weight);
  }

  // A += X W of `features` features of the tiles, and `ones` += the sum of W.
  __device__ void multiply(int64_t features, int32_t (&sums)[M][N][4],
                           int32_t (&ones)[N][4]) const {
    const int warp = threadIdx.x / WARP, r = threadIdx.x % WARP / 4, c = threadIdx.x % 4 * 4;
    const uint32_t one = BITS == 4 ? 0x11111111u : 0x01010101u;
    const uint32_t all_one[4] = {one, one, one, one};
    for (int step = 0; step < TILE_BYTES && step * 8 / BITS < features; step += 32) {
      uint32_t right[N][2];
      UNROLL
      for (int n = 0; n < N; ++n) UNROLL
      for (int i = 0; i < 2; ++i) right[n][i] = word(b, (warp * N + n) * 8 + r, step + c + 16 * i);
      UNROLL
      for (int m = 0; m < M; ++m) {
        uint32_t left[4];
        UNROLL
        for (int i = 0; i < 4; ++i)
          left[i] = word(a, m * 16 + r + i % 2 * 8, step + c + i / 2 * 16);
        UNROLL
        for (int n = 0; n < N; ++n) mma<BITS>(sums[m][n], left, right[n]);
      }
      if (p.zero.data) UNROLL
      for (int n = 0; n < N; ++n) mma<BITS>(ones[n], all_one, right[n]);
    }
  }

  // Calls f(m, n, i, row, column) for each output that this thread holds.
  template <class F>
  __device__ void each(F f) const {
    const int lane = threadIdx.x % WARP, warp = threadIdx.x / WARP;
    UNROLL
    for (int m = 0; m < M; ++m) UNROLL
    for (int n = 0; n < N; ++n) UNROLL
    for (int i = 0; i < 4; ++i) {
      const int64_t t = row + m * 16 + lane / 4 + i / 2 * 8;
      const int64_t o = column + (warp * N + n) * 8 + lane % 4 * 2 + i % 2;
      if (t < count && o < p.outputs) f(m, n, i, t, o);
    }
  }
};

template <int ROWS, int N, int BITS>
__global__ void __launch_bounds__(LINEAR_THREADS) linear_kernel(Linear p) {
  using Block = LinearBlock<ROWS, N, BITS>;
  SHARED(uint8_t, a, (ROWS * TILE_STRIDE));
  SHARED(uint8_t, b, (Block::COLUMNS * TILE_STRIDE));
  const int64_t across = ceil_div(p.outputs, Block::COLUMNS), size = p.features / p.groups;
  const int64_t expert = blockIdx.z, count = p.counts ? p.counts[expert] : p.rows;
  const int64_t row = blockIdx.x / across * ROWS, column = blockIdx.x % across * Block::COLUMNS;
  if (row >= count) return;  // the whole block
  const bool whole = size % 32 == 0;
  const bool aligned = reinterpret_cast<uintptr_t>(p.weight) % 16 == 0 && p.weight_stride % 16 == 0;
  const Block block{p, a, b, expert, row, count, column, whole, whole && aligned};

  typename Block::UnderWay next;
  block.fetch(next, 0, size);
  float out[Block::M][N][4] = {};
  const float zero = p.zero.data ? p.zero[0] : 0;
  for (int64_t group = 0; group < p.groups; ++group) {
    int32_t sums[Block::M][N][4] = {}, ones[N][4] = {};
    const int64_t end = (group + 1) * size;
    for (int64_t k = group * size; k < end; k += Block::FEATURES) {
      __syncthreads();  // the tiles before have been read
      next.put(a, b);
      __syncthreads();
      const bool last = k + Block::FEATURES >= end;  // then comes the first tile of a group
      const int64_t then = last ? end : k + Block::FEATURES;
      if (then < p.features) block.fetch(next, then, last ? end + size : end);
      block.multiply(end - k, sums, ones);
    }
    block.each([&](int m, int n, int i, int64_t, int64_t o) {
      float sum = static_cast<float>(sums[m][n][i]);
      if (p.zero.data) sum -= zero * static_cast<float>(ones[n][i]);
      out[m][n][i] += sum * p.weight_scale[(expert * p.outputs + o) * p.groups + group];
    });
  }
  block.each([&](int m, int n, int i, int64_t t, int64_t o) {
    float y = out[m][n][i] * p.scale[block.input_row(t)];
    if (p.bias.data) y += p.bias[o];
    p.y.set((expert * p.rows + t) * p.outputs + o, y);
  });
}

inline void linear(const Linear& p, bool int4, cudaStream_t stream) {
  if (p.rows == 0 || p.outputs == 0 || p.experts == 0) return;
  const bool few = p.rows <= 16;
  const int64_t blocks = ceil_div(p.rows, few ? 16 : 64) * ceil_div(p.outputs, few ? 32 : 64);
  const auto kernel = int4 ? (few ? linear_kernel<16, 1, 4> : linear_kernel<64, 2, 4>)
                           : (few ? linear_kernel<16, 1, 8> : linear_kernel<64, 2, 8>);
  LAUNCH(kernel, dim3(blocks, 1, p.experts), dim3(LINEAR_THREADS), stream, p);
}

}  // namespace torch_plugins::cuda

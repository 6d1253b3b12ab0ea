// The kernels of w4a4.h for one instruction set. A file includes this once, after it has defined
//
//   template <int ROWS, int BLOCKS>
//   void dot(const uint8_t* tiles, int64_t block_bytes, int64_t steps, const int8_t* codes,
//            int64_t stride, int32_t* sums);
//
// which counts sums[ROWS][BLOCKS * 16] of (weight code + 8) * input code over the steps of one
// group, and what is best for it: HEIGHTS, the numbers of rows that are multiplied at once, in
// order; MOST_BLOCKS at once with any of them, BLOCKS_OF_FEW with up to FEW_ROWS, BLOCKS_OF_A_ROW
// with one; and ALIGNMENT, the bytes of which a group of codes is a multiple. Fewer rows than the
// next height are multiplied with what lies behind them, which is memory of ours, and dropped.
#pragma once

#include "cpu/vec.h"
#include "cpu/w4a4.h"

namespace torch_plugins {
namespace {

// The inputs ------------------------------------------------------------------------------------

// max|x| as bits, which order NaN above infinity above numbers.
template <class T>
INLINE int32_t largest_bits(const T* x, int64_t count) {
  Ints most{};
  int64_t i = 0;
  for (; i + WIDTH <= count; i += WIDTH) {
    const Ints bits = to_bits(load(x + i)) & 0x7fffffff;
    most = bits > most ? bits : most;
  }
  if (i < count) {
    const Ints bits = to_bits(load(x + i, count - i)) & 0x7fffffff;
    most = bits > most ? bits : most;
  }
  int32_t out = 0;
  for (int lane = 0; lane < WIDTH; ++lane) out = most[lane] > out ? most[lane] : out;
  return out;
}

using Bytes = int8_t __attribute__((vector_size(WIDTH)));

// Codes of up to WIDTH features: round(clamp(x / scale + zero)).
INLINE Ints codes_of(Floats x, Floats scale, Floats zero, Floats lowest, Floats highest) {
  const Floats place = max(min(x / scale + zero, highest), lowest);
  return __builtin_convertvector(round_even(place), Ints);
}

template <class T>
INLINE int32_t quantize_group(const T* x, int64_t count, Floats scale, Floats zero, int bits,
                              int8_t* to) {
  const float most = static_cast<float>(1 << (bits - 1));
  const Floats lowest = splat(-most), highest = splat(most - 1);
  Ints total{};
  int64_t i = 0;
  for (; i + WIDTH <= count; i += WIDTH) {
    const Ints codes = codes_of(load(x + i), scale, zero, lowest, highest);
    total += codes;
    const Bytes bytes = __builtin_convertvector(codes, Bytes);
    std::memcpy(to + i, &bytes, sizeof bytes);
  }
  int32_t out = 0;
  for (int lane = 0; lane < WIDTH; ++lane) out += total[lane];
  if (i < count) {
    const Ints codes = codes_of(load(x + i, count - i), scale, zero, lowest, highest);
    for (int lane = 0; lane < count - i; ++lane) {
      to[i + lane] = static_cast<int8_t>(codes[lane]);
      out += codes[lane];
    }
  }
  return out;
}

template <class T>
void quantize_rows(const T* x, int64_t stride, const Quantization& how, int64_t first, int64_t last,
                   const Codes& codes) {
  constexpr int32_t infinity = 0x7f800000;
  const int64_t size = how.groups ? how.columns / how.groups : 0;
  for (int64_t row = first; row < last; ++row) {
    const T* from = x + row * stride;
    const int32_t most = largest_bits(from, how.columns);
    float scale = how.scale;
    if (!how.is_static) {
      float largest;
      std::memcpy(&largest, &most, sizeof largest);
      scale = 2 * largest / static_cast<float>((1 << how.bits) - 1);
      if (scale == 0) scale = 1;
    }
    const bool finite = how.is_static ? most <= infinity : most < infinity;
    int8_t* to = codes.values + row * codes.stride;
    codes.scales[row] = finite ? scale : __builtin_nanf("");
    for (int64_t group = 0; group < how.groups; ++group, to += codes.group_stride) {
      codes.sums[row * how.groups + group] =
          quantize_group(from + group * size, size, splat(scale), splat(how.zero), how.bits, to);
      std::memset(to + size, 0, codes.group_stride - size);
    }
  }
}

// The product -----------------------------------------------------------------------------------

// WIDTH columns of one row and group: what `dot` counted, with the weight's scale and without the 8
// of its codes and the zero point of the input's.
INLINE Floats of_group(const int32_t* counted, int32_t input_sum, float zero, const float* scales,
                       const int32_t* sums) {
  Ints count, of_weight;
  std::memcpy(&count, counted, sizeof count);
  Floats value = __builtin_convertvector(count - 8 * input_sum, Floats);
  if (zero != 0) {
    std::memcpy(&of_weight, sums, sizeof of_weight);
    value = value - zero * __builtin_convertvector(of_weight, Floats);
  }
  return value * load(scales);
}

// The same with the input's scale and the bias: `count` columns, of which some may be beyond y.
template <class T>
INLINE void finish(Floats value, float scale, const float* bias, int64_t count, T* y) {
  value = value * scale;
  if (count >= WIDTH) {
    if (bias != nullptr) value = value + load(bias);
    store(y, value);
  } else if (count > 0) {
    if (bias != nullptr) value = value + load(bias, count);
    store(y, value, count);
  }
}

INLINE int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }

// `rows` rows of codes by BLOCKS blocks of the weight; y is where the first result goes.
template <class T, int ROWS, int BLOCKS>
void multiply_tile(int64_t rows, const Weight& weight, const Codes& codes, const float* bias,
                   int64_t row, int64_t block, T* y, int64_t stride) {
  constexpr int64_t COLUMNS = BLOCKS * BLOCK;
  alignas(64) int32_t counted[ROWS * COLUMNS];
  alignas(64) float totals[ROWS * COLUMNS];
  const int64_t groups = weight.groups, steps = weight.steps();
  const int64_t column = block * BLOCK, count = least(COLUMNS, weight.rows - column);
  for (int64_t group = 0; group < groups; ++group) {
    dot<ROWS, BLOCKS>(weight.tiles + block * weight.block_bytes() + group * steps * TILE,
                      weight.block_bytes(), steps,
                      codes.values + row * codes.stride + group * codes.group_stride, codes.stride,
                      counted);
    for (int64_t i = 0; i < rows; ++i)
      for (int64_t lane = 0; lane < COLUMNS; lane += WIDTH) {
        const int64_t at = ((block + lane / BLOCK) * groups + group) * BLOCK + lane % BLOCK;
        float* total = totals + i * COLUMNS + lane;
        Floats value =
            of_group(counted + i * COLUMNS + lane, codes.sums[(row + i) * groups + group],
                     codes.zero, weight.scales + at, weight.sums + at);
        if (group > 0) value = load(total) + value;
        if (group + 1 < groups)
          store(total, value);
        else
          finish(value, codes.scales[row + i], bias ? bias + column + lane : nullptr, count - lane,
                 y + i * stride + lane);
      }
  }
}

constexpr int KINDS = sizeof HEIGHTS / sizeof HEIGHTS[0], MOST_ROWS = HEIGHTS[KINDS - 1];

// The least height that `rows` fit into.
template <class T, int LIMIT, int BLOCKS, int KIND = 0>
INLINE void multiply_rows(int64_t rows, const Weight& weight, const Codes& codes, const float* bias,
                          int64_t row, int64_t block, T* y, int64_t stride) {
  if constexpr (HEIGHTS[KIND] < LIMIT) {
    if (rows > HEIGHTS[KIND])
      return multiply_rows<T, LIMIT, BLOCKS, KIND + 1>(rows, weight, codes, bias, row, block, y,
                                                       stride);
  }
  multiply_tile<T, HEIGHTS[KIND], BLOCKS>(rows, weight, codes, bias, row, block, y, stride);
}

// Blocks BLOCKS at a time, as many as there are whole ones; rows up to LIMIT at a time, in portions
// that differ by little. Moves `block` to the first that is left, and y with it.
template <class T, int LIMIT, int BLOCKS>
void multiply_blocks(const Weight& weight, const Codes& codes, const float* bias, int64_t first_row,
                     int64_t last_row, int64_t& block, int64_t last_block, T*& y, int64_t stride) {
  const int64_t rows = last_row - first_row;
  const int64_t portions = (rows + LIMIT - 1) / LIMIT;
  const int64_t height = EVEN ? (rows + portions - 1) / portions : LIMIT;
  for (; block + BLOCKS <= last_block; block += BLOCKS, y += BLOCKS * BLOCK)
    for (int64_t row = first_row; row < last_row; row += height)
      multiply_rows<T, LIMIT, BLOCKS>(least(height, last_row - row), weight, codes, bias, row,
                                      block, y + (row - first_row) * stride, stride);
}

template <class T>
void multiply(const Weight& weight, const Codes& codes, const float* bias, int64_t first_row,
              int64_t last_row, int64_t block, int64_t last_block, T* y, int64_t stride) {
  const int64_t rows = last_row - first_row;
  if (rows <= 0) return;
  if (rows == 1)
    multiply_blocks<T, 1, BLOCKS_OF_A_ROW>(weight, codes, bias, first_row, last_row, block,
                                           last_block, y, stride);
  else if (rows <= FEW_ROWS)
    multiply_blocks<T, FEW_ROWS, BLOCKS_OF_FEW>(weight, codes, bias, first_row, last_row, block,
                                                last_block, y, stride);
  multiply_blocks<T, MOST_ROWS, MOST_BLOCKS>(weight, codes, bias, first_row, last_row, block,
                                             last_block, y, stride);
  multiply_blocks<T, MOST_ROWS, 1>(weight, codes, bias, first_row, last_row, block, last_block, y,
                                   stride);
}

// The table --------------------------------------------------------------------------------------

void quantize_float(const float* x, int64_t stride, const Quantization& how, int64_t first,
                    int64_t last, const Codes& codes) {
  quantize_rows(x, stride, how, first, last, codes);
}

void quantize_bf16(const uint16_t* x, int64_t stride, const Quantization& how, int64_t first,
                   int64_t last, const Codes& codes) {
  quantize_rows(reinterpret_cast<const bf16*>(x), stride, how, first, last, codes);
}

void multiply_float(const Weight& weight, const Codes& codes, const float* bias, int64_t first_row,
                    int64_t last_row, int64_t first_block, int64_t last_block, float* y,
                    int64_t stride) {
  multiply(weight, codes, bias, first_row, last_row, first_block, last_block, y, stride);
}

void multiply_bf16(const Weight& weight, const Codes& codes, const float* bias, int64_t first_row,
                   int64_t last_row, int64_t first_block, int64_t last_block, uint16_t* y,
                   int64_t stride) {
  multiply(weight, codes, bias, first_row, last_row, first_block, last_block,
           reinterpret_cast<bf16*>(y), stride);
}

constexpr Kernels KERNELS{ALIGNMENT,     MOST_ROWS,      quantize_float,
                          quantize_bf16, multiply_float, multiply_bf16};

}  // namespace
}  // namespace torch_plugins

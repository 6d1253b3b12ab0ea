// Four-bit weights in memory, and the kernels that multiply them by quantized inputs.
//
// A prepacked weight [O, I] with G groups of I / G neighbouring input features is one run of bytes,
// the same on every machine, little-endian:
//
//   header   64 bytes: "TPW4", version (uint32), O, I, G (int64 each), zeros
//   scales   float [B][G][16]    B = ceil(O / 16) blocks of rows, 0 beyond row O
//   sums     int32 [B][G][16]    sums of the codes of a group
//   tiles    uint8 [B][G][E][64] E = ceil(I / G / 8) steps of eight features
//
// Byte 4 r + c of a tile holds row r of the block: feature c of the step in its low half, feature
// 4 + c in its high half, each as code + 8, and 8 where there is no such row or feature. Sixteen
// rows of four features are one register of AVX-512's vpdpbusd and one row of an AMX tile; halves
// and quarters of them serve AVX2 and NEON.
#pragma once

#include <cstdint>

namespace torch_plugins {

constexpr int64_t BLOCK = 16, STEP = 8, TILE = 64;
constexpr int64_t HEADER = 64;
constexpr uint32_t VERSION = 1;

struct Weight {
  int64_t rows, columns, groups;
  const float* scales;
  const int32_t* sums;
  const uint8_t* tiles;

  int64_t blocks() const { return (rows + BLOCK - 1) / BLOCK; }
  int64_t group_columns() const { return columns / groups; }
  int64_t steps() const { return (group_columns() + STEP - 1) / STEP; }
  int64_t block_bytes() const { return groups * steps() * TILE; }
  int64_t bytes() const { return HEADER + blocks() * (groups * BLOCK * 8 + block_bytes()); }
};

// Rows of inputs as codes. Groups begin every `group_stride` bytes and end in zeros.
struct Codes {
  int8_t* values;
  int32_t* sums;  // [rows][groups]
  float* scales;  // [rows]; NaN where a row has no finite result
  float zero;     // the zero point of all of them
  int64_t stride, group_stride;
};

struct Quantization {
  int64_t columns, groups;
  int bits;
  bool is_static;
  float scale, zero;  // of a static one
};

struct Kernels {
  // A group of codes takes a multiple of this many bytes, and `height` - 1 rows behind the last one
  // are read.
  int64_t alignment, height;
  // Rows `first` to `last` of x, rows of `stride` elements, into those of `codes`.
  void (*quantize)(const float* x, int64_t stride, const Quantization& how, int64_t first,
                   int64_t last, const Codes& codes);
  void (*quantize_bf16)(const uint16_t* x, int64_t stride, const Quantization& how, int64_t first,
                        int64_t last, const Codes& codes);
  // x W^T + bias for rows and blocks from first to last, the last left out, into y, rows of
  // `stride` elements that begin with the first of both. Writes no column beyond the weight's rows.
  void (*multiply)(const Weight& weight, const Codes& codes, const float* bias, int64_t first_row,
                   int64_t last_row, int64_t first_block, int64_t last_block, float* y,
                   int64_t stride);
  void (*multiply_bf16)(const Weight& weight, const Codes& codes, const float* bias,
                        int64_t first_row, int64_t last_row, int64_t first_block,
                        int64_t last_block, uint16_t* y, int64_t stride);
};

const Kernels& w4a4_portable();
#if defined(__x86_64__)
const Kernels& w4a4_avx2();
const Kernels& w4a4_avx512();
const Kernels& w4a4_amx();
#elif defined(__aarch64__)
const Kernels& w4a4_neon();
#endif

// Those of level().
const Kernels& w4a4_kernels();

}  // namespace torch_plugins

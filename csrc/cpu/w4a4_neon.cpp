// NEON with dot products: sdot multiplies four rows of four weights by four codes of an input.
#include <arm_neon.h>

#include "cpu/w4a4.h"

namespace torch_plugins {
namespace {

constexpr int HEIGHTS[] = {1, 2, 3, 4}, ALIGNMENT = 8;
constexpr int MOST_BLOCKS = 1, FEW_ROWS = 1, BLOCKS_OF_FEW = 1, BLOCKS_OF_A_ROW = 2;
constexpr bool EVEN = true;

inline int8x16_t four(const int8_t* codes) {
  int32_t word;
  __builtin_memcpy(&word, codes, sizeof word);
  return vreinterpretq_s8_s32(vdupq_n_s32(word));
}

template <int ROWS, int BLOCKS>
void dot(const uint8_t* tiles, int64_t block_bytes, int64_t steps, const int8_t* codes,
         int64_t stride, int32_t* sums) {
  constexpr int QUARTERS = 4 * BLOCKS;  // four rows of the weight each
  int32x4_t total[ROWS][QUARTERS];
#pragma GCC unroll 16
  for (int i = 0; i < ROWS; ++i)
#pragma GCC unroll 16
    for (int j = 0; j < QUARTERS; ++j) total[i][j] = vdupq_n_s32(0);
  for (int64_t step = 0; step < steps; ++step)
#pragma GCC unroll 16
    for (int j = 0; j < QUARTERS; ++j) {
      const uint8x16_t both = vld1q_u8(tiles + (j / 4) * block_bytes + step * 64 + (j % 4) * 16);
      const int8x16_t first = vreinterpretq_s8_u8(vandq_u8(both, vdupq_n_u8(15)));
      const int8x16_t second = vreinterpretq_s8_u8(vshrq_n_u8(both, 4));
#pragma GCC unroll 16
      for (int i = 0; i < ROWS; ++i) {
        const int8_t* of_row = codes + i * stride + step * 8;
        total[i][j] = vdotq_s32(total[i][j], first, four(of_row));
        total[i][j] = vdotq_s32(total[i][j], second, four(of_row + 4));
      }
    }
#pragma GCC unroll 16
  for (int i = 0; i < ROWS; ++i)
#pragma GCC unroll 16
    for (int j = 0; j < QUARTERS; ++j) vst1q_s32(sums + (i * QUARTERS + j) * 4, total[i][j]);
}

}  // namespace
}  // namespace torch_plugins

#include "cpu/w4a4_kernel.h"

namespace torch_plugins {

const Kernels& w4a4_neon() { return KERNELS; }

}  // namespace torch_plugins

// Any machine: plain C++.
#include "cpu/w4a4.h"

namespace torch_plugins {
namespace {

constexpr int HEIGHTS[] = {1, 2, 3, 4}, ALIGNMENT = 8;
constexpr int MOST_BLOCKS = 1, FEW_ROWS = 1, BLOCKS_OF_FEW = 1, BLOCKS_OF_A_ROW = 1;
constexpr bool EVEN = true;

template <int ROWS, int BLOCKS>
void dot(const uint8_t* tiles, int64_t block_bytes, int64_t steps, const int8_t* codes,
         int64_t stride, int32_t* sums) {
  for (int i = 0; i < ROWS * BLOCKS * 16; ++i) sums[i] = 0;
  for (int64_t step = 0; step < steps; ++step)
    for (int j = 0; j < BLOCKS; ++j) {
      const uint8_t* tile = tiles + j * block_bytes + step * 64;
      for (int i = 0; i < ROWS; ++i) {
        const int8_t* of_row = codes + i * stride + step * 8;
        int32_t* to = sums + (i * BLOCKS + j) * 16;
        for (int row = 0; row < 16; ++row)
          for (int c = 0; c < 4; ++c)
            to[row] +=
                (tile[4 * row + c] & 15) * of_row[c] + (tile[4 * row + c] >> 4) * of_row[4 + c];
      }
    }
}

}  // namespace
}  // namespace torch_plugins

#include "cpu/w4a4_kernel.h"

namespace torch_plugins {

const Kernels& w4a4_portable() { return KERNELS; }

}  // namespace torch_plugins

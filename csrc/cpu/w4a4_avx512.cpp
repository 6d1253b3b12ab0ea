// AVX-512 with VNNI. Twelve rows by two blocks keep 24 sums, four halves of weights and a code in
// the 32 registers.
#include "cpu/w4a4.h"
#include "cpu/w4a4_vnni.h"

namespace torch_plugins {
namespace {

constexpr int HEIGHTS[] = {1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12}, ALIGNMENT = 8;
constexpr int MOST_BLOCKS = 2, FEW_ROWS = 4, BLOCKS_OF_FEW = 4, BLOCKS_OF_A_ROW = 4;
constexpr bool EVEN = true;

template <int ROWS, int BLOCKS>
void dot(const uint8_t* tiles, int64_t block_bytes, int64_t steps, const int8_t* codes,
         int64_t stride, int32_t* sums) {
  dot_vnni<ROWS, BLOCKS>(tiles, block_bytes, steps, codes, stride, sums);
}

}  // namespace
}  // namespace torch_plugins

#include "cpu/w4a4_kernel.h"

namespace torch_plugins {

const Kernels& w4a4_avx512() { return KERNELS; }

}  // namespace torch_plugins

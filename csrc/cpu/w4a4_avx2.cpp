// AVX2: vpmaddubsw multiplies bytes and adds pairs in 16 bits. A weight code is at most 15 and an
// input's at least -128, so eight such sums stay within 16 bits before they are widened.
#include <immintrin.h>

#include "cpu/w4a4.h"

namespace torch_plugins {
namespace {

constexpr int HEIGHTS[] = {1, 2, 3, 4}, ALIGNMENT = 8;
constexpr int MOST_BLOCKS = 1, FEW_ROWS = 1, BLOCKS_OF_FEW = 1, BLOCKS_OF_A_ROW = 2;
constexpr bool EVEN = true;

inline __m256i four(const int8_t* codes) {
  int32_t word;
  __builtin_memcpy(&word, codes, sizeof word);
  return _mm256_set1_epi32(word);
}

template <int ROWS, int BLOCKS>
void dot(const uint8_t* tiles, int64_t block_bytes, int64_t steps, const int8_t* codes,
         int64_t stride, int32_t* sums) {
  constexpr int HALVES = 2 * BLOCKS;  // eight rows of the weight each
  const __m256i half = _mm256_set1_epi8(15), ones = _mm256_set1_epi16(1);
  __m256i total[ROWS][HALVES];
#pragma GCC unroll 16
  for (int i = 0; i < ROWS; ++i)
#pragma GCC unroll 16
    for (int j = 0; j < HALVES; ++j) total[i][j] = _mm256_setzero_si256();
  for (int64_t step = 0; step < steps; ++step)
#pragma GCC unroll 16
    for (int j = 0; j < HALVES; ++j) {
      const uint8_t* from = tiles + (j / 2) * block_bytes + step * 64 + (j % 2) * 32;
      const __m256i both = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from));
      const __m256i first = _mm256_and_si256(both, half);
      const __m256i second = _mm256_and_si256(_mm256_srli_epi16(both, 4), half);
#pragma GCC unroll 16
      for (int i = 0; i < ROWS; ++i) {
        const int8_t* of_row = codes + i * stride + step * 8;
        const __m256i pairs = _mm256_add_epi16(_mm256_maddubs_epi16(first, four(of_row)),
                                               _mm256_maddubs_epi16(second, four(of_row + 4)));
        total[i][j] = _mm256_add_epi32(total[i][j], _mm256_madd_epi16(pairs, ones));
      }
    }
#pragma GCC unroll 16
  for (int i = 0; i < ROWS; ++i)
#pragma GCC unroll 16
    for (int j = 0; j < HALVES; ++j)
      _mm256_storeu_si256(reinterpret_cast<__m256i*>(sums + (i * HALVES + j) * 8), total[i][j]);
}

}  // namespace
}  // namespace torch_plugins

#include "cpu/w4a4_kernel.h"

namespace torch_plugins {

const Kernels& w4a4_avx2() { return KERNELS; }

}  // namespace torch_plugins

// AVX-512 with VNNI: vpdpbusd multiplies 16 rows of four weights by four codes of an input.
#pragma once

#include <immintrin.h>

#include <cstdint>

namespace torch_plugins {
namespace {

inline __m512i four(const int8_t* codes) {
  int32_t word;
  __builtin_memcpy(&word, codes, sizeof word);
  return _mm512_set1_epi32(word);
}

template <int ROWS, int BLOCKS>
void dot_vnni(const uint8_t* tiles, int64_t block_bytes, int64_t steps, const int8_t* codes,
              int64_t stride, int32_t* sums) {
  const __m512i half = _mm512_set1_epi8(15);
  __m512i low[ROWS][BLOCKS], high[ROWS][BLOCKS];
  constexpr bool APART = ROWS * BLOCKS <= 8;  // shorter chains where there are registers for it
#pragma GCC unroll 16
  for (int i = 0; i < ROWS; ++i)
#pragma GCC unroll 16
    for (int j = 0; j < BLOCKS; ++j) low[i][j] = high[i][j] = _mm512_setzero_si512();
  for (int64_t step = 0; step < steps; ++step) {
    __m512i first[BLOCKS], second[BLOCKS];
#pragma GCC unroll 16
    for (int j = 0; j < BLOCKS; ++j) {
      const __m512i both = _mm512_loadu_si512(tiles + j * block_bytes + step * 64);
      first[j] = _mm512_and_si512(both, half);
      second[j] = _mm512_and_si512(_mm512_srli_epi16(both, 4), half);
    }
#pragma GCC unroll 16
    for (int i = 0; i < ROWS; ++i) {
      const __m512i a = four(codes + i * stride + step * 8);
      const __m512i b = four(codes + i * stride + step * 8 + 4);
#pragma GCC unroll 16
      for (int j = 0; j < BLOCKS; ++j) {
        low[i][j] = _mm512_dpbusd_epi32(low[i][j], first[j], a);
        __m512i& rest = APART ? high[i][j] : low[i][j];
        rest = _mm512_dpbusd_epi32(rest, second[j], b);
      }
    }
  }
#pragma GCC unroll 16
  for (int i = 0; i < ROWS; ++i)
#pragma GCC unroll 16
    for (int j = 0; j < BLOCKS; ++j) {
      if (APART) low[i][j] = _mm512_add_epi32(low[i][j], high[i][j]);
      _mm512_storeu_si512(sums + (i * BLOCKS + j) * 16, low[i][j]);
    }
}

}  // namespace
}  // namespace torch_plugins

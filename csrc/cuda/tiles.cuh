// Tiles of codes in shared memory: rows of 64 bytes, which are 128 int4 or 64 int8 codes of
// neighbouring features, and 16 bytes between rows, so that the 32 words that a warp reads at once
// lie in 32 banks.
#pragma once

#include "portability.cuh"

namespace torch_plugins::cuda {

constexpr int TILE_BYTES = 64, TILE_STRIDE = TILE_BYTES + 16;

__device__ inline uint32_t word(const uint8_t* tile, int row, int byte) {
  return *reinterpret_cast<const uint32_t*>(tile + row * TILE_STRIDE + byte);
}

// 8 stored int4 codes (each code + 8) from feature k on; from `end` on: 0.
__device__ inline uint32_t stored_codes(const uint8_t* row, int64_t k, int64_t end) {
  uint32_t out = 0x88888888u;
  for (int i = 0; i < 8 && k + i < end; ++i) {
    const uint32_t half = row[(k + i) / 2] >> 4 * ((k + i) % 2) & 15;
    out ^= (half ^ 8) << 4 * i;
  }
  return out;
}

// Stored codes as 8 int8, in two words. The even features of four neighbouring bytes are their low
// halves.
__device__ inline void to_int8(uint32_t stored, uint32_t& first, uint32_t& second) {
  // code + 8 - 8 in each byte, without a borrow from its neighbour.
  const uint32_t even = (((stored & 0x0f0f0f0fu) | 0x80808080u) - 0x08080808u) ^ 0x80808080u;
  const uint32_t odd = (((stored >> 4 & 0x0f0f0f0fu) | 0x80808080u) - 0x08080808u) ^ 0x80808080u;
  first = __byte_perm(even, odd, 0x5140);
  second = __byte_perm(even, odd, 0x7362);
}

// 16 bytes of a tile from stored int4 codes, as int4 (32 features) or int8 (16). `vectors`: the
// features are all there, and lie as vectors of the GPU must.
template <int BITS>
__device__ uint4 from_int4(const uint8_t* row, int64_t k, int64_t end, bool vectors) {
  if constexpr (BITS == 4) {
    uint4 out;
    if (vectors) {
      out = *reinterpret_cast<const uint4*>(row + k / 2);
    } else {
      out.x = stored_codes(row, k, end);
      out.y = stored_codes(row, k + 8, end);
      out.z = stored_codes(row, k + 16, end);
      out.w = stored_codes(row, k + 24, end);
    }
    // Without the 8: two's complement.
    out.x ^= 0x88888888u, out.y ^= 0x88888888u, out.z ^= 0x88888888u, out.w ^= 0x88888888u;
    return out;
  } else {
    uint2 stored;
    if (vectors) {
      stored = *reinterpret_cast<const uint2*>(row + k / 2);
    } else {
      stored.x = stored_codes(row, k, end);
      stored.y = stored_codes(row, k + 8, end);
    }
    uint4 out;
    to_int8(stored.x, out.x, out.y);
    to_int8(stored.y, out.z, out.w);
    return out;
  }
}

// The same from int8 codes.
__device__ inline uint4 from_int8(const uint8_t* row, int64_t k, int64_t end, bool vectors) {
  if (vectors) return *reinterpret_cast<const uint4*>(row + k);
  uint32_t words[4] = {};
  for (int i = 0; i < 16 && k + i < end; ++i) words[i / 4] |= uint32_t(row[k + i]) << 8 * (i % 4);
  return {words[0], words[1], words[2], words[3]};
}

// The same from numbers of 16 bits.
__device__ inline uint4 from_16_bits(const uint16_t* row, int64_t k, int64_t end, bool vectors) {
  if (vectors) return *reinterpret_cast<const uint4*>(row + k);
  uint32_t words[4] = {};
  for (int i = 0; i < 8 && k + i < end; ++i) words[i / 2] |= uint32_t(row[k + i]) << 16 * (i % 2);
  return {words[0], words[1], words[2], words[3]};
}

// The 16 bytes of two tiles, of ROWS and of COLUMNS rows, that each thread holds on their way from
// memory: they are asked for before the tiles in use are multiplied, and put into their place
// afterwards.
template <int ROWS, int COLUMNS, int THREADS>
struct TilesUnderWay {
  static constexpr int PARTS = TILE_BYTES / 16, ALL = (ROWS + COLUMNS) * PARTS;
  static constexpr int EACH = (ALL + THREADS - 1) / THREADS;
  uint4 held[EACH];

  // input(row, part) and weight(row, part) are 16 bytes of a row.
  template <class Input, class Weight>
  __device__ void fetch(Input input, Weight weight) {
    UNROLL
    for (int j = 0; j < EACH; ++j) {
      const int i = threadIdx.x + j * THREADS, row = i / PARTS, part = i % PARTS;
      if (i < ALL) held[j] = row < ROWS ? input(row, part) : weight(row - ROWS, part);
    }
  }

  __device__ void put(uint8_t* of_input, uint8_t* of_weight) const {
    UNROLL
    for (int j = 0; j < EACH; ++j) {
      const int i = threadIdx.x + j * THREADS, row = i / PARTS, part = i % PARTS;
      uint8_t* to =
          row < ROWS ? of_input + row * TILE_STRIDE : of_weight + (row - ROWS) * TILE_STRIDE;
      if (i < ALL) *reinterpret_cast<uint4*>(to + part * 16) = held[j];
    }
  }
};

}  // namespace torch_plugins::cuda

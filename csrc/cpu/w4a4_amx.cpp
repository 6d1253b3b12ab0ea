// AMX: a tile of 16 rows of 64 codes by a tile of 64 features of one block, which is unpacked from
// half bytes as it is needed. Few rows leave most of a tile empty and are AVX-512's.
#include "cpu/amx.h"
#include "cpu/w4a4.h"
#include "cpu/w4a4_vnni.h"

namespace torch_plugins {
namespace {

constexpr int HEIGHTS[] = {1, 2, 3, 4, 16, 32}, ALIGNMENT = 64;
constexpr int MOST_BLOCKS = 2, FEW_ROWS = 4, BLOCKS_OF_FEW = 4, BLOCKS_OF_A_ROW = 4;
constexpr bool EVEN = false;
constexpr int64_t STEPS_OF_A_TILE = 8;

// Up to 64 features of a block, as bytes 0 to 15; what is beyond `steps` meets codes that are 0.
inline void unpack(const uint8_t* tiles, int64_t steps, uint8_t* to) {
  const __m512i half = _mm512_set1_epi8(15);
  for (int64_t step = 0; step < steps; ++step) {
    const __m512i both = _mm512_loadu_si512(tiles + step * 64);
    _mm512_store_si512(to + step * 128, _mm512_and_si512(both, half));
    _mm512_store_si512(to + step * 128 + 64, _mm512_and_si512(_mm512_srli_epi16(both, 4), half));
  }
}

template <int ROWS, int BLOCKS>
void dot_tiles(const uint8_t* tiles, int64_t block_bytes, int64_t steps, const int8_t* codes,
               int64_t stride, int32_t* sums) {
  TileShapes shapes;
  for (int tile = 0; tile < 8; ++tile) shapes.rows[tile] = 16, shapes.row_bytes[tile] = 64;
  tile_configure(shapes);
  alignas(64) uint8_t weights[BLOCKS][1024] = {};
  tile_zero<0>();
  tile_zero<1>();
  tile_zero<2>();
  tile_zero<3>();
  for (int64_t step = 0; step < steps; step += STEPS_OF_A_TILE) {
    const int64_t count = steps - step < STEPS_OF_A_TILE ? steps - step : STEPS_OF_A_TILE;
    tile_load<4>(codes + step * 8, stride);
    if constexpr (ROWS > 16) tile_load<5>(codes + 16 * stride + step * 8, stride);
    unpack(tiles + step * 64, count, weights[0]);
    tile_load<6>(weights[0], 64);
    tile_dot<0, 4, 6>();
    if constexpr (ROWS > 16) tile_dot<2, 5, 6>();
    if constexpr (BLOCKS > 1) {
      unpack(tiles + block_bytes + step * 64, count, weights[1]);
      tile_load<7>(weights[1], 64);
      tile_dot<1, 4, 7>();
      if constexpr (ROWS > 16) tile_dot<3, 5, 7>();
    }
  }
  constexpr int64_t row_bytes = BLOCKS * 64;
  tile_store<0>(sums, row_bytes);
  if constexpr (BLOCKS > 1) tile_store<1>(sums + 16, row_bytes);
  if constexpr (ROWS > 16) tile_store<2>(sums + 16 * BLOCKS * 16, row_bytes);
  if constexpr (ROWS > 16 && BLOCKS > 1) tile_store<3>(sums + 16 * BLOCKS * 16 + 16, row_bytes);
  tile_release();
}

template <int ROWS, int BLOCKS>
void dot(const uint8_t* tiles, int64_t block_bytes, int64_t steps, const int8_t* codes,
         int64_t stride, int32_t* sums) {
  if constexpr (ROWS <= FEW_ROWS)
    dot_vnni<ROWS, BLOCKS>(tiles, block_bytes, steps, codes, stride, sums);
  else
    dot_tiles<ROWS, BLOCKS>(tiles, block_bytes, steps, codes, stride, sums);
}

}  // namespace
}  // namespace torch_plugins

#include "cpu/w4a4_kernel.h"

namespace torch_plugins {

const Kernels& w4a4_amx() { return KERNELS; }

}  // namespace torch_plugins

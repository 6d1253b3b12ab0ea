#include "cpu/w4a4_weight.h"

#include <cstring>
#include <string>

#include "fail.h"

namespace torch_plugins {
namespace {

struct Header {
  char magic[4];
  uint32_t version;
  int64_t rows, columns, groups;
  uint8_t zeros[32];
};
static_assert(sizeof(Header) == HEADER, "the header is part of the format");

constexpr char MAGIC[4] = {'T', 'P', 'W', '4'};
constexpr int64_t MOST = int64_t{1} << 30;  // rows or columns; products of two stay within int64
// Of a group: sums of (code + 8) times an input's code, at most 15 * 128 each, stay within int32.
constexpr int64_t MOST_OF_A_GROUP = int64_t{1} << 20;

Weight place(int64_t rows, int64_t columns, int64_t groups, const uint8_t* bytes) {
  Weight out{rows, columns, groups, nullptr, nullptr, nullptr};
  const int64_t each = out.blocks() * groups * BLOCK;
  out.scales = reinterpret_cast<const float*>(bytes + HEADER);
  out.sums = reinterpret_cast<const int32_t*>(bytes + HEADER + each * 4);
  out.tiles = bytes + HEADER + each * 8;
  return out;
}

// The code of one weight as it is stored, code + 8.
uint8_t stored(const uint8_t* row, int64_t column) {
  return column % 2 ? row[column / 2] >> 4 : row[column / 2] & 15;
}

// One group of one row of a block into its tiles; its sum.
int32_t write_group(const uint8_t* plain, int64_t first, int64_t count, int64_t steps, int row,
                    uint8_t* tiles) {
  int32_t total = 0;
  for (int64_t i = 0; i < steps * STEP; ++i) {
    const uint8_t code = plain != nullptr && i < count ? stored(plain, first + i) : 8;
    uint8_t& byte = tiles[i / 8 * TILE + 4 * row + i % 4];
    byte = i % 8 < 4 ? code : byte | code << 4;
    total += code - 8;
  }
  return total;
}

}  // namespace

int64_t prepacked_bytes(int64_t rows, int64_t columns, int64_t groups) {
  return place(rows, columns, groups, nullptr).bytes();
}

Weight read_prepacked(const char* op, const char* name, const uint8_t* bytes, int64_t count,
                      int64_t rows, int64_t columns) {
  Header header;
  if (count >= HEADER) std::memcpy(&header, bytes, sizeof header);
  if (count < HEADER || std::memcmp(header.magic, MAGIC, sizeof MAGIC) != 0)
    fail(op, ": ", name, " is not a prepacked weight: make it with prepack_w4");
  if (header.version != VERSION)
    fail(op, ": ", name, " has the format ", header.version, ", and this library reads ", VERSION,
         ": make it anew with prepack_w4");
  if (header.rows != rows || header.columns != columns)
    fail(op, ": ", name, " is a weight of ", header.rows, " x ", header.columns,
         ", and the other arguments are for ", rows, " x ", columns);
  if (header.groups < 1 || header.groups > columns + (columns == 0) ||
      columns % header.groups != 0 || prepacked_bytes(rows, columns, header.groups) != count)
    fail(op, ": ", name, " is damaged: ", count, " bytes do not hold ", rows, " x ", columns,
         " in ", header.groups, " groups");
  check_sizes(std::string(op) + ": " + name, rows, columns, header.groups);
  return place(rows, columns, header.groups, bytes);
}

void write_header(int64_t rows, int64_t columns, int64_t groups, uint8_t* to) {
  Header header{};
  std::memcpy(header.magic, MAGIC, sizeof MAGIC);
  header.version = VERSION;
  header.rows = rows, header.columns = columns, header.groups = groups;
  std::memcpy(to, &header, sizeof header);
}

void write_blocks(const uint8_t* plain, const float* scales, int64_t rows, int64_t columns,
                  int64_t groups, int64_t first_block, int64_t last_block, uint8_t* to) {
  const Weight out = place(rows, columns, groups, to);
  const int64_t size = out.group_columns(), stride = (columns + 1) / 2;
  for (int64_t block = first_block; block < last_block; ++block)
    for (int64_t group = 0; group < groups; ++group) {
      const int64_t at = (block * groups + group) * BLOCK;
      auto* tiles = const_cast<uint8_t*>(out.tiles) + (block * groups + group) * out.steps() * TILE;
      for (int64_t i = 0; i < BLOCK; ++i) {
        const int64_t row = block * BLOCK + i;
        const bool exists = row < rows;
        const_cast<float*>(out.scales)[at + i] = exists ? scales[row * groups + group] : 0;
        const_cast<int32_t*>(out.sums)[at + i] =
            write_group(exists ? plain + row * stride : nullptr, group * size, size, out.steps(),
                        static_cast<int>(i), tiles);
      }
    }
}

void check_sizes(const std::string& what, int64_t rows, int64_t columns, int64_t groups) {
  if (rows >= MOST || columns >= MOST)
    fail(what, " has ", rows, " rows and ", columns, " columns: 2 ** 30 are too many");
  if (columns / groups > MOST_OF_A_GROUP)
    fail(what, " has groups of ", columns / groups,
         " features: at most 2 ** 20 can be summed; use "
         "more groups");
}

}  // namespace torch_plugins

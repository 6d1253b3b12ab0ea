// Prepacked weights: made, read and undone. See w4a4.h for the bytes.
#pragma once

#include <string>

#include "cpu/w4a4.h"

namespace torch_plugins {

// The weight in `prepacked`, whose memory it shares.
//
// Raises: not made by prepack_w4, or by another version of it, or for other sizes than these.
Weight read_prepacked(const char* op, const char* name, const uint8_t* bytes, int64_t count,
                      int64_t rows, int64_t columns);

// The bytes of a weight of these sizes.
int64_t prepacked_bytes(int64_t rows, int64_t columns, int64_t groups);

// Rows `first` to `last` of blocks of 16, from plain storage [rows, ceil(columns / 2)] and scales
// [rows, groups]. `to` has its header already.
void write_header(int64_t rows, int64_t columns, int64_t groups, uint8_t* to);
void write_blocks(const uint8_t* plain, const float* scales, int64_t rows, int64_t columns,
                  int64_t groups, int64_t first_block, int64_t last_block, uint8_t* to);

// Raises: more rows, columns or features of a group than these numbers hold.
void check_sizes(const std::string& what, int64_t rows, int64_t columns, int64_t groups);

}  // namespace torch_plugins

// SPDX-License-Identifier: Apache-2.0
// Memory layout of the rows of a strided tensor.
#pragma once

#include <cstdint>

namespace optkit {

// Rows that are adjacent in memory, as in a transposed matrix: element (row, column) is
// (row / inner) * outer_stride + row % inner + column * column_stride elements after the first.
struct StridedRows {
  int64_t column_stride;  // 0: the rows are not strided
  int64_t inner, outer_stride;
};

struct ForwardStrided {
  StridedRows x, residual;
};
struct BackwardStrided {
  StridedRows x, dy, d_sum;
};

struct RowLayout {
  int64_t stride;  // between packed rows; -1: the rows are strided, or not readable by a kernel
  StridedRows strided;
};

// Dimensions covered by one stride. On return `d` is the first dimension beyond them, walking from the last to `end`.
struct Level {
  int64_t count, stride;
};
inline Level collapse(const int64_t* sizes, const int64_t* strides, int64_t end, int64_t* d) {
  Level level = {1, 0};
  for (; *d >= end; --*d) {
    if (sizes[*d] == 1) continue;
    if (level.count == 1)
      level.stride = strides[*d];
    else if (strides[*d] != level.count * level.stride)
      break;
    level.count *= sizes[*d];
  }
  return level;
}

// Longer strided rows are copied as a whole: a block of them, with several rows to a cache line, would not fit a cache.
constexpr int64_t kLongestStrided = 1 << 16;

// Layout of rows made of the last `row_dims` dimensions.
inline RowLayout row_layout(const int64_t* sizes, const int64_t* strides, int64_t dim, int64_t row_dims) {
  constexpr RowLayout kNeither = {-1, {0, 0, 0}};
  int64_t d = dim - 1;
  const Level row = collapse(sizes, strides, dim - row_dims, &d);
  if (d >= dim - row_dims) return kNeither;
  const Level inner = collapse(sizes, strides, 0, &d);
  if (row.count == 1 || row.stride == 1) {
    if (d >= 0) return kNeither;
    return {inner.count == 1 ? row.count : inner.stride, {0, 0, 0}};
  }
  const Level outer = collapse(sizes, strides, 0, &d);
  if (d >= 0 || inner.count == 1 || inner.stride != 1 || row.stride == 0 || row.count > kLongestStrided)
    return kNeither;
  return {-1, {row.stride, inner.count, outer.stride}};
}

}  // namespace optkit

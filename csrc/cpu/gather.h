// SPDX-License-Identifier: Apache-2.0
// Copies strided rows, which are adjacent in memory, into packed rows: squares of vectors are transposed in registers.
#pragma once

#include <utility>

#include "cpu/vector.h"

namespace optkit {
namespace OPTKIT_ISA {

// Elements are only moved, so only their size matters.
template <class T>
struct Square {
  typedef T V __attribute__((vector_size(OPTKIT_VECTOR_BYTES)));
  static constexpr int kLanes = OPTKIT_VECTOR_BYTES / sizeof(T);

  // Interleaves the low or the high halves of a and b.
  template <int kFirst, int... kLane>
  OPTKIT_HD static V interleave(V a, V b, std::integer_sequence<int, kLane...>) {
    return __builtin_shufflevector(a, b, (kFirst + kLane / 2 + kLane % 2 * kLanes)...);
  }

  // Each round interleaves pairs of vectors; after log2(kLanes) rounds vector r holds element r of each.
  OPTKIT_HD static void transpose(V (&v)[kLanes]) {
    using Lanes = std::make_integer_sequence<int, kLanes>;
    for (int round = 1; round < kLanes; round *= 2) {
      V dealt[kLanes];
#pragma GCC unroll 32
      for (int k = 0; k < kLanes / 2; ++k) {
        dealt[2 * k] = interleave<0>(v[k], v[k + kLanes / 2], Lanes());
        dealt[2 * k + 1] = interleave<kLanes / 2>(v[k], v[k + kLanes / 2], Lanes());
      }
#pragma GCC unroll 32
      for (int k = 0; k < kLanes; ++k) v[k] = dealt[k];
    }
  }

  OPTKIT_HD static void move(const T* from, int64_t column_stride, T* to, int64_t row_stride, int64_t ahead) {
    V v[kLanes];
#pragma GCC unroll 32
    for (int k = 0; k < kLanes; ++k) {
      const T* column = from + k * column_stride;
      __builtin_memcpy(&v[k], column, sizeof(V));
      __builtin_prefetch(column + ahead);
    }
    transpose(v);
#pragma GCC unroll 32
    for (int k = 0; k < kLanes; ++k) __builtin_memcpy(to + k * row_stride, &v[k], sizeof(V));
  }
};

constexpr int64_t kColumnsNear = 64;

// `rows` rows of `columns` elements. The last square in each direction overlaps the previous one instead of being
// partial. The columns behind are prefetched: each is a page away from the next, which the hardware prefetcher misses.
template <class T>
OPTKIT_HD void gather(const T* from, int64_t column_stride, int64_t rows, int64_t columns, T* to) {
  constexpr int64_t kLanes = Square<T>::kLanes;
  if (rows < kLanes || columns < kLanes) {
    // Few enough columns that all their rows stay in the cache: one row after the other is then written, where writing
    // column by column would evict the lines of other rows.
    for (int64_t begin = 0; begin < columns; begin += kColumnsNear) {
      const int64_t end = begin + kColumnsNear < columns ? begin + kColumnsNear : columns;
      for (int64_t row = 0; row < rows; ++row)
        for (int64_t column = begin; column < end; ++column)
          to[row * columns + column] = from[column * column_stride + row];
    }
    return;
  }
  for (int64_t column = 0; column < columns; column += kLanes) {
    const int64_t c = column + kLanes <= columns ? column : columns - kLanes;
    for (int64_t row = 0; row < rows; row += kLanes) {
      const int64_t r = row + kLanes <= rows ? row : rows - kLanes;
      Square<T>::move(from + c * column_stride + r, column_stride, to + r * columns + c, columns,
                      kLanes * column_stride);
    }
  }
}

}  // namespace OPTKIT_ISA
}  // namespace optkit

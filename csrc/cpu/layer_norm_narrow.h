// SPDX-License-Identifier: Apache-2.0
// Rows too short to fill vectors: as many rows at a time as a vector has lanes, one row per lane.
#pragma once

#include "cpu/layer_norm_rows.h"
#include "norms/layer_norm.h"
#include "norms/rms_norm.h"

namespace optkit {
namespace OPTKIT_ISA {

constexpr int64_t kNarrow = 32;  // longest row handled here

// kLanes rows of n numbers, row after row and column after column.
template <class S>
struct Block {
  static constexpr int kLanes = Vec<S>::kLanes;
  alignas(64) S flat[kNarrow * kLanes];
  alignas(64) S column[kNarrow * kLanes];

  OPTKIT_HD Vec<S> get(int64_t j) const { return load_accumulator<S>(column, j * kLanes); }
  OPTKIT_HD void set(int64_t j, Vec<S> value) { store_accumulator<S>(column, j * kLanes, value); }

  // Rows of one number already are columns.
  OPTKIT_HD void to_columns(int64_t n) {
    if (n == 1) return store_accumulator<S>(column, 0, load_accumulator<S>(flat, 0));
    for (int64_t j = 0; j < n; ++j)
      for (int lane = 0; lane < kLanes; ++lane) column[j * kLanes + lane] = flat[lane * n + j];
  }
  OPTKIT_HD void to_rows(int64_t n) {
    if (n == 1) return store_accumulator<S>(flat, 0, load_accumulator<S>(column, 0));
    for (int64_t j = 0; j < n; ++j)
      for (int lane = 0; lane < kLanes; ++lane) flat[lane * n + j] = column[j * kLanes + lane];
  }

  // Rows past the end are zero.
  template <DType kType>
  OPTKIT_HD void load_rows(const void* base, int64_t first, int64_t rows, int64_t n, int64_t stride) {
    if (stride == n) {
      load_flat<kType>(base, first * n, rows * n, 0);
    } else {
      for (int64_t r = 0; r < rows; ++r) load_flat<kType>(base, (first + r) * stride, n, r * n);
    }
    for (int64_t k = rows * n; k < kLanes * n; ++k) flat[k] = S(0);
    to_columns(n);
  }
  template <DType kType>
  OPTKIT_HD void store_rows(void* base, int64_t first, int64_t rows, int64_t n) {
    to_rows(n);
    const int64_t count = rows * n;
    int64_t i = 0;
    for (; i + kLanes <= count; i += kLanes)
      store<S, false>(base, kType, first * n + i, kLanes, load_accumulator<S>(flat, i));
    if (i < count)
      store<S, true>(base, kType, first * n + i, static_cast<int>(count - i), load_accumulator<S>(flat, i));
  }

 private:
  template <DType kType>
  OPTKIT_HD void load_flat(const void* base, int64_t begin, int64_t count, int64_t to) {
    int64_t i = 0;
    for (; i + kLanes <= count; i += kLanes)
      store_accumulator<S>(flat, to + i, load<S, false>(base, kType, begin + i, kLanes));
    if (i < count) {
      const int rest = static_cast<int>(count - i);
      write<true, S>(flat, to + i, rest, load<S, true>(base, kType, begin + i, rest).v);
    }
  }
};

template <class Norm, DType kType>
OPTKIT_HD void forward_narrow(const NormForward& a, int64_t begin, int64_t end) {
  using S = accumulator_t<kType>;
  using V = Vec<S>;
  constexpr int kLanes = V::kLanes;
  const int64_t n = a.size;
  const S *weight = static_cast<const S*>(a.weight), *bias = static_cast<const S*>(a.bias);
  const V count(static_cast<S>(n));
  Block<S> x;
  for (int64_t row = begin; row < end; row += kLanes) {
    const int64_t rows = end - row < kLanes ? end - row : kLanes;
    if (a.residual) {
      if (a.x_stride == n) {
        add_residual<kType>(a, row * n, at(a.x, a.x_type, row * n), rows * n);
      } else {
        for (int64_t r = row; r < row + rows; ++r) add_residual<kType>(a, r * n, at(a.x, a.x_type, r * a.x_stride), n);
      }
    }
    x.template load_rows<kType>(a.residual ? a.sum : a.x, row, rows, n, a.residual ? n : a.x_stride);
    V mean(S(0)), squares(S(0));
    if (Norm::kCentered) {
      for (int64_t j = 0; j < n; ++j) mean = mean + x.get(j);
      mean = mean / count;
    }
    for (int64_t j = 0; j < n; ++j) {
      const V d = Norm::center(x.get(j), mean);
      x.set(j, d);
      squares = fma(d, d, squares);
    }
    const V rstd = V(S(1)) / sqrt(squares / count + V(static_cast<S>(a.eps)));
    for (int64_t j = 0; j < n; ++j) x.set(j, fma(x.get(j) * rstd, V(weight[j]), V(bias[j])));
    x.template store_rows<kType>(a.y, row, rows, n);
    if (rows == kLanes) {
      if (Norm::kCentered) store_accumulator<S>(a.mean, row, mean);
      store_accumulator<S>(a.rstd, row, rstd);
    } else {
      if (Norm::kCentered) write<true, S>(a.mean, row, static_cast<int>(rows), mean.v);
      write<true, S>(a.rstd, row, static_cast<int>(rows), rstd.v);
    }
  }
}

template <class Norm, DType kType>
OPTKIT_HD void backward_narrow(const NormBackward& a, int64_t begin, int64_t end, accumulator_t<kType>* d_weight,
                               accumulator_t<kType>* d_bias) {
  using S = accumulator_t<kType>;
  using V = Vec<S>;
  constexpr int kLanes = V::kLanes;
  const int64_t n = a.size;
  const S* weight = static_cast<const S*>(a.weight);
  const V inverse_n(S(1) / static_cast<S>(n));
  Block<S> x, dy;
  alignas(64) S weight_lanes[kNarrow * kLanes] = {}, bias_lanes[kNarrow * kLanes] = {};
  for (int64_t row = begin; row < end; row += kLanes) {
    const int64_t rows = end - row < kLanes ? end - row : kLanes;
    const int count = static_cast<int>(rows);
    x.template load_rows<kType>(a.x, row, rows, n, a.x_stride);
    dy.template load_rows<kType>(a.dy, row, rows, n, n);
    V mean(S(0));
    if (Norm::kCentered) mean = read<true, typename V::Native, S>(a.mean, row, count);
    const V rstd = read<true, typename V::Native, S>(a.rstd, row, count);
    V mean_g(S(0)), mean_gx(S(0));
    for (int64_t j = 0; j < n; ++j) {
      const V normalized = Norm::center(x.get(j), mean) * rstd, d = dy.get(j);
      const V g = d * V(weight[j]);
      x.set(j, normalized);
      dy.set(j, g);
      mean_g = mean_g + g;
      mean_gx = fma(g, normalized, mean_gx);
      store_accumulator<S>(weight_lanes, j * kLanes, fma(d, normalized, load_accumulator<S>(weight_lanes, j * kLanes)));
      store_accumulator<S>(bias_lanes, j * kLanes, load_accumulator<S>(bias_lanes, j * kLanes) + d);
    }
    if (a.dx == nullptr) continue;
    mean_g = mean_g * inverse_n;
    mean_gx = mean_gx * inverse_n;
    for (int64_t j = 0; j < n; ++j) x.set(j, Norm::gradient(dy.get(j), x.get(j), rstd, mean_g, mean_gx));
    if (a.d_sum) {
      dy.template load_rows<kType>(a.d_sum, row, rows, n, n);
      for (int64_t j = 0; j < n; ++j) x.set(j, x.get(j) + dy.get(j));
    }
    x.template store_rows<kType>(a.dx, row, rows, n);
    if (a.d_input) {
      for (int64_t k = 0; k < kLanes * n; k += kLanes) {
        const V alive = survival(a.dropout, row * n + k, V());
        const V dx = load_accumulator<S>(x.flat, k);
        store_accumulator<S>(x.flat, k, select(V(S(0)) < alive, dx * alive, V(S(0))));
      }
      x.to_columns(n);
      x.template store_rows<kType>(a.d_input, row, rows, n);
    }
  }
  for (int64_t j = 0; j < n; ++j) {
    if (d_weight) d_weight[j] += tree_sum(load_accumulator<S>(weight_lanes, j * kLanes));
    if (d_bias) d_bias[j] += tree_sum(load_accumulator<S>(bias_lanes, j * kLanes));
  }
}

}  // namespace OPTKIT_ISA
}  // namespace optkit

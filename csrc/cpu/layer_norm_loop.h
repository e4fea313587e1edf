// SPDX-License-Identifier: Apache-2.0
// One row at a time, for rows of at least one vector. The row is read from memory once and stays in the cache.
#pragma once

#include "cpu/layer_norm_rows.h"
#include "norms/layer_norm.h"
#include "norms/rms_norm.h"

namespace optkit {
namespace OPTKIT_ISA {

// 16-bit rows up to here are widened once, into this much of the cache.
constexpr int64_t kBufferSize = 4096;

// Pass after pass over one row, of which only the first touches memory: mean, mean square, result. kBuffered: the first
// pass leaves the row as wide numbers in `buffer` for the others.
template <class Norm, DType kType, bool kBuffered>
OPTKIT_HD void forward_row(const NormForward& a, int64_t row, wide_t<kType>* buffer) {
  using S = wide_t<kType>;
  using V = Vec<S>;
  constexpr int kLanes = V::kLanes;
  const int64_t n = a.size;
  const void* x = at(a.x, a.x_type, row * a.x_stride);
  void* y = at(a.y, kType, row * n);
  if (a.residual) {
    add_residual<kType>(a, row * n, x, n);
    x = at(a.sum, kType, row * n);
  }
  // The memory would idle while the row is in the cache: the next row is asked for meanwhile. With a residual it is
  // the first pass that reads memory, and it runs on its own.
  const int64_t next = a.residual ? 0 : a.x_stride;
  const auto first = [&](int64_t i) OPTKIT_INLINE {
    const V value = load<S, false>(x, kType, i, kLanes);
    if (kBuffered) wide_store<S>(buffer, i, value);
    return value;
  };
  const auto again = [&](int64_t i) OPTKIT_INLINE {
    return kBuffered ? wide_load<S>(buffer, i) : load<S, false>(x, kType, i, kLanes);
  };
  S mean = S(0);
  if (Norm::kCentered) {
    Accumulators<S> sum;
    walk_row<S>(n,
                [&](int64_t i, int k, auto lanes) OPTKIT_INLINE { sum.part[k] = sum.part[k] + keep(lanes, first(i)); });
    mean = sum.total() / static_cast<S>(n);
  }
  const V shift(mean);
  Accumulators<S> squares;
  walk_row<S>(n, [&](int64_t i, int k, auto lanes) OPTKIT_INLINE {
    __builtin_prefetch(at(x, kType, next + i));
    const V d = keep(lanes, Norm::center(Norm::kCentered ? again(i) : first(i), shift));
    squares.part[k] = fma(d, d, squares.part[k]);
  });
  const S variance = squares.total() / static_cast<S>(n);
  const S rstd = static_cast<S>(1.0 / optkit::sqrt(static_cast<double>(variance) + a.eps));
  if (Norm::kCentered) static_cast<S*>(a.mean)[row] = mean;
  static_cast<S*>(a.rstd)[row] = rstd;
  const V scale(rstd);
  walk_row<S>(n, [&](int64_t i, int, auto) OPTKIT_INLINE {
    const V normalized = Norm::center(again(i), shift) * scale;
    store<S, false>(y, kType, i, kLanes, fma(normalized, wide_load<S>(a.weight, i), wide_load<S>(a.bias, i)));
  });
}

// kRows rows side by side, so that weight and both sums over the rows are loaded once for all of them.
template <class Norm, DType kType, int kRows>
OPTKIT_HD void backward_rows(const NormBackward& a, int64_t row, wide_t<kType>* d_weight, wide_t<kType>* d_bias) {
  using S = wide_t<kType>;
  using V = Vec<S>;
  constexpr int kLanes = V::kLanes;
  const int64_t n = a.size;
  const void *x[kRows], *dy[kRows];
  V mean[kRows], rstd[kRows];
  Accumulators<S> sum_g[kRows], sum_gx[kRows];
#pragma GCC unroll 2
  for (int r = 0; r < kRows; ++r) {
    x[r] = at(a.x, kType, (row + r) * a.x_stride);
    dy[r] = at(a.dy, kType, (row + r) * n);
    mean[r] = V(Norm::kCentered ? static_cast<const S*>(a.mean)[row + r] : S(0));
    rstd[r] = V(static_cast<const S*>(a.rstd)[row + r]);
  }
  walk_row<S>(n, [&](int64_t i, int k, auto lanes) OPTKIT_INLINE {
    constexpr int kParts = 4 / kRows;  // accumulators per row: registers are few
    const V weight = wide_load<S>(a.weight, i);
    V to_weight(S(0)), to_bias(S(0));
#pragma GCC unroll 2
    for (int r = 0; r < kRows; ++r) {
      const V d = keep(lanes, load<S, false>(dy[r], kType, i, kLanes));
      const V normalized = Norm::center(load<S, false>(x[r], kType, i, kLanes), mean[r]) * rstd[r];
      const V g = d * weight;
      if (Norm::kCentered) sum_g[r].part[k % kParts] = sum_g[r].part[k % kParts] + g;
      sum_gx[r].part[k % kParts] = fma(g, normalized, sum_gx[r].part[k % kParts]);
      to_weight = r == 0 ? d * normalized : fma(d, normalized, to_weight);
      to_bias = r == 0 ? d : to_bias + d;
    }
    if (d_weight) wide_store<S>(d_weight, i, wide_load<S>(d_weight, i) + to_weight);
    if (d_bias) wide_store<S>(d_bias, i, wide_load<S>(d_bias, i) + to_bias);
  });
  if (a.dx == nullptr) return;
#pragma GCC unroll 2
  for (int r = 0; r < kRows; ++r) {
    const V mean_g(sum_g[r].total() / static_cast<S>(n)), mean_gx(sum_gx[r].total() / static_cast<S>(n));
    const int64_t begin = (row + r) * n;
    walk_row<S>(n, [&](int64_t i, int, auto) OPTKIT_INLINE {
      __builtin_prefetch(at(x[r], kType, kRows * a.x_stride + i));
      __builtin_prefetch(at(dy[r], kType, kRows * n + i));
      const V normalized = Norm::center(load<S, false>(x[r], kType, i, kLanes), mean[r]) * rstd[r];
      const V g = load<S, false>(dy[r], kType, i, kLanes) * wide_load<S>(a.weight, i);
      V dx = Norm::gradient(g, normalized, rstd[r], mean_g, mean_gx);
      if (a.d_sum) dx = dx + load<S, false>(a.d_sum, kType, begin + i, kLanes);
      if (a.d_input) {
        const V alive = survival(a.dropout, begin + i, V());
        store<S, false>(a.d_input, kType, begin + i, kLanes, select(V(S(0)) < alive, dx * alive, V(S(0))));
      }
      store<S, false>(a.dx, kType, begin + i, kLanes, dx);
    });
  }
}

}  // namespace OPTKIT_ISA
}  // namespace optkit

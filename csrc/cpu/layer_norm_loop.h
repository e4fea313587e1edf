// SPDX-License-Identifier: Apache-2.0
// One row at a time, for rows of at least one vector. The row is read from memory once and stays in the cache.
#pragma once

#include "cpu/layer_norm_rows.h"
#include "norms/layer_norm.h"
#include "norms/rms_norm.h"

namespace optkit {
namespace OPTKIT_ISA {

template <class Norm, DType kType>
OPTKIT_HD void forward_row(const NormForward& a, int64_t row) {
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
  S mean = S(0);
  if (Norm::kCentered) {
    Accumulators<S> sum;
    walk_row<S>(n, [&](int64_t i, int k, auto lanes) OPTKIT_INLINE {
      sum.part[k] = sum.part[k] + keep(lanes, load<S, false>(x, kType, i, kLanes));
    });
    mean = sum.total() / static_cast<S>(n);
  }
  const V shift(mean);
  Accumulators<S> squares;
  walk_row<S>(n, [&](int64_t i, int k, auto lanes) OPTKIT_INLINE {
    const V d = keep(lanes, Norm::center(load<S, false>(x, kType, i, kLanes), shift));
    squares.part[k] = fma(d, d, squares.part[k]);
  });
  const S variance = squares.total() / static_cast<S>(n);
  const S rstd = static_cast<S>(1.0 / optkit::sqrt(static_cast<double>(variance) + a.eps));
  if (Norm::kCentered) static_cast<S*>(a.mean)[row] = mean;
  static_cast<S*>(a.rstd)[row] = rstd;
  const V scale(rstd);
  walk_row<S>(n, [&](int64_t i, int, auto) OPTKIT_INLINE {
    const V normalized = Norm::center(load<S, false>(x, kType, i, kLanes), shift) * scale;
    store<S, false>(y, kType, i, kLanes, fma(normalized, wide_load<S>(a.weight, i), wide_load<S>(a.bias, i)));
  });
}

template <class Norm, DType kType>
OPTKIT_HD void backward_row(const NormBackward& a, int64_t row, wide_t<kType>* d_weight, wide_t<kType>* d_bias) {
  using S = wide_t<kType>;
  using V = Vec<S>;
  constexpr int kLanes = V::kLanes;
  const int64_t n = a.size;
  const void* x = at(a.x, kType, row * a.x_stride);
  const void* dy = at(a.dy, kType, row * n);
  const V mean(Norm::kCentered ? static_cast<const S*>(a.mean)[row] : S(0));
  const V rstd(static_cast<const S*>(a.rstd)[row]);
  Accumulators<S> sum_g, sum_gx;
  walk_row<S>(n, [&](int64_t i, int k, auto lanes) OPTKIT_INLINE {
    const V d = keep(lanes, load<S, false>(dy, kType, i, kLanes));
    const V normalized = Norm::center(load<S, false>(x, kType, i, kLanes), mean) * rstd;
    const V g = d * wide_load<S>(a.weight, i);
    if (Norm::kCentered) sum_g.part[k] = sum_g.part[k] + g;
    sum_gx.part[k] = fma(g, normalized, sum_gx.part[k]);
    if (d_weight) wide_store<S>(d_weight, i, fma(d, normalized, wide_load<S>(d_weight, i)));
    if (d_bias) wide_store<S>(d_bias, i, wide_load<S>(d_bias, i) + d);
  });
  if (a.dx == nullptr) return;
  const V mean_g(sum_g.total() / static_cast<S>(n)), mean_gx(sum_gx.total() / static_cast<S>(n));
  walk_row<S>(n, [&](int64_t i, int, auto) OPTKIT_INLINE {
    const V normalized = Norm::center(load<S, false>(x, kType, i, kLanes), mean) * rstd;
    const V g = load<S, false>(dy, kType, i, kLanes) * wide_load<S>(a.weight, i);
    V dx = Norm::gradient(g, normalized, rstd, mean_g, mean_gx);
    if (a.d_sum) dx = dx + load<S, false>(a.d_sum, kType, row * n + i, kLanes);
    if (a.d_input) {
      const V alive = survival(a.dropout, row * n + i, V());
      store<S, false>(a.d_input, kType, row * n + i, kLanes, select(V(S(0)) < alive, dx * alive, V(S(0))));
    }
    store<S, false>(a.dx, kType, row * n + i, kLanes, dx);
  });
}

}  // namespace OPTKIT_ISA
}  // namespace optkit

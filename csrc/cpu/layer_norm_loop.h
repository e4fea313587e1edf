// SPDX-License-Identifier: Apache-2.0
// LayerNorm and RMSNorm of rows of at least one vector, one or a few rows at a time. A row is read from memory once and
// stays in the cache.
#pragma once

#include "cpu/layer_norm_rows.h"
#include "norms/layer_norm.h"
#include "norms/rms_norm.h"

namespace optkit {
namespace OPTKIT_ISA {

// 16-bit rows up to this length are widened once, into a buffer of this size in the cache.
constexpr int64_t kBufferSize = 4096;
// This many rows of up to this length are processed together: a single short row would wait for its own sums, square
// root and division.
constexpr int kGroup = 4;
constexpr int64_t kGroupedRow = kBufferSize / kGroup / 2;

// Passes over `rows` rows: mean, mean square, result. Only the first pass reads memory. kBuffered: it leaves the rows
// as accumulators in `buffer` for the other passes.
template <class Norm, DType kType, bool kBuffered>
OPTKIT_HD void forward_rows(const NormForward& a, int64_t row, int rows, accumulator_t<kType>* buffer, bool streamed) {
  using S = accumulator_t<kType>;
  using V = Vec<S>;
  constexpr int kLanes = V::kLanes;
  const int64_t n = a.size;
  const auto x_of = [&](int r) OPTKIT_INLINE {
    return a.residual ? at(static_cast<const void*>(a.sum), kType, (row + r) * n)
                      : at(a.x, kType, (row + r) * a.x_stride);
  };
  const auto first = [&](const void* x, S* values, int64_t i) OPTKIT_INLINE {
    const V value = load<S, false>(x, kType, i, kLanes);
    if (kBuffered) store_accumulator<S>(values, i, value);
    return value;
  };
  const auto again = [&](const void* x, const S* values, int64_t i) OPTKIT_INLINE {
    return kBuffered ? load_accumulator<S>(values, i) : load<S, false>(x, kType, i, kLanes);
  };
  const bool is_far = a.rows * n * size_of(kType) > kFarFrom;
  S mean[kGroup] = {}, rstd[kGroup];
  for (int r = 0; a.residual && r < rows; ++r)
    add_residual<kType>(a, (row + r) * n, at(a.x, a.x_type, (row + r) * a.x_stride), n);
  for (int r = 0; Norm::kCentered && r < rows; ++r) {
    const void* x = x_of(r);
    S* values = kBuffered ? buffer + r * kGroupedRow : nullptr;
    Accumulators<S> sum;
    walk_row<S>(n, [&](int64_t i, int k, auto lanes)
                       OPTKIT_INLINE { sum.part[k] = sum.part[k] + keep(lanes, first(x, values, i)); });
    mean[r] = sum.total() / static_cast<S>(n);
  }
  for (int r = 0; r < rows; ++r) {
    const void* x = x_of(r);
    S* values = kBuffered ? buffer + r * kGroupedRow : nullptr;
    const V shift(mean[r]);
    Accumulators<S> squares;
    const auto add_square = [&](int64_t i, int k, auto lanes) OPTKIT_INLINE {
      const V d = keep(lanes, Norm::center(Norm::kCentered ? again(x, values, i) : first(x, values, i), shift));
      squares.part[k] = fma(d, d, squares.part[k]);
    };
    // The next rows are prefetched while these are processed in the cache.
    const void* next = at(a.x, a.x_type, (row + r + rows) * a.x_stride);
    const void* next_residual = a.residual ? at(a.residual, a.residual_type, (row + r + rows) * n) : next;
    if (is_far) {
      walk_row<S>(n, [&](int64_t i, int k, auto lanes) OPTKIT_INLINE {
        prefetch<kType, kSecondLevel>(at(next, kType, i), k);
        if (a.residual) prefetch<kType, kSecondLevel>(at(next_residual, kType, i), k);
        add_square(i, k, lanes);
      });
    } else {
      walk_row<S>(n, [&](int64_t i, int k, auto lanes) OPTKIT_INLINE {
        if (!a.residual) prefetch<kType, kFirstLevel>(at(next, kType, i), k);
        add_square(i, k, lanes);
      });
    }
    const S variance = squares.total() / static_cast<S>(n);
    rstd[r] = static_cast<S>(1.0 / optkit::sqrt(static_cast<double>(variance) + a.eps));
    if (Norm::kCentered) static_cast<S*>(a.mean)[row + r] = mean[r];
    static_cast<S*>(a.rstd)[row + r] = rstd[r];
  }
  for (int r = 0; r < rows; ++r) {
    const void* x = x_of(r);
    const S* values = kBuffered ? buffer + r * kGroupedRow : nullptr;
    void* y = at(a.y, kType, (row + r) * n);
    const V shift(mean[r]), scale(rstd[r]);
    walk_row<S>(n, [&](int64_t i, int, auto lanes) OPTKIT_INLINE {
      const V normalized = Norm::center(again(x, values, i), shift) * scale;
      const V value = fma(normalized, load_accumulator<S>(a.weight, i), load_accumulator<S>(a.bias, i));
      put<kType>(y, i, value, streamed && is_whole(lanes));
    });
  }
}

// Means over a row of g = dy * weight and of g * normalized.
template <class S>
struct Means {
  S g, gx;
};

// First pass of the backward: kRows rows at a time, so that the weight and both parameter sums are loaded once for all
// of them.
template <class Norm, DType kType, int kRows>
OPTKIT_HD void sum_rows(const NormBackward& a, int64_t row, accumulator_t<kType>* d_weight,
                        accumulator_t<kType>* d_bias, Means<accumulator_t<kType>>* means) {
  using S = accumulator_t<kType>;
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
    constexpr int kParts = 4 / kRows;  // accumulators per row: registers are scarce
    const V weight = load_accumulator<S>(a.weight, i);
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
    if (d_weight) store_accumulator<S>(d_weight, i, load_accumulator<S>(d_weight, i) + to_weight);
    if (d_bias) store_accumulator<S>(d_bias, i, load_accumulator<S>(d_bias, i) + to_bias);
  });
#pragma GCC unroll 2
  for (int r = 0; r < kRows; ++r)
    means[r] = {sum_g[r].total() / static_cast<S>(n), sum_gx[r].total() / static_cast<S>(n)};
}

// Second pass: dx of one row. Prefetches the row `ahead` rows further.
template <class Norm, DType kType>
OPTKIT_HD void gradient_row(const NormBackward& a, int64_t row, Means<accumulator_t<kType>> means, int ahead,
                            bool streamed) {
  using S = accumulator_t<kType>;
  using V = Vec<S>;
  constexpr int kLanes = V::kLanes;
  const int64_t n = a.size, begin = row * n;
  const void *x = at(a.x, kType, row * a.x_stride), *dy = at(a.dy, kType, begin);
  const V mean(Norm::kCentered ? static_cast<const S*>(a.mean)[row] : S(0)), rstd(static_cast<const S*>(a.rstd)[row]);
  const V mean_g(means.g), mean_gx(means.gx);
  walk_row<S>(n, [&](int64_t i, int k, auto lanes) OPTKIT_INLINE {
    prefetch<kType, kSecondLevel>(at(x, kType, ahead * a.x_stride + i), k);
    prefetch<kType, kSecondLevel>(at(dy, kType, ahead * n + i), k);
    const V normalized = Norm::center(load<S, false>(x, kType, i, kLanes), mean) * rstd;
    const V g = load<S, false>(dy, kType, i, kLanes) * load_accumulator<S>(a.weight, i);
    V dx = Norm::gradient(g, normalized, rstd, mean_g, mean_gx);
    if (a.d_sum) dx = dx + load<S, false>(a.d_sum, kType, begin + i, kLanes);
    if (a.d_input) {
      const V alive = survival(a.dropout, begin + i, V());
      store<S, false>(a.d_input, kType, begin + i, kLanes, select(V(S(0)) < alive, dx * alive, V(S(0))));
    }
    put<kType>(a.dx, begin + i, dx, streamed && is_whole(lanes));
  });
}

template <class Norm, DType kType>
OPTKIT_HD void backward_rows(const NormBackward& a, int64_t row, int rows, accumulator_t<kType>* d_weight,
                             accumulator_t<kType>* d_bias, bool streamed) {
  Means<accumulator_t<kType>> means[kGroup];
  int r = 0;
  for (; r + 2 <= rows; r += 2) sum_rows<Norm, kType, 2>(a, row + r, d_weight, d_bias, means + r);
  if (r < rows) sum_rows<Norm, kType, 1>(a, row + r, d_weight, d_bias, means + r);
  for (r = 0; a.dx && r < rows; ++r) gradient_row<Norm, kType>(a, row + r, means[r], rows, streamed);
}

}  // namespace OPTKIT_ISA
}  // namespace optkit

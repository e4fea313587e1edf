// SPDX-License-Identifier: Apache-2.0
// Sum of squares of a gradient, in one read before the step.
#pragma once

#include "cpu/access.h"
#include "cpu/launch.h"

namespace optkit {
namespace OPTKIT_ISA {

// Short enough that fp32 lanes lose no visible precision; the sum of a block is then added in double.
constexpr int64_t kNormBlock = 2048;

template <class S>
OPTKIT_HD double block_sum_of_squares(const TensorSlot& t, int64_t begin, int64_t end) {
  constexpr int kLanes = Vec<S>::kLanes;
  Vec<S> sum[4] = {Vec<S>(S(0)), Vec<S>(S(0)), Vec<S>(S(0)), Vec<S>(S(0))};
  int64_t i = begin;
  for (; i + 4 * kLanes <= end; i += 4 * kLanes)
    for (int k = 0; k < 4; ++k) {
      const Vec<S> g = load<S, false>(t.grad, t.grad_type, i + k * kLanes, kLanes);
      sum[k] = fma(g, g, sum[k]);
    }
  for (; i + kLanes <= end; i += kLanes) {
    const Vec<S> g = load<S, false>(t.grad, t.grad_type, i, kLanes);
    sum[0] = fma(g, g, sum[0]);
  }
  if (i < end) {
    const Vec<S> g = load<S, true>(t.grad, t.grad_type, i, static_cast<int>(end - i));
    sum[1] = fma(g, g, sum[1]);
  }
  return sum_of_lanes((sum[0] + sum[1]) + (sum[2] + sum[3]));
}

// Slow path in double, for a block whose fast sum is not valid; it tells an overflowing square from a non-finite
// gradient.
template <class S>
OPTKIT_HD void careful_sum(const TensorSlot& t, int64_t begin, int64_t end, Sums* out) {
  constexpr int kLanes = Vec<S>::kLanes;
  LaneTotal<S> squares;
  LaneCounter<S> nonfinite;
  for (int64_t i = begin; i < end; i += kLanes) {
    const Vec<S> g = i + kLanes <= end ? load<S, false>(t.grad, t.grad_type, i, kLanes)
                                       : load<S, true>(t.grad, t.grad_type, i, static_cast<int>(end - i));
    const Vec<S> finite = finite_or_zero(g);
    squares.add(finite, finite);
    nonfinite.add(g - g != Vec<S>(S(0)));
  }
  out->grad_sq += squares.total();
  out->nonfinite += nonfinite.total();
}

template <class S>
void norm_chunk(const TensorSlot& tensor, const Chunk& chunk, Sums* out) {
  const TensorSlot t = tensor;
  *out = {};
  for (int64_t begin = chunk.begin, last = chunk.begin + chunk.count; begin < last; begin += kNormBlock) {
    const int64_t end = begin + kNormBlock < last ? begin + kNormBlock : last;
    const double sum = block_sum_of_squares<S>(t, begin, end);
    if (squares_hold<S>(sum))
      out->grad_sq += sum;
    else
      careful_sum<S>(t, begin, end, out);
  }
}

}  // namespace OPTKIT_ISA
}  // namespace optkit

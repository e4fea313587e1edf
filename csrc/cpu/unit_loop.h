// SPDX-License-Identifier: Apache-2.0
// The sums that clipping or centralizing by unit needs before the step: one read of the gradient.
#pragma once

#include "core/pipeline.h"
#include "cpu/access.h"
#include "cpu/launch.h"
#include "cpu/split_weights.h"

namespace optkit {
namespace OPTKIT_ISA {

// Short enough that fp32 lanes lose no visible precision; the sums of a block are then added in double.
constexpr int64_t kUnitBlock = 2048;

template <class S, bool kTail>
OPTKIT_HD void add_unit_vector(const TensorSlot& t, const StageCoefs<S>& stage, bool needs_param, int64_t i, int count,
                               Vec<S>* sum) {
  const Vec<S> g = load<S, kTail>(t.grad, t.grad_type, i, count);
  sum[0] = sum[0] + stage_clip(stage, g);
  sum[1] = fma(g, g, sum[1]);
  if (!needs_param) return;
  const Vec<S> p = load_weights<S, kTail>(t, i, count);
  sum[2] = fma(p, p, sum[2]);
}

template <class S>
OPTKIT_HD UnitSums sum_unit_block(const TensorSlot& t, const StageCoefs<S>& stage, bool needs_param, int64_t begin,
                                  int64_t end) {
  constexpr int kLanes = Vec<S>::kLanes;
  Vec<S> sum[3] = {Vec<S>(S(0)), Vec<S>(S(0)), Vec<S>(S(0))};
  int64_t i = begin;
  for (; i + kLanes <= end; i += kLanes) add_unit_vector<S, false>(t, stage, needs_param, i, kLanes, sum);
  if (i < end) add_unit_vector<S, true>(t, stage, needs_param, i, static_cast<int>(end - i), sum);
  return {sum_of_lanes(sum[0]), sum_of_lanes(sum[1]), sum_of_lanes(sum[2])};
}

// Slow path in double, for a block whose fast sums are not valid.
template <class S>
OPTKIT_HD UnitSums careful_unit_block(const TensorSlot& t, const StageCoefs<S>& stage, bool needs_param, int64_t begin,
                                      int64_t end) {
  constexpr int kLanes = Vec<S>::kLanes;
  LaneTotal<S> grad, grad_sq, param_sq;
  for (int64_t i = begin; i < end; i += kLanes) {
    const int count = static_cast<int>(i + kLanes <= end ? kLanes : end - i);
    const Vec<S> g = load<S, true>(t.grad, t.grad_type, i, count);
    grad.add(stage_clip(stage, g), Vec<S>(S(1)));
    grad_sq.add(g, g);
    if (!needs_param) continue;
    const Vec<S> p = load_weights<S, true>(t, i, count);
    param_sq.add(p, p);
  }
  return {grad.total(), grad_sq.total(), param_sq.total()};
}

template <class S>
OPTKIT_HD UnitSums sum_unit(const TensorSlot& t, const StageCoefs<S>& stage, bool needs_param, int64_t begin,
                            int64_t last) {
  UnitSums total = {0.0, 0.0, 0.0};
  for (; begin < last; begin += kUnitBlock) {
    const int64_t end = begin + kUnitBlock < last ? begin + kUnitBlock : last;
    UnitSums block = sum_unit_block(t, stage, needs_param, begin, end);
    // Without the parameter, only the mean of the gradient is needed.
    const bool holds = block.grad - block.grad == 0.0 &&
                       (!needs_param || (squares_hold<S>(block.grad_sq) && squares_hold<S>(block.param_sq)));
    if (!holds) block = careful_unit_block(t, stage, needs_param, begin, end);
    total.grad += block.grad;
    total.grad_sq += block.grad_sq;
    total.param_sq += block.param_sq;
  }
  return total;
}

// Computes the scales and shifts of units [units.begin, units.begin + units.count).
template <class S>
Clipped measure_units(const TensorSlot& tensor, const GroupRow& group, double grad_scale, const Chunk& units) {
  const TensorSlot t = tensor;
  const StageCoefs<S> stage = prepare_stages<S>(group, group.lr, grad_scale, 1.0, 0.0, 0, false);
  const bool needs_param = is_bounded(group.clip_unit_ratio);
  Clipped clipped = {0.0, 0.0};
  for (int64_t unit = units.begin; unit < units.begin + units.count; ++unit) {
    const int64_t begin = unit * t.unit_length;
    const UnitSums sums = sum_unit<S>(t, stage, needs_param, begin, begin + t.unit_length);
    const double coefficient = unit_coefficient(group, sums, grad_scale);
    t.unit_scale[unit] = coefficient;
    t.unit_shift[unit] = t.is_vector ? 0.0 : unit_mean(group, sums, coefficient, static_cast<double>(t.unit_length));
    clipped.grad_sq += coefficient * coefficient * sums.grad_sq;
    clipped.num += coefficient < 1.0;
  }
  return needs_param ? clipped : Clipped{};
}

}  // namespace OPTKIT_ISA
}  // namespace optkit

// SPDX-License-Identifier: Apache-2.0
// The stages around an update rule, on values that are already in registers. The set of active stages is constant over
// a tensor, so each stage costs one well-predicted branch, and combining stages does not multiply kernels.
#pragma once

#include <cstdint>

#include "core/math.h"
#include "core/random.h"
#include "core/tables.h"

namespace optkit {

enum StageFlag : uint32_t {
  kClipValue = 1,
  kL2 = 2,
  kDecay = 4,
  kCautious = 8,
  kL1 = 16,
  kAverage = 32,
  kStatistics = 64,
  kStochastic = 128,
  kKahan = 256,
  kCentralize = 512,
};

// Coefficients of the stages: computed once per tensor and step in double, then narrowed to S.
template <class S>
struct StageCoefs {
  S grad_scale;  // unscale x clip coefficient, negative under maximize
  S clip_value;
  S unit_shift;  // mean of the unit's gradient, under centralize
  S l2;
  S keep;  // 1 - lr * weight_decay
  S l1;    // lr * l1: the proximal threshold
  S average_weight;
  RandomKey key;
  uint32_t flags;
};

// Weight of the new value in the average. Source: EMA, torch.optim.swa_utils (the first update copies); SWA, Izmailov
// et al. 2018, arXiv:1803.05407, Algorithm 1.
OPTKIT_HD double average_weight(const GroupRow& group, double num_averaged) {
  const auto kind = static_cast<AverageKind>(static_cast<int>(group.average_kind));
  if (kind == AverageKind::kNone || group.average_due == 0.0) return 0.0;
  if (num_averaged == 0.0) return 1.0;
  return kind == AverageKind::kExponential ? 1.0 - group.average_decay : 1.0 / (num_averaged + 1.0);
}

// `lr` is the group's learning rate, times the factor of a rule with an estimate. `step` counts this update, from 1.
// `tensor` is the index of the parameter, which selects its random stream.
template <class S>
OPTKIT_HD StageCoefs<S> prepare_stages(const GroupRow& group, double lr, double grad_scale, double step,
                                       double num_averaged, uint64_t tensor, bool statistics) {
  StageCoefs<S> c;
  const double decay = group.decoupled != 0.0 ? lr * group.weight_decay : 0.0;
  const double weight = average_weight(group, num_averaged);
  c.grad_scale = static_cast<S>(group.maximize != 0.0 ? -grad_scale : grad_scale);
  c.clip_value = static_cast<S>(group.clip_value);
  c.unit_shift = S(0);
  c.l2 = static_cast<S>(group.decoupled != 0.0 ? 0.0 : group.weight_decay);
  c.keep = static_cast<S>(1.0 - decay);
  c.l1 = static_cast<S>(lr * group.l1);
  c.average_weight = static_cast<S>(weight);
  c.key = random_key(static_cast<uint64_t>(group.rounding_seed), static_cast<uint64_t>(step), tensor);
  const auto rounding = static_cast<Rounding>(static_cast<int>(group.rounding));
  c.flags = (is_bounded(group.clip_value) ? kClipValue : 0u) | (c.l2 != S(0) ? kL2 : 0u) |
            (decay != 0.0 ? kDecay : 0u) | (group.cautious != 0.0 ? kCautious : 0u) | (c.l1 != S(0) ? kL1 : 0u) |
            (weight != 0.0 ? kAverage : 0u) | (statistics ? kStatistics : 0u) |
            (rounding == Rounding::kStochastic ? kStochastic : 0u) | (rounding == Rounding::kKahan ? kKahan : 0u) |
            (group.centralize != 0.0 ? kCentralize : 0u);
  return c;
}

// Factor that scales gradients of the given norm (after unscaling) down to `bound`. The 1e-6 is the one in
// torch.nn.utils.clip_grad_norm_.
OPTKIT_HD double clip_coefficient(double bound, double norm) {
  const double coefficient = bound / (norm + 1e-6);
  return coefficient < 1.0 ? coefficient : 1.0;
}

// Factor of one unit's gradient. Source: Brock et al. 2021, arXiv:2102.06171, equation 3. `grad_scale` may be negative.
OPTKIT_HD double unit_coefficient(const GroupRow& group, const UnitSums& sums, double grad_scale) {
  if (!is_bounded(group.clip_unit_ratio)) return 1.0;
  const double param_norm = sqrt(sums.param_sq),
               grad_norm = sqrt(sums.grad_sq) * (grad_scale < 0 ? -grad_scale : grad_scale);
  const double bound = group.clip_unit_ratio * (param_norm < group.clip_unit_eps ? group.clip_unit_eps : param_norm);
  return grad_norm > bound ? bound / grad_norm : 1.0;
}

// The mean that centralization subtracts. Source: Yong et al. 2020, arXiv:2004.01461, equation 1.
OPTKIT_HD double unit_mean(const GroupRow& group, const UnitSums& sums, double coefficient, double length) {
  return group.centralize != 0.0 ? sums.grad * coefficient / length : 0.0;
}

// Unscales, clips by norm, then clips by value.
template <class V>
OPTKIT_HD V stage_clip(const StageCoefs<scalar_of_t<V>>& c, V grad) {
  grad = grad * c.grad_scale;
  return c.flags & kClipValue ? min(max(grad, V(-c.clip_value)), V(c.clip_value)) : grad;
}

// The stages before the rule: unscale and clip, centralize, L2.
template <class V>
OPTKIT_HD V stage_gradient(const StageCoefs<scalar_of_t<V>>& c, V param, V grad) {
  grad = stage_clip(c, grad);
  if (c.flags & kCentralize) grad = grad - c.unit_shift;
  if (c.flags & kL2) grad = fma(V(c.l2), param, grad);
  return grad;
}

// The stages after the rule: decoupled decay, the update itself, the L1 proximal step (soft threshold: exact zeros).
// Source: decay, Loshchilov & Hutter 2019, arXiv:1711.05101, Algorithm 2; cautious decay, Chen et al. 2025,
// arXiv:2510.12402, Algorithm 1; proximal step, Parikh & Boyd 2014, "Proximal Algorithms", section 6.5.2.
template <class V>
OPTKIT_HD V stage_parameter(const StageCoefs<scalar_of_t<V>>& c, V param, V update) {
  using S = scalar_of_t<V>;
  V kept = param;
  if (c.flags & kDecay) {
    kept = param * c.keep;
    if (c.flags & kCautious) kept = select(update * param < V(S(0)), param, kept);
  }
  V next = kept - update;
  if (c.flags & kL1) {
    const V shrunk = max(abs(next) - V(c.l1), V(S(0)));
    next = select(next < V(S(0)), V(S(0)) - shrunk, shrunk);
  }
  return next;
}

template <class V>
OPTKIT_HD V stage_average(const StageCoefs<scalar_of_t<V>>& c, V average, V param) {
  // Weight 1 marks the first update, a copy: the formula would propagate a NaN from uninitialized memory.
  return c.average_weight == scalar_of_t<V>(1) ? param : fma(V(c.average_weight), param - average, average);
}

}  // namespace optkit

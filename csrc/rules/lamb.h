// SPDX-License-Identifier: Apache-2.0
// LAMB: Adam's direction, at a rate proportional to the norm of each layer's weights.
// Source: You et al. 2020, arXiv:1904.00962, Algorithm 2.
#pragma once

#include "core/math.h"
#include "core/tables.h"

namespace optkit {

struct LAMBRule {
  static constexpr const char* kStates[] = {"exp_avg", "exp_avg_sq"};
  static constexpr int kNumStates = 2;
  static constexpr const char* kHyperparameters[] = {"beta1", "beta2",    "eps",     "weight_decay",
                                                     "adapt", "min_norm", "max_norm"};
  enum Hyper : int { kBeta1, kBeta2, kEps, kWeightDecay, kAdapt, kMinNorm, kMaxNorm, kNumHyperparameters };
  static constexpr const char* kScalars[] = {nullptr};
  static constexpr int kNumScalars = 0;
  static constexpr uint32_t kMeasured = kParamSquares | kUpdateSquares;

  template <class S>
  struct Coefs {
    S one_minus_beta1, beta2, one_minus_beta2, step_size, rsqrt_bias_correction2, eps, decay;
  };

  template <class S>
  OPTKIT_HD static Coefs<S> prepare(const double* hyper, double lr, double step, float* const*) {
    const double beta1 = hyper[kBeta1], beta2 = hyper[kBeta2], eps = hyper[kEps], weight_decay = hyper[kWeightDecay];
    return {static_cast<S>(1.0 - beta1),
            static_cast<S>(beta2),
            static_cast<S>(1.0 - beta2),
            static_cast<S>(lr / (1.0 - power(beta1, step))),
            static_cast<S>(1.0 / sqrt(1.0 - power(beta2, step))),
            static_cast<S>(eps),
            static_cast<S>(lr * weight_decay)};
  }

  // phi(|x|) / |r + lambda x|, with phi the identity between two bounds.
  OPTKIT_HD static double trust_ratio(const double* hyper, const Sums& sums) {
    const bool adapts = hyper[kAdapt] != 0.0;
    const double param_norm = sqrt(sums.param_sq), update_norm = sqrt(sums.update_sq);
    const double phi = min(max(param_norm, hyper[kMinNorm]), hyper[kMaxNorm]);
    return adapts && phi > 0.0 && update_norm > 0.0 ? phi / update_norm : 1.0;
  }

  template <class V>
  OPTKIT_HD static V update(const Coefs<scalar_of_t<V>>& c, V param, V grad, V* state) {
    V& exp_avg = state[0];
    V& exp_avg_sq = state[1];
    exp_avg = lerp(exp_avg, grad, c.one_minus_beta1);                        // m_t
    exp_avg_sq = fma(grad * c.one_minus_beta2, grad, exp_avg_sq * c.beta2);  // v_t
    const V denom = fma(sqrt(exp_avg_sq), V(c.rsqrt_bias_correction2), V(c.eps));
    return fma(V(c.decay), param, exp_avg * c.step_size / denom);
  }
};

}  // namespace optkit

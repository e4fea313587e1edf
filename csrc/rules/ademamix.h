// SPDX-License-Identifier: Apache-2.0
// AdEMAMix: Adam with a second, slow average of the gradients.
// Source: Pagliardini et al. 2024, arXiv:2409.03137, Algorithm 1 and the schedules of its section 3.
#pragma once

#include "core/math.h"

namespace optkit {

struct AdEMAMixRule {
  static constexpr const char* kStates[] = {"exp_avg", "exp_avg_slow", "exp_avg_sq"};
  static constexpr int kNumStates = 3;
  static constexpr const char* kHyperparameters[] = {"beta1",
                                                     "beta2",
                                                     "beta3",
                                                     "eps",
                                                     "alpha",
                                                     "alpha_warmup",
                                                     "beta3_warmup",
                                                     "inverse_log_beta1",
                                                     "inverse_log_beta3"};
  enum Hyper : int {
    kBeta1,
    kBeta2,
    kBeta3,
    kEps,
    kAlpha,
    kAlphaWarmup,
    kBeta3Warmup,
    kInverseLogBeta1,
    kInverseLogBeta3,
    kNumHyperparameters
  };
  static constexpr const char* kScalars[] = {nullptr};
  static constexpr int kNumScalars = 0;

  template <class S>
  struct Coefs {
    S one_minus_beta1, beta2, one_minus_beta2, one_minus_beta3, step_size, slow_step_size, rsqrt_bias_correction2, eps;
  };

  template <class S>
  OPTKIT_HD static Coefs<S> prepare(const double* hyper, double lr, double step, float* const*) {
    const double beta1 = hyper[kBeta1], beta2 = hyper[kBeta2];
    const double alpha = step < hyper[kAlphaWarmup] ? hyper[kAlpha] * step / hyper[kAlphaWarmup] : hyper[kAlpha];
    double beta3 = hyper[kBeta3];
    if (step < hyper[kBeta3Warmup]) {  // the half-life grows linearly, from that of beta1
      const double share = step / hyper[kBeta3Warmup];
      const double warmed = real_power(
          2.718281828459045, 1.0 / ((1.0 - share) * hyper[kInverseLogBeta1] + share * hyper[kInverseLogBeta3]));
      beta3 = warmed < beta3 ? warmed : beta3;
    }
    return {static_cast<S>(1.0 - beta1),
            static_cast<S>(beta2),
            static_cast<S>(1.0 - beta2),
            static_cast<S>(1.0 - beta3),
            static_cast<S>(lr / (1.0 - power(beta1, step))),
            static_cast<S>(lr * alpha),
            static_cast<S>(1.0 / sqrt(1.0 - power(beta2, step))),
            static_cast<S>(hyper[kEps])};
  }

  template <class V>
  OPTKIT_HD static V update(const Coefs<scalar_of_t<V>>& c, V, V grad, V* state) {
    V& exp_avg = state[0];
    V& exp_avg_slow = state[1];
    V& exp_avg_sq = state[2];
    exp_avg = lerp(exp_avg, grad, c.one_minus_beta1);                        // m1_t
    exp_avg_slow = lerp(exp_avg_slow, grad, c.one_minus_beta3);              // m2_t
    exp_avg_sq = fma(grad * c.one_minus_beta2, grad, exp_avg_sq * c.beta2);  // nu_t
    const V denom = fma(sqrt(exp_avg_sq), V(c.rsqrt_bias_correction2), V(c.eps));
    return fma(exp_avg, V(c.step_size), exp_avg_slow * c.slow_step_size) / denom;
  }
};

}  // namespace optkit

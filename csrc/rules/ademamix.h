// SPDX-License-Identifier: Apache-2.0
// AdEMAMix: Adam with a second, slow average of the gradients.
// Source: Pagliardini et al. 2024, arXiv:2409.03137, Algorithm 1 and the schedules of its section 3.
#pragma once

#include "core/math.h"

namespace optkit {

struct AdEMAMixRule {
  static constexpr const char* kStates[] = {"exp_avg", "exp_avg_slow", "exp_avg_sq"};
  static constexpr int kNumStates = 3;
  static constexpr const char* kHypers[] = {"beta1",
                                            "beta2",
                                            "beta3",
                                            "eps",
                                            "alpha",
                                            "alpha_warmup",
                                            "beta3_warmup",
                                            "inverse_log_beta1",
                                            "inverse_log_beta3"};
  static constexpr int kNumHypers = 9;
  static constexpr const char* kScalars[] = {nullptr};
  static constexpr int kNumScalars = 0;

  template <class S>
  struct Coefs {
    S one_minus_beta1, beta2, one_minus_beta2, one_minus_beta3, step_size, slow_step_size, rsqrt_bias_correction2, eps;
  };

  template <class S>
  OPTKIT_HD static Coefs<S> prepare(const double* hyper, double lr, double step, float* const*) {
    const double beta1 = hyper[0], beta2 = hyper[1];
    const double alpha = step < hyper[5] ? hyper[4] * step / hyper[5] : hyper[4];
    double beta3 = hyper[2];
    if (step < hyper[6]) {  // the half-life grows linearly, from that of beta1
      const double share = step / hyper[6];
      const double warmed = real_power(2.718281828459045, 1.0 / ((1.0 - share) * hyper[7] + share * hyper[8]));
      beta3 = warmed < beta3 ? warmed : beta3;
    }
    return {static_cast<S>(1.0 - beta1),
            static_cast<S>(beta2),
            static_cast<S>(1.0 - beta2),
            static_cast<S>(1.0 - beta3),
            static_cast<S>(lr / (1.0 - power(beta1, step))),
            static_cast<S>(lr * alpha),
            static_cast<S>(1.0 / sqrt(1.0 - power(beta2, step))),
            static_cast<S>(hyper[3])};
  }

  template <class V>
  OPTKIT_HD static V update(const Coefs<scalar_of_t<V>>& c, V, V grad, V* state) {
    V& exp_avg = state[0];
    V& exp_avg_slow = state[1];
    V& exp_avg_sq = state[2];
    exp_avg = fma(V(c.one_minus_beta1), grad - exp_avg, exp_avg);                 // m1_t
    exp_avg_slow = fma(V(c.one_minus_beta3), grad - exp_avg_slow, exp_avg_slow);  // m2_t
    exp_avg_sq = fma(grad * c.one_minus_beta2, grad, exp_avg_sq * c.beta2);       // nu_t
    const V denom = fma(sqrt(exp_avg_sq), V(c.rsqrt_bias_correction2), V(c.eps));
    return fma(exp_avg, V(c.step_size), exp_avg_slow * c.slow_step_size) / denom;
  }
};

}  // namespace optkit

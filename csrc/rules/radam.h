// SPDX-License-Identifier: Apache-2.0
// RAdam: Adam that uses its second moment only once its variance is small enough.
// Source: Liu et al. 2020, arXiv:1908.03265, Algorithm 2.
#pragma once

#include "core/math.h"

namespace optkit {

struct RAdamRule {
  static constexpr const char* kStates[] = {"exp_avg", "exp_avg_sq"};
  static constexpr int kNumStates = 2;
  static constexpr const char* kHyperparameters[] = {"beta1", "beta2", "eps"};
  enum Hyper : int { kBeta1, kBeta2, kEps, kNumHyperparameters };
  static constexpr const char* kScalars[] = {nullptr};
  static constexpr int kNumScalars = 0;

  template <class S>
  struct Coefs {
    S one_minus_beta1, beta2, one_minus_beta2, step_size, adaptive_step_size, eps;
    bool adaptive;
  };

  template <class S>
  OPTKIT_HD static Coefs<S> prepare(const double* hyper, double lr, double step, float* const*) {
    const double beta1 = hyper[kBeta1], beta2 = hyper[kBeta2];
    const double beta2_power = power(beta2, step), correction2 = 1.0 - beta2_power;
    const double longest = 2.0 / (1.0 - beta2) - 1.0;                        // rho_inf
    const double length = longest - 2.0 * step * beta2_power / correction2;  // rho_t
    const double step_size = lr / (1.0 - power(beta1, step));
    const bool adaptive = length > 5.0;
    const double rectified =
        adaptive ? sqrt((length - 4.0) * (length - 2.0) * longest / ((longest - 4.0) * (longest - 2.0) * length)) : 0.0;
    return {static_cast<S>(1.0 - beta1),
            static_cast<S>(beta2),
            static_cast<S>(1.0 - beta2),
            static_cast<S>(step_size),
            static_cast<S>(step_size * rectified * sqrt(correction2)),
            static_cast<S>(hyper[kEps]),
            adaptive};
  }

  template <class V>
  OPTKIT_HD static V update(const Coefs<scalar_of_t<V>>& c, V, V grad, V* state) {
    V& exp_avg = state[0];
    V& exp_avg_sq = state[1];
    exp_avg = lerp(exp_avg, grad, c.one_minus_beta1);                        // m_t
    exp_avg_sq = fma(grad * c.one_minus_beta2, grad, exp_avg_sq * c.beta2);  // v_t
    if (!c.adaptive) return exp_avg * c.step_size;
    return exp_avg * c.adaptive_step_size / (sqrt(exp_avg_sq) + V(c.eps));
  }
};

}  // namespace optkit

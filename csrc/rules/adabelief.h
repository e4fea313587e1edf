// SPDX-License-Identifier: Apache-2.0
// AdaBelief: Adam that divides by the deviation of the gradient from its own average.
// Source: Zhuang et al. 2020, arXiv:2010.07468, Algorithm 2. As there, eps is added to the stored variance in every
// step and once more to its root.
#pragma once

#include "core/math.h"

namespace optkit {

struct AdaBeliefRule {
  static constexpr const char* kStates[] = {"exp_avg", "exp_avg_var"};
  static constexpr int kNumStates = 2;
  static constexpr const char* kHyperparameters[] = {"beta1", "beta2", "eps"};
  enum Hyper : int { kBeta1, kBeta2, kEps, kNumHyperparameters };
  static constexpr const char* kScalars[] = {nullptr};
  static constexpr int kNumScalars = 0;

  template <class S>
  struct Coefs {
    S one_minus_beta1, beta2, one_minus_beta2, step_size, rsqrt_bias_correction2, eps;
  };

  template <class S>
  OPTKIT_HD static Coefs<S> prepare(const double* hyper, double lr, double step, float* const*) {
    const double beta1 = hyper[kBeta1], beta2 = hyper[kBeta2];
    return {static_cast<S>(1.0 - beta1),
            static_cast<S>(beta2),
            static_cast<S>(1.0 - beta2),
            static_cast<S>(lr / (1.0 - power(beta1, step))),
            static_cast<S>(1.0 / sqrt(1.0 - power(beta2, step))),
            static_cast<S>(hyper[kEps])};
  }

  template <class V>
  OPTKIT_HD static V update(const Coefs<scalar_of_t<V>>& c, V, V grad, V* state) {
    V& exp_avg = state[0];
    V& exp_avg_var = state[1];
    exp_avg = lerp(exp_avg, grad, c.one_minus_beta1);  // m_t
    const V surprise = grad - exp_avg;
    exp_avg_var = fma(surprise * c.one_minus_beta2, surprise, exp_avg_var * c.beta2) + V(c.eps);  // s_t
    const V denom = fma(sqrt(exp_avg_var), V(c.rsqrt_bias_correction2), V(c.eps));
    return exp_avg * c.step_size / denom;
  }
};

}  // namespace optkit

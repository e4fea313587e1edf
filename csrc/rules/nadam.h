// SPDX-License-Identifier: Apache-2.0
// NAdam: Adam with Nesterov momentum and a momentum warmup.
// Source: Dozat 2016, "Incorporating Nesterov Momentum into Adam", Algorithm 2; the momentum schedule is his section 3.
#pragma once

#include "core/math.h"

namespace optkit {

struct NAdamRule {
  static constexpr const char* kStates[] = {"exp_avg", "exp_avg_sq"};
  static constexpr int kNumStates = 2;
  static constexpr const char* kHyperparameters[] = {"beta1", "beta2", "eps", "momentum_decay"};
  enum Hyper : int { kBeta1, kBeta2, kEps, kMomentumDecay, kNumHyperparameters };
  static constexpr const char* kScalars[] = {"mu_product"};
  static constexpr int kNumScalars = 1;

  template <class S>
  struct Coefs {
    S one_minus_beta1, beta2, one_minus_beta2, rsqrt_bias_correction2, eps, grad_step, momentum_step;
  };

  template <class S>
  OPTKIT_HD static Coefs<S> prepare(const double* hyper, double lr, double step, float* const* scalar) {
    const double beta1 = hyper[kBeta1], beta2 = hyper[kBeta2], decay = hyper[kMomentumDecay];
    const double mu = beta1 * (1.0 - 0.5 * real_power(0.96, step * decay));
    const double mu_next = beta1 * (1.0 - 0.5 * real_power(0.96, (step + 1.0) * decay));
    *scalar[0] *= static_cast<float>(mu);  // in fp32, as torch does
    const double mu_product = static_cast<double>(*scalar[0]);
    return {static_cast<S>(1.0 - beta1),
            static_cast<S>(beta2),
            static_cast<S>(1.0 - beta2),
            static_cast<S>(1.0 / sqrt(1.0 - power(beta2, step))),
            static_cast<S>(hyper[kEps]),
            static_cast<S>(lr * (1.0 - mu) / (1.0 - mu_product)),
            static_cast<S>(lr * mu_next / (1.0 - mu_product * mu_next))};
  }

  template <class V>
  OPTKIT_HD static V update(const Coefs<scalar_of_t<V>>& c, V, V grad, V* state) {
    V& exp_avg = state[0];
    V& exp_avg_sq = state[1];
    exp_avg = lerp(exp_avg, grad, c.one_minus_beta1);                        // m_t
    exp_avg_sq = fma(grad * c.one_minus_beta2, grad, exp_avg_sq * c.beta2);  // n_t
    const V denom = fma(sqrt(exp_avg_sq), V(c.rsqrt_bias_correction2), V(c.eps));
    return fma(V(c.grad_step), grad, exp_avg * c.momentum_step) / denom;
  }
};

}  // namespace optkit

// SPDX-License-Identifier: Apache-2.0
// Adam and AdamW: they differ only in where weight decay acts, which is a stage.
// Source: Kingma & Ba 2015, arXiv:1412.6980, Algorithm 1; AMSGrad, Reddi et al. 2018, arXiv:1904.09237, Algorithm 2.
// Differs from the papers as torch.optim does: AMSGrad keeps the maximum before the bias correction.
#pragma once

#include "core/math.h"

namespace optkit {

template <bool kAmsgrad>
struct AdamRule {
  static constexpr const char* kStates[] = {"exp_avg", "exp_avg_sq", "max_exp_avg_sq"};
  static constexpr int kNumStates = kAmsgrad ? 3 : 2;
  static constexpr const char* kHyperparameters[] = {"beta1", "beta2", "eps"};
  enum Hyper : int { kBeta1, kBeta2, kEps, kNumHyperparameters };
  static constexpr const char* kScalars[] = {nullptr};
  static constexpr int kNumScalars = 0;

  template <class S>
  struct Coefs {
    S one_minus_beta1, beta2, one_minus_beta2, step_size, rsqrt_bias_correction2, eps;
  };

  // `step` counts this update, from 1.
  template <class S>
  OPTKIT_HD static Coefs<S> prepare(const double* hyper, double lr, double step, float* const*) {
    const double beta1 = hyper[kBeta1], beta2 = hyper[kBeta2], eps = hyper[kEps];
    return {static_cast<S>(1.0 - beta1),
            static_cast<S>(beta2),
            static_cast<S>(1.0 - beta2),
            static_cast<S>(lr / (1.0 - power(beta1, step))),
            static_cast<S>(1.0 / sqrt(1.0 - power(beta2, step))),
            static_cast<S>(eps)};
  }

  // Returns what is subtracted from the parameter.
  template <class V>
  OPTKIT_HD static V update(const Coefs<scalar_of_t<V>>& c, V, V grad, V* state) {
    V& exp_avg = state[0];
    V& exp_avg_sq = state[1];
    exp_avg = lerp(exp_avg, grad, c.one_minus_beta1);                        // m_t
    exp_avg_sq = fma(grad * c.one_minus_beta2, grad, exp_avg_sq * c.beta2);  // v_t
    V second = exp_avg_sq;
    if constexpr (kAmsgrad) second = state[2] = max(exp_avg_sq, state[2]);  // this argument order keeps a NaN
    const V denom = fma(sqrt(second), V(c.rsqrt_bias_correction2), V(c.eps));
    return exp_avg * c.step_size / denom;
  }
};

}  // namespace optkit

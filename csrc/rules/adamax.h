// SPDX-License-Identifier: Apache-2.0
// Adamax: Adam with the infinity norm.
// Source: Kingma & Ba 2015, arXiv:1412.6980, Algorithm 2. Differs from it as torch.optim does: eps is added to |g|.
#pragma once

#include "core/math.h"

namespace optkit {

struct AdamaxRule {
  static constexpr const char* kStates[] = {"exp_avg", "exp_inf"};
  static constexpr int kNumStates = 2;
  static constexpr const char* kHyperparameters[] = {"beta1", "beta2", "eps"};
  enum Hyper : int { kBeta1, kBeta2, kEps, kNumHyperparameters };
  static constexpr const char* kScalars[] = {nullptr};
  static constexpr int kNumScalars = 0;

  template <class S>
  struct Coefs {
    S one_minus_beta1, beta2, step_size, eps;
  };

  template <class S>
  OPTKIT_HD static Coefs<S> prepare(const double* hyper, double lr, double step, float* const*) {
    return {static_cast<S>(1.0 - hyper[kBeta1]), static_cast<S>(hyper[kBeta2]),
            static_cast<S>(lr / (1.0 - power(hyper[kBeta1], step))), static_cast<S>(hyper[kEps])};
  }

  template <class V>
  OPTKIT_HD static V update(const Coefs<scalar_of_t<V>>& c, V, V grad, V* state) {
    V& exp_avg = state[0];
    V& exp_inf = state[1];
    exp_avg = lerp(exp_avg, grad, c.one_minus_beta1);        // m_t
    exp_inf = max(abs(grad) + V(c.eps), exp_inf * c.beta2);  // u_t; a NaN gradient propagates
    return exp_avg * c.step_size / exp_inf;
  }
};

}  // namespace optkit

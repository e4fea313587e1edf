// SPDX-License-Identifier: Apache-2.0
// Lion: the sign of an interpolated momentum.
// Source: Chen et al. 2023, arXiv:2302.06675, Algorithm 2.
#pragma once

#include "core/math.h"

namespace optkit {

struct LionRule {
  static constexpr const char* kStates[] = {"exp_avg"};
  static constexpr int kNumStates = 1;
  static constexpr const char* kHyperparameters[] = {"beta1", "beta2"};
  enum Hyper : int { kBeta1, kBeta2, kNumHyperparameters };
  static constexpr const char* kScalars[] = {nullptr};
  static constexpr int kNumScalars = 0;

  template <class S>
  struct Coefs {
    S lr, beta1, one_minus_beta1, beta2, one_minus_beta2;
  };

  template <class S>
  OPTKIT_HD static Coefs<S> prepare(const double* hyper, double lr, double, float* const*) {
    return {static_cast<S>(lr), static_cast<S>(hyper[kBeta1]), static_cast<S>(1.0 - hyper[kBeta1]),
            static_cast<S>(hyper[kBeta2]), static_cast<S>(1.0 - hyper[kBeta2])};
  }

  template <class V>
  OPTKIT_HD static V update(const Coefs<scalar_of_t<V>>& c, V, V grad, V* state) {
    using S = scalar_of_t<V>;
    V& exp_avg = state[0];
    const V mixed = fma(V(c.one_minus_beta1), grad, exp_avg * c.beta1);  // c_t
    exp_avg = fma(V(c.one_minus_beta2), grad, exp_avg * c.beta2);        // m_t
    const V zero(S(0));
    return select(mixed < zero, V(S(0) - c.lr), select(zero < mixed, V(c.lr), mixed * S(0)));  // NaN stays NaN
  }
};

}  // namespace optkit

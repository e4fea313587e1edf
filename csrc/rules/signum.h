// SPDX-License-Identifier: Apache-2.0
// Signum: the sign of the momentum.
// Source: Bernstein et al. 2018, arXiv:1802.04434, Algorithm 2.
#pragma once

#include "core/math.h"

namespace optkit {

struct SignumRule {
  static constexpr const char* kStates[] = {"exp_avg"};
  static constexpr int kNumStates = 1;
  static constexpr const char* kHyperparameters[] = {"momentum"};
  enum Hyper : int { kMomentum, kNumHyperparameters };
  static constexpr const char* kScalars[] = {nullptr};
  static constexpr int kNumScalars = 0;

  template <class S>
  struct Coefs {
    S lr, one_minus_momentum;
  };

  template <class S>
  OPTKIT_HD static Coefs<S> prepare(const double* hyper, double lr, double, float* const*) {
    return {static_cast<S>(lr), static_cast<S>(1.0 - hyper[kMomentum])};
  }

  template <class V>
  OPTKIT_HD static V update(const Coefs<scalar_of_t<V>>& c, V, V grad, V* state) {
    using S = scalar_of_t<V>;
    V& exp_avg = state[0];
    exp_avg = lerp(exp_avg, grad, c.one_minus_momentum);  // m_{k+1}
    const V zero(S(0));
    return select(exp_avg < zero, V(S(0) - c.lr), select(zero < exp_avg, V(c.lr), exp_avg * S(0)));  // NaN stays NaN
  }
};

}  // namespace optkit

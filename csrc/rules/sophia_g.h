// SPDX-License-Identifier: Apache-2.0
// Sophia-G: momentum divided by an estimate of the Hessian's diagonal, each element clipped to a magnitude of 1.
// Source: Liu et al. 2023, arXiv:2305.14342, Algorithm 3. The estimate is written outside of the step.
#pragma once

#include "core/math.h"

namespace optkit {

struct SophiaGRule {
  static constexpr const char* kStates[] = {"exp_avg", "hessian"};
  static constexpr int kNumStates = 2;
  static constexpr uint32_t kFullPrecisionStates = 1u << 1;  // what a user's estimate is written into
  static constexpr uint32_t kFixedStates = 1u << 1;          // no step writes it
  static constexpr const char* kHyperparameters[] = {"beta1", "rho", "eps"};
  enum Hyper : int { kBeta1, kRho, kEps, kNumHyperparameters };
  static constexpr const char* kScalars[] = {nullptr};
  static constexpr int kNumScalars = 0;

  template <class S>
  struct Coefs {
    S lr, one_minus_beta1, rho, eps;
    bool first;
  };

  template <class S>
  OPTKIT_HD static Coefs<S> prepare(const double* hyper, double lr, double, float* const*) {
    return {static_cast<S>(lr), static_cast<S>(1.0 - hyper[kBeta1]), static_cast<S>(hyper[kRho]),
            static_cast<S>(hyper[kEps]), false};
  }

  template <class V>
  OPTKIT_HD static V update(const Coefs<scalar_of_t<V>>& c, V, V grad, V* state) {
    using S = scalar_of_t<V>;
    V& exp_avg = state[0];
    exp_avg = lerp(exp_avg, grad, c.one_minus_beta1);  // m_t
    const V moved = exp_avg / max(state[1] * c.rho, V(c.eps));
    return min(max(moved, V(S(-1))), V(S(1))) * c.lr;
  }
};

}  // namespace optkit

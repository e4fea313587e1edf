// SPDX-License-Identifier: Apache-2.0
// Adadelta: steps in the units of the parameter, from the history of the steps themselves.
// Source: Zeiler 2012, arXiv:1212.5701, Algorithm 1. As in torch.optim, and unlike the paper, a learning rate
// multiplies the step.
#pragma once

#include "core/math.h"

namespace optkit {

struct AdadeltaRule {
  static constexpr const char* kStates[] = {"square_avg", "acc_delta"};
  static constexpr int kNumStates = 2;
  static constexpr const char* kHyperparameters[] = {"rho", "eps"};
  enum Hyper : int { kRho, kEps, kNumHyperparameters };
  static constexpr const char* kScalars[] = {nullptr};
  static constexpr int kNumScalars = 0;

  template <class S>
  struct Coefs {
    S lr, rho, one_minus_rho, eps;
  };

  template <class S>
  OPTKIT_HD static Coefs<S> prepare(const double* hyper, double lr, double, float* const*) {
    return {static_cast<S>(lr), static_cast<S>(hyper[kRho]), static_cast<S>(1.0 - hyper[kRho]),
            static_cast<S>(hyper[kEps])};
  }

  template <class V>
  OPTKIT_HD static V update(const Coefs<scalar_of_t<V>>& c, V, V grad, V* state) {
    V& square_avg = state[0];
    V& acc_delta = state[1];
    square_avg = fma(grad * c.one_minus_rho, grad, square_avg * c.rho);  // E[g^2]_t
    const V delta = sqrt(acc_delta + V(c.eps)) / sqrt(square_avg + V(c.eps)) * grad;
    acc_delta = fma(delta * c.one_minus_rho, delta, acc_delta * c.rho);  // E[dx^2]_t
    return delta * c.lr;
  }
};

}  // namespace optkit

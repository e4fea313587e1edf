// SPDX-License-Identifier: Apache-2.0
// Adagrad: every element has its own learning rate, which only decreases.
// Source: Duchi, Hazan & Singer 2011, "Adaptive Subgradient Methods for Online Learning and Stochastic Optimization",
// JMLR 12.
#pragma once

#include "core/math.h"

namespace optkit {

struct AdagradRule {
  static constexpr const char* kStates[] = {"sum"};
  static constexpr int kNumStates = 1;
  static constexpr const char* kHyperparameters[] = {"lr_decay", "eps"};
  enum Hyper : int { kLrDecay, kEps, kNumHyperparameters };
  static constexpr const char* kScalars[] = {nullptr};
  static constexpr int kNumScalars = 0;

  template <class S>
  struct Coefs {
    S lr, eps;
  };

  template <class S>
  OPTKIT_HD static Coefs<S> prepare(const double* hyper, double lr, double step, float* const*) {
    return {static_cast<S>(lr / (1.0 + (step - 1.0) * hyper[kLrDecay])), static_cast<S>(hyper[kEps])};
  }

  template <class V>
  OPTKIT_HD static V update(const Coefs<scalar_of_t<V>>& c, V, V grad, V* state) {
    V& sum = state[0];
    sum = fma(grad, grad, sum);
    return grad * c.lr / (sqrt(sum) + V(c.eps));
  }
};

}  // namespace optkit

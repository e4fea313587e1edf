// SPDX-License-Identifier: Apache-2.0
// RMSprop, plain or centered, with momentum.
// Source: Tieleman & Hinton 2012, "Lecture 6.5: rmsprop", COURSERA; centered, Graves 2013, arXiv:1308.0850, Equations
// 38-41. As in torch.optim, and unlike Graves, eps is outside the square root.
#pragma once

#include "core/math.h"

namespace optkit {

struct RMSpropRule {
  static constexpr const char* kStates[] = {"square_avg", "momentum_buffer", "grad_avg"};
  static constexpr int kNumStates = 3;
  static constexpr uint32_t kNeededStates = 1;
  static constexpr const char* kHyperparameters[] = {"alpha", "eps", "momentum", "centered"};
  enum Hyper : int { kAlpha, kEps, kMomentum, kCentered, kNumHyperparameters };
  static constexpr const char* kScalars[] = {nullptr};
  static constexpr int kNumScalars = 0;

  template <class S>
  struct Coefs {
    S lr, alpha, one_minus_alpha, eps, momentum;
    bool centered;
  };

  template <class S>
  OPTKIT_HD static Coefs<S> prepare(const double* hyper, double lr, double, float* const*) {
    return {static_cast<S>(lr),          static_cast<S>(hyper[kAlpha]),    static_cast<S>(1.0 - hyper[kAlpha]),
            static_cast<S>(hyper[kEps]), static_cast<S>(hyper[kMomentum]), hyper[kCentered] != 0.0};
  }

  // Without momentum there is no buffer: it is passed as zero and not stored.
  template <class V>
  OPTKIT_HD static V update(const Coefs<scalar_of_t<V>>& c, V, V grad, V* state) {
    V& square_avg = state[0];
    V& buffer = state[1];
    V& grad_avg = state[2];
    square_avg = fma(grad * c.one_minus_alpha, grad, square_avg * c.alpha);
    V variance = square_avg;
    if (c.centered) {
      grad_avg = lerp(grad_avg, grad, c.one_minus_alpha);
      // With rounding, the variance of a constant gradient can be slightly negative; torch's root is then NaN.
      variance = max(fma(V(scalar_of_t<V>(0)) - grad_avg, grad_avg, square_avg), V(scalar_of_t<V>(0)));
    }
    buffer = fma(V(c.momentum), buffer, grad / (sqrt(variance) + V(c.eps)));
    return buffer * c.lr;
  }
};

}  // namespace optkit

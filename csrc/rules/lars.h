// SPDX-License-Identifier: Apache-2.0
// LARS: SGD with momentum, at a rate proportional to the weight-to-gradient ratio of each layer.
// Source: You et al. 2017, arXiv:1708.03888, Algorithm 1.
#pragma once

#include "core/math.h"
#include "core/tables.h"

namespace optkit {

struct LARSRule {
  static constexpr const char* kStates[] = {"momentum_buffer"};
  static constexpr int kNumStates = 1;
  static constexpr const char* kHyperparameters[] = {"momentum", "weight_decay", "adapt", "trust_coefficient", "eps"};
  enum Hyper : int { kMomentum, kWeightDecay, kAdapt, kTrustCoefficient, kEps, kNumHyperparameters };
  static constexpr const char* kScalars[] = {nullptr};
  static constexpr int kNumScalars = 0;
  static constexpr uint32_t kMeasured = kGradSquares | kParamSquares;

  template <class S>
  struct Coefs {
    S momentum, lr, scale, weight_decay;  // the rate is lr * scale
  };

  template <class S>
  OPTKIT_HD static Coefs<S> prepare(const double* hyper, double lr, double, float* const*) {
    // A ratio of norms may exceed the range of fp32: a power of two is then factored out.
    const double scale = lr > 0x1p64 ? 0x1p64 : lr > 0.0 && lr < 0x1p-64 ? 0x1p-64 : 1.0;
    return {static_cast<S>(hyper[kMomentum]), static_cast<S>(lr / scale), static_cast<S>(scale),
            static_cast<S>(hyper[kWeightDecay])};
  }

  // lambda = eta |w| / (|g| + beta |w|)
  OPTKIT_HD static double trust_ratio(const double* hyper, const Sums& sums) {
    const bool adapts = hyper[kAdapt] != 0.0;
    const double param_norm = sqrt(sums.param_sq), grad_norm = sqrt(sums.grad_sq);
    return adapts && param_norm > 0.0 && grad_norm > 0.0
               ? hyper[kTrustCoefficient] * param_norm / (grad_norm + hyper[kWeightDecay] * param_norm + hyper[kEps])
               : 1.0;
  }

  template <class V>
  OPTKIT_HD static V update(const Coefs<scalar_of_t<V>>& c, V param, V grad, V* state) {
    V& buffer = state[0];
    const V direction = fma(V(c.weight_decay), param, grad) * c.scale;
    buffer = fma(V(c.lr), direction, buffer * c.momentum);  // v_{t+1}
    return buffer;
  }
};

}  // namespace optkit

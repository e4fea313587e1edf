// SPDX-License-Identifier: Apache-2.0
// MARS-AdamW: AdamW on gradients whose variance is reduced by the previous gradient.
// Source: Yuan et al. 2024, arXiv:2411.10438, Algorithm 2 with the approximation of section 3.3: the previous gradient
// is the one of the previous batch. Before the first step it is zero, as in the authors' implementation.
#pragma once

#include "core/math.h"
#include "core/tables.h"

namespace optkit {

struct MARSRule {
  static constexpr const char* kStates[] = {"exp_avg", "exp_avg_sq", "previous_grad"};
  static constexpr int kNumStates = 3;
  static constexpr const char* kHyperparameters[] = {"beta1", "beta2", "eps", "gamma", "max_corrected_norm"};
  enum Hyper : int { kBeta1, kBeta2, kEps, kGamma, kMaxCorrectedNorm, kNumHyperparameters };
  static constexpr const char* kScalars[] = {nullptr};
  static constexpr int kNumScalars = 0;
  static constexpr uint32_t kMeasured = kUpdateSquares;

  template <class S>
  struct Coefs {
    S one_minus_beta1, beta2, one_minus_beta2, step_size, rsqrt_bias_correction2, eps, difference_weight, limit;
  };

  template <class S>
  OPTKIT_HD static Coefs<S> prepare(const double* hyper, double lr, double step, double limit) {
    const double beta1 = hyper[kBeta1], beta2 = hyper[kBeta2];
    return {static_cast<S>(1.0 - beta1),
            static_cast<S>(beta2),
            static_cast<S>(1.0 - beta2),
            static_cast<S>(lr / (1.0 - power(beta1, step))),
            static_cast<S>(1.0 / sqrt(1.0 - power(beta2, step))),
            static_cast<S>(hyper[kEps]),
            static_cast<S>(hyper[kGamma] * beta1 / (1.0 - beta1)),
            static_cast<S>(limit)};
  }

  // The corrected gradient, before it is limited.
  template <class V>
  OPTKIT_HD static V limited(const Coefs<scalar_of_t<V>>& c, V grad, const V* state) {
    return fma(V(c.difference_weight), grad - state[2], grad);
  }

  OPTKIT_HD static double limit(const double* hyper, double squares, double) {
    const double norm = sqrt(squares), bound = hyper[kMaxCorrectedNorm];
    return norm > bound ? bound / norm : 1.0;
  }

  template <class V>
  OPTKIT_HD static V update(const Coefs<scalar_of_t<V>>& c, V, V grad, V* state) {
    V& exp_avg = state[0];
    V& exp_avg_sq = state[1];
    const V corrected = limited(c, grad, state) * c.limit;  // c_t
    state[2] = grad;
    exp_avg = lerp(exp_avg, corrected, c.one_minus_beta1);                             // m_t
    exp_avg_sq = fma(corrected * c.one_minus_beta2, corrected, exp_avg_sq * c.beta2);  // v_t
    const V denom = fma(sqrt(exp_avg_sq), V(c.rsqrt_bias_correction2), V(c.eps));
    return exp_avg * c.step_size / denom;
  }
};

}  // namespace optkit

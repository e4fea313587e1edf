// SPDX-License-Identifier: Apache-2.0
// Adan: Adam with Nesterov's momentum written in differences of gradients.
// Source: Xie et al. 2022, arXiv:2208.06677, Algorithm 1, without restarts. As in the authors' implementation, a beta
// is the weight of the old value (1 - the paper's beta), and all three moments are bias-corrected.
#pragma once

#include "core/math.h"

namespace optkit {

struct AdanRule {
  static constexpr const char* kStates[] = {"exp_avg", "exp_avg_diff", "exp_avg_sq", "previous_grad"};
  static constexpr int kNumStates = 4;
  static constexpr const char* kHyperparameters[] = {"beta1", "beta2", "beta3", "eps", "proximal_decay"};
  enum Hyper : int { kBeta1, kBeta2, kBeta3, kEps, kProximalDecay, kNumHyperparameters };
  static constexpr const char* kScalars[] = {nullptr};
  static constexpr int kNumScalars = 0;

  template <class S>
  struct Coefs {
    S one_minus_beta1, beta2, one_minus_beta2, beta3, one_minus_beta3;
    S step_size, diff_step_size, rsqrt_bias_correction3, eps, decay, shrink;
    bool first;
  };

  template <class S>
  OPTKIT_HD static Coefs<S> prepare(const double* hyper, double lr, double step, float* const*) {
    const double beta1 = hyper[kBeta1], beta2 = hyper[kBeta2], beta3 = hyper[kBeta3],
                 decay = lr * hyper[kProximalDecay];
    return {static_cast<S>(1.0 - beta1),
            static_cast<S>(beta2),
            static_cast<S>(1.0 - beta2),
            static_cast<S>(beta3),
            static_cast<S>(1.0 - beta3),
            static_cast<S>(lr / (1.0 - power(beta1, step))),
            static_cast<S>(lr * beta2 / (1.0 - power(beta2, step))),
            static_cast<S>(1.0 / sqrt(1.0 - power(beta3, step))),
            static_cast<S>(hyper[kEps]),
            static_cast<S>(decay),
            static_cast<S>(1.0 / (1.0 + decay)),
            step == 1.0};
  }

  template <class V>
  OPTKIT_HD static V update(const Coefs<scalar_of_t<V>>& c, V param, V grad, V* state) {
    using S = scalar_of_t<V>;
    V& exp_avg = state[0];
    V& exp_avg_diff = state[1];
    V& exp_avg_sq = state[2];
    V& previous_grad = state[3];
    const V diff = c.first ? V(S(0)) : grad - previous_grad;
    const V looking_ahead = fma(V(c.beta2), diff, grad);
    exp_avg = lerp(exp_avg, grad, c.one_minus_beta1);                                          // m_k
    exp_avg_diff = lerp(exp_avg_diff, diff, c.one_minus_beta2);                                // v_k
    exp_avg_sq = fma(looking_ahead * c.one_minus_beta3, looking_ahead, exp_avg_sq * c.beta3);  // n_k
    previous_grad = grad;
    const V denom = fma(sqrt(exp_avg_sq), V(c.rsqrt_bias_correction3), V(c.eps));
    const V moved = fma(exp_avg, V(c.step_size), exp_avg_diff * c.diff_step_size) / denom;
    if (c.decay == S(0)) return moved;
    return fma(V(c.decay), param, moved) * c.shrink;  // param - this = (param - moved) / (1 + lr * decay)
  }
};

}  // namespace optkit

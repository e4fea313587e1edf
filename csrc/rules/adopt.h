// SPDX-License-Identifier: Apache-2.0
// ADOPT: Adam that divides by the second moment of the previous steps, before it averages.
// Source: Taniguchi et al. 2024, arXiv:2411.02853v3, Algorithm 2 (with clipping). The first step only initializes the
// second moment: the paper's v_0.
#pragma once

#include "core/math.h"

namespace optkit {

struct ADOPTRule {
  static constexpr const char* kStates[] = {"exp_avg", "exp_avg_sq"};
  static constexpr int kNumStates = 2;
  static constexpr const char* kHyperparameters[] = {"beta1", "beta2", "eps", "clip_exponent", "decay", "cautious"};
  enum Hyper : int { kBeta1, kBeta2, kEps, kClipExponent, kDecay, kCautious, kNumHyperparameters };
  static constexpr const char* kScalars[] = {nullptr};
  static constexpr int kNumScalars = 0;

  template <class S>
  struct Coefs {
    S lr, one_minus_beta1, beta2, one_minus_beta2, eps, bound, decay;
    bool first, clips, cautious;
  };

  template <class S>
  OPTKIT_HD static Coefs<S> prepare(const double* hyper, double lr, double step, float* const*) {
    const bool first = step == 1.0, clips = hyper[kClipExponent] >= 0.0;  // below 0: not clipped
    return {static_cast<S>(lr),
            static_cast<S>(1.0 - hyper[kBeta1]),
            static_cast<S>(hyper[kBeta2]),
            static_cast<S>(1.0 - hyper[kBeta2]),
            static_cast<S>(hyper[kEps]),
            static_cast<S>(clips && !first ? real_power(step - 1.0, hyper[kClipExponent]) : 0.0),
            static_cast<S>(lr * hyper[kDecay]),
            first,
            clips,
            hyper[kCautious] != 0.0};
  }

  // Applies weight decay itself, since the stage would decay in the first step too.
  template <class V>
  OPTKIT_HD static V update(const Coefs<scalar_of_t<V>>& c, V param, V grad, V* state) {
    const V zero(scalar_of_t<V>(0));
    V& exp_avg = state[0];
    V& exp_avg_sq = state[1];
    if (c.first) {
      exp_avg_sq = grad * grad;  // v_0
      return zero;
    }
    V normed = grad / max(sqrt(exp_avg_sq), V(c.eps));
    if (c.clips) normed = min(max(normed, V(-c.bound)), V(c.bound));
    exp_avg = lerp(exp_avg, normed, c.one_minus_beta1);                      // m_t
    exp_avg_sq = fma(grad * c.one_minus_beta2, grad, exp_avg_sq * c.beta2);  // v_t
    const V moved = exp_avg * c.lr;
    if (c.decay == scalar_of_t<V>(0)) return moved;
    const V decayed = fma(V(c.decay), param, moved);
    return c.cautious ? select(moved * param < zero, moved, decayed) : decayed;
  }
};

}  // namespace optkit

// SPDX-License-Identifier: Apache-2.0
// StableAdamW: AdamW whose rate falls where gradients are larger than the second moment knows.
// Source: Wortsman et al. 2023, arXiv:2304.13013, Algorithm 2: the bias is corrected in the decay rates of both
// moments, and weight decay has the same rate as the update.
#pragma once

#include "core/math.h"
#include "core/tables.h"

namespace optkit {

struct StableAdamWRule {
  static constexpr const char* kStates[] = {"exp_avg", "exp_avg_sq"};
  static constexpr int kNumStates = 2;
  static constexpr const char* kHyperparameters[] = {"beta1", "beta2", "eps", "decay", "cautious"};
  enum Hyper : int { kBeta1, kBeta2, kEps, kDecay, kCautious, kNumHyperparameters };
  static constexpr const char* kScalars[] = {nullptr};
  static constexpr int kNumScalars = 0;
  static constexpr uint32_t kMeasured = kUpdateSquares;

  template <class S>
  struct Coefs {
    S lr, share1, share2, rest2, eps, decay;
    bool cautious;
  };

  // 1 - beta-hat: the weight of a new value in a moment that is its own weighted mean.
  OPTKIT_HD static double share_of(double beta, double step) { return (1.0 - beta) / (1.0 - power(beta, step)); }

  template <class S>
  OPTKIT_HD static Coefs<S> prepare(const double* hyper, double lr, double step, double limit) {
    const double rate = lr * limit, share2 = share_of(hyper[kBeta2], step);
    return {static_cast<S>(rate),        static_cast<S>(share_of(hyper[kBeta1], step)),
            static_cast<S>(share2),      static_cast<S>(1.0 - share2),
            static_cast<S>(hyper[kEps]), static_cast<S>(rate * hyper[kDecay]),
            hyper[kCautious] != 0.0};
  }

  template <class V>
  OPTKIT_HD static V second_moment(const Coefs<scalar_of_t<V>>& c, V grad, V exp_avg_sq) {
    return fma(grad * c.share2, grad, exp_avg_sq * c.rest2);
  }

  // The gradient in units of the second moment's root.
  template <class V>
  OPTKIT_HD static V limited(const Coefs<scalar_of_t<V>>& c, V grad, const V* state) {
    return grad / max(sqrt(second_moment(c, grad, state[1])), V(c.eps));
  }

  // 1 / max(1, RMS).
  OPTKIT_HD static double limit(const double*, double squares, double numel) {
    const double rms = sqrt(squares / numel);
    return rms > 1.0 ? 1.0 / rms : 1.0;
  }

  template <class V>
  OPTKIT_HD static V update(const Coefs<scalar_of_t<V>>& c, V param, V grad, V* state) {
    using S = scalar_of_t<V>;
    V& exp_avg = state[0];
    V& exp_avg_sq = state[1];
    exp_avg = lerp(exp_avg, grad, c.share1);          // v_t
    exp_avg_sq = second_moment(c, grad, exp_avg_sq);  // u_t
    const V moved = exp_avg / (sqrt(exp_avg_sq) + V(c.eps)) * c.lr;
    if (c.decay == S(0)) return moved;
    const V decayed = fma(V(c.decay), param, moved);
    return c.cautious ? select(moved * param < V(S(0)), moved, decayed) : decayed;
  }
};

}  // namespace optkit

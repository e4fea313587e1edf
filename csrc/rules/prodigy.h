// SPDX-License-Identifier: Apache-2.0
// Prodigy: Adam at the rate d, an estimate of the distance to the solution that grows from two sums over all
// parameters. Source: Mishchenko & Defazio 2024, arXiv:2306.06101, Prodigy (Adam version). Both sums are weighted by d
// / d0, as in the authors' code, to keep them in range; the weight cancels in their ratio. The step uses the d from
// before it, so one walk is enough.
#pragma once

#include "core/math.h"
#include "core/tables.h"

namespace optkit {

struct ProdigyRule {
  static constexpr const char* kStates[] = {"exp_avg", "exp_avg_sq", "s", "p0"};
  static constexpr int kNumStates = 4;
  static constexpr uint32_t kFullPrecisionStates = 1u << 3;  // p0: the initial parameter
  static constexpr uint32_t kFixedStates = 1u << 3;          // which never changes
  static constexpr const char* kHyperparameters[] = {
      "beta1", "beta2", "beta3", "eps", "use_bias_correction", "safeguard_warmup", "d0", "d"};
  enum Hyper : int { kBeta1, kBeta2, kBeta3, kEps, kUseBiasCorrection, kSafeguardWarmup, kD0, kD, kNumHyperparameters };
  static constexpr const char* kScalars[] = {nullptr};
  static constexpr int kNumScalars = 0;

  template <class S>
  struct Coefs {
    S one_minus_beta1, beta2, one_minus_beta2, beta3, d, d_eps, step_size, seen_weight, s_weight;
    bool first;
  };

  OPTKIT_HD static double rate(const double* hyper, double step) {
    const double correction = hyper[kUseBiasCorrection] != 0.0
                                  ? sqrt(1.0 - power(hyper[kBeta2], step)) / (1.0 - power(hyper[kBeta1], step))
                                  : 1.0;
    return hyper[kD] * correction;
  }

  // `lr` is the group's rate times `rate`.
  template <class S>
  OPTKIT_HD static Coefs<S> prepare(const double* hyper, double lr, double step, float* const*) {
    const double beta1 = hyper[kBeta1], beta2 = hyper[kBeta2], d = hyper[kD], weight = d / hyper[kD0];
    const double s_weight = hyper[kSafeguardWarmup] != 0.0 && lr != 0.0 ? weight * d : weight * lr;
    return {static_cast<S>(1.0 - beta1), static_cast<S>(beta2),
            static_cast<S>(1.0 - beta2), static_cast<S>(hyper[kBeta3]),
            static_cast<S>(d),           static_cast<S>(d * hyper[kEps]),
            static_cast<S>(lr),          static_cast<S>(weight * lr),
            static_cast<S>(s_weight),    step == 1.0};
  }

  template <class V>
  OPTKIT_HD static V update(const Coefs<scalar_of_t<V>>& c, V param, V grad, V* state) {
    V& exp_avg = state[0];
    V& exp_avg_sq = state[1];
    if (c.first) state[3] = param;
    const V scaled = grad * c.d;
    exp_avg = lerp(exp_avg, scaled, c.one_minus_beta1);                          // m_{k+1}
    exp_avg_sq = fma(scaled * c.one_minus_beta2, scaled, exp_avg_sq * c.beta2);  // v_{k+1}
    state[2] = fma(V(c.s_weight), grad, state[2] * c.beta3);                     // s_{k+1}
    return exp_avg / (sqrt(exp_avg_sq) + V(c.d_eps)) * c.step_size;
  }

  // <g_k, x_0 - x_k> and |s_{k+1}|.
  template <class V>
  OPTKIT_HD static void observe(const Coefs<scalar_of_t<V>>& c, V param, V grad, const V* state, V* seen, V* times) {
    using S = scalar_of_t<V>;
    seen[0] = grad * c.seen_weight;
    times[0] = state[3] - param;
    seen[1] = abs(state[2]);
    times[1] = V(S(1));
  }
};

}  // namespace optkit

// SPDX-License-Identifier: Apache-2.0
// Schedule-free SGD and AdamW: the parameter holds y, where gradients are taken; the state holds z, which they update.
// The average x, which is evaluated, is never stored: y = (1 - beta) z + beta x. Source: Defazio et al. 2024,
// arXiv:2405.15682, Equations 2-4 and Algorithm 1. The weights of the average are those of the authors' implementation:
// step^r times a power of the largest rate so far.
#pragma once

#include "core/math.h"

namespace optkit {

// Numbers of one step that both rules need.
struct ScheduleFreeStep {
  double rate;   // gamma_t
  double share;  // c_t: weight of z in the new x
};

// `average` points at warmup_steps, r, weight_lr_power and lr_max, the last hyperparameters of both rules. The sum of
// weights is stored as two floats, 48 bits in total.
OPTKIT_HD ScheduleFreeStep schedule_free_step(const double* average, double lr, double step, double correction,
                                              float* const* scalar) {
  const double warmup_steps = average[0], r = average[1], weight_lr_power = average[2], lr_max = average[3];
  const double ramp = step < warmup_steps ? step / warmup_steps : 1.0;
  const double weight = real_power(step, r) * real_power(lr_max * ramp * correction, weight_lr_power);
  const double sum = static_cast<double>(*scalar[0]) + static_cast<double>(*scalar[1]) + weight;
  *scalar[0] = static_cast<float>(sum);
  *scalar[1] = static_cast<float>(sum - static_cast<double>(*scalar[0]));
  return {lr * ramp * correction, sum == 0.0 ? 0.0 : weight / sum};
}

// Updates z and returns the decrease of y: y' = (1 - c) y + c z - rate (1 - beta (1 - c)) direction.
template <class V>
OPTKIT_HD V schedule_free_move(V param, V direction, V& z, scalar_of_t<V> rate, scalar_of_t<V> share,
                               scalar_of_t<V> y_rate) {
  const V update = fma(V(y_rate), direction, (param - z) * share);
  z = z - direction * rate;
  return update;
}

struct ScheduleFreeSGDRule {
  static constexpr const char* kStates[] = {"z"};
  static constexpr int kNumStates = 1;
  static constexpr const char* kHyperparameters[] = {"momentum", "warmup_steps", "r", "weight_lr_power", "lr_max"};
  enum Hyper : int { kMomentum, kWarmupSteps, kR, kWeightLrPower, kLrMax, kNumHyperparameters };
  static constexpr const char* kScalars[] = {"weight_sum", "weight_sum_rest"};
  static constexpr int kNumScalars = 2;

  template <class S>
  struct Coefs {
    S rate, share, y_rate;
    bool first;
  };

  template <class S>
  OPTKIT_HD static Coefs<S> prepare(const double* hyper, double lr, double step, float* const* scalar) {
    const ScheduleFreeStep now = schedule_free_step(hyper + kWarmupSteps, lr, step, 1.0, scalar);
    return {static_cast<S>(now.rate), static_cast<S>(now.share),
            static_cast<S>(now.rate * (1.0 - hyper[kMomentum] * (1.0 - now.share))), step == 1.0};
  }

  template <class V>
  OPTKIT_HD static V update(const Coefs<scalar_of_t<V>>& c, V param, V grad, V* state) {
    if (c.first) state[0] = param;  // z_1 = x_1 = y_1
    return schedule_free_move(param, grad, state[0], c.rate, c.share, c.y_rate);
  }
};

struct ScheduleFreeAdamWRule {
  static constexpr const char* kStates[] = {"z", "exp_avg_sq"};
  static constexpr int kNumStates = 2;
  static constexpr uint32_t kFullPrecisionStates = 1u << 0;  // z is a point: small updates of it would be lost
  static constexpr const char* kHyperparameters[] = {"beta1", "beta2",           "eps",   "decay", "warmup_steps",
                                                     "r",     "weight_lr_power", "lr_max"};
  enum Hyper : int { kBeta1, kBeta2, kEps, kDecay, kWarmupSteps, kR, kWeightLrPower, kLrMax, kNumHyperparameters };
  static constexpr const char* kScalars[] = {"weight_sum", "weight_sum_rest"};
  static constexpr int kNumScalars = 2;

  template <class S>
  struct Coefs {
    S beta2, one_minus_beta2, eps, decay, rate, share, y_rate;
    bool first;
  };

  template <class S>
  OPTKIT_HD static Coefs<S> prepare(const double* hyper, double lr, double step, float* const* scalar) {
    const double beta1 = hyper[kBeta1], beta2 = hyper[kBeta2];
    const ScheduleFreeStep now =
        schedule_free_step(hyper + kWarmupSteps, lr, step, sqrt(1.0 - power(beta2, step)), scalar);
    return {static_cast<S>(beta2),
            static_cast<S>(1.0 - beta2),
            static_cast<S>(hyper[kEps]),
            static_cast<S>(hyper[kDecay]),
            static_cast<S>(now.rate),
            static_cast<S>(now.share),
            static_cast<S>(now.rate * (1.0 - beta1 * (1.0 - now.share))),
            step == 1.0};
  }

  // Applies weight decay itself: at y, and it moves z too.
  template <class V>
  OPTKIT_HD static V update(const Coefs<scalar_of_t<V>>& c, V param, V grad, V* state) {
    if (c.first) state[0] = param;
    V& exp_avg_sq = state[1];
    exp_avg_sq = fma(grad * c.one_minus_beta2, grad, exp_avg_sq * c.beta2);  // v_t
    const V direction = fma(V(c.decay), param, grad / (sqrt(exp_avg_sq) + V(c.eps)));
    return schedule_free_move(param, direction, state[0], c.rate, c.share, c.y_rate);
  }
};

}  // namespace optkit

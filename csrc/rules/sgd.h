// SPDX-License-Identifier: Apache-2.0
// SGD with momentum, dampening and Nesterov's momentum.
// Source: Sutskever et al. 2013, "On the importance of initialization and momentum in deep learning", Equations 1-4.
// Differs from the paper as torch.optim does: the learning rate multiplies the buffer, which starts as the first
// gradient.
#pragma once

#include "core/math.h"

namespace optkit {

struct SGDRule {
  static constexpr const char* kStates[] = {"momentum_buffer"};
  static constexpr int kNumStates = 1;
  static constexpr uint32_t kNeededStates = 0;
  static constexpr const char* kHyperparameters[] = {"momentum", "dampening", "nesterov"};
  enum Hyper : int { kMomentum, kDampening, kNesterov, kNumHyperparameters };
  static constexpr const char* kScalars[] = {"momentum_step"};  // number of updates of the buffer
  static constexpr int kNumScalars = 1;

  template <class S>
  struct Coefs {
    S lr, momentum, buffer_weight, grad_weight;
    bool nesterov;
  };

  template <class S>
  OPTKIT_HD static Coefs<S> prepare(const double* hyper, double lr, double, float* const* scalar) {
    const double momentum = hyper[kMomentum], dampening = hyper[kDampening];
    const bool first = momentum == 0.0 || scalar[0] == nullptr || *scalar[0] == 0.0f;
    if (momentum != 0.0 && scalar[0] != nullptr) *scalar[0] += 1.0f;
    return {static_cast<S>(lr), static_cast<S>(momentum), static_cast<S>(first ? 0.0 : momentum),
            static_cast<S>(first ? 1.0 : 1.0 - dampening), hyper[kNesterov] != 0.0};
  }

  // Without momentum there is no buffer: it is passed as zero, becomes the gradient, and is not stored.
  template <class V>
  OPTKIT_HD static V update(const Coefs<scalar_of_t<V>>& c, V, V grad, V* state) {
    V& buffer = state[0];
    buffer = fma(V(c.buffer_weight), buffer, grad * c.grad_weight);
    const V direction = c.nesterov ? fma(V(c.momentum), buffer, grad) : buffer;
    return direction * c.lr;
  }
};

}  // namespace optkit

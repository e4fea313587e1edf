// SPDX-License-Identifier: Apache-2.0
// Adafactor: the second moment of a matrix is the product of its row and column means; the step is proportional to the
// parameter. Source: Shazeer & Stern 2018, arXiv:1804.04235, Algorithms 4 to 6; means and eps as in
// torch.optim.Adafactor.
#pragma once

#include "core/math.h"
#include "core/tables.h"

namespace optkit {

struct AdafactorRule {
  static constexpr const char* kStates[] = {"variance", "row_var", "col_var"};
  static constexpr int kNumStates = 1;
  static constexpr int kNumFactors = 2;
  static constexpr uint32_t kFullPrecisionStates = 3u << 1;  // few numbers, each an average of many
  static constexpr const char* kHyperparameters[] = {"beta2_decay", "eps1", "eps2",
                                                     "d"};  // eps1 < 0: the eps of the dtype
  enum Hyper : int { kBeta2Decay, kEps1, kEps2, kD, kNumHyperparameters };
  static constexpr const char* kScalars[] = {nullptr};
  static constexpr int kNumScalars = 0;
  static constexpr uint32_t kMeasured = kParamSquares | kUpdateSquares;

  template <class S>
  struct Coefs {
    S rate;
    S share;  // weight of the new squares in the second moment
    S least;  // lower bound of the square root in the denominator
    bool is_factored;
  };

  template <class S>
  OPTKIT_HD static Coefs<S> prepare(const double* hyper, double rate, double step, const TensorSlot& slot) {
    const double eps = hyper[kEps1] < 0.0 ? eps_of(is_split(slot) ? DType::kFloat32 : slot.param_type) : hyper[kEps1];
    return {static_cast<S>(rate), static_cast<S>(real_power(step, hyper[kBeta2Decay])), static_cast<S>(eps),
            !slot.is_vector};
  }

  // The relative step size. Comparisons with NaN give what Python's max gives.
  OPTKIT_HD static double relative_rate(const double* hyper, double lr, double step, double numel, const Sums& sums) {
    const double rms_param = sqrt(sums.param_sq / numel), excess = sqrt(sums.update_sq / numel) / hyper[kD];
    const double scale = rms_param > hyper[kEps2] ? rms_param : hyper[kEps2], bound = 1.0 / sqrt(step);
    return scale * (bound < lr ? bound : lr) / (excess > 1.0 ? excess : 1.0);
  }

  // For a matrix, state[0] already holds the factor of the gradient.
  template <class V>
  OPTKIT_HD static V update(const Coefs<scalar_of_t<V>>& c, V, V grad, V* state) {
    if (c.is_factored) return grad * state[0] * c.rate;
    V& variance = state[0];
    variance = lerp(variance, grad * grad, c.share);
    return grad * c.rate / sqrt(max(variance, V(c.least * c.least)));
  }

 private:
  OPTKIT_HD static double eps_of(DType type) {
    if (type == DType::kFloat64) return 0x1p-52;
    return type == DType::kFloat32 ? 0x1p-23 : type == DType::kBFloat16 ? 0x1p-7 : 0x1p-10;
  }
};

}  // namespace optkit

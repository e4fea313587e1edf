// SPDX-License-Identifier: Apache-2.0
// Root mean square normalization, one element at a time. Zhang & Sennrich 2019, equation 4.
#pragma once

#include "core/math.h"

namespace optkit {

struct RmsNorm {
  static constexpr bool kCentered = false;

  template <class V>
  OPTKIT_HD static V center(V x, V) {
    return x;
  }
  template <class V>
  OPTKIT_HD static V gradient(V g, V normalized, V rstd, V, V mean_gx) {
    return rstd * (g - normalized * mean_gx);
  }
};

}  // namespace optkit

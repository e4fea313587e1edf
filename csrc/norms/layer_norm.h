// SPDX-License-Identifier: Apache-2.0
// Layer normalization of one element; the caller sums over the row. Ba, Kiros & Hinton 2016, equation 3.
#pragma once

#include "core/math.h"

namespace optkit {

struct LayerNorm {
  static constexpr bool kCentered = true;

  // Deviation from the mean; its mean square is the variance.
  template <class V>
  OPTKIT_HD static V center(V x, V mean) {
    return x - mean;
  }
  // `mean_g` and `mean_gx`: means over the row of g = dy * weight and of g * normalized.
  template <class V>
  OPTKIT_HD static V gradient(V g, V normalized, V rstd, V mean_g, V mean_gx) {
    return rstd * ((g - mean_g) - normalized * mean_gx);
  }
};

}  // namespace optkit

// SPDX-License-Identifier: Apache-2.0
// The few operations an update rule may use, for one float or double. csrc/cpu/vector.h has the same names for vectors.
#pragma once

#include "core/macros.h"

namespace optkit {

template <class V>
struct scalar_of {  // the type of one lane
  using type = V;
};
template <class V>
using scalar_of_t = typename scalar_of<V>::type;

#if defined(__CUDA_ARCH__)
OPTKIT_HD float fma(float a, float b, float c) { return __fmaf_rn(a, b, c); }
OPTKIT_HD double fma(double a, double b, double c) { return __fma_rn(a, b, c); }
OPTKIT_HD float sqrt(float a) { return __fsqrt_rn(a); }
OPTKIT_HD double sqrt(double a) { return __dsqrt_rn(a); }
#else
OPTKIT_HD float fma(float a, float b, float c) { return __builtin_fmaf(a, b, c); }
OPTKIT_HD double fma(double a, double b, double c) { return __builtin_fma(a, b, c); }
OPTKIT_HD float sqrt(float a) { return __builtin_sqrtf(a); }
OPTKIT_HD double sqrt(double a) { return __builtin_sqrt(a); }
#endif

OPTKIT_HD float select(bool condition, float a, float b) { return condition ? a : b; }
OPTKIT_HD double select(bool condition, double a, double b) { return condition ? a : b; }
OPTKIT_HD float abs(float a) { return a < 0.0f ? -a : a; }
OPTKIT_HD double abs(double a) { return a < 0.0 ? -a : a; }

// A NaN in `a` stays NaN: the comparison is false, and the false branch returns `a`.
template <class V>
OPTKIT_HD V max(V a, V b) {
  return select(a < b, b, a);
}
template <class V>
OPTKIT_HD V min(V a, V b) {
  return select(b < a, b, a);
}

// Same as torch.lerp: returns exactly `to` at weight 1, whatever `from` is.
template <class V>
OPTKIT_HD V lerp(V from, V to, scalar_of_t<V> share) {
  using S = scalar_of_t<V>;
  return share < S(0.5) ? fma(V(share), to - from, from) : to - (to - from) * (S(1) - share);
}

// Replaces inf and NaN by zero.
template <class V>
OPTKIT_HD V finite_or_zero(V a) {
  const V zero(scalar_of_t<V>(0));
  return select(a - a == zero, a, zero);
}

// What a number could not store of a value, unless it is too large for that: the number may have been written since.
// `half_unit`: its share of the number, at most. -0 leaves even -0 as it is.
template <class V>
OPTKIT_HD V rest_of(V stored, V rest, scalar_of_t<V> half_unit) {
  using S = scalar_of_t<V>;
  return select(abs(rest) < abs(stored) * V(half_unit), rest, V(S(-0.0)));
}

// Whether a sum of squares accumulated in S, over at most 2^16 numbers, can be trusted: it did not overflow, and it is
// large enough that squares that underflowed do not matter in fp32. fp64 always has the range.
template <class S>
OPTKIT_HD bool squares_hold(double sum) {
  return sum - sum == 0.0 && (sizeof(S) == 8 || sum >= 0x1p-84);
}

// base^exponent for any exponent. The last bit may differ between host and device.
OPTKIT_HD double real_power(double base, double exponent) {
#if defined(__CUDA_ARCH__)
  return ::pow(base, exponent);
#else
  return __builtin_pow(base, exponent);
#endif
}

// base^exponent for a nonnegative integer exponent, by repeated squaring: bitwise equal on every machine, unlike
// std::pow.
OPTKIT_HD double power(double base, double exponent) {
  double result = 1.0;
  for (unsigned long long n = static_cast<unsigned long long>(exponent); n != 0; n >>= 1) {
    if (n & 1) result *= base;
    base *= base;
  }
  return result;
}

}  // namespace optkit

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

// A NaN in `a` stays a NaN: a comparison with it is false, and the false branch is `a`.
template <class V>
OPTKIT_HD V max(V a, V b) {
  return select(a < b, b, a);
}
template <class V>
OPTKIT_HD V min(V a, V b) {
  return select(b < a, b, a);
}

// As torch's lerp: exactly `to` at a share of 1, whatever `from` is.
template <class V>
OPTKIT_HD V lerp(V from, V to, scalar_of_t<V> share) {
  using S = scalar_of_t<V>;
  return share < S(0.5) ? fma(V(share), to - from, from) : to - (to - from) * (S(1) - share);
}

// What is not finite counts as nothing.
template <class V>
OPTKIT_HD V finite_or_zero(V a) {
  const V zero(scalar_of_t<V>(0));
  return select(a - a == zero, a, zero);
}

// Whether a sum of squares that was taken in S, of no more than 2^16 numbers, is right: below the bound, what
// underflowed could be seen in fp32; and it did not overflow. fp64 has range enough.
template <class S>
OPTKIT_HD bool squares_hold(double sum) {
  return sum - sum == 0.0 && (sizeof(S) == 8 || sum >= 0x1p-84);
}

// base^exponent for any exponent: the host's and the device's last bit may differ.
OPTKIT_HD double real_power(double base, double exponent) {
#if defined(__CUDA_ARCH__)
  return ::pow(base, exponent);
#else
  return __builtin_pow(base, exponent);
#endif
}

// base^exponent for a whole exponent >= 0, by repeated squaring: the same bits on every machine, unlike std::pow.
OPTKIT_HD double power(double base, double exponent) {
  double result = 1.0;
  for (unsigned long long n = static_cast<unsigned long long>(exponent); n != 0; n >>= 1) {
    if (n & 1) result *= base;
    base *= base;
  }
  return result;
}

}  // namespace optkit

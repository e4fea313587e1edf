// SPDX-License-Identifier: Apache-2.0
// 16-bit floating point, one number at a time, in integer arithmetic: for CUDA, and for CPUs without F16C.
#pragma once

#include <cstdint>

#include "core/macros.h"

namespace optkit {

OPTKIT_HD uint32_t float_bits(float a) {
  uint32_t bits;
  __builtin_memcpy(&bits, &a, sizeof(bits));
  return bits;
}
OPTKIT_HD float bits_float(uint32_t bits) {
  float a;
  __builtin_memcpy(&a, &bits, sizeof(a));
  return a;
}

OPTKIT_HD float half_to_float(uint16_t h) {
  const uint32_t sign = static_cast<uint32_t>(h & 0x8000u) << 16;
  const uint32_t magnitude = h & 0x7fffu;
  if (magnitude >= 0x7c00u) return bits_float(sign | 0x7f800000u | ((magnitude & 0x3ffu) << 13));  // inf, NaN
  if (magnitude >= 0x400u) return bits_float(sign | ((magnitude << 13) + 0x38000000u));            // normal
  const float subnormal = static_cast<float>(magnitude) * 5.9604644775390625e-8f;                  // steps of 2^-24
  return bits_float(sign | float_bits(subnormal));
}

// Round to nearest, ties to even.
OPTKIT_HD uint16_t float_to_half(float a) {
  const uint32_t bits = float_bits(a);
  const uint16_t sign = static_cast<uint16_t>((bits >> 16) & 0x8000u);
  const uint32_t magnitude = bits & 0x7fffffffu;
  if (magnitude > 0x7f800000u) return sign | 0x7e00u;   // NaN
  if (magnitude >= 0x477ff000u) return sign | 0x7c00u;  // rounds to infinity
  if (magnitude < 0x38800000u) {                        // subnormal: adding 0.5 puts the last kept bit last
    const float shifted = bits_float(magnitude) + 0.5f;
    return sign | static_cast<uint16_t>(float_bits(shifted) - 0x3f000000u);
  }
  const uint32_t rounded = magnitude - 0x38000000u + 0xfffu + ((magnitude >> 13) & 1u);
  return sign | static_cast<uint16_t>(rounded >> 13);
}

}  // namespace optkit

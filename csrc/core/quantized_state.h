// SPDX-License-Identifier: Apache-2.0
// State in 8 bits. Each block of kQuantizedBlock numbers shares one scale, its largest magnitude. A number is stored as
// a small floating-point code relative to the scale, with 3 fraction bits: magnitudes (1 + f/8) 2^-e, and zero. Signed
// state has a sign bit and e in 0..15; nonnegative state has e in 0..31. Rounding is stochastic, so an average
// accumulates changes smaller than one code. A nonzero square never becomes zero, since the rule divides by it. Inf and
// NaN have no code and are excluded from the scale, so that they do not destroy their block: they become zero in signed
// state, and the largest code of the block in nonnegative state. Source of block-wise scales: Dettmers et al. 2022,
// arXiv:2110.02861, section 2.1.
#pragma once

#include <cstdint>

#include "core/half.h"
#include "core/macros.h"
#include "core/math.h"
#include "core/random.h"

namespace optkit {

constexpr int64_t kQuantizedBlock = 128;  // on CUDA: four for each thread of a warp
constexpr float kQuantizedMax = 1.875f;   // the largest code: that of the block's largest number
// Within these bounds a scale and its reciprocal are normal numbers. Larger numbers saturate; smaller blocks become
// zero.
constexpr float kLeastScale = 0x1p-125f, kMostScale = 0x1p126f;

// The largest finite magnitude of a block so far, updated with one more number.
OPTKIT_HD float larger_finite(float largest, float value) {
  const float magnitude = abs(value);
  return magnitude > largest && magnitude - magnitude == 0.0f ? magnitude : largest;
}

// Scale of a block with this largest magnitude.
OPTKIT_HD float block_scale(float largest) {
  return largest < kLeastScale ? 0.0f : largest < kMostScale ? largest : kMostScale;
}

// Factor that maps a block of this scale to kQuantizedMax, and its inverse.
OPTKIT_HD float quantization_factor(float scale) { return scale > 0.0f ? kQuantizedMax / scale : 0.0f; }
OPTKIT_HD float dequantization_factor(float scale) { return finite_or_zero(scale) / kQuantizedMax; }

OPTKIT_HD float dequantize8(uint32_t code, bool is_signed) {
  const uint32_t magnitude = is_signed ? code & 127u : code;
  const uint32_t bits = (magnitude + (is_signed ? 112u << 3 : 96u << 3)) << 20;
  const uint32_t sign = is_signed ? (code & 128u) << 24 : 0u;
  return bits_float(magnitude == 0u ? 0u : (bits | sign));
}

// Magnitudes of the smallest and of the largest code, as fp32 bits.
OPTKIT_HD constexpr uint32_t least_magnitude(bool is_signed) { return ((is_signed ? 112u << 3 : 96u << 3) + 1u) << 20; }
OPTKIT_HD constexpr uint32_t most_magnitude(bool is_signed) {
  return ((is_signed ? 112u << 3 : 96u << 3) + (is_signed ? 127u : 255u)) << 20;
}

// `value` is relative to the scale; magnitudes above kQuantizedMax saturate.
OPTKIT_HD uint32_t quantize8(float value, uint32_t random, bool is_signed) {
  const uint32_t bits = float_bits(value), magnitude = bits & 0x7fffffffu;
  const uint32_t least = least_magnitude(is_signed), most = most_magnitude(is_signed);
  const uint32_t inside = magnitude < least ? least : magnitude > most ? most : magnitude;
  const uint32_t noise = random >> 12, code = (inside + noise) >> 20 & (is_signed ? 127u : 255u);
  if (!is_signed) return magnitude == 0u ? 0u : code;
  // Below the smallest code the only other value is zero.
  const float part = static_cast<float>(noise) * (0x1p-20f * bits_float(least));
  const bool is_zero = !(part < bits_float(magnitude)) || magnitude >= 0x7f800000u;
  return is_zero ? 0u : code | ((bits >> 24) & 128u);
}

}  // namespace optkit

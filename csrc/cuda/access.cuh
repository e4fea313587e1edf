// SPDX-License-Identifier: Apache-2.0
// Load and store of four elements by one thread: any stored dtype to and from fp32 (fp64 tensors: fp64).
#pragma once

#include <cstdint>

#include "core/code8.h"
#include "core/half.h"
#include "core/math.h"
#include "core/random.h"
#include "core/tables.h"

namespace optkit {

constexpr int kLanes = 4;  // elements a thread holds: 16 bytes of fp32

template <class S>
struct Four {
  S v[kLanes];
};

__device__ __forceinline__ uint16_t float_to_bfloat16(float a) {
  const uint32_t bits = float_bits(a);
  if ((bits & 0x7fffffffu) > 0x7f800000u) return static_cast<uint16_t>((bits >> 16) | 0x40u);
  return static_cast<uint16_t>((bits + ((bits >> 16) & 1u) + 0x7fffu) >> 16);
}

__device__ __forceinline__ uint16_t float_to_bfloat16(float a, uint32_t random) {
  const uint32_t bits = float_bits(a), magnitude = bits & 0x7fffffffu;
  if (magnitude > 0x7f800000u) return static_cast<uint16_t>((bits >> 16) | 0x40u);
  return static_cast<uint16_t>((bits + (magnitude == 0x7f800000u ? 0u : (random & 0xffffu))) >> 16);
}

// As in csrc/cpu/access.h, element by element.
__device__ __forceinline__ uint16_t float_to_float16(float a, uint32_t random) {
  const uint32_t bits = float_bits(a), magnitude = bits & 0x7fffffffu, sign = bits & 0x80000000u;
  const uint32_t exponent = magnitude >> 23;
  if (magnitude >= 0x477fe000u) return float_to_half(a);
  if (exponent < 103u) {
    const float uniform = static_cast<float>(random >> 8) * 5.9604644775390625e-8f;
    const bool up = uniform < bits_float(magnitude) * 16777216.0f;
    return float_to_half(bits_float(up ? (sign | 0x33800000u) : sign));
  }
  const uint32_t shift = exponent >= 113u ? 13u : 126u - exponent;
  return float_to_half(bits_float(((bits + (random & ((1u << shift) - 1u))) >> shift) << shift));
}

__device__ __forceinline__ float bits16_to_float(uint16_t bits, DType type) {
  return type == DType::kBFloat16 ? bits_float(static_cast<uint32_t>(bits) << 16) : half_to_float(bits);
}

__device__ __forceinline__ bool is_aligned(const void* pointer, int bytes) {
  return (reinterpret_cast<uintptr_t>(pointer) & (bytes - 1)) == 0;
}

// `count` of the four exist; the others are zero.
__device__ __forceinline__ void load(Four<float>& out, const void* base, DType type, int64_t i, int count) {
  if (type == DType::kFloat32) {
    const float* p = static_cast<const float*>(base) + i;
    if (count == kLanes && is_aligned(p, 16)) {
      const float4 four = *reinterpret_cast<const float4*>(p);
      out = {{four.x, four.y, four.z, four.w}};
      return;
    }
#pragma unroll
    for (int k = 0; k < kLanes; ++k) out.v[k] = k < count ? p[k] : 0.0f;
    return;
  }
  const uint16_t* p = static_cast<const uint16_t*>(base) + i;
  ushort4 four = {0, 0, 0, 0};
  if (count == kLanes && is_aligned(p, 8)) {
    four = *reinterpret_cast<const ushort4*>(p);
  } else {
    if (count > 0) four.x = p[0];
    if (count > 1) four.y = p[1];
    if (count > 2) four.z = p[2];
    if (count > 3) four.w = p[3];
  }
  out = {{bits16_to_float(four.x, type), bits16_to_float(four.y, type), bits16_to_float(four.z, type),
          bits16_to_float(four.w, type)}};
}

__device__ __forceinline__ void load(Four<double>& out, const void* base, DType, int64_t i, int count) {
  const double* p = static_cast<const double*>(base) + i;
#pragma unroll
  for (int k = 0; k < kLanes; ++k) out.v[k] = k < count ? p[k] : 0.0;
}

__device__ __forceinline__ void store_bits16(void* base, int64_t i, int count, const uint16_t (&bits)[kLanes]) {
  uint16_t* p = static_cast<uint16_t*>(base) + i;
  if (count == kLanes && is_aligned(p, 8)) {
    *reinterpret_cast<ushort4*>(p) = {bits[0], bits[1], bits[2], bits[3]};
    return;
  }
#pragma unroll
  for (int k = 0; k < kLanes; ++k)
    if (k < count) p[k] = bits[k];
}

// Stores, and leaves in `value` what the stored numbers now are. A null key rounds to nearest.
__device__ __forceinline__ void store(Four<float>& value, void* base, DType type, int64_t i, int count,
                                      const RandomKey* key = nullptr) {
  if (type == DType::kFloat32) {
    float* p = static_cast<float*>(base) + i;
    if (count == kLanes && is_aligned(p, 16)) {
      *reinterpret_cast<float4*>(p) = {value.v[0], value.v[1], value.v[2], value.v[3]};
      return;
    }
#pragma unroll
    for (int k = 0; k < kLanes; ++k)
      if (k < count) p[k] = value.v[k];
    return;
  }
  uint16_t bits[kLanes];
#pragma unroll
  for (int k = 0; k < kLanes; ++k) {
    if (key == nullptr) {
      bits[k] = type == DType::kBFloat16 ? float_to_bfloat16(value.v[k]) : float_to_half(value.v[k]);
    } else {
      const int64_t index = i + k;
      const RandomKey here = {key->low, key->high ^ static_cast<uint32_t>(index >> 32)};
      const uint32_t random = random_bits(here, static_cast<uint32_t>(index));
      bits[k] = type == DType::kBFloat16 ? float_to_bfloat16(value.v[k], random) : float_to_float16(value.v[k], random);
    }
    value.v[k] = bits16_to_float(bits[k], type);
  }
  store_bits16(base, i, count, bits);
}

__device__ __forceinline__ void store(Four<double>& value, void* base, DType, int64_t i, int count,
                                      const RandomKey* = nullptr) {
  double* p = static_cast<double*>(base) + i;
#pragma unroll
  for (int k = 0; k < kLanes; ++k)
    if (k < count) p[k] = value.v[k];
}

// Four codes of 8-bit state; the lanes of a warp hold one block. Every lane of the warp must call these.
__device__ __forceinline__ void load_codes(Four<float>& out, const void* base, const float* scales, bool is_signed,
                                           int64_t i, int count) {
  const uint8_t* p = static_cast<const uint8_t*>(base) + i;
  const float factor = count > 0 ? decode_factor(scales[i / kCodeBlock]) : 0.0f;
  uchar4 four = {0, 0, 0, 0};
  if (count == kLanes && is_aligned(p, 4)) {
    four = *reinterpret_cast<const uchar4*>(p);
  } else {
    if (count > 0) four.x = p[0];
    if (count > 1) four.y = p[1];
    if (count > 2) four.z = p[2];
    if (count > 3) four.w = p[3];
  }
  out = {{decode8(four.x, is_signed) * factor, decode8(four.y, is_signed) * factor, decode8(four.z, is_signed) * factor,
          decode8(four.w, is_signed) * factor}};
}

__device__ __forceinline__ void store_codes(const Four<float>& value, void* base, float* scales, bool is_signed,
                                            int64_t i, int count, RandomKey key) {
  float largest = 0.0f;
#pragma unroll
  for (int k = 0; k < kLanes; ++k) {
    const float magnitude = abs(value.v[k]);
    if (k < count && magnitude > largest) largest = magnitude;
  }
#pragma unroll
  for (int offset = 16; offset > 0; offset /= 2) {
    const float other = __shfl_xor_sync(0xffffffffu, largest, offset);
    largest = other > largest ? other : largest;
  }
  if (count <= 0) return;
  if (i % kCodeBlock == 0) scales[i / kCodeBlock] = largest;
  const float factor = code_factor(largest);
  uint8_t codes[kLanes];
#pragma unroll
  for (int k = 0; k < kLanes; ++k)
    codes[k] = static_cast<uint8_t>(encode8(value.v[k] * factor, code_random(key, i + k), is_signed));
  uint8_t* p = static_cast<uint8_t*>(base) + i;
  if (count == kLanes && is_aligned(p, 4)) {
    *reinterpret_cast<uchar4*>(p) = {codes[0], codes[1], codes[2], codes[3]};
    return;
  }
#pragma unroll
  for (int k = 0; k < kLanes; ++k)
    if (k < count) p[k] = codes[k];
}

}  // namespace optkit

// SPDX-License-Identifier: Apache-2.0
// Load and store of four elements by one thread: any stored dtype to and from fp32 (fp64 tensors: fp64). Loading is
// split into memory-to-register fetch and conversion, so that all streams of a step are requested before the first is
// waited for.
#pragma once

#include <cstdint>

#include "core/half.h"
#include "core/math.h"
#include "core/quantized_state.h"
#include "core/random.h"
#include "core/tables.h"

namespace optkit {

constexpr int kLanes = 4;  // elements a thread holds: 16 bytes of fp32

template <class S>
struct Four {
  S v[kLanes];
};

// Four elements as stored, low addresses first; elements past the end are zero.
template <class S>
struct Raw {
  uint32_t word[kLanes];
};
template <>
struct Raw<double> {
  double v[kLanes];
};

__device__ __forceinline__ uint16_t float_to_bfloat16(float a) {
  const uint32_t bits = float_bits(a);
  if ((bits & 0x7fffffffu) > 0x7f800000u) return static_cast<uint16_t>((bits >> 16) | 0x40u);
  return static_cast<uint16_t>((bits + ((bits >> 16) & 1u) + 0x7fffu) >> 16);
}

__device__ __forceinline__ uint16_t float_to_bfloat16(float a, uint32_t random) {
  const uint32_t bits = float_bits(a), magnitude = bits & 0x7fffffffu;
  if (magnitude > 0x7f800000u) return static_cast<uint16_t>((bits >> 16) | 0x40u);
  return static_cast<uint16_t>((bits + (magnitude == 0x7f800000u ? 0u : random >> 16)) >> 16);
}

// As in csrc/cpu/access.h, for one element.
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
  return float_to_half(bits_float(((bits + (random >> (32u - shift))) >> shift) << shift));
}

// The device instruction gives the same bits as the integer arithmetic, except for NaN payloads.
__device__ __forceinline__ float float16_to_float(uint16_t bits) {
#if defined(__CUDA_ARCH__)
  float a;
  asm("cvt.f32.f16 %0, %1;" : "=f"(a) : "h"(bits));
  return a;
#else
  return half_to_float(bits);
#endif
}
__device__ __forceinline__ float bits16_to_float(uint32_t bits, DType type) {
  return type == DType::kBFloat16 ? bits_float(bits << 16) : float16_to_float(static_cast<uint16_t>(bits));
}
__device__ __forceinline__ uint16_t float_to_bits16(float a, DType type) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
  uint16_t bits;
  if (type == DType::kBFloat16)
    asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(bits) : "f"(a));
  else
    asm("cvt.rn.f16.f32 %0, %1;" : "=h"(bits) : "f"(a));
  return bits;
#else
  return type == DType::kBFloat16 ? float_to_bfloat16(a) : float_to_half(a);
#endif
}

__device__ __forceinline__ bool is_aligned(const void* pointer, int64_t bytes) {
  return (reinterpret_cast<uintptr_t>(pointer) & (bytes - 1)) == 0;
}

// Whether four elements can be moved in one access, from any multiple of four on.
__device__ __forceinline__ bool moves_whole(const void* base, DType type) {
  return is_aligned(base, type == DType::kFloat64 ? 16 : kLanes * size_of(type));
}

// `count` of the four elements exist. `whole`: see moves_whole.
__device__ __forceinline__ void fetch(Raw<float>& out, const void* base, DType type, int64_t i, int count, bool whole) {
  out = {};
  const int64_t size = size_of(type);
  const char* p = static_cast<const char*>(base) + i * size;
  if (whole && count == kLanes) {
    if (size == 4) {
      const uint4 four = *reinterpret_cast<const uint4*>(p);
      out = {{four.x, four.y, four.z, four.w}};
    } else if (size == 2) {
      const uint2 four = *reinterpret_cast<const uint2*>(p);
      out.word[0] = four.x;
      out.word[1] = four.y;
    } else {
      out.word[0] = *reinterpret_cast<const uint32_t*>(p);
    }
    return;
  }
#pragma unroll
  for (int k = 0; k < kLanes; ++k) {
    if (k >= count) continue;
    if (size == 4)
      out.word[k] = reinterpret_cast<const uint32_t*>(p)[k];
    else if (size == 2)
      out.word[k / 2] |= static_cast<uint32_t>(reinterpret_cast<const uint16_t*>(p)[k]) << (16 * (k % 2));
    else
      out.word[0] |= static_cast<uint32_t>(reinterpret_cast<const uint8_t*>(p)[k]) << (8 * k);
  }
}

__device__ __forceinline__ void fetch(Raw<double>& out, const void* base, DType, int64_t i, int count, bool whole) {
  const double* p = static_cast<const double*>(base) + i;
  if (whole && count == kLanes) {
    const double2 low = *reinterpret_cast<const double2*>(p), high = *reinterpret_cast<const double2*>(p + 2);
    out = {{low.x, low.y, high.x, high.y}};
    return;
  }
#pragma unroll
  for (int k = 0; k < kLanes; ++k) out.v[k] = k < count ? p[k] : 0.0;
}

__device__ __forceinline__ Four<float> numbers(const Raw<float>& raw, DType type) {
  Four<float> out;
#pragma unroll
  for (int k = 0; k < kLanes; ++k)
    out.v[k] = type == DType::kFloat32 ? bits_float(raw.word[k])
                                       : bits16_to_float((raw.word[k / 2] >> (16 * (k % 2))) & 0xffffu, type);
  return out;
}
__device__ __forceinline__ Four<double> numbers(const Raw<double>& raw, DType) {
  return {{raw.v[0], raw.v[1], raw.v[2], raw.v[3]}};
}

// Fetches and converts.
template <class S>
__device__ __forceinline__ Four<S> load(const void* base, DType type, int64_t i, int count, bool whole) {
  Raw<S> raw;
  fetch(raw, base, type, i, count, whole);
  return numbers(raw, type);
}

__device__ __forceinline__ void store_bits16(void* base, int64_t i, int count, bool whole,
                                             const uint16_t (&bits)[kLanes]) {
  uint16_t* p = static_cast<uint16_t*>(base) + i;
  if (whole && count == kLanes) {
    *reinterpret_cast<uint2*>(p) = {bits[0] | static_cast<uint32_t>(bits[1]) << 16,
                                    bits[2] | static_cast<uint32_t>(bits[3]) << 16};
    return;
  }
#pragma unroll
  for (int k = 0; k < kLanes; ++k)
    if (k < count) p[k] = bits[k];
}

// The random bits of four elements, of which the first has an even number.
struct FourBits {
  uint32_t v[kLanes];
};
__device__ __forceinline__ FourBits random_four(RandomKey key, int64_t i) {
  FourBits random;
#pragma unroll
  for (int k = 0; k < kLanes; k += 2) {
    random.v[k] = random_bits(key, i + k);
    random.v[k + 1] = rotated(random.v[k], 16);
  }
  return random;
}
__device__ __forceinline__ FourBits bits_of_state(FourBits random, int state) {
#pragma unroll
  for (int k = 0; k < kLanes; ++k) random.v[k] = bits_of_state(random.v[k], state);
  return random;
}

__device__ __forceinline__ void store_bytes(void* base, int64_t i, int count, bool whole, uint32_t bytes) {
  uint8_t* p = static_cast<uint8_t*>(base) + i;
  if (whole && count == kLanes) {
    *reinterpret_cast<uint32_t*>(p) = bytes;
    return;
  }
#pragma unroll
  for (int k = 0; k < kLanes; ++k)
    if (k < count) p[k] = static_cast<uint8_t>(bytes >> (8 * k));
}

// Stores, and sets `value` to the stored values. Rounds to nearest, or stochastically to 16 bits.
__device__ __forceinline__ void store(Four<float>& value, void* base, DType type, int64_t i, int count, bool whole,
                                      bool at_random = false, const FourBits& random = {}) {
  if (type == DType::kFloat32) {
    float* p = static_cast<float*>(base) + i;
    if (whole && count == kLanes) {
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
    if (!at_random) {
      bits[k] = float_to_bits16(value.v[k], type);
    } else {
      bits[k] = type == DType::kBFloat16 ? float_to_bfloat16(value.v[k], random.v[k])
                                         : float_to_float16(value.v[k], random.v[k]);
    }
    value.v[k] = bits16_to_float(bits[k], type);
  }
  store_bits16(base, i, count, whole, bits);
}

__device__ __forceinline__ void store(Four<double>& value, void* base, DType, int64_t i, int count, bool whole,
                                      bool = false, const FourBits& = {}) {
  double* p = static_cast<double*>(base) + i;
  if (whole && count == kLanes) {
    *reinterpret_cast<double2*>(p) = {value.v[0], value.v[1]};
    *reinterpret_cast<double2*>(p + 2) = {value.v[2], value.v[3]};
    return;
  }
#pragma unroll
  for (int k = 0; k < kLanes; ++k)
    if (k < count) p[k] = value.v[k];
}

// Joins the two parts of split weights: see csrc/cpu/split_weights.h.
__device__ __forceinline__ Four<float> joined(const Raw<float>& param, const Raw<float>& correction, DType type) {
  Four<float> out;
#pragma unroll
  for (int k = 0; k < kLanes; ++k) {
    const uint32_t upper = (param.word[k / 2] >> (16 * (k % 2))) << 16;
    const uint32_t rest = type == DType::kInt16
                              ? static_cast<uint32_t>(static_cast<int16_t>(correction.word[k / 2] >> (16 * (k % 2))))
                              : static_cast<uint32_t>(static_cast<int8_t>(correction.word[0] >> (8 * k))) << 8;
    const float sum = bits_float(upper + rest), written = bits_float(upper), checked = sum + (written - written);
    out.v[k] = checked != checked ? written : sum;
  }
  return out;
}

// The numbers of a parameter; joins the two parts of split weights.
__device__ __forceinline__ Four<double> parameter_numbers(const Raw<double>& param, const Raw<double>&,
                                                          const TensorSlot& t) {
  return numbers(param, t.param_type);
}
__device__ __forceinline__ Four<float> parameter_numbers(const Raw<float>& param, const Raw<float>& lost,
                                                         const TensorSlot& t) {
  return is_split(t) ? joined(param, lost, t.compensation_type) : numbers(param, t.param_type);
}
template <class S>
__device__ __forceinline__ Four<S> load_parameter(const TensorSlot& t, int64_t i, int count, bool whole) {
  Raw<S> param, lost = {};
  fetch(param, t.param, t.param_type, i, count, whole);
  if (is_split(t)) fetch(lost, t.compensation, t.compensation_type, i, count, whole);
  return parameter_numbers(param, lost, t);
}

// Four codes of 8-bit state and their scale, both already fetched.
__device__ __forceinline__ Four<float> dequantized(const Raw<float>& raw, float scale, bool is_signed) {
  const float factor = dequantization_factor(scale);
  Four<float> out;
#pragma unroll
  for (int k = 0; k < kLanes; ++k) out.v[k] = dequantize8((raw.word[0] >> (8 * k)) & 0xffu, is_signed) * factor;
  return out;
}

// The lanes of a warp hold one block of codes: every lane must call this.
__device__ __forceinline__ void store_quantized(const Four<float>& value, void* base, float* scales, bool is_signed,
                                                int64_t i, int count, bool whole, const FourBits& random) {
  float largest = 0.0f;
#pragma unroll
  for (int k = 0; k < kLanes; ++k)
    if (k < count) largest = larger_finite(largest, value.v[k]);
#pragma unroll
  for (int offset = 16; offset > 0; offset /= 2) {
    const float other = __shfl_xor_sync(0xffffffffu, largest, offset);
    largest = other > largest ? other : largest;
  }
  if (count <= 0) return;
  const float scale = block_scale(largest), factor = quantization_factor(scale);
  if (i % kQuantizedBlock == 0) scales[i / kQuantizedBlock] = scale;
  uint32_t codes = 0;
#pragma unroll
  for (int k = 0; k < kLanes; ++k) codes |= quantize8(value.v[k] * factor, random.v[k], is_signed) << (8 * k);
  store_bytes(base, i, count, whole, codes);
}

// Stores the two parts of split weights, and sets `value` to the number that they represent.
__device__ __forceinline__ void store_split(Four<float>& value, void* param, void* correction, DType type, int64_t i,
                                            int count, bool whole, const FourBits& random) {
  uint16_t upper[kLanes], rest[kLanes];
  uint32_t bytes = 0;
#pragma unroll
  for (int k = 0; k < kLanes; ++k) {
    uint32_t bits = value.v[k] != value.v[k] ? 0x7fc00000u : float_bits(value.v[k]);
    if (type == DType::kInt8) bits = (bits + (random.v[k] >> 24)) & ~0xffu;
    upper[k] = static_cast<uint16_t>((bits + 0x8000u) >> 16);
    rest[k] = static_cast<uint16_t>(bits);
    bytes |= ((bits >> 8) & 0xffu) << (8 * k);
    value.v[k] = bits_float(bits);
  }
  store_bits16(param, i, count, whole, upper);
  if (type == DType::kInt16)
    store_bits16(correction, i, count, whole, rest);
  else
    store_bytes(correction, i, count, whole, bytes);
}

}  // namespace optkit

// SPDX-License-Identifier: Apache-2.0
// Load and store: any stored dtype to and from a vector of fp32 (fp64 tensors: fp64). The last, partial vector of a
// chunk goes through a small buffer, so that the arithmetic is written once.
#pragma once

#include <cstdint>
#include <cstring>

#include "core/half.h"
#include "core/random.h"
#include "core/tables.h"
#include "cpu/vector.h"

namespace optkit {
namespace OPTKIT_ISA {

constexpr int kFloatLanes = Vec<float>::kLanes;
typedef uint16_t NativeHalf __attribute__((vector_size(kFloatLanes * 2)));

OPTKIT_HD NativeBits to_words(NativeHalf h) {
  // gcc widens a vector in halves, which takes four instructions.
#if defined(__AVX512F__)
  return reinterpret_cast<NativeBits>(_mm512_cvtepu16_epi32(reinterpret_cast<__m256i>(h)));
#elif defined(__AVX2__)
  return reinterpret_cast<NativeBits>(_mm256_cvtepu16_epi32(reinterpret_cast<__m128i>(h)));
#else
  return __builtin_convertvector(h, NativeBits);
#endif
}

OPTKIT_HD Vec<float> bfloat16_to_float(NativeHalf h) {
  return Vec<float>(reinterpret_cast<Vec<float>::Native>(to_words(h) << 16));
}

// The upper half of each lane.
OPTKIT_HD NativeHalf upper_halves(NativeBits bits) {
  const NativeBits upper = bits >> 16;
#if defined(__AVX512F__)
  return reinterpret_cast<NativeHalf>(_mm512_cvtepi32_epi16(reinterpret_cast<__m512i>(upper)));
#elif defined(__AVX2__)  // gcc would add a redundant mask
  const __m256i packed = _mm256_packus_epi32(reinterpret_cast<__m256i>(upper), reinterpret_cast<__m256i>(upper));
  return reinterpret_cast<NativeHalf>(_mm256_castsi256_si128(_mm256_permute4x64_epi64(packed, 0x08)));
#else
  return __builtin_convertvector(upper, NativeHalf);
#endif
}

// Stores the upper halves of both vectors as bf16, one vector after the other.
OPTKIT_HD void write_upper_halves(void* base, int64_t i, NativeBits first, NativeBits second) {
  uint16_t* const p = static_cast<uint16_t*>(base) + i;
#if defined(__AVX512F__) && defined(__AVX512BW__)
  alignas(64) static const uint16_t upper[32] = {1,  3,  5,  7,  9,  11, 13, 15, 17, 19, 21, 23, 25, 27, 29, 31,
                                                 33, 35, 37, 39, 41, 43, 45, 47, 49, 51, 53, 55, 57, 59, 61, 63};
  const __m512i both = _mm512_permutex2var_epi16(reinterpret_cast<__m512i>(first), _mm512_load_si512(upper),
                                                 reinterpret_cast<__m512i>(second));
  std::memcpy(p, &both, sizeof(both));
#else
  const NativeHalf low = upper_halves(first), high = upper_halves(second);
  std::memcpy(p, &low, sizeof(low));
  std::memcpy(p + kFloatLanes, &high, sizeof(high));
#endif
}

// `rounded` where a is not NaN; otherwise a as a quiet NaN.
OPTKIT_HD NativeBits keep_nan(Vec<float> a, NativeBits rounded) {
  const NativeBits bits = reinterpret_cast<NativeBits>(a.v);
  return a.v != a.v ? (bits | 0x400000u) : rounded;
}

// Round to nearest, ties to even: the upper half is the bf16 number.
OPTKIT_HD NativeBits rounded_to_bfloat16(Vec<float> a) {
  const NativeBits bits = reinterpret_cast<NativeBits>(a.v);
  return keep_nan(a, bits + (((bits >> 16) & 1u) + 0x7fffu));
}

// Stochastic rounding. Infinity stays infinity.
OPTKIT_HD NativeBits rounded_to_bfloat16(Vec<float> a, NativeBits random) {
  return keep_nan(a, reinterpret_cast<NativeBits>(a.v) + (random >> 16));
}
OPTKIT_HD Vec<float> lower_halves_as_float(NativeBits bits) {
  return Vec<float>(reinterpret_cast<Vec<float>::Native>(bits << 16));
}
OPTKIT_HD Vec<float> upper_halves_as_float(NativeBits bits) {
  return Vec<float>(reinterpret_cast<Vec<float>::Native>(bits & 0xffff0000u));
}

OPTKIT_HD Vec<float> float16_to_float(NativeHalf h) {
#if defined(__AVX512F__)
  return Vec<float>::Native(_mm512_cvtph_ps(reinterpret_cast<__m256i>(h)));
#elif defined(__F16C__)
  return Vec<float>::Native(_mm256_cvtph_ps(reinterpret_cast<__m128i>(h)));
#else
  Vec<float> a;
  for (int i = 0; i < kFloatLanes; ++i) a.v[i] = half_to_float(h[i]);
  return a;
#endif
}

OPTKIT_HD NativeHalf float_to_float16(Vec<float> a) {
#if defined(__AVX512F__)
  return reinterpret_cast<NativeHalf>(_mm512_cvtps_ph(a.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
#elif defined(__F16C__)
  return reinterpret_cast<NativeHalf>(_mm256_cvtps_ph(a.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
#else
  NativeHalf h;
  for (int i = 0; i < kFloatLanes; ++i) h[i] = float_to_half(a.v[i]);
  return h;
#endif
}

// Rounds a stochastically to one of its two float16 neighbors.
OPTKIT_HD NativeHalf float_to_float16(Vec<float> a, NativeBits random) {
  const NativeBits bits = reinterpret_cast<NativeBits>(a.v);
  const NativeBits magnitude = bits & 0x7fffffffu;
  // Below 2^-14 float16 is subnormal with a fixed spacing of 2^-24, so more bits are cut off.
  const NativeBits exponent = magnitude >> 23;
  const NativeBits shift =
      exponent >= 113u ? (NativeBits{} + 13u) : (exponent < 102u ? (NativeBits{} + 24u) : 126u - exponent);
  const auto special = magnitude >= 0x477fe000u;  // at least the largest float16: left to round-to-nearest
  const NativeBits noise = random >> (32u - shift);
  const NativeBits cut = ((bits + noise) >> shift) << shift;
  const auto tiny = exponent < 103u;              // below the spacing of 2^-24: becomes zero or one unit
  const Vec<float> ratio = abs(a) * 16777216.0f;  // |a| / 2^-24, in [0, 1)
  const Vec<float> uniform = __builtin_convertvector(random >> 8, Vec<float>::Native) * 5.9604644775390625e-8f;
  const NativeBits one_step = (bits & 0x80000000u) | 0x33800000u;
  const NativeBits tiny_bits = (uniform < ratio).m ? one_step : (bits & 0x80000000u);
  const NativeBits chosen = special ? bits : (tiny ? tiny_bits : cut);
  return float_to_float16(Vec<float>(reinterpret_cast<Vec<float>::Native>(chosen)));
}

// Reads `count` lanes of N from element `i` on (kTail: less than a whole vector; the other lanes are zero).
template <bool kTail, class N, class E>
OPTKIT_HD N read(const void* base, int64_t i, int count) {
  N native{};
  std::memcpy(&native, static_cast<const E*>(base) + i, kTail ? count * sizeof(E) : sizeof(N));
  return native;
}
template <bool kTail, class E, class N>
OPTKIT_HD void write(void* base, int64_t i, int count, N native) {
  std::memcpy(static_cast<E*>(base) + i, &native, kTail ? count * sizeof(E) : sizeof(N));
}

template <class S, bool kTail>
OPTKIT_HD Vec<S> load(const void* base, DType type, int64_t i, int count) {
  if constexpr (sizeof(S) == 8)
    return read<kTail, Vec<double>::Native, double>(base, i, count);
  else if (type == DType::kFloat32)
    return read<kTail, Vec<float>::Native, float>(base, i, count);
  else if (type == DType::kBFloat16)
    return bfloat16_to_float(read<kTail, NativeHalf, uint16_t>(base, i, count));
  else
    return float16_to_float(read<kTail, NativeHalf, uint16_t>(base, i, count));
}

// Stores with round-to-nearest and returns the stored values.
template <class S, bool kTail>
OPTKIT_HD Vec<S> store(void* base, DType type, int64_t i, int count, Vec<S> value) {
  if constexpr (sizeof(S) == 8) {
    write<kTail, double>(base, i, count, value.v);
    return value;
  } else if (type == DType::kFloat32) {
    write<kTail, float>(base, i, count, value.v);
    return value;
  } else if (type == DType::kBFloat16) {
    const NativeBits bits = rounded_to_bfloat16(value);
    write<kTail, uint16_t>(base, i, count, upper_halves(bits));
    return upper_halves_as_float(bits);
  } else {
    const NativeHalf half = float_to_float16(value);
    write<kTail, uint16_t>(base, i, count, half);
    return float16_to_float(half);
  }
}

}  // namespace OPTKIT_ISA
}  // namespace optkit

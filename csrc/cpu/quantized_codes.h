// SPDX-License-Identifier: Apache-2.0
// Vectors of numbers to and from 8-bit codes: vector versions of core/quantized_state.h.
#pragma once

#include <cstdint>
#include <cstring>

#include "core/quantized_state.h"
#include "cpu/access.h"
#include "cpu/random_pair.h"
#include "cpu/vector_pair.h"

namespace optkit {
namespace OPTKIT_ISA {

typedef uint8_t NativeCodes __attribute__((vector_size(kFloatLanes)));

OPTKIT_HD NativeBits to_words(NativeCodes codes) {
#if defined(__AVX512F__)
  return reinterpret_cast<NativeBits>(_mm512_cvtepu8_epi32(reinterpret_cast<__m128i>(codes)));
#elif defined(__AVX2__)
  int64_t eight;
  std::memcpy(&eight, &codes, sizeof(eight));
  return reinterpret_cast<NativeBits>(_mm256_cvtepu8_epi32(_mm_cvtsi64_si128(eight)));
#else
  return __builtin_convertvector(codes, NativeBits);
#endif
}

// The lowest byte of each lane.
OPTKIT_HD NativeCodes to_bytes(NativeBits words) {
#if defined(__AVX512F__)
  return reinterpret_cast<NativeCodes>(_mm512_cvtepi32_epi8(reinterpret_cast<__m512i>(words)));
#elif defined(__AVX2__)
  const __m256i lowest = _mm256_set_epi32(-1, -1, -1, 0x0c080400, -1, -1, -1, 0x0c080400);
  const __m256i bytes = _mm256_shuffle_epi8(reinterpret_cast<__m256i>(words), lowest);
  const int64_t eight =
      _mm_cvtsi128_si64(_mm_unpacklo_epi32(_mm256_castsi256_si128(bytes), _mm256_extracti128_si256(bytes, 1)));
  NativeCodes codes;
  std::memcpy(&codes, &eight, sizeof(codes));
  return codes;
#else
  return __builtin_convertvector(words, NativeCodes);
#endif
}

// Converts words below 2^31 to fp32.
OPTKIT_HD Vec<float> to_float(NativeBits words) {
  return __builtin_convertvector(reinterpret_cast<NativeOf<float>::mask>(words), Vec<float>::Native);
}

// Pairs of vectors are handled as one vector of words: the element of the first vector in the lower half of a word,
// that of the second in the upper half.
typedef uint16_t NativeHalves __attribute__((vector_size(OPTKIT_VECTOR_BYTES)));
typedef uint8_t NativePairCodes __attribute__((vector_size(2 * kFloatLanes)));

// The codes of a pair, in the order of its lanes: two vectors in sequence, or even and odd elements in turn.
template <PairKind kKind>
OPTKIT_HD NativeHalves read_codes(const uint8_t* codes) {
  if constexpr (kKind == PairKind::kAlternating) {
    const auto bytes = read<false, NativePairCodes, uint8_t>(codes, 0, 2 * kFloatLanes);
#if defined(__AVX512BW__)
    return reinterpret_cast<NativeHalves>(_mm512_cvtepu8_epi16(reinterpret_cast<__m256i>(bytes)));
#elif defined(__AVX2__)
    return reinterpret_cast<NativeHalves>(_mm256_cvtepu8_epi16(reinterpret_cast<__m128i>(bytes)));
#else
    return __builtin_convertvector(bytes, NativeHalves);
#endif
  } else {
    const NativeBits first = to_words(read<false, NativeCodes, uint8_t>(codes, 0, kFloatLanes)),
                     second = to_words(read<false, NativeCodes, uint8_t>(codes, kFloatLanes, kFloatLanes));
    return reinterpret_cast<NativeHalves>(first | (second << 16));
  }
}

// Halves below 256.
template <PairKind kKind>
OPTKIT_HD void write_codes(uint8_t* codes, NativeHalves halves) {
  if constexpr (kKind == PairKind::kAlternating) {
    NativePairCodes bytes;
#if defined(__AVX512BW__)
    bytes = reinterpret_cast<NativePairCodes>(_mm512_cvtepi16_epi8(reinterpret_cast<__m512i>(halves)));
#elif defined(__AVX2__)
    const __m256i both = reinterpret_cast<__m256i>(halves);
    bytes = reinterpret_cast<NativePairCodes>(
        _mm_packus_epi16(_mm256_castsi256_si128(both), _mm256_extracti128_si256(both, 1)));
#else
    bytes = __builtin_convertvector(halves, NativePairCodes);
#endif
    write<false, uint8_t>(codes, 0, 2 * kFloatLanes, bytes);
  } else {
    const NativeBits words = reinterpret_cast<NativeBits>(halves);
    write<false, uint8_t>(codes, 0, kFloatLanes, to_bytes(words));
    write<false, uint8_t>(codes, kFloatLanes, kFloatLanes, to_bytes(words >> 16));
  }
}

// The upper half of the fp32 bits that a code is an offset from: its exponent is relative to them.
template <bool kSigned>
constexpr uint16_t kCodeOffset = (kSigned ? 112u << 3 : 96u << 3) << 4;

// The pair of vectors of 2 * kFloatLanes codes.
template <bool kSigned, PairKind kKind>
OPTKIT_HD void dequantize8(const uint8_t* codes, Vec<float> factor, float* out) {
  const NativeHalves code = read_codes<kKind>(codes);
  NativeHalves bits = ((code << 4) & static_cast<uint16_t>(kSigned ? 0x7f0 : 0xff0)) | kCodeOffset<kSigned>;
  if (kSigned) bits |= (code << 8) & static_cast<uint16_t>(0x8000);
  bits = (code & static_cast<uint16_t>(kSigned ? 127 : 255)) == 0 ? NativeHalves{} : bits;
  const NativeBits both = reinterpret_cast<NativeBits>(bits);
  write<false, float>(out, 0, kFloatLanes, (lower_halves_as_float(both) * factor).v);
  write<false, float>(out, kFloatLanes, kFloatLanes, (upper_halves_as_float(both) * factor).v);
}

// Vector version of quantize8 in core/quantized_state.h; `value` is finite.
template <bool kSigned>
OPTKIT_HD NativeBits quantize8(Vec<float> value, NativeBits random) {
  constexpr uint32_t kLeast = least_magnitude(kSigned), kMost = most_magnitude(kSigned);
  const NativeBits bits = reinterpret_cast<NativeBits>(value.v), magnitude = bits & 0x7fffffffu;
  const NativeBits least = NativeBits{} + kLeast, most = NativeBits{} + kMost;
  const NativeBits above = magnitude < least ? least : magnitude, inside = above > most ? most : above;
  const NativeBits noise = random >> 12, code = ((inside + noise) >> 20) & (kSigned ? 127u : 255u);
  if (!kSigned) return magnitude == 0u ? NativeBits{} : code;
  const NativeBits with_sign = code | ((bits >> 24) & 128u);
  const auto is_kept = (to_float(noise) * (0x1p-20f * bits_float(kLeast)) < abs(value)).m;
  return is_kept ? with_sign : NativeBits{};
}

OPTKIT_HD bool any_at_most(NativeHalves a, uint16_t bound) {
#if defined(__AVX512BW__)
  return _mm512_cmple_epu16_mask(reinterpret_cast<__m512i>(a), _mm512_set1_epi16(static_cast<int16_t>(bound))) != 0;
#else
  const NativeHalves least = a <= bound ? ~NativeHalves{} : NativeHalves{};
  uint64_t parts[OPTKIT_VECTOR_BYTES / 8], any = 0;
  std::memcpy(parts, &least, sizeof(parts));
  for (const uint64_t part : parts) any |= part;
  return any != 0;
#endif
}

// Codes of a pair of finite numbers. Numbers at the smallest code and below need a closer look, and are rare.
template <bool kSigned, PairKind kKind>
OPTKIT_HD void quantize8(Vec<float> first, Vec<float> second, const PairBits& random, uint8_t* codes) {
  constexpr uint16_t kLeast = least_magnitude(kSigned) >> 20, kMost = most_magnitude(kSigned) >> 20;
  const NativeBits low = reinterpret_cast<NativeBits>(first.v) + (random.part[0] >> 12),
                   high = reinterpret_cast<NativeBits>(second.v) + (random.part[1] >> 12);
  const NativeHalves with_sign = reinterpret_cast<NativeHalves>((low >> 20) | ((high >> 4) & 0xffff0000u));
  NativeHalves magnitude = with_sign & static_cast<uint16_t>(0x7ff);
  if (__builtin_expect(any_at_most(magnitude, kLeast), 0)) {
    const NativeBits words =
        quantize8<kSigned>(first, random.part[0]) | (quantize8<kSigned>(second, random.part[1]) << 16);
    write_codes<kKind>(codes, reinterpret_cast<NativeHalves>(words));
    return;
  }
  magnitude = magnitude > kMost ? NativeHalves{} + kMost : magnitude;
  magnitude &= static_cast<uint16_t>(kSigned ? 127 : 255);
  if (kSigned) magnitude |= (with_sign >> 4) & static_cast<uint16_t>(128);
  write_codes<kKind>(codes, magnitude);
}

}  // namespace OPTKIT_ISA
}  // namespace optkit

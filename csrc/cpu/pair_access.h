// SPDX-License-Identifier: Apache-2.0
// Load and store of pairs of vectors.
#pragma once

#include <cstdint>
#include <cstring>

#include "cpu/access.h"
#include "cpu/random_pair.h"
#include "cpu/vector_pair.h"

namespace optkit {
namespace OPTKIT_ISA {

// Exchanges the order of the lanes of a pair of vectors, from sequential to alternating and back.
OPTKIT_HD void alternate(Vec<float>* part) {
#if defined(__AVX512F__)
  const __m512i lane = _mm512_set_epi32(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0);
  const __m512i even = _mm512_add_epi32(lane, lane), odd = _mm512_add_epi32(even, _mm512_set1_epi32(1));
  const __m512 first = part[0].v, second = part[1].v;
  part[0] = Vec<float>::Native(_mm512_permutex2var_ps(first, even, second));
  part[1] = Vec<float>::Native(_mm512_permutex2var_ps(first, odd, second));
#elif defined(__AVX2__)
  const __m256 first = part[0].v, second = part[1].v;
  const __m256d even = _mm256_castps_pd(_mm256_shuffle_ps(first, second, 0x88)),
                odd = _mm256_castps_pd(_mm256_shuffle_ps(first, second, 0xdd));
  part[0] = Vec<float>::Native(_mm256_castpd_ps(_mm256_permute4x64_pd(even, 0xd8)));
  part[1] = Vec<float>::Native(_mm256_castpd_ps(_mm256_permute4x64_pd(odd, 0xd8)));
#else
  float from[2 * kFloatLanes], to[2 * kFloatLanes];
  std::memcpy(from, part, sizeof(from));
  for (int k = 0; k < 2 * kFloatLanes; ++k) to[k % 2 * kFloatLanes + k / 2] = from[k];
  std::memcpy(part, to, sizeof(to));
#endif
}
OPTKIT_HD void put_in_sequence(Vec<float>* part) {
#if defined(__AVX512F__)
  const __m512i low = _mm512_set_epi32(23, 7, 22, 6, 21, 5, 20, 4, 19, 3, 18, 2, 17, 1, 16, 0);
  const __m512 first = part[0].v, second = part[1].v;
  part[0] = Vec<float>::Native(_mm512_permutex2var_ps(first, low, second));
  part[1] = Vec<float>::Native(_mm512_permutex2var_ps(first, _mm512_add_epi32(low, _mm512_set1_epi32(8)), second));
#elif defined(__AVX2__)
  const __m256 low = _mm256_unpacklo_ps(part[0].v, part[1].v), high = _mm256_unpackhi_ps(part[0].v, part[1].v);
  part[0] = Vec<float>::Native(_mm256_permute2f128_ps(low, high, 0x20));
  part[1] = Vec<float>::Native(_mm256_permute2f128_ps(low, high, 0x31));
#else
  float from[2 * kFloatLanes], to[2 * kFloatLanes];
  std::memcpy(from, part, sizeof(from));
  for (int k = 0; k < 2 * kFloatLanes; ++k) to[k] = from[k % 2 * kFloatLanes + k / 2];
  std::memcpy(part, to, sizeof(to));
#endif
}

template <DType kType, class S, PairKind kKind>
OPTKIT_HD VectorPair<S, kKind> load_as(const void* base, int64_t i) {
  VectorPair<S, kKind> a;
  if constexpr (kKind == PairKind::kAlternating && kType == DType::kBFloat16) {
    const NativeBits words = read<false, NativeBits, uint16_t>(base, i, 2 * kFloatLanes);
    a.part[0] = lower_halves_as_float(words);
    a.part[1] = upper_halves_as_float(words);
  } else {
    OPTKIT_FOR_PARTS(a.part[k] = (load<S, false>(base, kType, i + k * Vec<S>::kLanes, Vec<S>::kLanes));)
    if constexpr (kKind == PairKind::kAlternating) alternate(a.part);
  }
  return a;
}

// Stores the upper halves of both vectors as bf16.
template <PairKind kKind>
OPTKIT_HD void write_upper_halves(void* base, int64_t i, NativeBits first, NativeBits second) {
  if constexpr (kKind == PairKind::kAlternating)
    write<false, uint16_t>(base, i, 2 * kFloatLanes, (first >> 16) | (second & 0xffff0000u));
  else
    write_upper_halves(base, i, first, second);
}

template <DType kType, class S, PairKind kKind>
OPTKIT_HD VectorPair<S, kKind> store_as(void* base, int64_t i, VectorPair<S, kKind> a) {
  if constexpr (kType == DType::kBFloat16) {
    const NativeBits first = rounded_to_bfloat16(a.part[0]), second = rounded_to_bfloat16(a.part[1]);
    write_upper_halves<kKind>(base, i, first, second);
    return VectorPair<float, kKind>(upper_halves_as_float(first), upper_halves_as_float(second));
  } else {
    VectorPair<S, kKind> ordered = a;
    if constexpr (kKind == PairKind::kAlternating) put_in_sequence(ordered.part);
    OPTKIT_FOR_PARTS(ordered.part[k] =
                         (store<S, false>(base, kType, i + k * Vec<S>::kLanes, Vec<S>::kLanes, ordered.part[k]));)
    if constexpr (kKind == PairKind::kAlternating && kType != DType::kFloat32) alternate(ordered.part);
    return kKind == PairKind::kAlternating && kType == DType::kFloat32 ? a : ordered;
  }
}

// A pair whose lanes lie in memory one after the other, whatever the order of its elements.
template <class S, PairKind kKind>
OPTKIT_HD VectorPair<S, kKind> load_lanes(const void* base, int64_t i) {
  VectorPair<S, kKind> a;
  OPTKIT_FOR_PARTS((a.part[k] = read<false, typename Vec<S>::Native, S>(base, i + k * Vec<S>::kLanes, Vec<S>::kLanes));)
  return a;
}
template <class S, PairKind kKind>
OPTKIT_HD void store_lanes(void* base, int64_t i, const VectorPair<S, kKind>& a) {
  OPTKIT_FOR_PARTS((write<false, S>(base, i + k * Vec<S>::kLanes, Vec<S>::kLanes, a.part[k].v));)
}

// Elements [i, i + kLanes).
template <class S, PairKind kKind = PairKind::kPlain>
OPTKIT_HD VectorPair<S, kKind> load_pair(const void* base, DType type, int64_t i) {
  if constexpr (sizeof(S) == 8) return load_as<DType::kFloat64, S, kKind>(base, i);
  if (__builtin_expect(type == DType::kFloat32, 1)) return load_as<DType::kFloat32, S, kKind>(base, i);
  return type == DType::kBFloat16 ? load_as<DType::kBFloat16, S, kKind>(base, i)
                                  : load_as<DType::kFloat16, S, kKind>(base, i);
}

// Stores with round-to-nearest and returns the stored values.
template <class S, PairKind kKind>
OPTKIT_HD VectorPair<S, kKind> store_pair(void* base, DType type, int64_t i, const VectorPair<S, kKind>& a) {
  if constexpr (sizeof(S) == 8) {
    return store_as<DType::kFloat64>(base, i, a);
  } else {
    if (__builtin_expect(type == DType::kFloat32, 1)) return store_as<DType::kFloat32>(base, i, a);
    return type == DType::kBFloat16 ? store_as<DType::kBFloat16>(base, i, a) : store_as<DType::kFloat16>(base, i, a);
  }
}

// Stores 16-bit numbers with stochastic rounding and returns the stored values.
template <PairKind kKind>
OPTKIT_HD VectorPair<float, kKind> store_pair_stochastic(void* base, DType type, int64_t i, VectorPair<float, kKind> a,
                                                         const PairBits& random) {
  using S = float;
  if (type == DType::kBFloat16) {
    const NativeBits first = rounded_to_bfloat16(a.part[0], random.part[0]),
                     second = rounded_to_bfloat16(a.part[1], random.part[1]);
    write_upper_halves<kKind>(base, i, first, second);
    return VectorPair<float, kKind>(upper_halves_as_float(first), upper_halves_as_float(second));
  }
  if constexpr (kKind == PairKind::kAlternating) __builtin_unreachable();  // its loops have no float16
  for (int k = 0; k < kParts<S>; ++k) {
    const NativeHalf half = float_to_float16(a.part[k], random.part[k]);
    write<false, uint16_t>(base, i + k * kFloatLanes, kFloatLanes, half);
    a.part[k] = float16_to_float(half);
  }
  return a;
}

}  // namespace OPTKIT_ISA
}  // namespace optkit

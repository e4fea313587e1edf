// SPDX-License-Identifier: Apache-2.0
// fp32 weights in two parts: a bf16 parameter, the number rounded to bf16, and an integer correction, the difference of
// their bits: 16 bits in units of fp32's last place, or 8 bits in units of 256 of them.
#pragma once

#include "cpu/pair_access.h"
#include "cpu/quantized_codes.h"

namespace optkit {
namespace OPTKIT_ISA {

typedef int16_t NativeShorts __attribute__((vector_size(kFloatLanes * 2)));
typedef int8_t NativeBytes __attribute__((vector_size(kFloatLanes)));

// Signed integers, as the bits of words.
OPTKIT_HD NativeBits signed_words(NativeShorts numbers) {
#if defined(__AVX512F__)
  return reinterpret_cast<NativeBits>(_mm512_cvtepi16_epi32(reinterpret_cast<__m256i>(numbers)));
#elif defined(__AVX2__)
  return reinterpret_cast<NativeBits>(_mm256_cvtepi16_epi32(reinterpret_cast<__m128i>(numbers)));
#else
  return reinterpret_cast<NativeBits>(__builtin_convertvector(numbers, NativeOf<float>::mask));
#endif
}
OPTKIT_HD NativeBits signed_words(NativeBytes numbers) {
#if defined(__AVX512F__)
  return reinterpret_cast<NativeBits>(_mm512_cvtepi8_epi32(reinterpret_cast<__m128i>(numbers)));
#elif defined(__AVX2__)
  int64_t eight;
  std::memcpy(&eight, &numbers, sizeof(eight));
  return reinterpret_cast<NativeBits>(_mm256_cvtepi8_epi32(_mm_cvtsi64_si128(eight)));
#else
  return reinterpret_cast<NativeBits>(__builtin_convertvector(numbers, NativeOf<float>::mask));
#endif
}

// The lower half of each lane.
OPTKIT_HD NativeHalf lower_halves(NativeBits words) {
#if defined(__AVX512F__)
  return reinterpret_cast<NativeHalf>(_mm512_cvtepi32_epi16(reinterpret_cast<__m512i>(words)));
#elif defined(__AVX2__)
  return upper_halves(words << 16);
#else
  return __builtin_convertvector(words, NativeHalf);
#endif
}

// Anyone may write the parameter between two steps: the correction of its former value then moves it by at most half a
// unit of bf16's last place. Where it is infinite, or the sum a NaN (beside 0), the correction is dropped.
OPTKIT_HD Vec<float> joined(Vec<float> upper, NativeBits rest) {
  const auto sum = reinterpret_cast<Vec<float>::Native>(reinterpret_cast<NativeBits>(upper.v) + rest);
  const auto checked = sum + (upper.v - upper.v);
  return Vec<float>(checked != checked ? upper.v : sum);
}

// Elements [i, i + count).
template <bool kTail>
OPTKIT_HD NativeBits load_correction(const TensorSlot& t, int64_t i, int count) {
  return t.compensation_type == DType::kInt16
             ? signed_words(read<kTail, NativeShorts, int16_t>(t.compensation, i, count))
             : signed_words(read<kTail, NativeBytes, int8_t>(t.compensation, i, count)) << 8;
}
template <bool kTail>
OPTKIT_HD Vec<float> load_split(const TensorSlot& t, int64_t i, int count) {
  const Vec<float> upper = bfloat16_to_float(read<kTail, NativeHalf, uint16_t>(t.param, i, count));
  return joined(upper, load_correction<kTail>(t, i, count));
}

// The corrections of a pair, in units of fp32's last place, as the bits of words.
template <PairKind kKind>
OPTKIT_HD void load_corrections(const TensorSlot& t, int64_t i, NativeBits* rest) {
  const bool is_whole = t.compensation_type == DType::kInt16;
  if constexpr (kKind == PairKind::kAlternating) {
    using Signed = NativeOf<float>::mask;
    if (is_whole) {
      const NativeBits words = read<false, NativeBits, uint16_t>(t.compensation, i, 2 * kFloatLanes);
      rest[0] = reinterpret_cast<NativeBits>(reinterpret_cast<Signed>(words << 16) >> 16);
      rest[1] = reinterpret_cast<NativeBits>(reinterpret_cast<Signed>(words) >> 16);
    } else {
      const NativeBits bytes = to_words(read<false, NativeHalf, uint8_t>(t.compensation, i, 2 * kFloatLanes));
      rest[0] = reinterpret_cast<NativeBits>(reinterpret_cast<Signed>(bytes << 24) >> 16);
      rest[1] = reinterpret_cast<NativeBits>(reinterpret_cast<Signed>((bytes & 0xff00u) << 16) >> 16);
    }
  } else {
    for (int k = 0; k < kParts<float>; ++k) rest[k] = load_correction<false>(t, i + k * kFloatLanes, kFloatLanes);
  }
}

template <PairKind kKind>
OPTKIT_HD VectorPair<float, kKind> load_split_pair(const TensorSlot& t, int64_t i) {
  VectorPair<float, kKind> a = load_as<DType::kBFloat16, float, kKind>(t.param, i);
  NativeBits rest[kParts<float>];
  load_corrections<kKind>(t, i, rest);
  for (int k = 0; k < kParts<float>; ++k) a.part[k] = joined(a.part[k], rest[k]);
  return a;
}

// Loads a parameter, with its correction if it has one.
template <class S, bool kTail>
OPTKIT_HD Vec<S> load_weights(const TensorSlot& t, int64_t i, int count) {
  if constexpr (sizeof(S) == 4) {
    if (is_split(t)) return load_split<kTail>(t, i, count);
  }
  return load<S, kTail>(t.param, t.param_type, i, count);
}

// Stores the lower halves of both vectors, as corrections of 16 bits, or their second bytes, as corrections of 8.
template <PairKind kKind>
OPTKIT_HD void store_corrections(const TensorSlot& t, int64_t i, const NativeBits* bits) {
  const bool is_whole = t.compensation_type == DType::kInt16;
  if constexpr (kKind == PairKind::kAlternating) {
    if (is_whole)
      write<false, uint16_t>(t.compensation, i, 2 * kFloatLanes, (bits[0] & 0xffffu) | (bits[1] << 16));
    else
      write<false, uint8_t>(t.compensation, i, 2 * kFloatLanes,
                            lower_halves(((bits[0] >> 8) & 0xffu) | (bits[1] & 0xff00u)));
  } else {
    for (int k = 0; k < kParts<float>; ++k) {
      const int64_t here = i + k * kFloatLanes;
      if (is_whole)
        write<false, uint16_t>(t.compensation, here, kFloatLanes, lower_halves(bits[k]));
      else
        write<false, uint8_t>(t.compensation, here, kFloatLanes, to_bytes(bits[k] >> 8));
    }
  }
}

// Stores both parts, and returns the numbers that they represent. 8 bits are rounded stochastically.
template <PairKind kKind>
OPTKIT_HD VectorPair<float, kKind> store_split(const TensorSlot& t, int64_t i, const VectorPair<float, kKind>& a,
                                               const PairBits& random) {
  const bool is_whole = t.compensation_type == DType::kInt16;
  NativeBits bits[kParts<float>];
  for (int k = 0; k < kParts<float>; ++k) {
    const Vec<float> value = a.part[k];
    bits[k] = value.v != value.v ? NativeBits{} + 0x7fc00000u : reinterpret_cast<NativeBits>(value.v);
    if (!is_whole) bits[k] = (bits[k] + (random.part[k] >> 24)) & ~0xffu;
  }
  store_corrections<kKind>(t, i, bits);
  write_upper_halves<kKind>(t.param, i, bits[0] + 0x8000u, bits[1] + 0x8000u);
  const auto number = [&bits](int k) { return Vec<float>(reinterpret_cast<Vec<float>::Native>(bits[k])); };
  return {number(0), number(1)};
}

}  // namespace OPTKIT_ISA
}  // namespace optkit

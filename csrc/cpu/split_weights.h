// SPDX-License-Identifier: Apache-2.0
// fp32 weights in two parts: a bf16 parameter, the number rounded to bf16, and an integer correction, the difference of
// their bits: 16 bits in units of fp32's last place, or 8 bits in units of 256 of them.
#pragma once

#include "cpu/quantized_loop.h"
#include "cpu/vector_pair.h"

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
#else
  return reinterpret_cast<NativeBits>(__builtin_convertvector(numbers, NativeOf<float>::mask));
#endif
}

// The lower half of each lane.
OPTKIT_HD NativeHalf lower_halves(NativeBits words) {
#if defined(__AVX512F__)
  return reinterpret_cast<NativeHalf>(_mm512_cvtepi32_epi16(reinterpret_cast<__m512i>(words)));
#else
  return __builtin_convertvector(words, NativeHalf);
#endif
}

// Loads elements [i, i + count) of a parameter with a correction. Anyone may write the parameter between two steps:
// the correction of its former value then moves it by at most half a unit of bf16's last place. Only beside 0 and
// infinity could the sum be a NaN, and there the correction is dropped.
template <bool kTail>
OPTKIT_HD Vec<float> load_split(const TensorSlot& t, int64_t i, int count) {
  const Vec<float> upper = bfloat16_to_float(read<kTail, NativeHalf, uint16_t>(t.param, i, count));
  const NativeBits rest = t.compensation_type == DType::kInt16
                              ? signed_words(read<kTail, NativeShorts, int16_t>(t.compensation, i, count))
                              : signed_words(read<kTail, NativeBytes, int8_t>(t.compensation, i, count)) << 8;
  const auto joined = reinterpret_cast<Vec<float>::Native>(reinterpret_cast<NativeBits>(upper.v) + rest);
  return Vec<float>(joined != joined ? upper.v : joined);
}

// Loads a parameter, with its correction if it has one.
template <class S, bool kTail>
OPTKIT_HD Vec<S> load_weights(const TensorSlot& t, int64_t i, int count) {
  if constexpr (sizeof(S) == 4) {
    if (is_split(t)) return load_split<kTail>(t, i, count);
  }
  return load<S, kTail>(t.param, t.param_type, i, count);
}

// Stores both parts, and returns the number that they represent. 8 bits are rounded stochastically.
OPTKIT_HD VectorPair<float> store_split(const TensorSlot& t, int64_t i, const VectorPair<float>& a,
                                        const PairBits& random) {
  const bool is_whole = t.compensation_type == DType::kInt16;
  NativeBits bits[kParts<float>];
  for (int k = 0; k < kParts<float>; ++k) {
    const Vec<float> value = a.part[k];
    bits[k] = value.v != value.v ? NativeBits{} + 0x7fc00000u : reinterpret_cast<NativeBits>(value.v);
    const int64_t here = i + k * kFloatLanes;
    if (is_whole) {
      write<false, uint16_t>(t.compensation, here, kFloatLanes, lower_halves(bits[k]));
    } else {
      bits[k] = (bits[k] + (random.part[k] >> 24)) & ~0xffu;
      write<false, uint8_t>(t.compensation, here, kFloatLanes, to_bytes(bits[k] >> 8));
    }
  }
  write_upper_halves(t.param, i, bits[0] + 0x8000u, bits[1] + 0x8000u);
  return VectorPair<float>(Vec<float>(reinterpret_cast<Vec<float>::Native>(bits[0])),
                           Vec<float>(reinterpret_cast<Vec<float>::Native>(bits[1])));
}

}  // namespace OPTKIT_ISA
}  // namespace optkit

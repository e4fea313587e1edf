// SPDX-License-Identifier: Apache-2.0
// The random bits of a run of elements, two vectors at a time: neighbors share a word, so one vector of words serves.
#pragma once

#include <cstdint>
#include <cstring>

#include "core/random.h"
#include "cpu/access.h"

namespace optkit {
namespace OPTKIT_ISA {

// Words [word, word + kFloatLanes) of the random stream.
OPTKIT_HD NativeBits random_words(RandomKey key, int64_t word) {
  NativeBits lane;
  for (int k = 0; k < kFloatLanes; ++k) lane[k] = k;
  return random_word(key_at(key, word), lane + static_cast<uint32_t>(word));
}

// For the lanes of two vectors of fp32.
struct PairBits {
  NativeBits part[2];
};

// Words for neighbors: each lane of the lower or upper half twice, the second time with its halves exchanged.
template <bool kUpper>
OPTKIT_HD NativeBits for_neighbors(NativeBits words) {
#if defined(__AVX512F__)
  const __m512i lane = _mm512_set_epi32(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0);
  const __m512i from = _mm512_add_epi32(_mm512_srli_epi32(lane, 1), _mm512_set1_epi32(kUpper ? 8 : 0));
  const __m512i left = _mm512_slli_epi32(_mm512_and_si512(lane, _mm512_set1_epi32(1)), 4);
  return reinterpret_cast<NativeBits>(
      _mm512_rolv_epi32(_mm512_permutexvar_epi32(from, reinterpret_cast<__m512i>(words)), left));
#elif defined(__AVX2__)
  const __m256i from = kUpper ? _mm256_set_epi32(7, 7, 6, 6, 5, 5, 4, 4) : _mm256_set_epi32(3, 3, 2, 2, 1, 1, 0, 0);
  const __m256i odd_exchanged =
      _mm256_broadcastsi128_si256(_mm_set_epi32(0x0d0c0f0e, 0x0b0a0908, 0x05040706, 0x03020100));
  return reinterpret_cast<NativeBits>(
      _mm256_shuffle_epi8(_mm256_permutevar8x32_epi32(reinterpret_cast<__m256i>(words), from), odd_exchanged));
#else
  NativeBits spread;
  for (int k = 0; k < kFloatLanes; ++k) spread[k] = words[k / 2 + (kUpper ? kFloatLanes / 2 : 0)];
  NativeBits is_odd;
  for (int k = 0; k < kFloatLanes; ++k) is_odd[k] = k % 2;
  return is_odd != 0u ? rotated(spread, 16) : spread;
#endif
}

// Bits of the elements from i on: in sequence, or those with even and with odd places apart.
template <bool kAlternates>
OPTKIT_HD PairBits random_pair(RandomKey key, int64_t i) {
  const NativeBits words = random_words(key, i >> 1);
  if constexpr (kAlternates) {
    if (__builtin_expect(i & 1, 0)) return {rotated(words, 16), random_words(key, (i >> 1) + 1)};
    return {words, rotated(words, 16)};
  } else {
    if (__builtin_expect(i & 1, 0)) {
      uint32_t bits[2 * kFloatLanes];
      for (int k = 0; k < 2 * kFloatLanes; ++k) bits[k] = random_bits(key, i + k);
      PairBits random;
      std::memcpy(&random, bits, sizeof(random));
      return random;
    }
    return {for_neighbors<false>(words), for_neighbors<true>(words)};
  }
}
OPTKIT_HD PairBits bits_of_state(PairBits random, int state) {
  return {optkit::bits_of_state(random.part[0], state), optkit::bits_of_state(random.part[1], state)};
}

}  // namespace OPTKIT_ISA
}  // namespace optkit

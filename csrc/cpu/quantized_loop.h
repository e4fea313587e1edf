// SPDX-License-Identifier: Apache-2.0
// 8-bit state, one part of a chunk at a time: dequantized into buffers that stay in the L1 cache, walked as fp32 state,
// and quantized again.
#pragma once

#include <cstdint>
#include <cstring>

#include "core/math.h"
#include "core/quantized_state.h"
#include "core/tables.h"
#include "cpu/access.h"

namespace optkit {
namespace OPTKIT_ISA {

constexpr int64_t kQuantizedPart = 2048;  // elements: 8 KiB of fp32 for each state
static_assert(kChunk % kQuantizedPart == 0 && kQuantizedPart % kQuantizedBlock == 0, "a block lies in one part");

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
#else
  return __builtin_convertvector(words, NativeCodes);
#endif
}

// Converts words below 2^31 to fp32.
OPTKIT_HD Vec<float> to_float(NativeBits words) {
  return __builtin_convertvector(reinterpret_cast<NativeOf<float>::mask>(words), Vec<float>::Native);
}

OPTKIT_HD uint32_t largest_lane(NativeBits words) {
  typedef uint32_t Four __attribute__((vector_size(16)));
  Four part[kFloatLanes / 4];
  std::memcpy(part, &words, sizeof(words));
  for (int k = 1; k < kFloatLanes / 4; ++k) part[0] = part[k] > part[0] ? part[k] : part[0];
  const uint32_t low = part[0][0] > part[0][1] ? part[0][0] : part[0][1];
  const uint32_t high = part[0][2] > part[0][3] ? part[0][2] : part[0][3];
  return low > high ? low : high;
}

// The fp32 bits that a code is an offset from: its exponent is relative to them.
template <bool kSigned>
constexpr uint32_t kCodeOffset = (kSigned ? 112u << 3 : 96u << 3) << 20;

template <bool kSigned>
OPTKIT_HD Vec<float> dequantize8(NativeCodes codes, Vec<float> factor) {
  const NativeBits code = to_words(codes), magnitude = kSigned ? code & 127u : code;
  NativeBits bits = (magnitude << 20) | kCodeOffset<kSigned>;
  if (kSigned) bits |= (code << 24) & 0x80000000u;
  const Vec<float> value = Vec<float>(reinterpret_cast<Vec<float>::Native>(bits)) * factor;
  return magnitude == 0u ? Vec<float>::Native{} : value.v;
}

// Vector version of quantize8 in core/quantized_state.h; `value` is finite.
template <bool kSigned>
OPTKIT_HD NativeCodes quantize8(Vec<float> value, NativeBits random) {
  constexpr uint32_t kLeast = least_magnitude(kSigned), kMost = most_magnitude(kSigned);
  const NativeBits bits = reinterpret_cast<NativeBits>(value.v), magnitude = bits & 0x7fffffffu;
  const NativeBits least = NativeBits{} + kLeast, most = NativeBits{} + kMost;
  const NativeBits above = magnitude < least ? least : magnitude, inside = above > most ? most : above;
  const NativeBits noise = random >> 12, code = (inside + noise) >> 20;
  if (!kSigned) return to_bytes(magnitude == 0u ? NativeBits{} : code);
  const NativeBits with_sign = (code & 127u) | ((bits >> 24) & ~127u);
  const auto is_kept = (to_float(noise) * (0x1p-20f * bits_float(kLeast)) < abs(value)).m;
  return to_bytes(is_kept ? with_sign : NativeBits{});
}

// The largest magnitude of a block, as fp32 bits.
OPTKIT_HD uint32_t largest_magnitude(const float* values, int64_t count) {
  NativeBits lanes{};
  for (int64_t i = 0; i < count; i += kFloatLanes) {
    const NativeBits magnitude = read<false, NativeBits, uint32_t>(values, i, kFloatLanes) & 0x7fffffffu;
    lanes = magnitude > lanes ? magnitude : lanes;
  }
  return largest_lane(lanes);
}

template <bool kSigned>
OPTKIT_HD void dequantize_block(const uint8_t* codes, float scale, int64_t count, float* out) {
  const Vec<float> factor(dequantization_factor(scale));
  for (int64_t i = 0; i < count; i += kFloatLanes)
    write<false, float>(out, i, kFloatLanes,
                        dequantize8<kSigned>(read<false, NativeCodes, uint8_t>(codes, i, kFloatLanes), factor).v);
}

// The random bits of a block.
struct BlockBits {
  NativeBits lanes[kQuantizedBlock / kFloatLanes];

  BlockBits(RandomKey key, int64_t first) {
    for (int64_t i = 0; i < kQuantizedBlock; i += kFloatLanes) lanes[i / kFloatLanes] = random_lanes(key, first + i);
  }
  uint32_t of(int64_t i) const { return lanes[i / kFloatLanes][i % kFloatLanes]; }
};

// `values` and `codes` have room for a whole block.
template <bool kSigned>
OPTKIT_HD void quantize_block(float* values, int64_t count, const BlockBits& random, int state, uint8_t* codes,
                              float* scale) {
  for (int64_t i = count; i % kFloatLanes != 0; ++i) values[i] = 0.0f;
  float largest = bits_float(largest_magnitude(values, count));
  const bool is_finite = largest - largest == 0.0f;
  if (__builtin_expect(!is_finite, 0)) {
    largest = 0.0f;
    for (int64_t i = 0; i < count; ++i) largest = larger_finite(largest, values[i]);
  }
  *scale = block_scale(largest);
  const float factor = quantization_factor(*scale);
  if (__builtin_expect(!is_finite, 0)) {
    for (int64_t i = 0; i < count; ++i)
      codes[i] = static_cast<uint8_t>(
          optkit::quantize8(values[i] * factor, optkit::bits_of_state(random.of(i), state), kSigned));
    return;
  }
  for (int64_t i = 0; i < count; i += kFloatLanes) {
    const Vec<float> value = read<false, Vec<float>::Native, float>(values, i, kFloatLanes);
    const NativeBits bits = optkit::bits_of_state(random.lanes[i / kFloatLanes], state);
    write<false, uint8_t>(codes, i, kFloatLanes, quantize8<kSigned>(value * factor, bits));
  }
}

// One block of the states in bit mask `kStates`, held in fp32 while a loop walks it.
template <int kNumStates, uint32_t kStates>
class QuantizedBlock {
 public:
  explicit QuantizedBlock(const TensorSlot& t) : t_(t) {}

  // Points the states at the numbers of the block that starts at element `first`.
  OPTKIT_HD void dequantize(int64_t first, void** states) {
    for (int k = 0; k < kNumStates; ++k) {
      if (!(kStates >> k & 1u)) continue;
      const float scale = t_.state_scale[k][first / kQuantizedBlock];
      const uint8_t* codes = static_cast<const uint8_t*>(t_.state[k]) + first;
      if (t_.unsigned_states >> k & 1u)
        dequantize_block<false>(codes, scale, kQuantizedBlock, values_[k]);
      else
        dequantize_block<true>(codes, scale, kQuantizedBlock, values_[k]);
      states[k] = values_[k] - first;
    }
  }
  OPTKIT_HD void quantize(int64_t first, RandomKey key) {
    const BlockBits random(key, first);
    for (int k = 0; k < kNumStates; ++k) {
      if (!(kStates >> k & 1u)) continue;
      float* scale = t_.state_scale[k] + first / kQuantizedBlock;
      uint8_t* codes = static_cast<uint8_t*>(t_.state[k]) + first;
      if (t_.unsigned_states >> k & 1u)
        quantize_block<false>(values_[k], kQuantizedBlock, random, k, codes, scale);
      else
        quantize_block<true>(values_[k], kQuantizedBlock, random, k, codes, scale);
    }
  }

 private:
  const TensorSlot t_;
  alignas(64) float values_[kNumStates][kQuantizedBlock];
};

// A slot whose 8-bit states are replaced by fp32 buffers.
class DequantizedStates {
 public:
  // Bit k of `states`: state k is in 8 bits.
  DequantizedStates(const TensorSlot& t, uint32_t states, const Chunk& part)
      : quantized_(t), slot_(t), states_(states), part_(part) {
    for (int64_t begin = 0; begin < part_.count; begin += kQuantizedBlock)
      for (int k = 0; k < kMaxStates; ++k)
        if (states_ >> k & 1u) dequantize(k, begin);
    for (int k = 0; k < kMaxStates; ++k)
      if (states_ >> k & 1u) slot_.state[k] = buffer()[k] - part_.begin;
    slot_.state_type = DType::kFloat32;
  }
  const TensorSlot& slot() const { return slot_; }

  void quantize(RandomKey key) const {
    for (int64_t begin = 0; begin < part_.count; begin += kQuantizedBlock) {
      const BlockBits random(key, part_.begin + begin);
      for (int k = 0; k < kMaxStates; ++k)
        if (states_ >> k & 1u) quantize(k, begin, random);
    }
  }

 private:
  using Buffer = float (*)[kQuantizedPart];
  static Buffer buffer() {
    alignas(64) static thread_local float values[kMaxStates][kQuantizedPart];
    return values;
  }

  bool is_signed(int k) const { return !(quantized_.unsigned_states >> k & 1u); }
  int64_t count_from(int64_t begin) const {
    return part_.count - begin < kQuantizedBlock ? part_.count - begin : kQuantizedBlock;
  }
  uint8_t* codes(int k, int64_t begin) const {
    return static_cast<uint8_t*>(quantized_.state[k]) + part_.begin + begin;
  }
  float* scale(int k, int64_t begin) const {
    return quantized_.state_scale[k] + (part_.begin + begin) / kQuantizedBlock;
  }

  // The block that starts at element `begin` of the part.
  void dequantize(int k, int64_t begin) const {
    const int64_t count = count_from(begin);
    const uint8_t* from = codes(k, begin);
    uint8_t last[kQuantizedBlock] = {};
    if (count < kQuantizedBlock) from = static_cast<const uint8_t*>(std::memcpy(last, from, count));
    (is_signed(k) ? dequantize_block<true> : dequantize_block<false>)(from, *scale(k, begin), count,
                                                                      buffer()[k] + begin);
  }
  void quantize(int k, int64_t begin, const BlockBits& random) const {
    const int64_t count = count_from(begin);
    uint8_t last[kQuantizedBlock];
    uint8_t* const to = count < kQuantizedBlock ? last : codes(k, begin);
    (is_signed(k) ? quantize_block<true> : quantize_block<false>)(buffer()[k] + begin, count, random, k, to,
                                                                  scale(k, begin));
    if (to == last) std::memcpy(codes(k, begin), last, count);
  }

  const TensorSlot& quantized_;
  TensorSlot slot_;
  const uint32_t states_;
  const Chunk part_;
};

}  // namespace OPTKIT_ISA
}  // namespace optkit

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
#include "cpu/quantized_codes.h"
#include "cpu/random_pair.h"

namespace optkit {
namespace OPTKIT_ISA {

constexpr int64_t kQuantizedPart = 2048;  // elements: 8 KiB of fp32 for each state
static_assert(kChunk % kQuantizedPart == 0 && kQuantizedPart % kQuantizedBlock == 0, "a block lies in one part");

OPTKIT_HD uint32_t largest_lane(NativeBits words) {
  typedef uint32_t Four __attribute__((vector_size(16)));
  Four part[kFloatLanes / 4];
  std::memcpy(part, &words, sizeof(words));
  for (int k = 1; k < kFloatLanes / 4; ++k) part[0] = part[k] > part[0] ? part[k] : part[0];
  const uint32_t low = part[0][0] > part[0][1] ? part[0][0] : part[0][1];
  const uint32_t high = part[0][2] > part[0][3] ? part[0][2] : part[0][3];
  return low > high ? low : high;
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

// The numbers of a block in fp32 have the order of pairs: each pair has its lanes one after the other.
template <bool kSigned, PairKind kKind>
OPTKIT_HD void dequantize_block(const uint8_t* codes, float scale, int64_t count, float* out) {
  const Vec<float> factor(dequantization_factor(scale));
  for (int64_t i = 0; i < count; i += 2 * kFloatLanes) dequantize8<kSigned, kKind>(codes + i, factor, out + i);
}

// The lane of a pair that element i of a block is in.
template <PairKind kKind>
OPTKIT_HD int lane_in_pair(int64_t i) {
  const int place = static_cast<int>(i % (2 * kFloatLanes));
  return kKind == PairKind::kAlternating ? place % 2 * kFloatLanes + place / 2 : place;
}

// The random bits of a block.
template <PairKind kKind>
struct BlockBits {
  PairBits pairs[kQuantizedBlock / (2 * kFloatLanes)];

  BlockBits(RandomKey key, int64_t first) {
    for (int64_t i = 0; i < kQuantizedBlock; i += 2 * kFloatLanes)
      pairs[i / (2 * kFloatLanes)] = random_pair<kKind == PairKind::kAlternating>(key, first + i);
  }
  uint32_t of(int64_t i) const {
    const int lane = lane_in_pair<kKind>(i);
    return pairs[i / (2 * kFloatLanes)].part[lane / kFloatLanes][lane % kFloatLanes];
  }
};

struct BlockScale {
  float factor;
  bool is_finite;  // whether all numbers of the block are
};

// Sets the scale of a block of `values`, which has room for a whole one.
OPTKIT_HD BlockScale scale_block(float* values, int64_t count, float* scale) {
  for (int64_t i = count; i % (2 * kFloatLanes) != 0; ++i) values[i] = 0.0f;
  float largest = bits_float(largest_magnitude(values, count));
  const bool is_finite = largest - largest == 0.0f;
  if (__builtin_expect(!is_finite, 0)) {
    largest = 0.0f;
    for (int64_t i = 0; i < count; ++i) largest = larger_finite(largest, values[i]);
  }
  *scale = block_scale(largest);
  return {quantization_factor(*scale), is_finite};
}

// `codes` has room for a whole block.
template <bool kSigned, PairKind kKind>
OPTKIT_HD void quantize_block(const float* values, int64_t count, BlockScale scale, const BlockBits<kKind>& random,
                              int state, uint8_t* codes) {
  constexpr int64_t kPair = 2 * kFloatLanes;
  if (__builtin_expect(!scale.is_finite, 0)) {
    for (int64_t i = 0; i < count; ++i) {
      const float value = values[i / kPair * kPair + lane_in_pair<kKind>(i)];
      codes[i] = static_cast<uint8_t>(
          optkit::quantize8(value * scale.factor, optkit::bits_of_state(random.of(i), state), kSigned));
    }
    return;
  }
  for (int64_t i = 0; i < count; i += kPair) {
    const Vec<float> first = read<false, Vec<float>::Native, float>(values, i, kFloatLanes),
                     second = read<false, Vec<float>::Native, float>(values, i + kFloatLanes, kFloatLanes);
    quantize8<kSigned, kKind>(first * scale.factor, second * scale.factor,
                              bits_of_state(random.pairs[i / kPair], state), codes + i);
  }
}

// One block of the states in bit mask `kStates`, held in fp32 while a loop walks it in alternating pairs, which codes
// fill and leave by one instruction.
template <int kNumStates, uint32_t kStates>
class QuantizedBlock {
 public:
  explicit QuantizedBlock(const TensorSlot& t) : t_(t) {}

  // Points the states at the numbers of the block that starts at element `first`.
  OPTKIT_HD void dequantize(int64_t first, void** states) {
#pragma GCC unroll 4
    for (int k = 0; k < kNumStates; ++k) {
      if (!(kStates >> k & 1u)) continue;
      const float scale = t_.state_scale[k][first / kQuantizedBlock];
      const uint8_t* codes = static_cast<const uint8_t*>(t_.state[k]) + first;
      if (t_.unsigned_states >> k & 1u)
        dequantize_block<false, kKind>(codes, scale, kQuantizedBlock, values_[k]);
      else
        dequantize_block<true, kKind>(codes, scale, kQuantizedBlock, values_[k]);
      states[k] = values_[k] - first;
    }
  }
  OPTKIT_HD void quantize(int64_t first, RandomKey key) {
    BlockScale scale[kNumStates];  // of all states before their codes: each waits for a sum over lanes and a division
#pragma GCC unroll 4
    for (int k = 0; k < kNumStates; ++k)
      if (kStates >> k & 1u)
        scale[k] = scale_block(values_[k], kQuantizedBlock, t_.state_scale[k] + first / kQuantizedBlock);
    const BlockBits<kKind> random(key, first);
#pragma GCC unroll 4
    for (int k = 0; k < kNumStates; ++k) {
      if (!(kStates >> k & 1u)) continue;
      uint8_t* codes = static_cast<uint8_t*>(t_.state[k]) + first;
      if (t_.unsigned_states >> k & 1u)
        quantize_block<false, kKind>(values_[k], kQuantizedBlock, scale[k], random, k, codes);
      else
        quantize_block<true, kKind>(values_[k], kQuantizedBlock, scale[k], random, k, codes);
    }
  }

 private:
  static constexpr PairKind kKind = PairKind::kAlternating;
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
      const BlockBits<kKind> random(key, part_.begin + begin);
      for (int k = 0; k < kMaxStates; ++k)
        if (states_ >> k & 1u) quantize(k, begin, random);
    }
  }

 private:
  static constexpr PairKind kKind = PairKind::kPlain;
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
    (is_signed(k) ? dequantize_block<true, kKind> : dequantize_block<false, kKind>)(from, *scale(k, begin), count,
                                                                                    buffer()[k] + begin);
  }
  void quantize(int k, int64_t begin, const BlockBits<kKind>& random) const {
    const int64_t count = count_from(begin);
    uint8_t last[kQuantizedBlock];
    uint8_t* const to = count < kQuantizedBlock ? last : codes(k, begin);
    float* const values = buffer()[k] + begin;
    (is_signed(k)
         ? quantize_block<true, kKind>
         : quantize_block<false, kKind>)(values, count, scale_block(values, count, scale(k, begin)), random, k, to);
    if (to == last) std::memcpy(codes(k, begin), last, count);
  }

  const TensorSlot& quantized_;
  TensorSlot slot_;
  const uint32_t states_;
  const Chunk part_;
};

}  // namespace OPTKIT_ISA
}  // namespace optkit

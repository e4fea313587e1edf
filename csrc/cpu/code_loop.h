// SPDX-License-Identifier: Apache-2.0
// 8-bit state of one chunk, decoded into a buffer that stays in the L2 cache, and encoded again behind the walk.
#pragma once

#include <cstdint>

#include "core/code8.h"
#include "core/math.h"
#include "core/tables.h"

namespace optkit {
namespace OPTKIT_ISA {

static_assert(kChunk % kCodeBlock == 0, "a block lies in one chunk");

inline void decode_chunk(const TensorSlot& t, int state, const Chunk& chunk, float* out) {
  const bool is_signed = !(t.unsigned_states >> state & 1u);
  const uint8_t* codes = static_cast<const uint8_t*>(t.state[state]) + chunk.begin;
  const float* scales = t.state_scale[state] + chunk.begin / kCodeBlock;
  for (int64_t begin = 0; begin < chunk.count; begin += kCodeBlock) {
    const int64_t end = begin + kCodeBlock < chunk.count ? begin + kCodeBlock : chunk.count;
    const float factor = decode_factor(scales[begin / kCodeBlock]);
    for (int64_t i = begin; i < end; ++i) out[i] = decode8(codes[i], is_signed) * factor;
  }
}

inline void encode_chunk(const TensorSlot& t, int state, const Chunk& chunk, RandomKey key, const float* values) {
  const bool is_signed = !(t.unsigned_states >> state & 1u);
  const RandomKey here = state_key(key, state);
  uint8_t* codes = static_cast<uint8_t*>(t.state[state]) + chunk.begin;
  float* scales = t.state_scale[state] + chunk.begin / kCodeBlock;
  for (int64_t begin = 0; begin < chunk.count; begin += kCodeBlock) {
    const int64_t end = begin + kCodeBlock < chunk.count ? begin + kCodeBlock : chunk.count;
    float largest = 0.0f;
    for (int64_t i = begin; i < end; ++i) largest = larger_finite(largest, values[i]);
    const float scale = code_scale(largest), factor = code_factor(scale);
    scales[begin / kCodeBlock] = scale;
    for (int64_t i = begin; i < end; ++i)
      codes[i] = static_cast<uint8_t>(encode8(values[i] * factor, code_random(here, chunk.begin + i), is_signed));
  }
}

// Points the states of `t` at decoded copies while it lives; `encode` writes them back. Those of `wide` are not coded.
class DecodedStates {
 public:
  DecodedStates(TensorSlot* t, int num_states, uint32_t wide, const Chunk& chunk)
      : coded_(*t), wide_(wide), chunk_(chunk) {
    if (coded_.state_type != DType::kCode8) return;
    for (int k = 0; k < num_states; ++k) {
      if (!is_coded(k)) continue;
      decode_chunk(coded_, k, chunk, buffer()[k]);
      t->state[k] = buffer()[k] - chunk.begin;
    }
    t->state_type = DType::kFloat32;
  }
  void encode(int num_states, RandomKey key) const {
    if (coded_.state_type != DType::kCode8) return;
    for (int k = 0; k < num_states; ++k)
      if (is_coded(k)) encode_chunk(coded_, k, chunk_, key, buffer()[k]);
  }

 private:
  using Buffer = float (*)[kChunk];
  static Buffer buffer() {
    alignas(64) static thread_local float values[kMaxStates][kChunk];
    return values;
  }
  bool is_coded(int k) const { return coded_.state[k] != nullptr && !(wide_ >> k & 1u); }

  const TensorSlot coded_;
  const uint32_t wide_;
  const Chunk chunk_;
};

}  // namespace OPTKIT_ISA
}  // namespace optkit

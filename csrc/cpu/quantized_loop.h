// SPDX-License-Identifier: Apache-2.0
// 8-bit state of one chunk, dequantized into a buffer that stays in the L2 cache, and quantized again behind the walk.
#pragma once

#include <cstdint>

#include "core/math.h"
#include "core/quantized_state.h"
#include "core/tables.h"

namespace optkit {
namespace OPTKIT_ISA {

static_assert(kChunk % kQuantizedBlock == 0, "a block lies in one chunk");

inline void dequantize_chunk(const TensorSlot& t, int state, const Chunk& chunk, float* out) {
  const bool is_signed = !(t.unsigned_states >> state & 1u);
  const uint8_t* codes = static_cast<const uint8_t*>(t.state[state]) + chunk.begin;
  const float* scales = t.state_scale[state] + chunk.begin / kQuantizedBlock;
  for (int64_t begin = 0; begin < chunk.count; begin += kQuantizedBlock) {
    const int64_t end = begin + kQuantizedBlock < chunk.count ? begin + kQuantizedBlock : chunk.count;
    const float factor = dequantization_factor(scales[begin / kQuantizedBlock]);
    for (int64_t i = begin; i < end; ++i) out[i] = dequantize8(codes[i], is_signed) * factor;
  }
}

inline void quantize_chunk(const TensorSlot& t, int state, const Chunk& chunk, RandomKey key, const float* values) {
  const bool is_signed = !(t.unsigned_states >> state & 1u);
  const RandomKey here = state_key(key, state);
  uint8_t* codes = static_cast<uint8_t*>(t.state[state]) + chunk.begin;
  float* scales = t.state_scale[state] + chunk.begin / kQuantizedBlock;
  for (int64_t begin = 0; begin < chunk.count; begin += kQuantizedBlock) {
    const int64_t end = begin + kQuantizedBlock < chunk.count ? begin + kQuantizedBlock : chunk.count;
    float largest = 0.0f;
    for (int64_t i = begin; i < end; ++i) largest = larger_finite(largest, values[i]);
    const float scale = block_scale(largest), factor = quantization_factor(scale);
    scales[begin / kQuantizedBlock] = scale;
    for (int64_t i = begin; i < end; ++i)
      codes[i] =
          static_cast<uint8_t>(quantize8(values[i] * factor, quantization_random(here, chunk.begin + i), is_signed));
  }
}

// Points the states of `t` at dequantized copies while it lives; `quantize` writes them back. Those of `full_precision`
// are not quantized.
class DequantizedStates {
 public:
  DequantizedStates(TensorSlot* t, int num_states, uint32_t full_precision, const Chunk& chunk)
      : quantized_(*t), full_precision_(full_precision), chunk_(chunk) {
    if (quantized_.state_type != DType::kQuantized8) return;
    for (int k = 0; k < num_states; ++k) {
      if (!is_quantized(k)) continue;
      dequantize_chunk(quantized_, k, chunk, buffer()[k]);
      t->state[k] = buffer()[k] - chunk.begin;
    }
    t->state_type = DType::kFloat32;
  }
  void quantize(int num_states, RandomKey key) const {
    if (quantized_.state_type != DType::kQuantized8) return;
    for (int k = 0; k < num_states; ++k)
      if (is_quantized(k)) quantize_chunk(quantized_, k, chunk_, key, buffer()[k]);
  }

 private:
  using Buffer = float (*)[kChunk];
  static Buffer buffer() {
    alignas(64) static thread_local float values[kMaxStates][kChunk];
    return values;
  }
  bool is_quantized(int k) const { return quantized_.state[k] != nullptr && !(full_precision_ >> k & 1u); }

  const TensorSlot quantized_;
  const uint32_t full_precision_;
  const Chunk chunk_;
};

}  // namespace OPTKIT_ISA
}  // namespace optkit

// SPDX-License-Identifier: Apache-2.0
// Arguments of a normalization, for CPU and CUDA. A null pointer: absent. "Accumulator": fp32, or fp64 for fp64
// tensors.
#pragma once

#include <cstdint>

#include "core/random.h"
#include "core/tables.h"

namespace optkit {

// Dropout of the input. The bits depend only on seed and position, so no mask is stored.
struct Dropout {
  RandomKey key;
  uint32_t keep_below;  // an element is kept if its 32 bits are below; 0: none is kept
  float scale;          // factor of the kept elements
  int32_t on;
};

OPTKIT_HD Dropout make_dropout(double p, int64_t seed) {
  if (p <= 0.0) return {{0, 0}, 0, 1.0f, 0};
  const double limit = (1.0 - p) * 4294967296.0;
  const uint32_t keep_below = limit >= 4294967295.0 ? 0xffffffffu : static_cast<uint32_t>(limit);
  const float scale = p < 1.0 ? static_cast<float>(1.0 / (1.0 - p)) : 0.0f;
  return {random_key(static_cast<uint64_t>(seed), 0, 0), keep_below, scale, 1};
}

// 32 bits for the element at a 64-bit position, given in halves.
template <class U>
OPTKIT_HD U dropout_bits(RandomKey key, U place_low, U place_high) {
  return lowbias32(lowbias32(place_low + key.low) ^ (place_high ^ key.high));
}

struct NormForward {
  const void* x;         // rows of `size`, `x_stride` elements apart
  const void* residual;  // null: no addition; contiguous, like all that follow
  void* sum;             // dropout(x) + residual, rounded to its dtype; the rounded value is normalized
  void* y;
  void* mean;  // accumulator, one per row; null for RMSNorm
  void* rstd;
  const void* weight;  // CPU: accumulator, never null
  const void* bias;
  int64_t rows, size, x_stride;
  DType x_type, residual_type, type, weight_type;  // `type`: of y and of sum
  Dropout dropout;
  double eps;
};

struct NormBackward {
  const void* dy;
  const void* d_sum;  // gradient of `sum` itself
  const void* x;      // the normalized input; rows `x_stride` elements apart
  const void* mean;
  const void* rstd;
  const void* weight;
  void* dx;       // gradient of the normalized input, plus d_sum; null: not needed
  void* d_input;  // the same, through the dropout; null: no dropout
  int64_t rows, size, x_stride;
  DType type, weight_type;  // `type`: of x, dy, d_sum, dx and d_input
  Dropout dropout;
  int32_t wants_weight, wants_bias;
};

}  // namespace optkit

// SPDX-License-Identifier: Apache-2.0
// Walks the rows of LayerNorm and RMSNorm on CPU.
#pragma once

#include "cpu/work_stealing.h"
#include "norms/layout.h"
#include "norms/tables.h"

namespace optkit {

// Rows [begin, end), packed. The backward adds to its partial sum of the parameter gradients, in accumulators.
using NormForwardRows = void (*)(const NormForward&, int64_t begin, int64_t end);
using NormBackwardRows = void (*)(const NormBackward&, int64_t begin, int64_t end, void* d_weight, void* d_bias);

// The kernels of one instruction set: [0] RMSNorm, [1] LayerNorm; then by DType.
struct NormKernels {
  NormForwardRows forward[2][4];
  NormBackwardRows backward[2][4];
  // Converts to accumulators and back; fp64 is copied. A widened NaN has zeros in the bits that 16-bit rounding adds
  // to.
  void (*widen)(const void* from, DType type, int64_t count, void* to);
  void (*narrow)(const void* from, DType type, int64_t count, void* to);
  // Copies strided rows into packed ones.
  void (*gather)(const void* from, int64_t column_stride, DType type, int64_t rows, int64_t columns, void* to);
  // out[i] = sum over k of parts[k * stride + i] for i in [begin, end), k in order.
  void (*add_parts)(const void* parts, DType type, int64_t num_parts, int64_t stride, int64_t begin, int64_t end,
                    void* out);
};

// torch's thread pool, behind plain signatures.
struct Workers {
  ParallelFor parallel_for;
  int (*count)();
};

void norm_forward(bool centered, const NormForward& arguments, const ForwardStrided& strided, const Workers& workers);
// `d_weight` and `d_bias` have `size` elements of weight_type each; null: not needed.
void norm_backward(bool centered, const NormBackward& arguments, const BackwardStrided& strided, void* d_weight,
                   void* d_bias, const Workers& workers);

const NormKernels& active_norm_kernels();

}  // namespace optkit

// SPDX-License-Identifier: Apache-2.0
// The arguments of a chunk kernel, and the table of kernels of one instruction set.
#pragma once

#include "core/pipeline.h"
#include "core/tables.h"
#include "cpu/layer_norm.h"
#include "rules/all.h"

namespace optkit {

template <class Rule, class S>
struct PreparedTensor {
  StageCoefs<S> stage;
  typename Rule::template Coefs<S> rule;
};

using StepChunk = void (*)(const TensorSlot&, const void* prepared, const Chunk&, Sums* out);
using NormChunk = void (*)(const TensorSlot&, const Chunk&, Sums* out);
using FactorRun = void (*)(const TensorSlot&, const void* prepared, const Chunk& strips_or_matrices);
using MeasureUnits = Clipped (*)(const TensorSlot&, const GroupRow&, double grad_scale, const Chunk& units);

// Null: the rule has no factors.
struct FactorKernels {
  FactorRun sum_strips;
  FactorRun make_factors;
};

struct Kernels {
  const char* isa;
  StepChunk step_float[kNumRules];
  StepChunk step_double[kNumRules];
  StepChunk measure_float[kNumRules];  // null: the rule needs no sums before its step
  StepChunk measure_double[kNumRules];
  FactorKernels factors_float[kNumRules];
  FactorKernels factors_double[kNumRules];
  NormChunk norm_float;
  NormChunk norm_double;
  MeasureUnits units_float;
  MeasureUnits units_double;
  const NormKernels* norms;  // LayerNorm and RMSNorm
};

// Each is defined in its own translation unit, compiled for that instruction set.
namespace baseline {
extern const Kernels kernels;
}
namespace avx2 {
extern const Kernels kernels;
}
namespace avx512 {
extern const Kernels kernels;
}

}  // namespace optkit

// SPDX-License-Identifier: Apache-2.0
// Arguments that the host passes to the kernels.
#pragma once

#include <cuda_runtime.h>

#include "core/pipeline.h"
#include "core/tables.h"
#include "cuda/api.h"
#include "rules/all.h"

namespace optkit {

// Gradients move every step (`zero_grad(set_to_none=True)`), so their addresses are arguments of the first launch that
// reads them, which stores them on the device for the other launches: there is nothing to upload, and a captured graph
// keeps its own copy. A launch has room for as few addresses as it needs; 28 KiB of arguments need CUDA 12.1.
template <int kCount>
struct GradTable {
  static constexpr int kSize = kCount;
  const void* pointer[kCount];
};
constexpr int kFewGrads = 64, kSomeGrads = 440;
#if CUDART_VERSION >= 12010
constexpr int kMaxGrads = 3500;
#else
constexpr int kMaxGrads = kSomeGrads;
#endif

constexpr int kMaxGroupsPerLaunch = 16;

// A rule with a trust ratio is prepared twice: at a rate of 1 to measure its update, and at the resulting rate.
enum class Phase : int32_t { kOnly = 0, kMeasure = 1, kMeasured = 2 };

struct GroupTable {
  GroupRow row[kMaxGroupsPerLaunch];
  const double* rate[kMaxGroupsPerLaunch];  // in device memory; null: the rate in the row
  int32_t first;
  int32_t count;
};

// One unit of a tensor, or a whole tensor that is one unit.
struct Unit {
  int64_t index;
  int32_t tensor;
};

// Tables in device memory; static except for `grads` and `prepared`.
struct DeviceTables {
  const TensorSlot* tensors;
  const Chunk* chunks;
  const int32_t* first_chunk;  // per tensor, and one past the last
  const void** grads;          // per tensor
  unsigned char* prepared;     // PreparedTensor<Rule, S> per tensor
  int32_t* skip;               // 1: this step is skipped
  double2* partial;            // {sum of squares, non-finite} per chunk
  Sums* sums;                  // per chunk
  unsigned int* ticket;        // number of finished blocks of the norm kernel
  double* tensor_sq;           // sum of squares of each tensor's gradient, if a clip needs it
  const Unit* units;           // of the tensors that are clipped or centralized per unit
  Clipped* unit_clipped;       // per unit
  Clipped* tensor_clipped;     // per tensor
  Sums* tensor_sums;           // per tensor: sums for its trust ratio
};

// Tensors [first_tensor, ...) whose gradient addresses fit into one launch, and their chunks.
struct Range {
  int32_t first_tensor, num_tensors, first_chunk, num_chunks;
};

template <class Rule, class S>
struct PreparedTensor {
  StageCoefs<S> stage;
  typename Rule::template Coefs<S> rule;
};

}  // namespace optkit

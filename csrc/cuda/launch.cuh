// SPDX-License-Identifier: Apache-2.0
// What the host hands to the kernels.
#pragma once

#include <cuda_runtime.h>

#include "core/pipeline.h"
#include "core/tables.h"
#include "cuda/api.h"
#include "rules/all.h"

namespace optkit {

// Gradients move every step (`zero_grad(set_to_none=True)`), so their addresses travel with the first launch of a step
// that reads them, which leaves them on the device for the others: nothing to upload, and a captured graph keeps its
// own copy. A launch carries as few as it needs; 28 KiB of arguments need CUDA 12.1.
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

// A rule with a trust ratio is prepared twice: at a rate of 1 to measure its own step, and then at the rate it comes
// to.
enum class Phase : int32_t { kOnly = 0, kMeasure = 1, kMeasured = 2 };

struct GroupTable {
  GroupRow row[kMaxGroupsPerLaunch];
  const double* rate[kMaxGroupsPerLaunch];  // on the device; null: the row's
  int32_t first;
  int32_t count;
};

// One unit of a tensor, or a whole tensor where that is one unit.
struct Unit {
  int64_t index;
  int32_t tensor;
};

// Tables in device memory; static but for `grads` and `prepared`.
struct DeviceTables {
  const TensorSlot* tensors;
  const Chunk* chunks;
  const int32_t* first_chunk;  // per tensor, and one past the last
  const void** grads;          // per tensor
  unsigned char* prepared;     // PreparedTensor<Rule, S> per tensor
  int32_t* skip;               // 1: this step is skipped
  double2* partial;            // {sum of squares, non-finite} per chunk
  Sums* sums;                  // per chunk
  unsigned int* ticket;        // blocks of the norm kernel that are done
  double* tensor_sq;           // sum of squares of each tensor's gradient, where a clip asks for it
  const Unit* units;           // of the tensors whose units are treated by themselves
  Clipped* unit_clipped;       // per unit
  Clipped* tensor_clipped;     // per tensor
  Sums* tensor_sums;           // per tensor: what its trust ratio is computed from
};

// Tensors [first_tensor, ...), whose gradients' addresses fit one launch, and their chunks.
struct Range {
  int32_t first_tensor, num_tensors, first_chunk, num_chunks;
};

template <class Rule, class S>
struct PreparedTensor {
  StageCoefs<S> stage;
  typename Rule::template Coefs<S> rule;
};

}  // namespace optkit

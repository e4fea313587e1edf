// SPDX-License-Identifier: Apache-2.0
// The end of a run that is shorter than a pair of vectors, in buffers of a whole one.
#pragma once

#include <cstdint>
#include <cstring>

#include "core/tables.h"
#include "cpu/vector_pair.h"

namespace optkit {
namespace OPTKIT_ISA {

// Buffers for a run shorter than a pair, so that the walk has one form for all lengths.
template <class Rule, class S>
class StagedEnd {
 public:
  StagedEnd(const TensorSlot& t, int64_t begin, int count) : staged(t), begin_(begin), count_(count) {
    stage(&staged.param, t.param_type);
    const void* grad = t.grad;
    stage(const_cast<void**>(&grad), t.grad_type);
    staged.grad = grad;
    for (int k = 0; k < Rule::kNumStates; ++k) stage(&staged.state[k], type_of_state<Rule>(t, k));
    stage(&staged.average, t.average_type);
    stage(&staged.compensation, t.compensation_type);
  }
  // Copies back everything that was written, except the gradient.
  void write_back(const TensorSlot& t) const {
    copy_back(t.param, staged.param, t.param_type);
    for (int k = 0; k < Rule::kNumStates; ++k) copy_back(t.state[k], staged.state[k], type_of_state<Rule>(t, k));
    copy_back(t.average, staged.average, t.average_type);
    copy_back(t.compensation, staged.compensation, t.compensation_type);
  }

  TensorSlot staged;

 private:
  static constexpr int kStreams = 4 + kMaxStates;

  // Replaces *base by a buffer whose first element is element `begin_`.
  void stage(void** base, DType type) {
    if (*base == nullptr) return;
    char* buffer = buffers_[used_++];
    std::memcpy(buffer, static_cast<char*>(*base) + begin_ * size_of(type), count_ * size_of(type));
    *base = buffer - begin_ * size_of(type);
  }
  void copy_back(void* base, void* buffer, DType type) const {
    if (base == nullptr) return;
    const int64_t offset = begin_ * size_of(type);
    std::memcpy(static_cast<char*>(base) + offset, static_cast<char*>(buffer) + offset, count_ * size_of(type));
  }

  const int64_t begin_;
  const int count_;
  int used_ = 0;
  alignas(64) char buffers_[kStreams][VectorPair<S>::kLanes * sizeof(S)] = {};
};

}  // namespace OPTKIT_ISA
}  // namespace optkit

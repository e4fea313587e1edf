// SPDX-License-Identifier: Apache-2.0
// The only loop over parameter elements on CPU. A vector of elements is loaded, taken through every stage in registers,
// and stored: one walk through memory, whatever is switched on.
#pragma once

#include "core/pipeline.h"
#include "cpu/access.h"
#include "cpu/code_loop.h"
#include "cpu/launch.h"

namespace optkit {
namespace OPTKIT_ISA {

template <class S>
struct VectorSums {
  Vec<S> grad_sq{S(0)}, param_sq{S(0)}, update_sq{S(0)};
  LaneCounter<S> nonfinite, lost;
  Vec<S> observed[kObserved] = {Vec<S>(S(0)), Vec<S>(S(0))};
};

template <class S>
OPTKIT_HD Mask<S> is_nonfinite(Vec<S> a) {
  return (a - a) != Vec<S>(S(0));
}

template <class S>
OPTKIT_HD void add_statistics(VectorSums<S>& sums, Vec<S> grad, Vec<S> update, Vec<S> next, Mask<S> unchanged) {
  sums.grad_sq = fma(grad, grad, sums.grad_sq);
  sums.param_sq = fma(next, next, sums.param_sq);
  sums.update_sq = fma(update, update, sums.update_sq);
  sums.nonfinite.add(is_nonfinite(grad));
  sums.lost.add((update != Vec<S>(S(0))) & unchanged);
}

// Stores `next` under the tensor's rounding; returns the stored values.
template <class S, bool kTail>
OPTKIT_HD Vec<S> store_parameter(const TensorSlot& t, const StageCoefs<S>& c, int64_t i, int count, Vec<S> next) {
  if constexpr (sizeof(S) == 4) {
    if ((c.flags & kStochastic) && t.param_type != DType::kFloat32)
      return store_stochastic<kTail>(t.param, t.param_type, i, count, next, c.key);
  }
  return store<S, kTail>(t.param, t.param_type, i, count, next);
}

// kMeasure: only sums what a rule's trust is made of; writes nothing.
template <class Rule, class S, bool kTail, bool kMeasure>
OPTKIT_HD void step_vector(const TensorSlot& t, const StageCoefs<S>& stage,
                           const typename Rule::template Coefs<S>& coefs, int64_t i, int count, VectorSums<S>& sums) {
  using V = Vec<S>;
  const V stored_before = load<S, kTail>(t.param, t.param_type, i, count);
  const V grad = stage_gradient(stage, stored_before, load<S, kTail>(t.grad, t.grad_type, i, count));
  V lost_before(S(0));
  if (t.compensation) lost_before = load<S, kTail>(t.compensation, t.param_type, i, count);
  const V param = stored_before + lost_before;

  // Lanes past `count` are computed like the others, from zeros, but enter no sum.
  const auto counted = [count](V a) { return kTail ? first_lanes(a, count) : a; };

  V state[Rule::kNumStates];
  for (int k = 0; k < Rule::kNumStates; ++k)
    state[k] = t.state[k] ? load<S, kTail>(t.state[k], type_of_state<Rule>(t, k), i, count) : V(S(0));
  const V update = Rule::update(coefs, param, grad, state);
  if constexpr (kMeasure) {
    const V g = counted(grad), u = counted(update);
    sums.grad_sq = fma(g, g, sums.grad_sq);
    sums.param_sq = fma(param, param, sums.param_sq);  // zero already where there is no parameter
    sums.update_sq = fma(u, u, sums.update_sq);
    return;
  }
  if constexpr (HasEstimate<Rule>::value) {
    V seen[kObserved];
    Rule::observe(coefs, param, grad, state, seen);
    for (int k = 0; k < kObserved; ++k) sums.observed[k] = sums.observed[k] + counted(seen[k]);
  }
  for (int k = 0; k < Rule::kNumStates; ++k)
    if (t.state[k] && writes_state<Rule>(coefs, k))
      store<S, kTail>(t.state[k], type_of_state<Rule>(t, k), i, count, state[k]);

  const V next = stage_parameter(stage, param, update);
  const V stored = store_parameter<S, kTail>(t, stage, i, count, next);
  Mask<S> unchanged = stored == stored_before;
  if (t.compensation) {
    const V lost = store<S, kTail>(t.compensation, t.param_type, i, count, next - stored);
    unchanged = unchanged & (lost == lost_before);
  }
  if (stage.flags & kAverage) {
    const V average = load<S, kTail>(t.average, t.average_type, i, count);
    store<S, kTail>(t.average, t.average_type, i, count, stage_average(stage, average, stored));
  }
  if (stage.flags & kStatistics) add_statistics(sums, counted(grad), counted(next - param), counted(next), unchanged);
}

// How far ahead of the arithmetic memory is asked for. Far enough to reach the next 4 KiB page, where the processor's
// own prefetcher stops; nearer than about 2 KiB it only gets in the way (docs/performance.md).
constexpr int64_t kPrefetchBytes = 3072;

OPTKIT_HD void prefetch(const void* base, DType type, int64_t i) {
  __builtin_prefetch(static_cast<const char*>(base) + i * size_of(type) + kPrefetchBytes);
}

template <class Rule>
OPTKIT_HD void prefetch_streams(const TensorSlot& t, bool averages, int64_t i) {
  prefetch(t.param, t.param_type, i);
  prefetch(t.grad, t.grad_type, i);
  for (int k = 0; k < Rule::kNumStates; ++k)
    if (t.state[k]) prefetch(t.state[k], type_of_state<Rule>(t, k), i);
  if (averages) prefetch(t.average, t.average_type, i);
}

template <class Rule, class S, bool kMeasure>
OPTKIT_HD void step_range(const TensorSlot& t, const StageCoefs<S>& stage,
                          const typename Rule::template Coefs<S>& coefs, int64_t begin, int64_t end,
                          VectorSums<S>& sums) {
  constexpr int kLanes = Vec<S>::kLanes;
  int64_t i = begin;
  for (; i + kLanes <= end; i += kLanes) {
    prefetch_streams<Rule>(t, stage.flags & kAverage, i);
    step_vector<Rule, S, false, kMeasure>(t, stage, coefs, i, kLanes, sums);
  }
  if (i < end) step_vector<Rule, S, true, kMeasure>(t, stage, coefs, i, static_cast<int>(end - i), sums);
}

// The same, with each unit's own scale and shift.
template <class Rule, class S, bool kMeasure>
OPTKIT_HD void step_units(const TensorSlot& t, const StageCoefs<S>& stage,
                          const typename Rule::template Coefs<S>& coefs, int64_t begin, int64_t end,
                          VectorSums<S>& sums) {
  StageCoefs<S> here = stage;
  for (int64_t unit = begin / t.unit_length; begin < end; ++unit) {
    const int64_t unit_end = (unit + 1) * t.unit_length;
    const int64_t until = unit_end < end ? unit_end : end;
    here.grad_scale = static_cast<S>(stage.grad_scale * t.unit_scale[unit]);
    here.unit_shift = static_cast<S>(t.unit_shift[unit]);
    step_range<Rule, S, kMeasure>(t, here, coefs, begin, until, sums);
    begin = until;
  }
}

template <class Rule, class S, bool kMeasure>
void walk_chunk(const TensorSlot& tensor, const void* prepared, const Chunk& chunk, Sums* out) {
  // By value: the compiler then knows that no store in the loop can change them.
  TensorSlot slot = tensor;
  const DecodedStates decoded(&slot, Rule::kNumStates, WideStates<Rule>::bits, chunk);
  const TensorSlot t = slot;
  const auto launch = *static_cast<const PreparedTensor<Rule, S>*>(prepared);
  const int64_t end = chunk.begin + chunk.count;
  VectorSums<S> sums;
  if (t.unit_scale == nullptr)
    step_range<Rule, S, kMeasure>(t, launch.stage, launch.rule, chunk.begin, end, sums);
  else
    step_units<Rule, S, kMeasure>(t, launch.stage, launch.rule, chunk.begin, end, sums);
  if constexpr (!kMeasure) decoded.encode(Rule::kNumStates, launch.stage.key);
  if (kMeasure || HasEstimate<Rule>::value || (launch.stage.flags & kStatistics)) {
    *out = {sum_of_lanes(sums.grad_sq),
            sum_of_lanes(sums.param_sq),
            sum_of_lanes(sums.update_sq),
            sums.nonfinite.total(),
            sums.lost.total(),
            {sum_of_lanes(sums.observed[0]), sum_of_lanes(sums.observed[1])}};
  }
}

template <class Rule, class S>
void step_chunk(const TensorSlot& tensor, const void* prepared, const Chunk& chunk, Sums* out) {
  walk_chunk<Rule, S, false>(tensor, prepared, chunk, out);
}

// Null for a rule without trust.
template <class Rule, class S>
constexpr StepChunk measure_chunk() {
  if constexpr (HasTrust<Rule>::value)
    return &walk_chunk<Rule, S, true>;
  else
    return nullptr;
}

}  // namespace OPTKIT_ISA
}  // namespace optkit

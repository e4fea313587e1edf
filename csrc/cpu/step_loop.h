// SPDX-License-Identifier: Apache-2.0
// The only loop over parameter elements on CPU. A vector of elements is loaded, taken through every stage in registers,
// and stored: one walk through memory, whatever is switched on.
#pragma once

#include "core/pipeline.h"
#include "cpu/factor_loop.h"
#include "cpu/launch.h"
#include "cpu/quantized_loop.h"
#include "cpu/vector_pair.h"

namespace optkit {
namespace OPTKIT_ISA {

template <class S>
struct PairSums {
  PairTotal<S> grad_sq, param_sq, update_sq;
  PairCounter<S> nonfinite, lost;
  PairTotal<S> observed[kObserved];
};

template <class S>
OPTKIT_HD void add_statistics(PairSums<S>& sums, VectorPair<S> grad, VectorPair<S> update, VectorPair<S> next,
                              PairMask<S> unchanged) {
  sums.grad_sq.add(grad, grad);
  sums.param_sq.add(next, next);
  sums.update_sq.add(update, update);
  sums.nonfinite.add((grad - grad) != VectorPair<S>(S(0)));
  sums.lost.add((update != VectorPair<S>(S(0))) & unchanged);
}

// Stores `next` under the tensor's rounding; returns the stored values.
template <class S>
OPTKIT_HD VectorPair<S> store_parameter(const TensorSlot& t, const StageCoefs<S>& c, int64_t i,
                                        const VectorPair<S>& next) {
  if constexpr (sizeof(S) == 4) {
    if ((c.flags & kStochastic) && t.param_type != DType::kFloat32)
      return store_pair_stochastic(t.param, t.param_type, i, next, c.key);
  }
  return store_pair<S>(t.param, t.param_type, i, next);
}

// Elements [i, i + VectorPair<S>::kLanes), of which the first `count` enter the sums.
// kMeasure: only adds up what the trust ratio is computed from; writes nothing.
template <class Rule, class S, bool kMeasure>
OPTKIT_HD void step_pair(const TensorSlot& t, const StageCoefs<S>& stage, const typename Rule::template Coefs<S>& coefs,
                         int64_t i, int count, PairSums<S>& sums) {
  using V = VectorPair<S>;
  const V stored_before = load_pair<S>(t.param, t.param_type, i);
  const V grad = stage_gradient(stage, stored_before, load_pair<S>(t.grad, t.grad_type, i));
  V lost_before(S(0));
  if (t.compensation) lost_before = finite_or_zero(load_pair<S>(t.compensation, t.param_type, i));
  const V param = stored_before + lost_before;

  const auto counted = [count](const V& a) { return count < V::kLanes ? first_lanes(a, count) : a; };

  V state[Rule::kNumStates];
  for (int k = 0; k < Rule::kNumStates; ++k)
    state[k] = t.state[k] ? load_pair<S>(t.state[k], type_of_state<Rule>(t, k), i) : V(S(0));
  const V update = Rule::update(coefs, param, grad, state);
  if constexpr (kMeasure) {
    const V g = counted(grad), p = counted(param), u = counted(update);
    if (Rule::kMeasured & kGradSquares) sums.grad_sq.add(g, g);
    if (Rule::kMeasured & kParamSquares) sums.param_sq.add(p, p);
    if (Rule::kMeasured & kUpdateSquares) sums.update_sq.add(u, u);
    return;
  }
  if constexpr (HasEstimate<Rule>::value) {
    V seen[kObserved], times[kObserved];
    Rule::observe(coefs, param, grad, state, seen, times);
    for (int k = 0; k < kObserved; ++k) sums.observed[k].add(counted(seen[k]), counted(times[k]));
  }
  for (int k = 0; k < Rule::kNumStates; ++k)
    if (t.state[k] && writes_state<Rule>(coefs, k)) store_pair<S>(t.state[k], type_of_state<Rule>(t, k), i, state[k]);

  const V next = stage_parameter(stage, param, update);
  const V stored = store_parameter<S>(t, stage, i, next);
  PairMask<S> unchanged = stored == stored_before;
  if (t.compensation) {
    // Beyond the largest number of the dtype nothing is kept: an infinity would stay when the parameter comes back.
    const V lost = store_pair<S>(t.compensation, t.param_type, i, finite_or_zero(next - stored));
    unchanged = unchanged & (lost == lost_before);
  }
  if (stage.flags & kAverage) {
    const V average = load_pair<S>(t.average, t.average_type, i);
    store_pair<S>(t.average, t.average_type, i, stage_average(stage, average, stored));
  }
  if (stage.flags & kStatistics) add_statistics(sums, counted(grad), counted(next - param), counted(next), unchanged);
}

// What the loop runs for: every stage and dtype; the stages that most runs have, in fp32, with all states or with the
// needed ones alone; or the sums for a trust ratio alone.
enum class Walk { kWhole, kLean, kBare, kMeasure };

// Stages that the lean loop knows. It is a second copy of the loop, a small one: every branch that goes is paid for by
// all those who do not need it (docs/performance.md).
constexpr uint32_t kLeanFlags = kL2 | kDecay | kAverage;

template <class Rule>
constexpr uint32_t kAllStates = (1u << Rule::kNumStates) - 1;

// kWhole, kLean or kBare.
template <class Rule, class S>
Walk walk_of(const TensorSlot& t, const StageCoefs<S>& stage) {
  if (sizeof(S) == 8 || HasEstimate<Rule>::value || (stage.flags & ~kLeanFlags) || t.compensation) return Walk::kWhole;
  if (t.param_type != DType::kFloat32 || t.grad_type != DType::kFloat32 || t.state_type != DType::kFloat32 ||
      t.average_type != DType::kFloat32)
    return Walk::kWhole;
  uint32_t present = 0;
  for (int k = 0; k < Rule::kNumStates; ++k) present |= t.state[k] ? 1u << k : 0u;
  return present == kAllStates<Rule> ? Walk::kLean : present == NeededStates<Rule>::bits ? Walk::kBare : Walk::kWhole;
}

// Elements [begin, end), a whole number of pairs, of whose last `count` enter the sums. Not inlined: it is the bulk of
// the code, and serves whole runs and staged ends alike.
template <class Rule, class S, Walk kWalk>
__attribute__((noinline)) void step_pairs(const TensorSlot& tensor, const StageCoefs<S>& stages,
                                          const typename Rule::template Coefs<S>& numbers, int64_t begin, int64_t end,
                                          int count, PairSums<S>* out) {
  // By value: the compiler then knows that no store in the loop can change them.
  TensorSlot t = tensor;
  StageCoefs<S> stage = stages;
  const auto coefs = numbers;
  constexpr bool kIsLean = kWalk == Walk::kLean || kWalk == Walk::kBare;
  if constexpr (kIsLean) {
    t.param_type = t.grad_type = t.state_type = t.average_type = DType::kFloat32;
    t.compensation = nullptr;
    stage.flags &= kLeanFlags;
    count = VectorPair<S>::kLanes;
    constexpr uint32_t kStates = kWalk == Walk::kLean ? kAllStates<Rule> : NeededStates<Rule>::bits;
    for (int k = 0; k < Rule::kNumStates; ++k) {
      if (kStates >> k & 1u) {
        if (t.state[k] == nullptr) __builtin_unreachable();
      } else {
        t.state[k] = nullptr;
      }
    }
  }
  PairSums<S> sums = *out;
  for (int64_t i = begin; i < end; i += VectorPair<S>::kLanes)
    step_pair<Rule, S, kWalk == Walk::kMeasure>(t, stage, coefs, i, count, sums);
  if constexpr (!kIsLean) *out = sums;
}

// Fewer elements than a pair holds, by way of buffers: the walk then has one form for all lengths.
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
    stage(&staged.compensation, t.param_type);
  }
  // What was written, but the gradient, goes back.
  void write_back(const TensorSlot& t) const {
    copy_back(t.param, staged.param, t.param_type);
    for (int k = 0; k < Rule::kNumStates; ++k) copy_back(t.state[k], staged.state[k], type_of_state<Rule>(t, k));
    copy_back(t.average, staged.average, t.average_type);
    copy_back(t.compensation, staged.compensation, t.param_type);
  }

  TensorSlot staged;

 private:
  static constexpr int kStreams = 4 + kMaxStates;

  // Replaces *base by a buffer whose element `begin_` is the first.
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

template <class Rule, class S, bool kMeasure>
void step_range(const TensorSlot& t, const StageCoefs<S>& stage, const typename Rule::template Coefs<S>& coefs,
                int64_t begin, int64_t end, PairSums<S>& sums) {
  constexpr int kLanes = VectorPair<S>::kLanes;
  const int64_t whole = begin + (end - begin) / kLanes * kLanes;
  constexpr Walk kWalk = kMeasure ? Walk::kMeasure : Walk::kWhole;
  constexpr bool kHasLean = !kMeasure && sizeof(S) == 4;
  constexpr bool kHasBare = kHasLean && NeededStates<Rule>::bits != kAllStates<Rule>;
  const Walk walk = kHasLean ? walk_of<Rule>(t, stage) : kWalk;
  if (begin < whole) {
    if (walk == Walk::kLean)
      step_pairs<Rule, S, kHasLean ? Walk::kLean : kWalk>(t, stage, coefs, begin, whole, kLanes, &sums);
    else if (walk == Walk::kBare)
      step_pairs<Rule, S, kHasBare ? Walk::kBare : kWalk>(t, stage, coefs, begin, whole, kLanes, &sums);
    else
      step_pairs<Rule, S, kWalk>(t, stage, coefs, begin, whole, kLanes, &sums);
  }
  if (whole == end) return;
  const int rest = static_cast<int>(end - whole);
  StagedEnd<Rule, S> short_end(t, whole, rest);
  step_pairs<Rule, S, kWalk>(short_end.staged, stage, coefs, whole, whole + kLanes, rest, &sums);
  if constexpr (!kMeasure) short_end.write_back(t);
}

// The same, with each unit's own scale and shift.
template <class Rule, class S, bool kMeasure>
void step_units(const TensorSlot& t, const StageCoefs<S>& stage, const typename Rule::template Coefs<S>& coefs,
                int64_t begin, int64_t end, PairSums<S>& sums) {
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
  TensorSlot t = tensor;
  const DequantizedStates dequantized(&t, Rule::kNumStates, FullPrecisionStates<Rule>::bits, chunk);
  const auto& launch = *static_cast<const PreparedTensor<Rule, S>*>(prepared);
  if constexpr (HasFactors<Rule>::value) spread_factors<Rule, S>(&t, launch.rule, chunk);
  const int64_t end = chunk.begin + chunk.count;
  PairSums<S> sums;
  if (t.unit_scale == nullptr)
    step_range<Rule, S, kMeasure>(t, launch.stage, launch.rule, chunk.begin, end, sums);
  else
    step_units<Rule, S, kMeasure>(t, launch.stage, launch.rule, chunk.begin, end, sums);
  if constexpr (!kMeasure) dequantized.quantize(Rule::kNumStates, launch.stage.key);
  if (kMeasure || HasEstimate<Rule>::value || (launch.stage.flags & kStatistics)) {
    *out = {sums.grad_sq.total(),   sums.param_sq.total(), sums.update_sq.total(),
            sums.nonfinite.total(), sums.lost.total(),     {sums.observed[0].total(), sums.observed[1].total()}};
  }
}

template <class Rule, class S>
void step_chunk(const TensorSlot& tensor, const void* prepared, const Chunk& chunk, Sums* out) {
  walk_chunk<Rule, S, false>(tensor, prepared, chunk, out);
}

// Null for a rule whose rate follows no norms.
template <class Rule, class S>
constexpr StepChunk measure_chunk() {
  if constexpr (HasTrustRatio<Rule>::value || HasFactors<Rule>::value)
    return &walk_chunk<Rule, S, true>;
  else
    return nullptr;
}

template <class Rule, class S>
constexpr FactorKernels factor_kernels() {
  if constexpr (HasFactors<Rule>::value)
    return {&sum_strips<Rule, S>, &make_factors<Rule, S>};
  else
    return {nullptr, nullptr};
}

}  // namespace OPTKIT_ISA
}  // namespace optkit

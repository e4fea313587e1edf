// SPDX-License-Identifier: Apache-2.0
// The only loop over parameter elements on CPU. A vector of elements is loaded, taken through every stage in registers,
// and stored: one walk through memory, whatever stages are on.
#pragma once

#include <type_traits>

#include "core/pipeline.h"
#include "cpu/factor_loop.h"
#include "cpu/launch.h"
#include "cpu/pair_access.h"
#include "cpu/quantized_loop.h"
#include "cpu/split_weights.h"
#include "cpu/staged_end.h"
#include "cpu/vector_pair.h"

namespace optkit {
namespace OPTKIT_ISA {

template <class S>
struct PairSums {
  PairTotal<S> grad_sq, param_sq, update_sq;
  PairCounter<S> nonfinite, lost;
  PairTotal<S> observed[kObserved];
};

template <class S, PairKind kKind>
OPTKIT_HD void add_statistics(PairSums<S>& sums, VectorPair<S, kKind> grad, VectorPair<S, kKind> update,
                              VectorPair<S, kKind> next, PairMask<S> unchanged) {
  sums.grad_sq.add(grad, grad);
  sums.param_sq.add(next, next);
  sums.update_sq.add(update, update);
  const VectorPair<S, kKind> zero(S(0));
  sums.nonfinite.add((grad - grad) != zero);
  sums.lost.add((update != zero) & unchanged);
}

// Loads a parameter; joins the two parts of split weights.
template <class S, PairKind kKind>
OPTKIT_HD VectorPair<S, kKind> load_parameter(const TensorSlot& t, int64_t i) {
  if constexpr (sizeof(S) == 4) {
    if (is_split(t)) return load_split_pair<kKind>(t, i);
  }
  return load_pair<S, kKind>(t.param, t.param_type, i);
}

// Stores `next` with the tensor's rounding; returns the stored values.
template <class S, PairKind kKind>
OPTKIT_HD VectorPair<S, kKind> store_parameter(const TensorSlot& t, const StageCoefs<S>& c, int64_t i,
                                               const VectorPair<S, kKind>& next, const PairBits& random) {
  if constexpr (sizeof(S) == 4) {
    if (is_split(t)) return store_split(t, i, next, random);
    if ((c.flags & kStochastic) && t.param_type != DType::kFloat32)
      return store_pair_stochastic(t.param, t.param_type, i, next, random);
  }
  return store_pair(t.param, t.param_type, i, next);
}

// 16-bit state is always rounded stochastically: an average moves by less than half a unit in its last place, so
// rounding to nearest would leave it unchanged.
template <class S, PairKind kKind>
OPTKIT_HD void store_rounded(void* base, DType type, int64_t i, const VectorPair<S, kKind>& value,
                             const PairBits& random, int state) {
  if constexpr (sizeof(S) == 4) {
    if (size_of(type) == 2) {
      store_pair_stochastic(base, type, i, value, bits_of_state(random, state));
      return;
    }
  }
  store_pair(base, type, i, value);
}

// Elements [i, i + VectorPair<S>::kLanes), of which the first `count` enter the sums.
// kMeasure: only accumulates the sums for the trust ratio; writes nothing.
// kHeld: bit mask of states in fp32 whose pairs have the order of their lanes in memory (QuantizedBlock).
template <class Rule, class S, bool kMeasure, PairKind kKind, uint32_t kHeld = 0>
OPTKIT_HD void step_pair(const TensorSlot& t, const StageCoefs<S>& stage, const typename Rule::template Coefs<S>& coefs,
                         int64_t i, int count, PairSums<S>& sums) {
  using V = VectorPair<S, kKind>;
  const V stored_before = load_parameter<S, kKind>(t, i);
  const V grad = stage_gradient(stage, stored_before, load_pair<S, kKind>(t.grad, t.grad_type, i));
  V lost_before(S(0)), param = stored_before;
  if (t.compensation && !is_split(t)) {
    const V kept = load_pair<S, kKind>(t.compensation, t.param_type, i);
    lost_before = rest_of(stored_before, kept, static_cast<S>(half_unit(t.param_type)));
    param = stored_before + lost_before;
  }

  const auto counted = [count](const V& a) { return count < V::kLanes ? first_lanes(a, count) : a; };

  V state[Rule::kNumStates];
  for (int k = 0; k < Rule::kNumStates; ++k)
    state[k] = kHeld >> k & 1u ? load_lanes<S, kKind>(t.state[k], i)
               : t.state[k]    ? load_pair<S, kKind>(t.state[k], type_of_state<Rule>(t, k), i)
                               : V(S(0));
  const V update = update_or_limited<Rule, kMeasure>(coefs, param, grad, state);
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
  PairBits random = {};
  const bool has_narrow_average = (stage.flags & kAverage) && size_of(t.average_type) == 2;
  if (sizeof(S) == 4 &&
      (size_of(t.state_type) == 2 || (stage.flags & kStochastic) || is_split(t) || has_narrow_average))
    random = random_pair<kKind == PairKind::kAlternating>(stage.key, i);
  for (int k = 0; k < Rule::kNumStates; ++k) {
    if (t.state[k] == nullptr || !writes_state<Rule>(coefs, k)) continue;
    if (kHeld >> k & 1u)
      store_lanes(t.state[k], i, state[k]);
    else
      store_rounded(t.state[k], type_of_state<Rule>(t, k), i, state[k], random, k);
  }

  const V next = stage_parameter(stage, param, update);
  const V stored = store_parameter(t, stage, i, next, random);
  PairMask<S> unchanged = stored == stored_before;
  if (t.compensation && !is_split(t)) {
    // Nothing is kept on overflow: an infinity would remain after the parameter has come back in range.
    const V lost = store_pair(t.compensation, t.param_type, i, finite_or_zero(next - stored));
    unchanged = unchanged & (lost == lost_before);
  }
  if (stage.flags & kAverage) {
    const V average = load_pair<S, kKind>(t.average, t.average_type, i);
    store_rounded(t.average, t.average_type, i, stage_average(stage, average, stored), random, kAverageState);
  }
  if (stage.flags & kStatistics) add_statistics(sums, counted(grad), counted(next - param), counted(next), unchanged);
}

// What a copy of the loop is compiled for. Whole: every stage and dtype. Measuring: only the sums for a trust ratio.
struct Whole {
  static constexpr bool kIsLean = false, kMeasures = false;
  static constexpr PairKind kKind = PairKind::kPlain;
};
struct Measuring {
  static constexpr bool kIsLean = false, kMeasures = true;
  static constexpr PairKind kKind = PairKind::kPlain;
};

// Lean: the stages and dtypes that most runs have, and the states of bit mask `kStateSet`. Gradients are of the
// parameter's dtype. Branches for rare stages would slow down every run without them (docs/performance.md).
template <uint32_t kStateSet, DType kParam, DType kState>
struct Lean {
  static constexpr bool kIsLean = true, kMeasures = false;
  static constexpr uint32_t kStates = kStateSet;
  static constexpr DType kParamType = kParam, kStateType = kState;
  static constexpr bool kIsQuantized = kState == DType::kQuantized8;
  static constexpr bool kIsBFloat16 = kParam == DType::kBFloat16 && kState == DType::kBFloat16;
  static constexpr PairKind kKind = kIsBFloat16 || kIsQuantized ? PairKind::kAlternating : PairKind::kPlain;
};

// Stages that the lean loops support; those over 16-bit parameters also support every rounding.
constexpr uint32_t kLeanFlags = kL2 | kDecay | kAverage, kLeanRoundings = kStochastic | kKahan;

template <class Rule>
constexpr uint32_t kAllStates = (1u << Rule::kNumStates) - 1;

// Tells the compiler what a lean loop may assume.
template <class Rule, class Form, class S>
OPTKIT_HD void assume_lean(TensorSlot& t, StageCoefs<S>& stage) {
  constexpr bool kIsFloat32 = Form::kParamType == DType::kFloat32;
  t.param_type = t.grad_type = Form::kParamType;
  t.state_type = Form::kStateType == DType::kQuantized8 ? DType::kFloat32 : Form::kStateType;  // dequantized
  if (kIsFloat32) t.average_type = DType::kFloat32;
  if (t.average_type == DType::kFloat16) __builtin_unreachable();
  if (kIsFloat32) t.compensation = nullptr;
  stage.flags &= kLeanFlags | (kIsFloat32 ? 0u : kLeanRoundings);
  for (int k = 0; k < Rule::kNumStates; ++k) {
    if (Form::kStates >> k & 1u) {
      if (t.state[k] == nullptr) __builtin_unreachable();
    } else {
      t.state[k] = nullptr;
    }
  }
}

// Elements [begin, end): a whole number of pairs, or of blocks where state is in 8 bits. Of the last pair, `count`
// elements enter the sums. Not inlined: it is most of the code, and serves whole runs and staged ends alike.
template <class Rule, class S, class Form>
__attribute__((noinline)) void step_pairs(const TensorSlot& tensor, const StageCoefs<S>& stages,
                                          const typename Rule::template Coefs<S>& numbers, int64_t begin, int64_t end,
                                          int count, PairSums<S>* out) {
  // A copy, so that the compiler knows that no store in the loop can change it.
  TensorSlot t = tensor;
  StageCoefs<S> stage = stages;
  const auto coefs = numbers;
  PairSums<S> sums = *out;
  if constexpr (Form::kIsLean) {
    assume_lean<Rule, Form>(t, stage);
    count = VectorPair<S>::kLanes;
    if constexpr (Form::kIsQuantized) {
      constexpr uint32_t kHeld = Form::kStates & ~FullPrecisionStates<Rule>::bits;
      QuantizedBlock<Rule::kNumStates, kHeld> block(tensor);
      for (int64_t first = begin; first < end; first += kQuantizedBlock) {
        block.dequantize(first, t.state);
        for (int64_t i = first; i < first + kQuantizedBlock; i += VectorPair<S>::kLanes)
          step_pair<Rule, S, false, Form::kKind, kHeld>(t, stage, coefs, i, count, sums);
        block.quantize(first, stage.key);
      }
      return;
    }
  }
  for (int64_t i = begin; i < end; i += VectorPair<S>::kLanes)
    step_pair<Rule, S, Form::kMeasures, Form::kKind>(t, stage, coefs, i, count, sums);
  if constexpr (!Form::kIsLean) *out = sums;
}

template <class Rule>
using StepPairs = void (*)(const TensorSlot&, const StageCoefs<float>&, const typename Rule::template Coefs<float>&,
                           int64_t, int64_t, int, PairSums<float>*);

template <class Rule, uint32_t kStates, DType kParam>
StepPairs<Rule> lean_loop_of(DType state_type) {
  switch (state_type) {
    case DType::kFloat32:
      return &step_pairs<Rule, float, Lean<kStates, kParam, DType::kFloat32>>;
    case DType::kBFloat16:
      return &step_pairs<Rule, float, Lean<kStates, kParam, DType::kBFloat16>>;
    case DType::kQuantized8:
      return &step_pairs<Rule, float, Lean<kStates, kParam, DType::kQuantized8>>;
    default:
      return nullptr;
  }
}

// The lean loop for this tensor, with all states or only the needed ones; null if it takes the whole loop.
template <class Rule>
StepPairs<Rule> lean_loop(const TensorSlot& t, const StageCoefs<float>& stage) {
  if constexpr (HasEstimate<Rule>::value || HasFactors<Rule>::value) return nullptr;
  const bool is_float32 = t.param_type == DType::kFloat32;
  if (t.grad_type != t.param_type) return nullptr;
  if (t.average_type != DType::kFloat32 && (is_float32 || t.average_type != DType::kBFloat16)) return nullptr;
  if (is_float32 ? (stage.flags & ~kLeanFlags) != 0 || t.compensation != nullptr
                 : t.param_type != DType::kBFloat16 || (stage.flags & ~(kLeanFlags | kLeanRoundings)) != 0)
    return nullptr;
  constexpr uint32_t kAll = kAllStates<Rule>, kNeeded = NeededStates<Rule>::bits;
  uint32_t present = 0;
  for (int k = 0; k < Rule::kNumStates; ++k) present |= t.state[k] ? 1u << k : 0u;
  if (present == kAll && kAll != 0)
    return is_float32 ? lean_loop_of<Rule, kAll, DType::kFloat32>(t.state_type)
                      : lean_loop_of<Rule, kAll, DType::kBFloat16>(t.state_type);
  if (present != kNeeded || (kNeeded != 0 && t.state_type != DType::kFloat32)) return nullptr;
  return is_float32 ? &step_pairs<Rule, float, Lean<kNeeded, DType::kFloat32, DType::kFloat32>>
                    : &step_pairs<Rule, float, Lean<kNeeded, DType::kBFloat16, DType::kFloat32>>;
}

template <class Rule, class S, bool kMeasure>
void step_range(const TensorSlot& t, const StageCoefs<S>& stage, const typename Rule::template Coefs<S>& coefs,
                int64_t begin, int64_t end, PairSums<S>& sums) {
  constexpr int kLanes = VectorPair<S>::kLanes;
  using Form = std::conditional_t<kMeasure, Measuring, Whole>;
  const int64_t whole = begin + (end - begin) / kLanes * kLanes;
  if (begin < whole) {
    auto loop = &step_pairs<Rule, S, Form>;
    if constexpr (!kMeasure && sizeof(S) == 4)
      if (const auto lean = lean_loop<Rule>(t, stage)) loop = lean;
    loop(t, stage, coefs, begin, whole, kLanes, &sums);
  }
  if (whole == end) return;
  const int rest = static_cast<int>(end - whole);
  StagedEnd<Rule, S> short_end(t, whole, rest);
  step_pairs<Rule, S, Form>(short_end.staged, stage, coefs, whole, whole + kLanes, rest, &sums);
  if constexpr (!kMeasure) short_end.write_back(t);
}

// The same, with a scale and shift per unit.
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
void walk_part(TensorSlot t, const PreparedTensor<Rule, S>& launch, const Chunk& part, PairSums<S>& sums) {
  if constexpr (HasFactors<Rule>::value) spread_factors<Rule, S>(&t, launch.rule, part);
  const int64_t end = part.begin + part.count;
  if (t.unit_scale == nullptr)
    step_range<Rule, S, kMeasure>(t, launch.stage, launch.rule, part.begin, end, sums);
  else
    step_units<Rule, S, kMeasure>(t, launch.stage, launch.rule, part.begin, end, sums);
}

// 8-bit state: dequantized part by part; in the lean loops, whole blocks one at a time.
template <class Rule, bool kMeasure>
void walk_quantized(const TensorSlot& t, const PreparedTensor<Rule, float>& launch, const Chunk& chunk,
                    PairSums<float>& sums) {
  int64_t done = 0;
  if constexpr (!kMeasure) {
    const auto lean = t.unit_scale == nullptr ? lean_loop<Rule>(t, launch.stage) : nullptr;
    const int64_t blocks = chunk.count / kQuantizedBlock * kQuantizedBlock;
    if (lean != nullptr && blocks > 0) {
      lean(t, launch.stage, launch.rule, chunk.begin, chunk.begin + blocks, 0, &sums);
      done = blocks;
    }
  }
  uint32_t states = 0;
  for (int k = 0; k < Rule::kNumStates; ++k)
    states |= t.state[k] != nullptr && type_of_state<Rule>(t, k) == DType::kQuantized8 ? 1u << k : 0u;
  for (; done < chunk.count; done += kQuantizedPart) {
    const int64_t count = chunk.count - done < kQuantizedPart ? chunk.count - done : kQuantizedPart;
    const Chunk part = {chunk.begin + done, chunk.tensor, static_cast<int32_t>(count)};
    const DequantizedStates dequantized(t, states, part);
    walk_part<Rule, float, kMeasure>(dequantized.slot(), launch, part, sums);
    if constexpr (!kMeasure) dequantized.quantize(launch.stage.key);
  }
}

template <class Rule, class S, bool kMeasure>
void walk_chunk(const TensorSlot& t, const void* prepared, const Chunk& chunk, Sums* out) {
  const auto& launch = *static_cast<const PreparedTensor<Rule, S>*>(prepared);
  PairSums<S> sums;
  if constexpr (sizeof(S) == 4) {
    if (t.state_type == DType::kQuantized8)
      walk_quantized<Rule, kMeasure>(t, launch, chunk, sums);
    else
      walk_part<Rule, S, kMeasure>(t, launch, chunk, sums);
  } else {
    walk_part<Rule, S, kMeasure>(t, launch, chunk, sums);
  }
  if (kMeasure || HasEstimate<Rule>::value || (launch.stage.flags & kStatistics)) {
    *out = {sums.grad_sq.total(),   sums.param_sq.total(), sums.update_sq.total(),
            sums.nonfinite.total(), sums.lost.total(),     {sums.observed[0].total(), sums.observed[1].total()}};
  }
}

template <class Rule, class S>
void step_chunk(const TensorSlot& tensor, const void* prepared, const Chunk& chunk, Sums* out) {
  walk_chunk<Rule, S, false>(tensor, prepared, chunk, out);
}

// Null for a rule that needs no sums before its step.
template <class Rule, class S>
constexpr StepChunk measure_chunk() {
  if constexpr (measures_first<Rule>() || HasFactors<Rule>::value)
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

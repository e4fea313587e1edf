// SPDX-License-Identifier: Apache-2.0
// What a plan consists of: plain tables, built once, walked by the CPU and by CUDA alike.
#pragma once

#include <cstdint>

#include "core/macros.h"

namespace optkit {

// kQuantized8: state only, see core/quantized_state.h.
enum class DType : int32_t { kFloat32 = 0, kBFloat16 = 1, kFloat16 = 2, kFloat64 = 3, kQuantized8 = 4 };

OPTKIT_HD constexpr int64_t size_of(DType type) {
  return type == DType::kFloat64 ? 8 : type == DType::kFloat32 ? 4 : type == DType::kQuantized8 ? 1 : 2;
}

constexpr int kMaxStates = 4;            // state tensors of one rule
constexpr int kMaxScalars = 2;           // numbers per parameter that a rule carries from step to step
constexpr int kMaxHyperparameters = 12;  // numbers a rule reads from its parameter group
constexpr int kObserved = 2;             // sums that a rule makes its estimate of
constexpr int64_t kChunk =
    16384;  // elements: 64 KiB of fp32 per stream, so that the streams of a step share the L2 cache

// What the state of a matrix that is kept by rows and columns becomes in a step. Rows and columns are those of the last
// two dimensions, counted over all matrices of the tensor.
struct Factors {
  double* row_sums;     // of the squared gradient, per row
  double* column_sums;  // per strip and column
  void* row;            // per row and per column, in the type that is computed in: their products are one over the root
  void* column;         // of the second moment
  int64_t num_strips;   // runs of rows that a matrix is cut into
};

// One parameter: where its numbers live. Null: absent.
struct TensorSlot {
  void* param;
  const void* grad;
  void* state[kMaxStates];
  float* state_scale[kMaxStates];  // of 8-bit state: the largest magnitude of each block
  void* average;
  void* compensation;  // what Kahan summation could not store in `param`, in the dtype of `param`
  float* scalar[kMaxScalars];
  float* step;             // times this parameter was updated
  float* num_averaged;     // updates of `average`
  double* unit_scale;      // per unit (output row) of the tensor, this step: factor of its gradient, and what is then
  double* unit_shift;      // subtracted from it. Null: no unit is treated by itself
  int64_t unit_length;     // elements of a unit; they lie together
  const Factors* factors;  // of a matrix under a rule with factors; else null
  int64_t rows, columns;   // the last two dimensions, 1 where there are fewer
  int64_t numel;
  DType param_type, grad_type, state_type, average_type;
  int32_t group;
  int32_t index;             // number of the parameter in its optimizer: its random stream
  int32_t active;            // 0: no gradient this step
  uint32_t unsigned_states;  // bit k: 8-bit state k is never negative
  int32_t is_vector;         // 1: fewer than two dimensions, so one unit, which is not centralized
};

// A run of elements of one tensor: the unit of work, and of every partial sum.
struct Chunk {
  int64_t begin;
  int32_t tensor;
  int32_t count;
};

enum class AverageKind : int32_t { kNone = 0, kExponential = 1, kUniform = 2 };
constexpr const char* kAverageKinds[] = {"none", "exponential", "uniform"};
enum class Rounding : int32_t { kNearest = 0, kStochastic = 1, kKahan = 2 };
constexpr const char* kRoundings[] = {"nearest", "stochastic", "kahan"};

// One parameter group, in the numbers a user sees. Doubles throughout: this is the row Python writes.
struct GroupRow {
  double lr;
  double weight_decay;
  double decoupled;  // 1: decay acts on the parameter; 0: on the gradient (L2)
  double cautious;   // 1: decoupled decay only where the update points the same way
  double maximize;
  double l1;
  double centralize;        // 1: the mean of each unit is taken off its gradient
  double clip_value;        // +inf: off
  double clip_tensor_norm;  // largest norm of one tensor's gradient; +inf: off
  double clip_unit_ratio;   // largest |gradient| / |parameter| of one unit; +inf: off
  double clip_unit_eps;     // least |parameter| in that ratio
  double rounding;          // a Rounding
  double rounding_seed;
  double average_kind;   // an AverageKind
  double average_decay;  // of the exponential kind
  double average_due;    // 1: this step's result is averaged
  double rule[kMaxHyperparameters];
};
constexpr const char* kGroupFields[] = {"lr",
                                        "weight_decay",
                                        "decoupled",
                                        "cautious",
                                        "maximize",
                                        "l1",
                                        "centralize",
                                        "clip_value",
                                        "clip_tensor_norm",
                                        "clip_unit_ratio",
                                        "clip_unit_eps",
                                        "rounding",
                                        "rounding_seed",
                                        "average_kind",
                                        "average_decay",
                                        "average_due"};
constexpr int kNumGroupFields = sizeof(kGroupFields) / sizeof(kGroupFields[0]);
static_assert(sizeof(GroupRow) == sizeof(double) * (kNumGroupFields + kMaxHyperparameters),
              "GroupRow must match its names");

// Is a bound of a group one? Off is +inf; a comparison, since isinf is not the same function on host and device.
OPTKIT_HD bool is_bounded(double bound) { return bound < 1e300; }

// Are units of a group's tensors treated by themselves?
OPTKIT_HD bool treats_units(const GroupRow& group) {
  return group.centralize != 0.0 || is_bounded(group.clip_unit_ratio);
}

// Sums over one unit: what its scale and shift are made of.
struct UnitSums {
  double grad;               // of the gradients after scaling and value clip
  double grad_sq, param_sq;  // of the gradients before, and of the parameters
};

// What clipping by tensor or by unit left.
struct Clipped {
  double grad_sq;  // sum of squares of the gradients, before scaling
  double num;      // tensors or units that were scaled down
};

// Sums over one chunk, or over one tensor.
struct Sums {
  double grad_sq, param_sq, update_sq;
  double nonfinite;            // gradient elements that are inf or NaN
  double lost;                 // elements whose stored value did not change although their update was not zero
  double observed[kObserved];  // of a rule with an estimate
};

// Sums of squares that a rule may set its rate by.
enum Squares : uint32_t { kGradSquares = 1, kParamSquares = 2, kUpdateSquares = 4 };

// Does a rule set its rate by norms of the whole tensor? Then it names the sums in kMeasured, since what is not asked
// for is not read, and says how:
//   static double trust_ratio(const double* hyper, const Sums& sums)   the factor of the rate, given the squares of the
//   gradient it sees, of the parameter, and of its own update at a rate of 1.
template <class Rule, class = void>
struct HasTrustRatio {
  static constexpr bool value = false;
};
template <class Rule>
struct HasTrustRatio<Rule, decltype(void(&Rule::trust_ratio))> {
  static constexpr bool value = true;
};

// Does a rule keep the state of a matrix by rows and columns? Then, behind its kNumStates states by element, which a
// matrix does not have, its kStates names that of rows and that of columns; `update` of a matrix finds in state[0] one
// over the root of the second moment; `prepare` is given the tensor instead of scalars, and makes in its Coefs the
// `share` of new squares in the state and the `least` root; and it sets its rate by norms of the whole tensor:
//   static double relative_rate(const double* hyper, double lr, double step, double numel, const Sums& sums)   the
//   rate, given sums as for a trust ratio.
template <class Rule, class = void>
struct HasFactors {
  static constexpr bool value = false;
};
template <class Rule>
struct HasFactors<Rule, decltype(void(Rule::kNumFactors))> {
  static constexpr bool value = true;
};
template <class Rule>
constexpr int num_state_names() {
  if constexpr (HasFactors<Rule>::value)
    return Rule::kNumStates + Rule::kNumFactors;
  else
    return Rule::kNumStates;
}

// Does a rule set its rate by an estimate that it makes of all parameters together? Then the estimate is the last of
// its hyperparameters, and it says how:
//   static double rate(const double* hyper, double step)   the factor of the group's rate, for the stages too;
//   static void observe(coefs, param, grad, state, V* seen, V* times)   the two factors of what an element adds to each
//   of the kObserved sums that the next estimate is made of; `state` is that after `update`.
template <class Rule, class = void>
struct HasEstimate {
  static constexpr bool value = false;
};
template <class Rule>
struct HasEstimate<Rule, decltype(void(&Rule::rate))> {
  static constexpr bool value = true;
};

// The factor of the group's rate.
template <class Rule>
OPTKIT_HD double rate_factor(const double* hyper, double step) {
  if constexpr (HasEstimate<Rule>::value)
    return Rule::rate(hyper, step);
  else
    return 1.0;
}

// Bit k of Rule::kNeededStates: state k is there whatever the settings. All are, where a rule does not say.
template <class Rule, class = void>
struct NeededStates {
  static constexpr uint32_t bits = (1u << Rule::kNumStates) - 1;
};
template <class Rule>
struct NeededStates<Rule, decltype(void(Rule::kNeededStates))> {
  static constexpr uint32_t bits = Rule::kNeededStates;
};

// Bit k of Rule::kFullPrecisionStates: state k is a point, not an average, and so in full precision whatever the others
// are in.
template <class Rule, class = void>
struct FullPrecisionStates {
  static constexpr uint32_t bits = 0;
};
template <class Rule>
struct FullPrecisionStates<Rule, decltype(void(Rule::kFullPrecisionStates))> {
  static constexpr uint32_t bits = Rule::kFullPrecisionStates;
};

// How state k is stored.
template <class Rule>
OPTKIT_HD DType type_of_state(const TensorSlot& t, int k) {
  const bool is_full_precision = FullPrecisionStates<Rule>::bits >> k & 1u;
  return is_full_precision && t.state_type != DType::kFloat64 ? DType::kFloat32 : t.state_type;
}

// Bit k of Rule::kFixedStates: only the first update, which Coefs::first tells, writes state k.
template <class Rule, class = void>
struct FixedStates {
  static constexpr uint32_t bits = 0;
};
template <class Rule>
struct FixedStates<Rule, decltype(void(Rule::kFixedStates))> {
  static constexpr uint32_t bits = Rule::kFixedStates;
};

// Whether this update writes state k. The products of factors are not kept.
template <class Rule, class Coefs>
OPTKIT_HD bool writes_state(const Coefs& coefs, int k) {
  if constexpr (HasFactors<Rule>::value)
    return !coefs.is_factored;
  else if constexpr (FixedStates<Rule>::bits != 0)
    return coefs.first || !(FixedStates<Rule>::bits >> k & 1u);
  else
    return true;
}

}  // namespace optkit

// SPDX-License-Identifier: Apache-2.0
// The tables that make up a plan: built once, walked by CPU and CUDA alike.
#pragma once

#include <cstdint>

#include "core/macros.h"

namespace optkit {

// kQuantized8: state only, see core/quantized_state.h. Integers: corrections of split weights, see TensorSlot.
enum class DType : int32_t {
  kFloat32 = 0,
  kBFloat16 = 1,
  kFloat16 = 2,
  kFloat64 = 3,
  kQuantized8 = 4,
  kInt8 = 5,
  kInt16 = 6
};

OPTKIT_HD constexpr bool is_floating(DType type) { return type <= DType::kFloat64; }
OPTKIT_HD constexpr int64_t size_of(DType type) {
  return type == DType::kFloat64                              ? 8
         : type == DType::kFloat32                            ? 4
         : type == DType::kQuantized8 || type == DType::kInt8 ? 1
                                                              : 2;
}

// The largest share of a number that half a unit of its last place can be, and a little more: half a unit is below it.
OPTKIT_HD constexpr double half_unit(DType type) {
  return type == DType::kBFloat16  ? 0x1.000002p-8
         : type == DType::kFloat16 ? 0x1.000002p-11
         : type == DType::kFloat32 ? 0x1.000002p-24
                                   : 0x1.0000000000001p-53;
}

constexpr int kMaxStates = 4;            // state tensors of one rule
constexpr int kMaxScalars = 2;           // numbers per parameter that a rule carries across steps
constexpr int kMaxHyperparameters = 12;  // numbers a rule reads from its parameter group
constexpr int kObserved = 2;             // sums from which a rule computes its estimate
constexpr int64_t kChunk =
    16384;  // elements: 64 KiB of fp32 per stream, so that the streams of a step share the L2 cache

// One step's factors for a matrix whose second moment is stored by rows and columns. Rows and columns are those of the
// last two dimensions, counted over all matrices of the tensor.
struct Factors {
  double* row_sums;     // of the squared gradient, per row
  double* column_sums;  // per strip and column
  void* row;            // per row and per column, in the compute dtype: their products are
  void* column;         // 1 / sqrt(second moment)
  int64_t num_strips;   // runs of rows that a matrix is split into
};

// Memory of one parameter, its gradient and its state. Null: absent.
struct TensorSlot {
  void* param;
  const void* grad;
  void* state[kMaxStates];
  float* state_scale[kMaxStates];  // of 8-bit state: the largest magnitude of each block
  void* average;
  void* compensation;  // low-order part lost when storing `param`: by Kahan summation, in the dtype of `param`; of
                       // split weights, the integer correction of cpu/split_weights.h
  float* scalar[kMaxScalars];
  float* step;             // number of updates of this parameter
  float* num_averaged;     // number of updates of `average`
  double* unit_scale;      // this step's gradient factor per unit (output row), and the shift that is
  double* unit_shift;      // then subtracted. Null: no per-unit clipping or centralization
  int64_t unit_length;     // elements of a unit, which are contiguous
  const Factors* factors;  // set for a matrix under a rule with factors; null otherwise
  int64_t rows, columns;   // sizes of the last two dimensions; 1 where there are fewer
  int64_t numel;
  DType param_type, grad_type, state_type, average_type, compensation_type;
  int32_t group;
  int32_t index;             // index of the parameter in its optimizer; selects its random stream
  int32_t active;            // 0: no gradient this step
  uint32_t unsigned_states;  // bit k: 8-bit state k is nonnegative
  int32_t is_vector;         // 1: fewer than two dimensions; the tensor is one unit and is not centralized
};

// Whether `param` is the upper part of an fp32 number with its correction in `compensation`.
OPTKIT_HD bool is_split(const TensorSlot& t) {
  return t.compensation != nullptr && t.compensation_type != t.param_type;
}

// A run of elements of one tensor: the unit of work and of partial sums.
struct Chunk {
  int64_t begin;
  int32_t tensor;
  int32_t count;
};

enum class AverageKind : int32_t { kNone = 0, kExponential = 1, kUniform = 2 };
constexpr const char* kAverageKinds[] = {"none", "exponential", "uniform"};
enum class Rounding : int32_t { kNearest = 0, kStochastic = 1, kKahan = 2, kSplit24 = 3, kSplit32 = 4 };
constexpr const char* kRoundings[] = {"nearest", "stochastic", "kahan", "split24", "split32"};

// One parameter group, in the numbers that the user sees. All doubles: Python writes this row.
struct GroupRow {
  double lr;
  double weight_decay;
  double decoupled;  // 1: decay acts on the parameter; 0: on the gradient (L2)
  double cautious;   // 1: decoupled decay only where the update has the sign of the parameter
  double maximize;
  double l1;
  double centralize;        // 1: the mean of each unit is subtracted from its gradient
  double clip_value;        // +inf: off
  double clip_tensor_norm;  // largest gradient norm of one tensor; +inf: off
  double clip_unit_ratio;   // largest |gradient| / |parameter| of one unit; +inf: off
  double clip_unit_eps;     // lower bound of |parameter| in that ratio
  double rounding;          // a Rounding
  double rounding_seed;
  double average_kind;   // an AverageKind
  double average_decay;  // for the exponential kind
  double average_due;    // 1: this step updates the average
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

// Whether a bound is set (+inf: off). A comparison, since host and device have different isinf functions.
OPTKIT_HD bool is_bounded(double bound) { return bound < 1e300; }

// Whether the tensors of a group are clipped or centralized per unit.
OPTKIT_HD bool treats_units(const GroupRow& group) {
  return group.centralize != 0.0 || is_bounded(group.clip_unit_ratio);
}

// Sums over one unit, from which its scale and shift are computed.
struct UnitSums {
  double grad;               // of the gradients, after scaling and clipping by value
  double grad_sq, param_sq;  // of the gradients before that, and of the parameters
};

// Result of clipping by tensor or by unit.
struct Clipped {
  double grad_sq;  // sum of squares of the clipped gradients, before scaling
  double num;      // tensors or units that were scaled down
};

// Sums over one chunk, or over one tensor.
struct Sums {
  double grad_sq, param_sq, update_sq;
  double nonfinite;            // gradient elements that are inf or NaN
  double lost;                 // elements whose stored value did not change although their update was not zero
  double observed[kObserved];  // for a rule with an estimate
};

// Sums of squares from which a rule may compute its rate.
enum Squares : uint32_t { kGradSquares = 1, kParamSquares = 2, kUpdateSquares = 4 };

// Whether a rule computes its rate from norms of the whole tensor. Such a rule lists the sums it needs in kMeasured
// (the others are not computed) and defines:
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

// Whether a rule limits a tensor's step by the norm of a vector of its own, unlike a trust ratio not only by its rate.
// Such a rule sets kMeasured to kUpdateSquares and defines:
//   static V limited(coefs, grad, const V* state)   an element of that vector, before this update;
//   static double limit(const double* hyper, double squares, double numel)   the factor, given the sum of their
//   squares.
// `prepare` receives that factor (1 while the vector is measured) instead of scalars.
template <class Rule, class = void>
struct HasLimit {
  static constexpr bool value = false;
};
template <class Rule>
struct HasLimit<Rule, decltype(void(&Rule::limit))> {
  static constexpr bool value = true;
};

// Whether a walk over the tensor precedes that of the update.
template <class Rule>
constexpr bool measures_first() {
  return HasTrustRatio<Rule>::value || HasLimit<Rule>::value;
}

// What a walk computes of an element: the update or, in one that measures for a limit, what is measured.
template <class Rule, bool kMeasure, class Coefs, class V>
OPTKIT_HD V update_or_limited(const Coefs& coefs, V param, V grad, V* state) {
  if constexpr (kMeasure && HasLimit<Rule>::value)
    return Rule::limited(coefs, grad, state);
  else
    return Rule::update(coefs, param, grad, state);
}

// Whether a rule stores the second moment of a matrix by rows and columns. Its kStates then ends with the row and the
// column state, after kNumStates elementwise states, which a matrix does not have. For a matrix, `update` finds
// 1 / sqrt(second moment) in state[0], and `prepare` receives the tensor instead of scalars and sets in its Coefs
// `share` (the weight of new squares in the state) and `least` (the smallest root). The rule also computes its rate
// from norms of the whole tensor:
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

// Whether a rule computes its rate from an estimate over all parameters. The estimate is its last hyperparameter, and
// it defines:
//   static double rate(const double* hyper, double step)   the factor of the group's rate, stages included;
//   static void observe(coefs, param, grad, state, V* seen, V* times)   the two factors of an element's contribution to
//   each of the kObserved sums for the next estimate; `state` is the one after `update`.
template <class Rule, class = void>
struct HasEstimate {
  static constexpr bool value = false;
};
template <class Rule>
struct HasEstimate<Rule, decltype(void(&Rule::rate))> {
  static constexpr bool value = true;
};

// The factor of the group's learning rate.
template <class Rule>
OPTKIT_HD double rate_factor(const double* hyper, double step) {
  if constexpr (HasEstimate<Rule>::value)
    return Rule::rate(hyper, step);
  else
    return 1.0;
}

// Bit k of Rule::kNeededStates: state k exists under any settings. Default: all of them.
template <class Rule, class = void>
struct NeededStates {
  static constexpr uint32_t bits = (1u << Rule::kNumStates) - 1;
};
template <class Rule>
struct NeededStates<Rule, decltype(void(Rule::kNeededStates))> {
  static constexpr uint32_t bits = Rule::kNeededStates;
};

// Bit k of Rule::kFullPrecisionStates: state k is a point, not an average, so it stays in full precision whatever
// `state_dtype` is.
template <class Rule, class = void>
struct FullPrecisionStates {
  static constexpr uint32_t bits = 0;
};
template <class Rule>
struct FullPrecisionStates<Rule, decltype(void(Rule::kFullPrecisionStates))> {
  static constexpr uint32_t bits = Rule::kFullPrecisionStates;
};

// Storage dtype of state k.
template <class Rule>
OPTKIT_HD DType type_of_state(const TensorSlot& t, int k) {
  const bool is_full_precision = FullPrecisionStates<Rule>::bits >> k & 1u;
  return is_full_precision && t.state_type != DType::kFloat64 ? DType::kFloat32 : t.state_type;
}

// Bit k of Rule::kFixedStates: only the first update (Coefs::first) writes state k.
template <class Rule, class = void>
struct FixedStates {
  static constexpr uint32_t bits = 0;
};
template <class Rule>
struct FixedStates<Rule, decltype(void(Rule::kFixedStates))> {
  static constexpr uint32_t bits = Rule::kFixedStates;
};

// Whether this update writes state k. The products of factors are not stored.
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

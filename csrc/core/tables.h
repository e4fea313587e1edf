// SPDX-License-Identifier: Apache-2.0
// What a plan consists of: plain tables, built once, walked by the CPU and by CUDA alike.
#pragma once

#include <cstdint>

namespace optkit {

enum class DType : int32_t { kFloat32 = 0, kBFloat16 = 1, kFloat16 = 2, kFloat64 = 3 };

constexpr int64_t size_of(DType type) { return type == DType::kFloat64 ? 8 : type == DType::kFloat32 ? 4 : 2; }

constexpr int kMaxStates = 4;       // state tensors of one rule
constexpr int kMaxScalars = 2;      // numbers per parameter that a rule carries from step to step
constexpr int kMaxRuleHypers = 12;  // numbers a rule reads from its parameter group
constexpr int64_t kChunk =
    16384;  // elements: 64 KiB of fp32 per stream, so that the streams of a step share the L2 cache

// One parameter: where its numbers live. Null: absent.
struct TensorSlot {
  void* param;
  const void* grad;
  void* state[kMaxStates];
  void* average;
  void* compensation;  // what Kahan summation could not store in `param`, in the dtype of `param`
  float* scalar[kMaxScalars];
  float* step;          // times this parameter was updated
  float* num_averaged;  // updates of `average`
  int64_t numel;
  DType param_type, grad_type, state_type, average_type;
  int32_t group;
  int32_t index;   // number of the parameter in its optimizer: its random stream
  int32_t active;  // 0: no gradient this step
};

// At most kChunk elements of one tensor: the unit of work, and of every partial sum.
struct Chunk {
  int64_t begin;
  int32_t tensor;
  int32_t count;
};

enum class AverageKind : int32_t { kNone = 0, kExponential = 1, kUniform = 2 };
enum class Rounding : int32_t { kNearest = 0, kStochastic = 1, kKahan = 2 };

// One parameter group, in the numbers a user sees. Doubles throughout: this is the row Python writes.
struct GroupRow {
  double lr;
  double weight_decay;
  double decoupled;  // 1: decay acts on the parameter; 0: on the gradient (L2)
  double cautious;   // 1: decoupled decay only where the update points the same way
  double maximize;
  double l1;
  double clip_value;  // +inf: off
  double rounding;    // a Rounding
  double rounding_seed;
  double average_kind;   // an AverageKind
  double average_decay;  // of the exponential kind
  double average_due;    // 1: this step's result is averaged
  double rule[kMaxRuleHypers];
};
constexpr const char* kGroupFields[] = {
    "lr",         "weight_decay", "decoupled",     "cautious",     "maximize",      "l1",
    "clip_value", "rounding",     "rounding_seed", "average_kind", "average_decay", "average_due"};
constexpr int kNumGroupFields = sizeof(kGroupFields) / sizeof(kGroupFields[0]);
static_assert(sizeof(GroupRow) == sizeof(double) * (kNumGroupFields + kMaxRuleHypers), "GroupRow must match its names");

// Sums over one chunk, or over one tensor.
struct Sums {
  double grad_sq, param_sq, update_sq;
  double nonfinite;  // gradient elements that are inf or NaN
  double lost;       // elements whose stored value did not change although their update was not zero
};

}  // namespace optkit

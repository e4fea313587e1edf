// SPDX-License-Identifier: Apache-2.0
#include "bindings/plan.h"

#include <cstring>
#include <iterator>
#include <stdexcept>
#include <utility>

#include "bindings/device.h"
#include "bindings/threads.h"

namespace optkit {
namespace {

int rule_id(const std::string& name) {
#define OPTKIT_MATCH(rule, type) \
  if (name == #rule) return kRule_##rule;
  OPTKIT_FOR_EACH_CPU_RULE(OPTKIT_MATCH)
#undef OPTKIT_MATCH
  throw std::invalid_argument("Plan(rule='" + name + "'): no such rule is compiled.");
}

template <class Rule>
constexpr RuleTraits traits_of() {
  return {num_state_names<Rule>(),
          num_state_names<Rule>() - Rule::kNumStates,
          Rule::kNumScalars,
          Rule::kNumHyperparameters,
          NeededStates<Rule>::bits != 0,
          FullPrecisionStates<Rule>::bits,
          HasEstimate<Rule>::value};
}

constexpr RuleTraits kTraits[] = {
#define OPTKIT_TRAITS(name, type) traits_of<type>(),
    OPTKIT_FOR_EACH_CPU_RULE(OPTKIT_TRAITS)
#undef OPTKIT_TRAITS
};

// Whether an entry of a row is one of `count` enum values.
bool is_choice(double value, int count) { return value >= 0 && value < count && value == static_cast<int>(value); }

void check_row(const GroupRow& row, const TensorSlot& tensor) {
  if (!is_choice(row.rounding, std::size(kRoundings)) || !is_choice(row.average_kind, std::size(kAverageKinds)))
    throw std::invalid_argument(
        "Plan.set_groups(rows=...): rounding and average_kind must be numbers of their choices.");
  const bool has_average = tensor.num_averaged != nullptr && (tensor.average != nullptr || tensor.numel == 0);
  if (row.average_kind != 0.0 && !has_average)
    throw std::invalid_argument("Plan.set_groups(rows=...): average_kind must be 0 for tensors without an average.");
}

}  // namespace

Plan::Plan(const std::string& rule, bool in_double, int cuda_device)
    : device(cuda_device),
      is_double(in_double),
      rule_(rule_id(rule)),
      cpu_(rule_, is_double, &torch_parallel, torch_num_threads()) {
  if (device >= 0 && rule_ >= kNumCudaRules)
    throw std::invalid_argument("Plan(rule='" + rule + "'): no such rule is compiled for CUDA.");
  if (device >= 0) check_cuda(cuda_api().create(rule_, is_double, device, &cuda_));
}

Plan::~Plan() {
  if (cuda_ != nullptr) cuda_api().destroy(cuda_);
}

const RuleTraits& Plan::traits() const { return kTraits[rule_]; }

void Plan::set_active(const std::vector<int>& indices) {
  int last = -1;
  for (const int i : indices) {
    if (i <= last || i >= static_cast<int>(tensors.size()))
      throw std::invalid_argument("Plan.set_active(indices=...): indices of tensors must increase.");
    last = i;
  }
  for (TensorSlot& tensor : tensors) tensor.active = 0;
  for (const int i : indices) tensors[i].active = 1;
  active = indices;
  uploaded_ = false;
  if (device < 0) cpu_.layout(tensors);
}

void Plan::set_groups(const std::vector<std::vector<double>>& rows) {
  const std::size_t length = kNumGroupFields + static_cast<std::size_t>(traits().num_hyperparameters);
  std::vector<GroupRow> groups(rows.size(), GroupRow{});
  for (std::size_t i = 0; i < rows.size(); ++i) {
    if (rows[i].size() != length)
      throw std::invalid_argument("Plan.set_groups(rows=...): a row must hold " + std::to_string(length) +
                                  " numbers, not " + std::to_string(rows[i].size()) + ".");
    std::memcpy(&groups[i], rows[i].data(), length * sizeof(double));
  }
  for (const TensorSlot& tensor : tensors)
    if (tensor.group >= static_cast<int>(groups.size()))
      throw std::invalid_argument("Plan.set_groups(rows=...): needs one row for each group, and a tensor is in group " +
                                  std::to_string(tensor.group) + ".");
  for (const int i : active) check_row(groups[tensors[i].group], tensors[i]);
  groups_ = std::move(groups);
}

bool Plan::clips_tensors() const {
  for (const int i : active)
    if (is_bounded(groups_[tensors[i].group].clip_tensor_norm)) return true;
  return false;
}

Norm Plan::norm() {
  cpu_.num_workers = torch_num_threads();
  cpu_.norm(tensors, sums_);
  Norm total = {0.0, 0.0};
  for (const Sums& sums : sums_) {
    total.grad_sq += sums.grad_sq;
    total.nonfinite += sums.nonfinite;
  }
  return total;
}

Clipped Plan::step(double grad_scale, bool statistics) {
  cpu_.num_workers = torch_num_threads();
  if (sums_.size() != tensors.size()) sums_.assign(tensors.size(), Sums{});
  return cpu_.step(tensors, groups_, grad_scale, statistics, sums_);
}

void Plan::upload(uintptr_t stream) {
  if (uploaded_) return;
  const auto count = static_cast<int>(tensors.size());
  check_cuda(cuda_api().layout(cuda_, tensors.data(), count, reinterpret_cast<void*>(stream)));
  uploaded_ = true;
}

void Plan::cuda_norm(double* norm_out, uintptr_t stream) {
  upload(stream);
  check_cuda(cuda_api().norm(cuda_, tensors.data(), norm_out, reinterpret_cast<void*>(stream)));
}

void Plan::cuda_step(const CudaStepControl& control, const std::vector<const double*>& rates, uintptr_t stream) {
  upload(stream);
  check_cuda(cuda_api().step(cuda_, tensors.data(), groups_.data(), rates.data(), static_cast<int>(groups_.size()),
                             &control, reinterpret_cast<void*>(stream)));
}

}  // namespace optkit

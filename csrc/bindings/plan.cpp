// SPDX-License-Identifier: Apache-2.0
#include "bindings/plan.h"

#include <cstring>
#include <mutex>
#include <stdexcept>
#include <unordered_map>
#include <utility>

#include "bindings/threads.h"

namespace optkit {
namespace {

std::mutex registry_mutex;
std::unordered_map<int64_t, Plan*>& registry() {
  static std::unordered_map<int64_t, Plan*> plans;
  return plans;
}

int rule_id(const std::string& name) {
#define OPTKIT_MATCH(rule, type) \
  if (name == #rule) return kRule_##rule;
  OPTKIT_FOR_EACH_RULE(OPTKIT_MATCH)
#undef OPTKIT_MATCH
  throw std::invalid_argument("Plan(rule='" + name + "'): no such rule is compiled.");
}

}  // namespace

Plan::Plan(const std::string& rule, bool is_double)
    : rule_(rule_id(rule)), is_double_(is_double), cpu_(rule_, is_double, &torch_parallel, torch_num_threads()) {
  static int64_t next_id = 0;
  const std::lock_guard<std::mutex> lock(registry_mutex);
  id_ = ++next_id;
  registry()[id_] = this;
}

Plan::~Plan() {
  const std::lock_guard<std::mutex> lock(registry_mutex);
  registry().erase(id_);
}

Plan* Plan::find(int64_t id) {
  const std::lock_guard<std::mutex> lock(registry_mutex);
  const auto found = registry().find(id);
  return found == registry().end() ? nullptr : found->second;
}

void Plan::add_tensor(const TensorSlot& slot, Shape shape) {
  tensors.push_back(slot);
  shapes.push_back(std::move(shape));
}

void Plan::set_active(const std::vector<int>& indices) {
  for (TensorSlot& tensor : tensors) tensor.active = 0;
  for (const int i : indices) tensors.at(i).active = 1;
  active = indices;
  cpu_.layout(tensors);
}

void Plan::set_groups(const std::vector<std::vector<double>>& rows) {
  groups_.resize(rows.size());
  for (std::size_t i = 0; i < rows.size(); ++i) {
    GroupRow row = {};
    if (rows[i].size() * sizeof(double) > sizeof(row)) throw std::invalid_argument("Plan.set_groups: a row is too long.");
    std::memcpy(&row, rows[i].data(), rows[i].size() * sizeof(double));
    groups_[i] = row;
  }
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

void Plan::step(double grad_scale, bool statistics) {
  cpu_.num_workers = torch_num_threads();
  cpu_.step(tensors, groups_, grad_scale, statistics, sums_);
}

}  // namespace optkit

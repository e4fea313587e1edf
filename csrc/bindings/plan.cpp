// SPDX-License-Identifier: Apache-2.0
#include "bindings/plan.h"

#include <cstring>
#include <mutex>
#include <stdexcept>
#include <unordered_map>
#include <utility>

#include "bindings/device.h"
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
  OPTKIT_FOR_EACH_CPU_RULE(OPTKIT_MATCH)
#undef OPTKIT_MATCH
  throw std::invalid_argument("Plan(rule='" + name + "'): no such rule is compiled.");
}

// Has the parameter's memory, shape or order of dimensions changed since the plan was built?
bool has_moved(const TensorView& param, const void* data, const Shape& shape) {
  if (!param.is_strided || param.data != data || param.dim != static_cast<int64_t>(shape.sizes.size())) return true;
  for (int64_t d = 0; d < param.dim; ++d)
    if (param.sizes[d] != shape.sizes[d] || param.strides[d] != shape.strides[d]) return true;
  return false;
}

// Can the gradient be walked with the parameter's own index? Strides of dimensions of size 1 mean nothing.
Misfit compare(const Shape& param, const TensorView& grad, const TensorSlot& slot, bool on_cuda) {
  if (!grad.is_strided || (grad.data == nullptr && slot.numel > 0)) return Misfit::kLayout;
  if (grad.dim != static_cast<int64_t>(param.sizes.size())) return Misfit::kShape;
  for (int64_t d = 0; d < grad.dim; ++d)
    if (param.sizes[d] != grad.sizes[d]) return Misfit::kShape;
  if (!(on_cuda ? grad.on_cuda : grad.on_cpu)) return Misfit::kDevice;
  if (!grad.has_dtype || (grad.dtype == DType::kFloat64) != (slot.param_type == DType::kFloat64)) return Misfit::kDType;
  for (int64_t d = 0; d < grad.dim; ++d)
    if (grad.sizes[d] > 1 && param.strides[d] != grad.strides[d]) return Misfit::kLayout;
  return Misfit::kNone;
}

}  // namespace

Plan::Plan(const std::string& rule, bool is_double, int cuda_device)
    : device(cuda_device),
      rule_(rule_id(rule)),
      is_double_(is_double),
      cpu_(rule_, is_double, &torch_parallel, torch_num_threads()) {
  if (device >= 0 && rule_ >= kNumCudaRules)
    throw std::invalid_argument("Plan(rule='" + rule + "'): no such rule is compiled for CUDA.");
  if (device >= 0) check_cuda(cuda_api().create(rule_, is_double_, device, &cuda_));
  static int64_t next_id = 0;
  const std::lock_guard<std::mutex> lock(registry_mutex);
  id_ = ++next_id;
  registry()[id_] = this;
}

Plan::~Plan() {
  if (cuda_ != nullptr) cuda_api().destroy(cuda_);
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
  uploaded_ = false;
  if (device < 0) cpu_.layout(tensors);
}

Misfit Plan::point_at(int place, const TensorView& param, const TensorView& grad) {
  TensorSlot& slot = tensors[place];
  if (has_moved(param, slot.param, shapes[place])) return Misfit::kParamMoved;
  const Misfit misfit = compare(shapes[place], grad, slot, is_on_cuda());
  if (misfit != Misfit::kNone) return misfit;
  slot.grad = grad.data;
  slot.grad_type = grad.dtype;
  return Misfit::kNone;
}

void Plan::set_groups(const std::vector<std::vector<double>>& rows) {
  groups_.resize(rows.size());
  for (std::size_t i = 0; i < rows.size(); ++i) {
    GroupRow row = {};
    if (rows[i].size() * sizeof(double) > sizeof(row))
      throw std::invalid_argument("Plan.set_groups: a row is too long.");
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

void Plan::cuda_norm(uintptr_t norm_out, uintptr_t stream) {
  upload(stream);
  check_cuda(
      cuda_api().norm(cuda_, tensors.data(), reinterpret_cast<double*>(norm_out), reinterpret_cast<void*>(stream)));
}

void Plan::cuda_step(const CudaStepControl& control, const std::vector<const double*>& rates, uintptr_t stream) {
  if (rates.size() != groups_.size()) throw std::invalid_argument("Plan.cuda_step: needs one rate for each group.");
  upload(stream);
  check_cuda(cuda_api().step(cuda_, tensors.data(), groups_.data(), rates.data(), static_cast<int>(groups_.size()),
                             &control, reinterpret_cast<void*>(stream)));
}

}  // namespace optkit

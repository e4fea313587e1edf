// SPDX-License-Identifier: Apache-2.0
// A plan: the tables of one optimizer's tensors on one device, and the walks over them. Independent of torch and
// Python.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "bindings/device.h"
#include "core/tables.h"
#include "cpu/walk.h"

namespace optkit {

struct Norm {
  double grad_sq;    // of all active gradients, before unscaling
  double nonfinite;  // elements
};

// The requirements of a compiled rule on a plan.
struct RuleTraits {
  int num_states;         // elementwise, followed by those by row and by column
  int num_factor_states;  // the latter
  int num_scalars, num_hyperparameters;
  bool needs_scalars;              // false: may be null where the rule keeps no state
  uint32_t full_precision_states;  // bit k: state k is fp32 whatever the dtype of the others
  bool has_estimate;
};

class Plan {
 public:
  // device: index of a CUDA device, or kCpu. Throws std::invalid_argument if the rule is not compiled for it.
  Plan(const std::string& rule, bool is_double, int device);
  ~Plan();
  Plan(const Plan&) = delete;
  Plan& operator=(const Plan&) = delete;

  // Call before the first walk, after tensors were added, and whenever the set of tensors with a gradient changes.
  void set_active(const std::vector<int>& indices);
  // Throws std::invalid_argument for rows that are invalid for the tensors.
  void set_groups(const std::vector<std::vector<double>>& rows);

  Norm norm();
  // Clipping by tensor needs `norm` to have been called for the same gradients. Returns the result of clipping by
  // tensor or by unit.
  Clipped step(double grad_scale, bool statistics);
  // Per tensor, in insertion order: {grad_sq, param_sq, update_sq, nonfinite, lost}.
  const std::vector<Sums>& sums() const { return sums_; }

  // CUDA, asynchronous: pointers are device memory, `stream` is a cudaStream_t.
  void cuda_norm(double* norm_out, uintptr_t stream);
  // `rates`: per group, a learning rate in device memory that replaces the one in its row, or null.
  void cuda_step(const CudaStepControl& control, const std::vector<const double*>& rates, uintptr_t stream);
  // False for the CPU, and for the emulation in host memory.
  bool is_on_cuda() const { return device >= 0 && cuda_api().on_host == 0; }

  const RuleTraits& traits() const;
  bool clips_tensors() const;  // such clipping needs the norm of each tensor
  std::size_t num_groups() const { return groups_.size(); }

  const int device;
  const bool is_double;
  std::vector<TensorSlot> tensors;
  std::vector<int> active;  // indices of tensors with a gradient, in order

 private:
  void upload(uintptr_t stream);

  int rule_;
  std::vector<GroupRow> groups_;
  std::vector<Sums> sums_;
  CpuWalk cpu_;
  void* cuda_ = nullptr;
  bool uploaded_ = false;
};

}  // namespace optkit

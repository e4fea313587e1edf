// SPDX-License-Identifier: Apache-2.0
// A plan: the tables of one optimizer's tensors on one device, and the walks over them. No torch and no Python here.
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

// What a compiled rule expects of a plan.
struct RuleTraits {
  int num_states;         // by element, and behind them those by row and by column
  int num_factor_states;  // the latter
  int num_scalars, num_hyperparameters;
  bool needs_scalars;              // null where the rule keeps no state; false: a rule may go without
  uint32_t full_precision_states;  // bit k: state k is fp32 whatever the others are in
  bool has_estimate;
};

class Plan {
 public:
  // device: index of a CUDA device, or kCpu. Throws std::invalid_argument for a rule that is not compiled for it.
  Plan(const std::string& rule, bool is_double, int device);
  ~Plan();
  Plan(const Plan&) = delete;
  Plan& operator=(const Plan&) = delete;

  // Call after tensors were added; before the first walk, and whenever other tensors have a gradient.
  void set_active(const std::vector<int>& indices);
  // Throws std::invalid_argument for rows that the tensors cannot be walked with.
  void set_groups(const std::vector<std::vector<double>>& rows);

  Norm norm();
  // Clipping by tensor needs `norm` to have been called for the same gradients. Returns what clipping
  // by tensor or by unit left.
  Clipped step(double grad_scale, bool statistics);
  // Per tensor, in the order of adding: {grad_sq, param_sq, update_sq, nonfinite, lost}.
  const std::vector<Sums>& sums() const { return sums_; }

  // On CUDA, without waiting for it: pointers are device memory, `stream` a cudaStream_t.
  void cuda_norm(double* norm_out, uintptr_t stream);
  // `rates`: per group, a learning rate in device memory that replaces the one in its row, or null.
  void cuda_step(const CudaStepControl& control, const std::vector<const double*>& rates, uintptr_t stream);
  // False for the CPU, and for an emulation that works on the host's memory.
  bool is_on_cuda() const { return device >= 0 && cuda_api().on_host == 0; }

  const RuleTraits& traits() const;
  bool clips_tensors() const;  // needs the norm of each
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

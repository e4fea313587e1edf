// SPDX-License-Identifier: Apache-2.0
// A plan: the tables of one optimizer on one device, known to Python by a number so that an op can find it. No torch
// here.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "bindings/device.h"
#include "core/tables.h"
#include "cpu/walk.h"

namespace optkit {

// What is wrong with a parameter or its gradient; the order is the order of the checks.
enum class Misfit : int64_t { kNone = 0, kParamMoved = 1, kShape = 2, kDevice = 3, kDType = 4, kLayout = 5 };

struct Shape {
  std::vector<int64_t> sizes, strides;
};

// What a plan looks at of a tensor, however Python handed it over. A sparse one is not strided, and shows nothing else.
struct TensorView {
  bool is_strided, on_cpu, on_cuda, has_dtype;  // has_dtype: it is one of DType
  DType dtype;
  void* data;
  int64_t dim;
  const int64_t *sizes, *strides;
};

struct Norm {
  double grad_sq;    // of all active gradients, before unscaling
  double nonfinite;  // elements
};

class Plan {
 public:
  // device: index of a CUDA device, or -1 for the CPU.
  Plan(const std::string& rule, bool is_double, int device);
  ~Plan();
  Plan(const Plan&) = delete;
  Plan& operator=(const Plan&) = delete;

  int64_t id() const { return id_; }
  static Plan* find(int64_t id);

  void add_tensor(const TensorSlot& slot, Shape shape);
  void set_active(const std::vector<int>& indices);
  // Points tensor `place` at this step's gradient, if parameter and gradient are such that both can be walked.
  Misfit point_at(int place, const TensorView& param, const TensorView& grad);
  void set_groups(const std::vector<std::vector<double>>& rows);

  Norm norm();
  // Clipping by tensor needs `norm` to have been called for the same gradients. Returns what clipping
  // by tensor or by unit left.
  Clipped step(double grad_scale, bool statistics);
  // Per tensor, in the order of adding: {grad_sq, param_sq, update_sq, nonfinite, lost}.
  const std::vector<Sums>& sums() const { return sums_; }

  // On CUDA, without waiting for it: pointers are device memory, `stream` a cudaStream_t.
  void cuda_norm(uintptr_t norm_out, uintptr_t stream);
  // `rates`: per group, a learning rate in device memory that replaces the one in its row, or null.
  void cuda_step(const CudaStepControl& control, const std::vector<const double*>& rates, uintptr_t stream);
  // False for the CPU, and for an emulation that works on the host's memory.
  bool is_on_cuda() const { return device >= 0 && cuda_api().on_host == 0; }

  const int device;
  std::vector<TensorSlot> tensors;
  std::vector<Shape> shapes;  // of the parameters
  std::vector<int> active;    // indices of tensors with a gradient, in order

 private:
  int64_t id_;
  int rule_;
  bool is_double_;
  std::vector<GroupRow> groups_;
  std::vector<Sums> sums_;
  CpuWalk cpu_;
  void upload(uintptr_t stream);
  void* cuda_ = nullptr;
  bool uploaded_ = false;
};

}  // namespace optkit

// SPDX-License-Identifier: Apache-2.0
// A plan as exposed to Python. Between steps it stores addresses but no tensors; before a walk it receives the tensors,
// checks that each still matches its address, and holds references until the walk is done.
#pragma once

#include <pybind11/pybind11.h>

#include <cstdint>
#include <set>
#include <stdexcept>
#include <string>
#include <vector>

#include "bindings/facts.h"
#include "bindings/plan.h"
#include "bindings/slot_filler.h"

namespace optkit {

// A tensor that the plan was built from, or bound to, has moved.
class Moved : public std::runtime_error {
 public:
  using std::runtime_error::runtime_error;
};

class BoundPlan {
 public:
  BoundPlan(const std::string& rule, bool is_double, int device);
  ~BoundPlan();
  BoundPlan(const BoundPlan&) = delete;
  BoundPlan& operator=(const BoundPlan&) = delete;

  // Throws std::invalid_argument for tensors that the rule cannot walk together.
  void add_tensor(const pybind11::object& param, const pybind11::dict& state, const StateNames& names,
                  uint32_t unsigned_states, int group, int tensor_index);
  void set_active(const std::vector<int>& indices);

  // Binds the active parameters, their state and their gradients, as listed, until `release`. Inspects the gradients
  // from index `start` on, and returns kBound or the index of the first that cannot be walked. Those before `start`
  // must have been inspected already. Throws Moved if a parameter is not what it was.
  static constexpr int64_t kBound = -1;
  int64_t bind(const pybind11::list& params, const pybind11::list& states, const pybind11::list& grads, int64_t start);
  // Drops the references that `bind` took.
  void release();

  // Each of these first checks everything that it will touch, and throws Moved, before anything is written, if a tensor
  // has moved: a gradient since it was bound, a parameter or its state since it was added. `check` does nothing else.
  void check();
  pybind11::tuple norm();
  pybind11::tuple step(const std::vector<std::vector<double>>& rows, double grad_scale, bool statistics);
  void cuda_norm(const pybind11::object& norm_out, uintptr_t stream);
  void cuda_step(const std::vector<std::vector<double>>& rows, const CudaStepControl& control,
                 const std::vector<const double*>& rates, uintptr_t stream);

  // The device memory of a tensor of fp32 or fp64; null for None. Throws std::invalid_argument for fewer elements or
  // another dtype.
  template <class T>
  T* device_memory(const pybind11::object& tensor, const char* name, DType dtype, int64_t count) const {
    return static_cast<T*>(device_memory(tensor, name, dtype, count));
  }
  pybind11::list sums() const;
  pybind11::tuple observed() const;
  std::size_t num_tensors() const { return plan_.tensors.size(); }
  std::size_t num_groups() const { return plan_.num_groups(); }

 private:
  // A state tensor, by its position in the parameter's state dict.
  struct Named {
    pybind11::object name;
    bool is_walked;
    Facts facts;
    mutable Records records;
  };
  struct Watched {
    Facts param;
    mutable Records records;
    std::vector<Named> state;
  };
  class Use;
  class Hold;

  void* device_memory(const pybind11::object& tensor, const char* name, DType dtype, int64_t count) const;
  Facts facts_of(PyObject* tensor, const std::string& name);
  bool fits(const TensorView& grad, const Facts& param) const;
  void check_bound(const char* method, bool on_cuda) const;
  void check_gradients(Hold* hold) const;
  void check_state(Hold* hold) const;

  Plan plan_;
  std::set<Shape> shapes_;                    // of all tensors watched
  std::vector<Watched> watched_;              // per tensor of the plan
  pybind11::object params_, states_, grads_;  // lists, of the active tensors
  int64_t num_looked_at_ = 0;                 // gradients, counted from the first
  bool is_active_set_ = false, has_norm_ = false, is_in_use_ = false;
};

}  // namespace optkit

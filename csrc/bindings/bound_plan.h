// SPDX-License-Identifier: Apache-2.0
// A plan as Python sees it. It holds addresses between steps and no tensor; before a walk it is handed the tensors,
// looks whether each still is what the addresses were taken from, and holds them until the walk is done.
#pragma once

#include <pybind11/pybind11.h>

#include <cstdint>
#include <stdexcept>
#include <string>
#include <vector>

#include "bindings/look.h"
#include "bindings/plan.h"

namespace optkit {

// What a plan was made of, or bound to, is not there any more.
class Moved : public std::runtime_error {
 public:
  using std::runtime_error::runtime_error;
};

// What a plan relies on of one tensor.
struct Facts {
  void* data = nullptr;
  DType dtype = DType::kFloat32;
  std::vector<int64_t> sizes, strides;
  int64_t num_bytes = 0;  // that the elements span

  bool hold_for(const TensorView& view) const;
};

// Names of a parameter's state in a plan.
struct StateNames {
  std::vector<pybind11::object> states, scales, scalars;  // of the rule, in its order; None: absent
  pybind11::object average;                               // None: absent
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

  // Takes the active parameters, their state and their gradients as they are in these lists from now until `release`.
  // Looks at the gradients from place `start` on: kBound, or the place of the first that cannot be walked. Those before
  // `start` must have been looked at. Throws Moved if a parameter is not what it was.
  static constexpr int64_t kBound = -1;
  int64_t bind(const pybind11::list& params, const pybind11::list& states, const pybind11::list& grads, int64_t start);
  // Lets go of what `bind` took.
  void release();

  // Each looks, right before it walks, at all that it will touch, and throws Moved, before anything is written, if that
  // is not where it was: a gradient when it was bound, a parameter or its state when it was added. `check` only looks.
  void check();
  pybind11::tuple norm();
  pybind11::tuple step(const std::vector<std::vector<double>>& rows, double grad_scale, bool statistics);
  void cuda_norm(const pybind11::object& norm_out, uintptr_t stream);
  void cuda_step(const std::vector<std::vector<double>>& rows, const CudaStepControl& control,
                 const std::vector<const double*>& rates, uintptr_t stream);

  // The device memory of a tensor of fp32 or fp64; null for None. Throws std::invalid_argument if it holds fewer
  // elements, or numbers of another kind.
  template <class T>
  T* device_memory(const pybind11::object& tensor, const char* name, DType dtype, int64_t count) const {
    return static_cast<T*>(device_memory(tensor, name, dtype, count));
  }
  pybind11::list sums() const;
  pybind11::tuple observed() const;
  std::size_t num_tensors() const { return plan_.tensors.size(); }
  std::size_t num_groups() const { return plan_.num_groups(); }

 private:
  // A state tensor of a parameter, by its place in the parameter's state.
  struct Named {
    pybind11::object name;
    bool is_walked;
    Facts facts;
  };
  struct Watched {
    Facts param;
    std::vector<Named> state;
  };
  class Use;
  class Hold;

  void* device_memory(const pybind11::object& tensor, const char* name, DType dtype, int64_t count) const;
  Facts facts_of(PyObject* tensor, const std::string& name) const;
  bool fits(const TensorView& grad, const Facts& param) const;
  void check_bound(const char* method, bool on_cuda) const;
  void check_gradients(Hold* hold) const;
  void check_state(Hold* hold) const;

  Plan plan_;
  std::vector<Watched> watched_;              // per tensor of the plan
  pybind11::object params_, states_, grads_;  // lists, of the active tensors
  int64_t num_looked_at_ = 0;                 // gradients, from the first on
  bool is_active_set_ = false, has_norm_ = false, is_in_use_ = false;
};

}  // namespace optkit

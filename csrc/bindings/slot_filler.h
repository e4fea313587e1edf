// SPDX-License-Identifier: Apache-2.0
// Puts the state of a parameter into its slot of a plan, and refuses tensors that the rule cannot walk together.
#pragma once

#include <pybind11/pybind11.h>

#include <stdexcept>
#include <string>
#include <vector>

#include "bindings/facts.h"
#include "bindings/plan.h"
#include "core/quantized_state.h"

namespace optkit {

namespace py = pybind11;

// Names of the state of a parameter in a plan.
struct StateNames {
  std::vector<py::object> states, scales, scalars;  // of the rule, in its order; None: absent
  py::object average;                               // None: absent
};

[[noreturn]] inline void refuse(const std::string& name, const std::string& requirement) {
  throw std::invalid_argument("Plan.add_tensor(" + name + "=...): " + requirement + ".");
}

inline std::string text(const py::object& name) {
  return name.is_none() ? "None" : py::cast<std::string>(py::str(name));
}

inline int place_of(const std::vector<py::object>& names, PyObject* name) {
  for (std::size_t k = 0; k < names.size(); ++k)
    if (!names[k].is_none() && PyObject_RichCompareBool(names[k].ptr(), name, Py_EQ) == 1) return static_cast<int>(k);
  PyErr_Clear();
  return -1;
}

inline bool is_named(PyObject* name, const char* expected) {
  return PyUnicode_Check(name) && PyUnicode_CompareWithASCIIString(name, expected) == 0;
}

// A per-parameter number that is carried across steps.
inline float* number(const Facts& facts, const std::string& name) {
  if (facts.dtype != DType::kFloat32 || facts.numel() != 1) refuse(name, "must be one fp32 number");
  return static_cast<float*>(facts.data);
}

// Fills the slot of one parameter with its state tensors, checking each against the parameter.
class SlotFiller {
 public:
  SlotFiller(const Plan& plan, const Facts& param, const StateNames& names, TensorSlot* slot)
      : traits_(plan.traits()), is_double_(plan.is_double), param_(param), names_(names), slot_(slot) {}

  // Role of a state entry in the walk.
  enum class Role { kNone, kState, kScale, kScalar, kStep, kCompensation, kCorrection, kAverage, kNumAveraged };
  struct Found {
    Role role;
    int place;  // index among those of the rule
  };

  Found find(PyObject* key) const {
    if (const int k = place_of(names_.states, key); k >= 0) return {Role::kState, k};
    if (const int k = place_of(names_.scales, key); k >= 0) return {Role::kScale, k};
    if (const int k = place_of(names_.scalars, key); k >= 0) return {Role::kScalar, k};
    if (is_named(key, "step")) return {Role::kStep, 0};
    if (is_named(key, "compensation")) return {Role::kCompensation, 0};
    if (is_named(key, "correction8")) return {Role::kCorrection, 0};
    if (is_named(key, "correction16")) return {Role::kCorrection, 1};
    if (names_.average.is_none()) return {Role::kNone, 0};
    if (place_of({names_.average}, key) >= 0) return {Role::kAverage, 0};
    return {is_named(key, "num_averaged") ? Role::kNumAveraged : Role::kNone, 0};
  }

  void put(const Found& found, const Facts& facts, const std::string& name) {
    switch (found.role) {
      case Role::kNone:
        break;
      case Role::kState:
        return put_state(found.place, facts, name);
      case Role::kScale:
        return put_scale(found.place, facts, name);
      case Role::kScalar:
        slot_->scalar[found.place] = number(facts, name);
        break;
      case Role::kStep:
        slot_->step = number(facts, name);
        break;
      case Role::kCompensation:
        if (facts.dtype != param_.dtype) refuse(name, "must be like the parameter");
        return put_compensation(facts, name);
      case Role::kCorrection:
        if (param_.dtype != DType::kBFloat16 || facts.dtype != (found.place == 0 ? DType::kInt8 : DType::kInt16))
          refuse(name, "must be in as many bits as its name says, beside a bfloat16 parameter");
        return put_compensation(facts, name);
      case Role::kAverage:
        return put_average(facts, name);
      case Role::kNumAveraged:
        slot_->num_averaged = number(facts, name);
        break;
    }
  }

  void check_complete() const {
    if (slot_->step == nullptr) refuse("step", "must be in the state");
    for (std::size_t k = 0; k < names_.states.size(); ++k) {
      if (!names_.states[k].is_none() && slot_->state[k] == nullptr && param_numel() > 0)
        refuse(text(names_.states[k]), "must be in the state");
      const bool is_code = slot_->state[k] != nullptr && type_of(static_cast<int>(k)) == DType::kQuantized8;
      if (is_code && slot_->state_scale[k] == nullptr && param_numel() > 0)
        refuse(text(names_.states[k]), "must have scales");
    }
    for (int n = 0; n < traits_.num_scalars; ++n)
      if (slot_->scalar[n] == nullptr && (traits_.needs_scalars || !names_.scalars.empty()))
        refuse("scalars", "every number of the rule must be in the state");
    if (!names_.average.is_none() &&
        (slot_->num_averaged == nullptr || (slot_->average == nullptr && param_numel() > 0)))
      refuse("average", "it and num_averaged must be in the state");
  }

 private:
  int64_t param_numel() const { return param_.numel(); }
  DType type_of(int k) const {
    return traits_.full_precision_states >> k & 1u && !is_double_ ? DType::kFloat32 : slot_->state_type;
  }
  bool is_by_element(int k) const { return k < traits_.num_states - traits_.num_factor_states; }

  void put_state(int k, const Facts& facts, const std::string& name) {
    const bool is_full_precision = traits_.full_precision_states >> k & 1u;
    if (is_double_ != (facts.dtype == DType::kFloat64))
      refuse(name, "must be fp64 beside an fp64 parameter, only there");
    if (is_full_precision && !is_double_ && facts.dtype != DType::kFloat32) refuse(name, "must be fp32");
    if (!is_floating(facts.dtype) && facts.dtype != DType::kQuantized8)
      refuse(name, "must be floating-point numbers or 8-bit codes");
    if (!is_full_precision && has_type_ && facts.dtype != slot_->state_type)
      refuse(name, "must have the dtype of the others");
    if (!is_full_precision) slot_->state_type = facts.dtype, has_type_ = true;
    if (is_by_element(k)) {
      if (!facts.is_in_order_of(param_)) refuse(name, "must have the shape and strides of the parameter");
    } else {
      const int64_t other = k == traits_.num_states - 2 ? slot_->columns : slot_->rows;
      if (param_numel() > 0 && (facts.numel() * other != param_numel() || !facts.is_dense()))
        refuse(name, "must hold one number for each row, or each column, without gaps");
    }
    slot_->state[k] = facts.data;
  }
  void put_scale(int k, const Facts& facts, const std::string& name) {
    const int64_t blocks = (param_numel() + kQuantizedBlock - 1) / kQuantizedBlock;
    if (facts.dtype != DType::kFloat32 || facts.numel() != blocks || !facts.is_dense())
      refuse(name, "must be " + std::to_string(blocks) + " fp32 numbers without gaps");
    slot_->state_scale[k] = static_cast<float*>(facts.data);
  }
  void put_compensation(const Facts& facts, const std::string& name) {
    if (!facts.is_in_order_of(param_)) refuse(name, "must be like the parameter");
    if (slot_->compensation != nullptr) refuse(name, "must be the only rest of its parameter");
    slot_->compensation = facts.data;
    slot_->compensation_type = facts.dtype;
  }
  void put_average(const Facts& facts, const std::string& name) {
    if (!is_floating(facts.dtype) || is_double_ != (facts.dtype == DType::kFloat64) || !facts.is_in_order_of(param_))
      refuse(name, "must have the shape and strides of the parameter, and be fp64 beside an fp64 one, only there");
    slot_->average = facts.data;
    slot_->average_type = facts.dtype;
  }

  const RuleTraits& traits_;
  const bool is_double_;
  const Facts& param_;
  const StateNames& names_;
  TensorSlot* slot_;
  bool has_type_ = false;
};

}  // namespace optkit

// SPDX-License-Identifier: Apache-2.0
// A call of the norms' autograd node: its arguments from Python, whether the node supports them, and how autograd saves
// the call.
#pragma once

#include <ATen/core/ivalue.h>
#include <torch/csrc/Exceptions.h>
#include <torch/csrc/autograd/python_variable.h>

#include <array>
#include <cmath>
#include <cstring>
#include <limits>
#include <vector>

#include "bindings/node_tensor.h"

namespace optkit {

// The arguments of a call other than tensors.
struct Call {
  double eps, dropout;
  int64_t dims, rows, size, seed;
  at::ScalarType input_type, residual_type, type, parameter_type;
  bool centered, adds, has_weight, has_bias;

  at::ScalarType accumulator() const { return type == at::kDouble ? at::kDouble : at::kFloat; }
  int64_t mean_bytes() const { return centered ? rows * static_cast<int64_t>(c10::elementSize(accumulator())) : 0; }
};

// The autograd context saves only types that torch knows, so a call is stored as a list of integers.
using Words = std::array<int64_t, (sizeof(Call) + 7) / 8>;

inline c10::IValue packed(const Call& call) {
  Words words = {};
  std::memcpy(words.data(), &call, sizeof(call));
  return std::vector<int64_t>(words.begin(), words.end());
}

inline Call unpacked(const c10::IValue& value) {
  const std::vector<int64_t> words = value.toIntVector();
  Call call;
  std::memcpy(&call, words.data(), sizeof(call));
  return call;
}
// A tensor argument; false if the node does not support it.
inline bool take(PyObject* object, const char* owner, const char* name, Parameter* out) {
  if (object == Py_None) return true;
  if (!THPVariable_CheckExact(object)) {
    TORCH_CHECK_TYPE(THPVariable_Check(object), owner, "(", name, "=", Py_TYPE(object)->tp_name, "): ", name,
                     " must be a tensor.");
    return false;
  }
  const Tensor& t = THPVariable_Unpack(object);
  if (!is_plain(t)) return false;
  *out = t;
  return true;
}

// The value of the seed; false if it must not be read: it is traced, batched or fake.
inline bool take_seed(PyObject* object, const char* owner, double dropout, int64_t* seed) {
  constexpr char kRequirement[] = "must be an int64 number on CPU where dropout is above 0.";
  if (object == Py_None) {
    TORCH_CHECK_VALUE(dropout == 0.0, owner, "(seed=None): ", kRequirement);
    return true;
  }
  TORCH_CHECK_TYPE(THPVariable_Check(object), owner, "(seed=", Py_TYPE(object)->tp_name, "): ", kRequirement);
  const Tensor& t = THPVariable_Unpack(object);
  TORCH_CHECK_VALUE(t.scalar_type() == at::kLong && t.is_cpu() && !t.is_nested() && t.sym_numel() == 1, owner,
                    "(seed=", t.toString(), "): ", kRequirement);
  if (!THPVariable_CheckExact(object) || !is_memory(t)) return false;
  *seed = *t.const_data_ptr<int64_t>();
  return true;
}

// Fills in what follows from the tensors; false if they do not fit, which the dispatcher op then reports.
inline bool describe(PyObject* sizes, PyObject* eps, const Tensor& input, const Parameter& residual,
                     const Parameter& weight, const Parameter& bias, Call* call) {
  if (!(PyTuple_Check(sizes) || PyList_Check(sizes)) || input.numel() == 0) return false;
  call->dims = PySequence_Fast_GET_SIZE(sizes);
  if (call->dims < 1 || call->dims > input.dim()) return false;
  call->size = 1;
  for (int64_t k = 0; k < call->dims; ++k) {
    PyObject* const item = PySequence_Fast_GET_ITEM(sizes, k);
    if (!PyLong_CheckExact(item)) return false;  // other conversions run Python, which might change the list
    const int64_t size = PyLong_AsLongLong(item);
    if (size != input.size(input.dim() - call->dims + k)) return PyErr_Clear(), false;
    call->size *= size;
  }
  call->rows = input.numel() / call->size;
  call->adds = residual.has_value();
  call->has_weight = weight.has_value();
  call->has_bias = bias.has_value();
  call->input_type = call->type = call->residual_type = input.scalar_type();
  if (residual) {
    call->residual_type = residual->scalar_type();
    if (residual->sizes() != input.sizes()) return false;
    if ((call->input_type == at::kDouble) != (call->residual_type == at::kDouble)) return false;
    if (call->residual_type != call->input_type) call->type = at::kFloat;
  }
  const at::IntArrayRef row_sizes = input.sizes().slice(input.dim() - call->dims);
  call->parameter_type = weight ? weight->scalar_type() : bias ? bias->scalar_type() : call->accumulator();
  for (const Parameter* parameter : {&weight, &bias}) {
    if (!*parameter) continue;
    const Tensor& t = **parameter;
    if (t.sizes() != row_sizes || !t.is_contiguous() || t.scalar_type() != call->parameter_type) return false;
    if (t.scalar_type() != call->type && t.scalar_type() != call->accumulator()) return false;
  }
  // Default eps: the resolution of the dtype for RMSNorm in torch; LayerNorm has none.
  if (eps == Py_None && call->centered) return false;
  call->eps = eps == Py_None ? (call->accumulator() == at::kDouble ? std::numeric_limits<double>::epsilon()
                                                                   : std::numeric_limits<float>::epsilon())
                             : PyFloat_AsDouble(eps);
  if (PyErr_Occurred()) return PyErr_Clear(), false;
  return call->eps >= 0.0 && std::isfinite(call->eps);
}

inline bool takes(Py_ssize_t count, Py_ssize_t wanted, const char* owner) {
  if (count != wanted) PyErr_Format(PyExc_TypeError, "%s(): takes %zd arguments, not %zd.", owner, wanted, count);
  return count == wanted;
}

inline PyObject* wrong_kind(const char* owner, const char* name, PyObject* value, const char* requirement) {
  PyErr_Clear();
  return PyErr_Format(PyExc_TypeError, "%s(%s=%R): must be %s.", owner, name, value, requirement);
}

}  // namespace optkit

// SPDX-License-Identifier: Apache-2.0
// Reads the gradients of a list of parameters in one call: `p.grad` from Python takes 140 ns each.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>
#include <torch/csrc/Exceptions.h>
#include <torch/csrc/autograd/python_variable.h>

#include <vector>

namespace py = pybind11;

namespace optkit {
namespace {

// A new reference to `param.grad`; other classes than torch's own may have an attribute of their own.
PyObject* grad_of(PyObject* param) {
  if (!THPVariable_CheckExact(param)) return PyObject_GetAttrString(param, "grad");
  return THPVariable_Wrap(THPVariable_Unpack(param).grad());
}

}  // namespace

// gradients(params: list) -> (those that are there, the indices of their parameters; None: all have one).
PyObject* gradients(PyObject*, PyObject* params) {
  HANDLE_TH_ERRORS
  if (!PyList_Check(params)) return PyErr_Format(PyExc_TypeError, "gradients(params=...): must be a list.");
  const auto all = py::reinterpret_borrow<py::list>(params);
  py::list found;
  std::vector<std::size_t> places;
  for (std::size_t i = 0; i < all.size(); ++i) {
    const py::object param = all[i];  // held: an attribute of another class may run any code
    const auto grad = py::reinterpret_steal<py::object>(grad_of(param.ptr()));
    if (!grad) return nullptr;
    if (grad.is_none()) continue;
    found.append(grad);
    places.push_back(i);
  }
  const py::object indices = places.size() == all.size() ? py::none() : py::object(py::cast(places));
  return py::make_tuple(found, indices).release().ptr();
  END_HANDLE_TH_ERRORS
}

}  // namespace optkit

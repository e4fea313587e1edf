// SPDX-License-Identifier: Apache-2.0
#include "bindings/membership.h"

#include <stdexcept>
#include <unordered_map>

namespace py = pybind11;

namespace optkit {

Membership::Membership(const py::dict& state, const py::list& lists, const py::list& entries)
    : num_entries_(PyList_GET_SIZE(entries.ptr())) {
  for (const py::handle& list : lists) {
    if (!PyList_Check(list.ptr())) throw std::invalid_argument("Membership(lists=...): must be a list of lists.");
    std::vector<PyObject*>& params = params_.emplace_back();
    for (Py_ssize_t i = 0; i < PyList_GET_SIZE(list.ptr()); ++i) params.push_back(PyList_GET_ITEM(list.ptr(), i));
  }
  std::unordered_map<PyObject*, Py_ssize_t> place_of;
  for (Py_ssize_t i = 0; i < num_entries_; ++i) place_of[PyList_GET_ITEM(entries.ptr(), i)] = i;
  PyObject *key, *value;
  for (Py_ssize_t i = 0; PyDict_Next(state.ptr(), &i, &key, &value);) {
    const auto found = place_of.find(key);
    keys_.push_back({key, found == place_of.end() ? -1 : found->second});
    if (found != place_of.end()) place_of.erase(found);
  }
  if (!place_of.empty()) throw std::invalid_argument("Membership(entries=...): every entry must have state.");
}

py::object Membership::states(const py::dict& state, const py::list& lists) const {
  if (PyList_GET_SIZE(lists.ptr()) != static_cast<Py_ssize_t>(params_.size())) return py::none();
  for (std::size_t g = 0; g < params_.size(); ++g) {
    PyObject* list = PyList_GET_ITEM(lists.ptr(), static_cast<Py_ssize_t>(g));
    const std::vector<PyObject*>& params = params_[g];
    if (!PyList_Check(list) || PyList_GET_SIZE(list) != static_cast<Py_ssize_t>(params.size())) return py::none();
    for (std::size_t i = 0; i < params.size(); ++i)
      if (PyList_GET_ITEM(list, static_cast<Py_ssize_t>(i)) != params[i]) return py::none();
  }
  if (PyDict_GET_SIZE(state.ptr()) != static_cast<Py_ssize_t>(keys_.size())) return py::none();
  py::list states(static_cast<std::size_t>(num_entries_));
  PyObject *key, *value;
  Py_ssize_t position = 0;
  for (const Key& seen : keys_) {
    if (!PyDict_Next(state.ptr(), &position, &key, &value) || key != seen.key) return py::none();
    if (seen.entry < 0) continue;
    if (!PyDict_Check(value)) return py::none();
    PyList_SET_ITEM(states.ptr(), seen.entry, Py_NewRef(value));
  }
  return states;
}

}  // namespace optkit

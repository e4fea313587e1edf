// SPDX-License-Identifier: Apache-2.0
// The parameters of an optimizer that have state: looked up in its groups and state before every step.
#pragma once

#include <pybind11/pybind11.h>

#include <vector>

namespace optkit {

class Membership {
 public:
  // `entries`: the parameters of `lists` that have state, in the order of the answer of `states`. Parameters are
  // compared by address, so the caller must keep them alive as long as this object.
  Membership(const pybind11::dict& state, const pybind11::list& lists, const pybind11::list& entries);

  // The current state of each entry, in a list; None if parameters were added, removed or reordered, or an entry has no
  // state.
  pybind11::object states(const pybind11::dict& state, const pybind11::list& lists) const;

 private:
  struct Key {
    PyObject* key;
    Py_ssize_t entry;  // -1: a parameter without an entry
  };

  std::vector<std::vector<PyObject*>> params_;  // by group
  std::vector<Key> keys_;                       // of the state dict, in its order
  Py_ssize_t num_entries_;
};

}  // namespace optkit

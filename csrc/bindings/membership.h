// SPDX-License-Identifier: Apache-2.0
// Which parameters an optimizer has, and which of them state: looked up in its own groups and state before every step.
#pragma once

#include <pybind11/pybind11.h>

#include <vector>

namespace optkit {

class Membership {
 public:
  // `entries`: those parameters of `lists` that have state, in the order that `states` answers in. Objects are known by
  // their addresses: whoever makes a Membership keeps the parameters alive as long.
  Membership(const pybind11::dict& state, const pybind11::list& lists, const pybind11::list& entries);

  // The state of each entry as it is now, in a list; None if parameters came, went or changed places, or an entry has
  // no state.
  pybind11::object states(const pybind11::dict& state, const pybind11::list& lists) const;

 private:
  struct Key {
    PyObject* key;
    Py_ssize_t entry;  // -1: a parameter that is no entry
  };

  std::vector<std::vector<PyObject*>> params_;  // by group
  std::vector<Key> keys_;                       // of the state, in its order
  Py_ssize_t num_entries_;
};

}  // namespace optkit

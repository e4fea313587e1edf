// SPDX-License-Identifier: Apache-2.0
// Looks at tensors from Python without torch's headers: DLPack's C exchange API (dmlc/dlpack, include/dlpack/dlpack.h,
// version 1), some ten nanoseconds a tensor, where a boxed op takes hundreds.
#pragma once

#include <Python.h>

#include "bindings/plan.h"

namespace optkit {

// Takes what `torch.Tensor.__dlpack_c_exchange_api__` holds; false if this is a version that we do not know.
bool open_exchange(PyObject* capsule);

// As the op plan_bind, for lists of tensors; -1, or 8 * (place in the list) + Misfit. The GIL is held.
int64_t bind_lists(Plan& plan, PyObject* params, PyObject* grads);

}  // namespace optkit

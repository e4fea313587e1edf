// SPDX-License-Identifier: Apache-2.0
// Looks at a tensor from Python: where its numbers lie now, and whether they lie there at all. Without torch's headers,
// by DLPack's C exchange API (dmlc/dlpack, include/dlpack/dlpack.h, version 1); the library built for one torch brings
// a quicker look of its own.
#pragma once

#include <Python.h>

#include <cstdint>

#include "core/tables.h"

namespace optkit {

// `device` of a tensor on the CPU.
constexpr int32_t kCpu = -1;

struct TensorView {
  void* data;
  int64_t dim;
  const int64_t *sizes, *strides;
  int64_t num_bytes;  // of its memory from `data` on, as far as that can be told
  int32_t device;     // kCpu, or the number of a CUDA device
  DType dtype;        // kQuantized8: unsigned bytes
};

// False, with nothing else said, for a tensor that has no strided memory of its own in one of our dtypes: sparse, fake
// or wrapped, traced or transformed, lazily negated, on another kind of device, or no tensor at all. Never throws and
// leaves no Python error.
using Look = bool (*)(PyObject* tensor, TensorView* view);

// Name of a PyCapsule that holds a Look.
constexpr const char* kLookCapsule = "lightning_optkit.look";

extern Look look;

// Takes what `torch.Tensor.__dlpack_c_exchange_api__` holds, torch.Tensor and the function that `__torch_dispatch__`
// is in a class without one of its own; false if this is a version that we do not know.
bool open_exchange(PyObject* capsule, PyObject* tensor_type, PyObject* no_dispatch);

// Takes the look that a capsule of that name holds, or, for None, that by the exchange; throws for anything else.
void use_look(PyObject* capsule);

// torch's DTensor: of one, its `_local_tensor` is looked at.
void set_sharded_type(PyObject* type);

// The part of a tensor that lies here: the local part of a sharded one, the tensor itself if it is not.
class Local {
 public:
  explicit Local(PyObject* tensor);
  ~Local() { Py_XDECREF(owned_); }
  Local(const Local&) = delete;
  Local& operator=(const Local&) = delete;

  PyObject* get() const { return part_; }  // borrowed; null: there is none
  bool look_at(TensorView* view) const { return part_ != nullptr && look(part_, view); }

 private:
  PyObject* part_;
  PyObject* owned_ = nullptr;
};

}  // namespace optkit

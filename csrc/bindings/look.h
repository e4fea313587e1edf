// SPDX-License-Identifier: Apache-2.0
// Inspects a tensor from Python: whether it has memory, and where. This one needs no torch headers: it uses DLPack's C
// exchange API (dmlc/dlpack, include/dlpack/dlpack.h, version 1). The library built for one torch version provides a
// faster one.
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
  int64_t num_bytes;    // of its memory from `data` on
  int32_t device;       // kCpu, or the index of a CUDA device
  DType dtype;          // kQuantized8: unsigned bytes
  const void* storage;  // the record that num_bytes was read from, to prefetch it; null: unknown
};

// Returns false, without further information, for anything without strided memory of its own in a supported dtype:
// sparse, fake, wrapped, traced, transformed or lazily negated tensors, other device types, and objects that are no
// tensors. Never throws and leaves no Python error set.
using Look = bool (*)(PyObject* tensor, TensorView* view);

// Name of a PyCapsule that holds a Look.
constexpr const char* kLookCapsule = "lightning_optkit.look";

extern Look look;

// Arguments: `torch.Tensor.__dlpack_c_exchange_api__`, torch.Tensor, and the default `__torch_dispatch__` of a class
// that does not override it. False for an unsupported version of the API.
bool open_exchange(PyObject* capsule, PyObject* tensor_type, PyObject* no_dispatch);

// Installs the Look in a capsule of that name or, for None, the one by DLPack; throws for anything else.
void use_look(PyObject* capsule);

// torch's DTensor: its `_local_tensor` is inspected instead.
void set_sharded_type(PyObject* type);

// The local part of a sharded tensor; any other tensor as is.
class Local {
 public:
  explicit Local(PyObject* tensor);
  ~Local() { Py_XDECREF(owned_); }
  Local(const Local&) = delete;
  Local& operator=(const Local&) = delete;

  PyObject* get() const { return part_; }  // borrowed; null: none
  bool look_at(TensorView* view) const { return part_ != nullptr && look(part_, view); }

 private:
  PyObject* part_;
  PyObject* owned_ = nullptr;
};

}  // namespace optkit

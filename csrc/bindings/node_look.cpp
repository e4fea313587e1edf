// SPDX-License-Identifier: Apache-2.0
// Inspects a tensor through torch's headers: a few nanoseconds, where DLPack takes tens and ignores a lazy negation.
#include <ATen/core/Tensor.h>
#include <torch/csrc/autograd/python_variable.h>

#include "bindings/look.h"
#include "bindings/node_tensor.h"

namespace optkit {
namespace {

// Dispatch keys of a tensor with plain memory that may be read directly.
constexpr c10::DispatchKeySet kPlain({c10::DispatchKey::CPU, c10::DispatchKey::CUDA, c10::DispatchKey::AutogradCPU,
                                      c10::DispatchKey::AutogradCUDA, c10::DispatchKey::ADInplaceOrView,
                                      c10::DispatchKey::AutocastCPU, c10::DispatchKey::AutocastCUDA});

bool look_at(PyObject* object, TensorView* view) {
  if (!THPVariable_Check(object)) return false;
  const at::Tensor& tensor = THPVariable_Unpack(object);
  if (!tensor.defined() || (tensor.key_set().raw_repr() & ~kPlain.raw_repr()) != 0) return false;
  const c10::TensorImpl& impl = *tensor.unsafeGetTensorImpl();
  if (tensor.scalar_type() == at::kByte)
    view->dtype = DType::kQuantized8;
  else if (tensor.scalar_type() == at::kChar)
    view->dtype = DType::kInt8;
  else if (tensor.scalar_type() == at::kShort)
    view->dtype = DType::kInt16;
  else if (!to_dtype(tensor.scalar_type(), &view->dtype))
    return false;
  if (!impl.has_storage()) return false;
  try {
    // Mutable access: copy-on-write memory becomes the tensor's own.
    view->data = tensor.mutable_data_ptr();
    const int64_t before = impl.storage_offset() * static_cast<int64_t>(impl.itemsize());
    view->num_bytes = static_cast<int64_t>(impl.unsafe_storage().nbytes()) - before;
  } catch (const std::exception&) {
    return false;
  }
  if (view->data == nullptr && impl.numel() > 0) return false;
  view->dim = impl.dim();
  view->sizes = impl.sizes().data();
  view->strides = impl.strides().data();
  view->device = tensor.is_cuda() ? impl.device().index() : kCpu;
  return true;
}

const Look chosen = &look_at;

}  // namespace

// A new reference to a capsule named kLookCapsule.
PyObject* look_capsule() { return PyCapsule_New(const_cast<Look*>(&chosen), kLookCapsule, nullptr); }

}  // namespace optkit

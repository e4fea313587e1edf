// SPDX-License-Identifier: Apache-2.0
#include "bindings/look.h"

#include <stdexcept>

namespace optkit {
namespace {

// The part of the interface used here; names and layout are DLPack's.
struct DLDevice {
  int32_t device_type, device_id;
};
struct DLDataType {
  uint8_t code, bits;
  uint16_t lanes;
};
struct DLTensor {
  void* data;
  DLDevice device;
  int32_t ndim;
  DLDataType dtype;
  int64_t *shape, *strides;
  uint64_t byte_offset;
};
struct DLPackExchangeAPI {
  uint32_t version_major, version_minor;
  void* prev_api;
  void *managed_tensor_allocator, *managed_tensor_from_py_object_no_sync, *managed_tensor_to_py_object_no_sync;
  int (*dltensor_from_py_object_no_sync)(void* py_object, DLTensor* out);  // 0, or -1 with a Python error
  void* current_work_stream;
};
constexpr int32_t kDLCPU = 1, kDLCUDA = 2;
constexpr uint8_t kDLInt = 0, kDLUInt = 1, kDLFloat = 2, kDLBfloat = 4;

const DLPackExchangeAPI* exchange = nullptr;
PyObject *tensor_type = nullptr, *no_dispatch = nullptr, *sharded_type = nullptr;

bool to_dtype(DLDataType type, DType* dtype) {
  if (type.code == kDLBfloat && type.bits == 16)
    *dtype = DType::kBFloat16;
  else if (type.code == kDLFloat && type.bits == 32)
    *dtype = DType::kFloat32;
  else if (type.code == kDLFloat && type.bits == 16)
    *dtype = DType::kFloat16;
  else if (type.code == kDLFloat && type.bits == 64)
    *dtype = DType::kFloat64;
  else if (type.code == kDLUInt && type.bits == 8)
    *dtype = DType::kQuantized8;
  else if (type.code == kDLInt && (type.bits == 8 || type.bits == 16))
    *dtype = type.bits == 8 ? DType::kInt8 : DType::kInt16;
  else
    return false;
  return type.lanes == 1;
}

// Whether a class overrides `__torch_dispatch__`. The memory of its instances, if any, is then meaningless.
bool has_dispatch(PyTypeObject* type) {
  PyObject* dispatch = PyObject_GetAttrString(reinterpret_cast<PyObject*>(type), "__torch_dispatch__");
  if (dispatch == nullptr) PyErr_Clear();
  const bool is_default = dispatch == no_dispatch;
  Py_XDECREF(dispatch);
  return !is_default;
}

// The exchange ignores a lazy negation.
bool is_negated(PyObject* tensor) {
  static PyObject* const name = PyUnicode_InternFromString("is_neg");
  PyObject* answer = PyObject_CallMethodNoArgs(tensor, name);
  if (answer == nullptr) PyErr_Clear();
  const bool is_false = answer == Py_False;
  Py_XDECREF(answer);
  return !is_false;
}

PyObject* call(PyObject* object, PyObject* method) {
  return object == nullptr ? nullptr : PyObject_CallMethodNoArgs(object, method);
}

// Bytes of the tensor's storage from `data` on; 0 if it cannot be asked.
int64_t num_bytes_from(PyObject* tensor, const void* data) {
  static PyObject *const storage_name = PyUnicode_InternFromString("untyped_storage"),
                         *const size_name = PyUnicode_InternFromString("nbytes"),
                         *const begin_name = PyUnicode_InternFromString("data_ptr");
  PyObject* storage = call(tensor, storage_name);
  PyObject *size = call(storage, size_name), *begin = call(storage, begin_name);
  int64_t num_bytes = 0;
  if (size != nullptr && begin != nullptr) {
    const auto* first = static_cast<const char*>(PyLong_AsVoidPtr(begin));
    num_bytes = PyLong_AsLongLong(size) - (static_cast<const char*>(data) - first);
  }
  if (PyErr_Occurred()) {
    PyErr_Clear();
    num_bytes = 0;
  }
  Py_XDECREF(begin);
  Py_XDECREF(size);
  Py_XDECREF(storage);
  return num_bytes;
}

bool look_by_exchange(PyObject* tensor, TensorView* view) {
  auto* type = Py_TYPE(tensor);
  if (exchange == nullptr || !PyType_IsSubtype(type, reinterpret_cast<PyTypeObject*>(tensor_type))) return false;
  if (reinterpret_cast<PyObject*>(type) != tensor_type && has_dispatch(type)) return false;
  DLTensor seen = {};
  if (exchange->dltensor_from_py_object_no_sync(tensor, &seen) != 0) {
    PyErr_Clear();
    return false;
  }
  const bool on_cpu = seen.device.device_type == kDLCPU, on_cuda = seen.device.device_type == kDLCUDA;
  if (!(on_cpu || on_cuda) || (seen.ndim > 0 && seen.strides == nullptr) || !to_dtype(seen.dtype, &view->dtype))
    return false;
  int64_t numel = 1;
  for (int32_t d = 0; d < seen.ndim; ++d) numel *= seen.shape[d];
  if ((numel > 0 && seen.data == nullptr) || is_negated(tensor)) return false;
  view->data = static_cast<char*>(seen.data) + seen.byte_offset;
  view->dim = seen.ndim;
  view->sizes = seen.shape;
  view->strides = seen.strides;
  view->num_bytes = seen.data == nullptr ? 0 : num_bytes_from(tensor, view->data);
  view->device = on_cpu ? kCpu : seen.device.device_id;
  view->storage = nullptr;
  return true;
}

}  // namespace

Look look = &look_by_exchange;

bool open_exchange(PyObject* capsule, PyObject* type, PyObject* default_dispatch) {
  const auto* api = static_cast<const DLPackExchangeAPI*>(PyCapsule_GetPointer(capsule, "dlpack_exchange_api"));
  if (api == nullptr) PyErr_Clear();
  if (api == nullptr || api->version_major != 1 || !PyType_Check(type)) return false;
  tensor_type = Py_NewRef(type);
  no_dispatch = Py_NewRef(default_dispatch);
  exchange = api;
  return true;
}

void use_look(PyObject* capsule) {
  if (capsule == Py_None) {
    look = &look_by_exchange;
    return;
  }
  const auto* held = static_cast<const Look*>(PyCapsule_GetPointer(capsule, kLookCapsule));
  if (held == nullptr) {
    PyErr_Clear();
    throw std::invalid_argument("use_look(capsule=...): capsule must be lightning_optkit._node.look.");
  }
  look = *held;
}

void set_sharded_type(PyObject* type) {
  if (!PyType_Check(type)) throw std::invalid_argument("set_sharded_type(type=...): type must be a class.");
  Py_XSETREF(sharded_type, Py_NewRef(type));
}

Local::Local(PyObject* tensor) : part_(tensor) {
  PyTypeObject* type = Py_TYPE(tensor);
  if (sharded_type == nullptr || !PyType_IsSubtype(type, reinterpret_cast<PyTypeObject*>(sharded_type))) return;
  static PyObject* const name = PyUnicode_InternFromString("_local_tensor");
  part_ = owned_ = PyObject_GetAttr(tensor, name);
  if (part_ == nullptr) PyErr_Clear();
}

}  // namespace optkit

// SPDX-License-Identifier: Apache-2.0
#include "bindings/exchange.h"

#include <stdexcept>

namespace optkit {
namespace {

// The part of the interface that is used; names and layout are DLPack's.
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
constexpr uint8_t kDLFloat = 2, kDLBfloat = 4;

const DLPackExchangeAPI* exchange = nullptr;

bool to_dtype(DLDataType type, DType* dtype) {
  if (type.code == kDLBfloat && type.bits == 16)
    *dtype = DType::kBFloat16;
  else if (type.code == kDLFloat && type.bits == 32)
    *dtype = DType::kFloat32;
  else if (type.code == kDLFloat && type.bits == 16)
    *dtype = DType::kFloat16;
  else if (type.code == kDLFloat && type.bits == 64)
    *dtype = DType::kFloat64;
  else
    return false;
  return type.lanes == 1;
}

// A tensor that cannot be described, such as a sparse one, is one without strides.
TensorView view(PyObject* tensor) {
  DLTensor seen = {};
  TensorView result = {};
  if (exchange->dltensor_from_py_object_no_sync(tensor, &seen) != 0) {
    PyErr_Clear();
    return result;
  }
  result.is_strided = seen.data != nullptr || seen.strides != nullptr || seen.ndim == 0;
  result.data = static_cast<char*>(seen.data) + seen.byte_offset;
  result.dim = seen.ndim;
  result.sizes = seen.shape;
  result.strides = seen.strides;
  result.has_dtype = to_dtype(seen.dtype, &result.dtype);
  result.on_cpu = seen.device.device_type == kDLCPU;
  result.on_cuda = seen.device.device_type == kDLCUDA;
  return result;
}

}  // namespace

bool open_exchange(PyObject* capsule) {
  const auto* api = static_cast<const DLPackExchangeAPI*>(PyCapsule_GetPointer(capsule, "dlpack_exchange_api"));
  if (api == nullptr) PyErr_Clear();
  if (api == nullptr || api->version_major != 1) return false;
  exchange = api;
  return true;
}

int64_t bind_lists(Plan& plan, PyObject* params, PyObject* grads) {
  if (exchange == nullptr) throw std::logic_error("Plan.bind: torch offers no DLPack exchange API.");
  if (!PyList_Check(params) || !PyList_Check(grads) ||
      PyList_GET_SIZE(params) != static_cast<Py_ssize_t>(plan.active.size()) ||
      PyList_GET_SIZE(grads) != PyList_GET_SIZE(params))
    throw std::invalid_argument("Plan.bind: needs a list of one gradient for each active parameter.");
  for (Py_ssize_t i = 0; i < PyList_GET_SIZE(params); ++i) {
    const TensorView param = view(PyList_GET_ITEM(params, i)), grad = view(PyList_GET_ITEM(grads, i));
    const Misfit misfit = plan.point_at(plan.active[i], param, grad);
    if (misfit != Misfit::kNone) return 8 * static_cast<int64_t>(i) + static_cast<int64_t>(misfit);
  }
  return -1;
}

}  // namespace optkit

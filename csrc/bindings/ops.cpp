// SPDX-License-Identifier: Apache-2.0
// The only file that sees torch, and only its stable ABI: one binary serves every torch from 2.10 on.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/tensor.h>

#include "bindings/plan.h"
#include "bindings/threads.h"

namespace optkit {

void torch_parallel(int64_t size, void (*body)(int64_t, int64_t, void*), void* context) {
  TORCH_ERROR_CODE_CHECK(torch_parallel_for(0, size, 1, body, context));
}

int torch_num_threads() {
  uint32_t count = 1;
  TORCH_ERROR_CODE_CHECK(torch_get_num_threads(&count));
  return static_cast<int>(count);
}

namespace {

using torch::stable::detail::from;
using torch::stable::detail::to;

// Owns a list argument of a boxed call. Items are taken one by one: a vector of tensors would cost an allocation each.
class TensorList {
 public:
  explicit TensorList(StableIValue value) : handle_(to<StableListHandle>(value)) {
    TORCH_ERROR_CODE_CHECK(torch_list_size(handle_, &size));
  }
  ~TensorList() { torch_delete_list(handle_); }
  TensorList(const TensorList&) = delete;
  TensorList& operator=(const TensorList&) = delete;

  // The caller deletes what it gets.
  AtenTensorHandle take(size_t i) const {
    StableIValue item;
    TORCH_ERROR_CODE_CHECK(torch_list_get_item(handle_, i, &item));
    return to<AtenTensorHandle>(item);
  }

  size_t size = 0;

 private:
  StableListHandle handle_;
};

// Has the parameter's memory, shape or order of dimensions changed since the plan was built?
bool has_moved(AtenTensorHandle param, const TensorSlot& slot, const Shape& shape) {
  void* data = nullptr;
  int64_t dim = 0, *sizes = nullptr, *strides = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_data_ptr(param, &data));
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_dim(param, &dim));
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_sizes(param, &sizes));
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_strides(param, &strides));
  if (data != slot.param || dim != static_cast<int64_t>(shape.sizes.size())) return true;
  for (int64_t d = 0; d < dim; ++d)
    if (sizes[d] != shape.sizes[d] || strides[d] != shape.strides[d]) return true;
  return false;
}

bool to_dtype(int32_t code, DType* dtype) {
  static const int32_t float32 = aoti_torch_dtype_float32(), bfloat16 = aoti_torch_dtype_bfloat16(),
                       float16 = aoti_torch_dtype_float16(), float64 = aoti_torch_dtype_float64();
  if (code == float32)
    *dtype = DType::kFloat32;
  else if (code == bfloat16)
    *dtype = DType::kBFloat16;
  else if (code == float16)
    *dtype = DType::kFloat16;
  else if (code == float64)
    *dtype = DType::kFloat64;
  else
    return false;
  return true;
}

// Can the gradient be walked with the parameter's own index? Strides of dimensions of size 1 mean nothing.
Misfit compare(const Shape& param, AtenTensorHandle grad, int32_t device_type, TensorSlot* slot) {
  int64_t dim = 0, *sizes = nullptr, *strides = nullptr;
  int32_t dtype = 0, grad_device = 0;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_dim(grad, &dim));
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_sizes(grad, &sizes));
  if (dim != static_cast<int64_t>(param.sizes.size())) return Misfit::kShape;
  for (int64_t d = 0; d < dim; ++d)
    if (param.sizes[d] != sizes[d]) return Misfit::kShape;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(grad, &grad_device));
  if (grad_device != device_type) return Misfit::kDevice;
  int32_t layout = 0;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_layout(grad, &layout));
  if (layout != aoti_torch_layout_strided()) return Misfit::kLayout;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_dtype(grad, &dtype));
  DType grad_type = slot->grad_type;
  if (!to_dtype(dtype, &grad_type)) return Misfit::kDType;
  if ((grad_type == DType::kFloat64) != (slot->param_type == DType::kFloat64)) return Misfit::kDType;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_strides(grad, &strides));
  for (int64_t d = 0; d < dim; ++d)
    if (sizes[d] > 1 && param.strides[d] != strides[d]) return Misfit::kLayout;
  void* data = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_data_ptr(grad, &data));
  slot->grad = data;
  slot->grad_type = grad_type;
  return Misfit::kNone;
}

// plan_bind(plan, params, grads): points the plan at this step's gradients of its active parameters. Returns -1, or
// 8 * (place in the list) + Misfit for the first one that does not fit.
void plan_bind(StableIValue* stack, uint64_t, uint64_t) {
  Plan* plan = Plan::find(to<int64_t>(stack[0]));
  const TensorList params(stack[1]), grads(stack[2]);
  STD_TORCH_CHECK(plan != nullptr, "plan_bind: no such plan.");
  STD_TORCH_CHECK(params.size == plan->active.size() && grads.size == params.size,
                  "plan_bind: needs one gradient for each active parameter.");
  const int32_t device_type = plan->is_on_cuda() ? aoti_torch_device_type_cuda() : aoti_torch_device_type_cpu();
  int64_t result = -1;
  for (size_t i = 0; i < params.size && result < 0; ++i) {
    const int place = plan->active[i];
    TensorSlot& slot = plan->tensors[place];
    const AtenTensorHandle param = params.take(i), grad = grads.take(i);
    const Misfit misfit = has_moved(param, slot, plan->shapes[place])
                              ? Misfit::kParamMoved
                              : compare(plan->shapes[place], grad, device_type, &slot);
    TORCH_ERROR_CODE_CHECK(aoti_torch_delete_tensor_object(param));
    TORCH_ERROR_CODE_CHECK(aoti_torch_delete_tensor_object(grad));
    if (misfit != Misfit::kNone) result = 8 * static_cast<int64_t>(i) + static_cast<int64_t>(misfit);
  }
  stack[0] = from(result);
}

}  // namespace
}  // namespace optkit

STABLE_TORCH_LIBRARY(lightning_optkit, m) { m.def("plan_bind(int plan, Tensor[] params, Tensor[] grads) -> int"); }

STABLE_TORCH_LIBRARY_IMPL(lightning_optkit, CompositeExplicitAutograd, m) { m.impl("plan_bind", &optkit::plan_bind); }

// SPDX-License-Identifier: Apache-2.0
// Torch's threads and the op that binds a plan, on torch's stable ABI: one binary serves every torch from 2.10 on.
#include "bindings/argument.h"
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

TensorView view(AtenTensorHandle tensor) {
  TensorView result = {};
  int32_t layout = 0, dtype = 0, device_type = 0;
  int64_t *sizes = nullptr, *strides = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_layout(tensor, &layout));
  result.is_strided = layout == aoti_torch_layout_strided();
  if (!result.is_strided) return result;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_dim(tensor, &result.dim));
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_sizes(tensor, &sizes));
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_strides(tensor, &strides));
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(tensor, &device_type));
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_dtype(tensor, &dtype));
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_data_ptr(tensor, &result.data));
  result.sizes = sizes;
  result.strides = strides;
  result.on_cpu = device_type == aoti_torch_device_type_cpu();
  result.on_cuda = device_type == aoti_torch_device_type_cuda();
  result.has_dtype = to_dtype(dtype, &result.dtype);
  return result;
}

// plan_bind(plan, params, grads): points the plan at this step's gradients of its active parameters. Returns -1, or
// 8 * (place in the list) + Misfit for the first one that does not fit. For a torch without what exchange.h needs.
void plan_bind(StableIValue* stack, uint64_t, uint64_t) {
  Plan* plan = Plan::find(to<int64_t>(stack[0]));
  const TensorList params(stack[1]), grads(stack[2]);
  STD_TORCH_CHECK(plan != nullptr, "plan_bind: no such plan.");
  STD_TORCH_CHECK(params.size == plan->active.size() && grads.size == params.size,
                  "plan_bind: needs one gradient for each active parameter.");
  int64_t result = -1;
  for (size_t i = 0; i < params.size && result < 0; ++i) {
    const AtenTensorHandle param = params.take(i), grad = grads.take(i);
    const Misfit misfit = plan->point_at(plan->active[i], view(param), view(grad));
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

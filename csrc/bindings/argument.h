// SPDX-License-Identifier: Apache-2.0
// Tensors of a dispatcher op, through torch's stable ABI: metadata and memory of an argument, and new outputs.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <array>
#include <cstdint>
#include <memory>
#include <optional>
#include <utility>

#include "core/tables.h"
#include "cpu/memory.h"
#include "norms/layout.h"

namespace optkit {

struct DeleteTensor {
  void operator()(AtenTensorHandle handle) const { aoti_torch_delete_tensor_object(handle); }
};
using Output = std::unique_ptr<AtenTensorOpaque, DeleteTensor>;

inline StableIValue give(Output output) { return torch::stable::detail::from(output.release()); }

// torch's codes of our dtypes, in the order of DType.
inline const std::array<int32_t, 4>& dtype_codes() {
  static const std::array<int32_t, 4> codes = {aoti_torch_dtype_float32(), aoti_torch_dtype_bfloat16(),
                                               aoti_torch_dtype_float16(), aoti_torch_dtype_float64()};
  return codes;
}

inline bool to_dtype(int32_t code, DType* dtype) {
  const auto found = std::find(dtype_codes().begin(), dtype_codes().end(), code);
  if (found == dtype_codes().end()) return false;
  *dtype = static_cast<DType>(found - dtype_codes().begin());
  return true;
}

inline int32_t code_of(DType dtype) { return dtype_codes()[static_cast<size_t>(dtype)]; }

inline bool is_half(DType dtype) { return size_of(dtype) == 2; }

// A tensor argument of a call: owns its handle and reads the metadata once. Metadata comes first; the data pointer is
// read only if a kernel could use the memory.
class Argument {
 public:
  explicit Argument(const char* argument_name) : name(argument_name) {}
  Argument(const char* argument_name, AtenTensorHandle handle) : name(argument_name), handle_(handle) { look(); }
  Argument(Argument&& other) noexcept { swap(other); }
  Argument& operator=(Argument&& other) noexcept {
    swap(other);
    return *this;
  }
  ~Argument() {
    if (handle_) aoti_torch_delete_tensor_object(handle_);
  }

  explicit operator bool() const { return handle_ != nullptr; }
  AtenTensorHandle get() const { return handle_; }
  AtenTensorHandle release() { return std::exchange(handle_, nullptr); }
  bool same_shape(const Argument& other) const {
    return dim == other.dim && std::equal(sizes, sizes + dim, other.sizes);
  }

  RowLayout layout(int64_t row_dims) const { return row_layout(sizes, strides, dim, row_dims); }
  bool on_cpu() const { return device == aoti_torch_device_type_cpu(); }

  bool on_device_of(const Argument& other) const {
    return device == other.device && device_index == other.device_index;
  }
  // Whether the pointer is a multiple of the element size, which the kernels' loads require.
  bool is_aligned() const { return reinterpret_cast<uintptr_t>(data) % element_size == 0; }
  // Whether the storage covers the range of sizes and strides: it may have been resized or freed.
  bool has_memory() const { return numel == 0 || (data != nullptr && reach_bytes <= storage_bytes); }

  // A contiguous, aligned version.
  Argument contiguous() && {
    if (!is_aligned()) {
      AtenTensorHandle copy = nullptr;
      TORCH_ERROR_CODE_CHECK(aoti_torch_clone(handle_, &copy));
      return Argument(name, copy).contiguous();
    }
    StableIValue stack[2] = {torch::stable::detail::from(release()),
                             torch::stable::detail::from(aoti_torch_memory_format_contiguous_format())};
    TORCH_ERROR_CODE_CHECK(torch_call_dispatcher("aten::contiguous", "", stack, TORCH_ABI_VERSION));
    return Argument(name, torch::stable::detail::to<AtenTensorHandle>(stack[0]));
  }

  const char* name = "";
  int32_t layout_code = 0, dtype_code = 0, device = 0, device_index = 0;
  DType dtype = DType::kFloat32;
  bool is_defined = false;   // the dispatcher accepts None as a tensor
  bool is_known = false;     // dtype is one of DType
  bool is_ordinary = false;  // strided, on CPU or CUDA: only then are the fields below set
  int64_t dim = 0, numel = 0, element_size = 1;
  int64_t *sizes = nullptr, *strides = nullptr;
  void* data = nullptr;
  int64_t reach_bytes = 0, storage_bytes = 0;

 private:
  void swap(Argument& other) {
    std::swap(name, other.name);
    std::swap(layout_code, other.layout_code);
    std::swap(dtype_code, other.dtype_code);
    std::swap(device, other.device);
    std::swap(device_index, other.device_index);
    std::swap(dtype, other.dtype);
    std::swap(is_defined, other.is_defined);
    std::swap(is_known, other.is_known);
    std::swap(is_ordinary, other.is_ordinary);
    std::swap(dim, other.dim);
    std::swap(numel, other.numel);
    std::swap(element_size, other.element_size);
    std::swap(sizes, other.sizes);
    std::swap(strides, other.strides);
    std::swap(data, other.data);
    std::swap(reach_bytes, other.reach_bytes);
    std::swap(storage_bytes, other.storage_bytes);
    std::swap(handle_, other.handle_);
  }
  void look() {
    TORCH_ERROR_CODE_CHECK(aoti_torch_is_defined(handle_, &is_defined));
    if (!is_defined) return;
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_layout(handle_, &layout_code));
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_dtype(handle_, &dtype_code));
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(handle_, &device));
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_index(handle_, &device_index));
    is_known = to_dtype(dtype_code, &dtype);
    element_size = std::max<int64_t>(1, static_cast<int64_t>(aoti_torch_dtype_element_size(dtype_code)));
    const bool here = on_cpu() || device == aoti_torch_device_type_cuda();
    // A nested tensor reports a strided layout but has no sizes.
    is_ordinary = here && layout_code == aoti_torch_layout_strided() &&
                  aoti_torch_get_sizes(handle_, &sizes) == AOTI_TORCH_SUCCESS;
    if (!is_ordinary) return;
    int64_t offset = 0;
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_dim(handle_, &dim));
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_strides(handle_, &strides));
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_numel(handle_, &numel));
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_storage_offset(handle_, &offset));
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_storage_size(handle_, &storage_bytes));
    if (numel == 0) return;
    int64_t last = offset;
    for (int64_t d = 0; d < dim; ++d) last += (sizes[d] - 1) * strides[d];
    reach_bytes = (last + 1) * element_size;
    if (reach_bytes <= storage_bytes) TORCH_ERROR_CODE_CHECK(aoti_torch_get_data_ptr(handle_, &data));
  }

  AtenTensorHandle handle_ = nullptr;
};

inline Argument required(const char* name, StableIValue value) {
  return Argument(name, torch::stable::detail::to<AtenTensorHandle>(value));
}
inline Argument optional(const char* name, StableIValue value) {
  const std::optional<AtenTensorHandle> handle = torch::stable::detail::to<std::optional<AtenTensorHandle>>(value);
  return handle ? Argument(name, *handle) : Argument(name);
}

// A new contiguous tensor on the device of `like`.
inline Output empty(const Argument& like, const int64_t* sizes, int64_t dim, DType dtype) {
  std::array<int64_t, 64> strides;
  STD_TORCH_CHECK(dim <= 64, "at most 64 dimensions");
  int64_t step = 1;
  for (int64_t d = dim - 1; d >= 0; --d) {
    strides[d] = step;
    step *= std::max<int64_t>(sizes[d], 1);
  }
  AtenTensorHandle handle = nullptr;
  TORCH_ERROR_CODE_CHECK(
      aoti_torch_empty_strided(dim, sizes, strides.data(), code_of(dtype), like.device, like.device_index, &handle));
  Output output(handle);
  if (like.device == aoti_torch_device_type_cpu()) {
    void* data = nullptr;
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_data_ptr(handle, &data));
    back_by_huge_pages(data, step * size_of(dtype));
  }
  return output;
}
inline Output nothing(const Argument& like) {
  const int64_t size = 0;
  return empty(like, &size, 1, like.dtype);
}
inline void* data_of(const Output& output) {
  void* data = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_data_ptr(output.get(), &data));
  return data;
}

}  // namespace optkit

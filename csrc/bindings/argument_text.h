// SPDX-License-Identifier: Apache-2.0
// Error messages for arguments of a dispatcher op, in Python's terms.
#pragma once

#include <stdexcept>
#include <string>
#include <utility>

#include "bindings/argument.h"

namespace optkit {

inline std::string name_of_dtype(int32_t code) {
  static const std::pair<int32_t, const char*> names[] = {
      {aoti_torch_dtype_float32(), "float32"},
      {aoti_torch_dtype_float64(), "float64"},
      {aoti_torch_dtype_bfloat16(), "bfloat16"},
      {aoti_torch_dtype_float16(), "float16"},
      {aoti_torch_dtype_int64(), "int64"},
      {aoti_torch_dtype_int32(), "int32"},
      {aoti_torch_dtype_int16(), "int16"},
      {aoti_torch_dtype_int8(), "int8"},
      {aoti_torch_dtype_uint8(), "uint8"},
      {aoti_torch_dtype_uint16(), "uint16"},
      {aoti_torch_dtype_uint32(), "uint32"},
      {aoti_torch_dtype_uint64(), "uint64"},
      {aoti_torch_dtype_bool(), "bool"},
      {aoti_torch_dtype_complex32(), "complex32"},
      {aoti_torch_dtype_complex64(), "complex64"},
      {aoti_torch_dtype_complex128(), "complex128"},
      {aoti_torch_dtype_float8_e4m3fn(), "float8_e4m3fn"},
      {aoti_torch_dtype_float8_e5m2(), "float8_e5m2"},
  };
  for (const auto& [known, name] : names)
    if (known == code) return std::string("torch.") + name;
  return "dtype number " + std::to_string(code);
}

inline std::string name_of_layout(int32_t code) {
  static const std::pair<int32_t, const char*> names[] = {
      {aoti_torch_layout_strided(), "strided"},       {aoti_torch_layout_sparse_coo(), "sparse_coo"},
      {aoti_torch_layout_sparse_csr(), "sparse_csr"}, {aoti_torch_layout_sparse_csc(), "sparse_csc"},
      {aoti_torch_layout_sparse_bsr(), "sparse_bsr"}, {aoti_torch_layout_sparse_bsc(), "sparse_bsc"},
      {aoti_torch_layout__mkldnn(), "_mkldnn"},
  };
  for (const auto& [known, name] : names)
    if (known == code) return std::string("torch.") + name;
  return "layout number " + std::to_string(code);
}

inline std::string name_of_device(const Argument& t) {
  if (t.on_cpu()) return "cpu";
  if (t.device == aoti_torch_device_type_meta()) return "meta";
  if (t.device == aoti_torch_device_type_cuda()) return "cuda:" + std::to_string(t.device_index);
  return "device type " + std::to_string(t.device);
}

inline std::string text_of(const int64_t* sizes, int64_t dim) {
  std::string text = "(";
  for (int64_t d = 0; d < dim; ++d) text += (d > 0 ? ", " : "") + std::to_string(sizes[d]);
  return text + (dim == 1 ? ",)" : ")");
}
inline std::string shape_of(const Argument& t) { return text_of(t.sizes, t.dim); }

// Raises `op(argument=value): requirement.`, a ValueError in Python.
class Refusals {
 public:
  explicit Refusals(const char* op) : op_(op) {}

  [[noreturn]] void refuse(const std::string& argument, const std::string& value,
                           const std::string& requirement) const {
    throw std::invalid_argument(std::string(op_) + "(" + argument + "=" + value + "): " + requirement + ".");
  }

  // Requires strided memory of a supported dtype, on CPU or CUDA.
  void check_floating(const Argument& t) const {
    check_ordinary(t);
    if (!t.is_known)
      refuse(field(t, "dtype"), name_of_dtype(t.dtype_code), "must be float64, float32, bfloat16 or float16");
  }
  void check_ordinary(const Argument& t) const {
    if (!t.is_defined) refuse(t.name, "None", "must be a tensor");
    if (t.layout_code != aoti_torch_layout_strided())
      refuse(field(t, "layout"), name_of_layout(t.layout_code), "must be torch.strided");
    if (!t.on_cpu() && t.device != aoti_torch_device_type_cuda())
      refuse(field(t, "device"), name_of_device(t), "must be on CPU or CUDA");
    if (!t.is_ordinary) refuse(field(t, "is_nested"), "True", "must be one tensor with sizes and strides");
    if (!t.has_memory())
      refuse(field(t, "untyped_storage().nbytes()"), std::to_string(t.storage_bytes),
             "must be the " + std::to_string(t.reach_bytes) + " bytes that its shape and strides lead to");
  }
  void check_device(const Argument& t, const Argument& like) const {
    if (!t.on_device_of(like))
      refuse(field(t, "device"), name_of_device(t),
             "must be the device of the " + std::string(like.name) + ", " + name_of_device(like));
  }
  void check_dtype(const Argument& t, DType wanted) const {
    if (t.dtype != wanted || !t.is_known)
      refuse(field(t, "dtype"), name_of_dtype(t.dtype_code), "must be " + name_of_dtype(code_of(wanted)));
  }
  void check_shape(const Argument& t, const int64_t* sizes, int64_t dim) const {
    if (t.dim != dim || !std::equal(sizes, sizes + dim, t.sizes))
      refuse(field(t, "shape"), shape_of(t), "must be " + text_of(sizes, dim));
  }

  static std::string field(const Argument& t, const char* what) { return std::string(t.name) + "." + what; }

 private:
  const char* op_;
};

}  // namespace optkit

// SPDX-License-Identifier: Apache-2.0
// Tensors of the norms' autograd node: whether the kernels can read their memory, and the layout of their rows.
#pragma once

#include <ATen/core/Tensor.h>

#include <optional>

#include "core/tables.h"
#include "norms/layout.h"

namespace optkit {

using at::Tensor;
using Parameter = std::optional<Tensor>;

inline bool to_dtype(at::ScalarType type, DType* dtype) {
  switch (type) {
    case at::kFloat:
      return *dtype = DType::kFloat32, true;
    case at::kBFloat16:
      return *dtype = DType::kBFloat16, true;
    case at::kHalf:
      return *dtype = DType::kFloat16, true;
    case at::kDouble:
      return *dtype = DType::kFloat64, true;
    default:
      return false;
  }
}

inline DType dtype_of(at::ScalarType type) {
  DType dtype = DType::kFloat32;
  to_dtype(type, &dtype);
  return dtype;
}

// Whether the storage covers the range of sizes and strides, and is aligned: it may have been resized, freed, or viewed
// from bytes.
inline bool has_memory(const Tensor& t) {
  if (t.numel() == 0) return true;
  int64_t last = t.storage_offset();
  for (int64_t d = 0; d < t.dim(); ++d) last += (t.size(d) - 1) * t.stride(d);
  const int64_t item = static_cast<int64_t>(t.element_size());
  const at::StorageImpl* storage = t.unsafeGetTensorImpl()->unsafe_storage().unsafeGetStorageImpl();
  return (last + 1) * item <= static_cast<int64_t>(storage->nbytes()) &&
         reinterpret_cast<uintptr_t>(t.const_data_ptr()) % item == 0;
}

// Plain CPU memory: no subclass, no function transform, no lazy negation.
inline bool is_memory(const Tensor& t) {
  static const uint64_t allowed =
      c10::DispatchKeySet({c10::DispatchKey::CPU, c10::DispatchKey::AutogradCPU, c10::DispatchKey::ADInplaceOrView,
                           c10::DispatchKey::AutocastCPU})
          .raw_repr();
  return t.defined() && (t.key_set().raw_repr() & ~allowed) == 0 && has_memory(t);
}

// The same, with a supported dtype.
inline bool is_plain(const Tensor& t) {
  DType dtype;
  return is_memory(t) && to_dtype(t.scalar_type(), &dtype);
}

inline bool has_tangent(const Tensor& t) { return t._fw_grad(0).defined(); }

// Whether no tracing, function transform or dispatch mode is active.
inline bool is_eager() {
  const c10::impl::LocalDispatchKeySet keys = c10::impl::tls_local_dispatch_key_set();
  return (keys.included_ - c10::default_included_set).empty();
}

// A tensor whose rows are packed or strided, as the kernels require; a copy where the original is neither.
struct Rows {
  Tensor tensor;
  RowLayout layout = {0, {0, 0, 0}};

  const void* data() const { return tensor.defined() ? tensor.const_data_ptr() : nullptr; }
};

inline RowLayout layout_of(const Tensor& t, int64_t row_dims) {
  return row_layout(t.sizes().data(), t.strides().data(), t.dim(), row_dims);
}

// `spaced`: gaps between packed rows are allowed.
inline Rows rows_of(const Tensor& t, int64_t row_dims, bool spaced) {
  if (!t.defined()) return {};
  const RowLayout layout = layout_of(t, row_dims);
  if (layout.strided.column_stride != 0 || (spaced ? layout.stride >= 0 : t.is_contiguous())) return {t, layout};
  const Tensor copy = t.contiguous();
  return {copy, layout_of(copy, row_dims)};
}

inline const void* data_or_null(const Parameter& t) { return t ? t->const_data_ptr() : nullptr; }
inline void* data_or_null(const Tensor& t) { return t.defined() ? t.mutable_data_ptr() : nullptr; }

}  // namespace optkit

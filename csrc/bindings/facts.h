// SPDX-License-Identifier: Apache-2.0
// What a plan relies on of a tensor, to be compared with the tensor before every walk.
#pragma once

#include <Python.h>

#include <cstdint>
#include <tuple>
#include <vector>

#include "bindings/look.h"

namespace optkit {

// Sizes and strides. Tensors of one shape share it, so that comparing hundreds of them reads one place in memory.
struct Shape {
  std::vector<int64_t> sizes, strides;

  bool operator<(const Shape& other) const { return std::tie(sizes, strides) < std::tie(other.sizes, other.strides); }
};

struct Facts {
  void* data = nullptr;
  DType dtype = DType::kFloat32;
  const Shape* shape = nullptr;
  int64_t num_bytes = 0;  // spanned by the elements

  bool hold_for(const TensorView& view) const;
  int64_t numel() const;
  // Whether the elements fill a block of memory, in any order of dimensions.
  bool is_dense() const;
  // Strides of dimensions of size 1 are ignored.
  bool is_in_order_of(const Facts& other) const;
};

// Bytes from the first element to the end of the last one; strides of our tensors are never negative.
int64_t span_of(const TensorView& view);

// Where the facts of a tensor were read last. A walk over large tensors evicts these records from the caches, and the
// next look would wait for one after the other. The addresses may be stale: they are prefetched, never read.
class Records {
 public:
  void remember(PyObject* object, const TensorView& view) {
    object_ = object;
    sizes_ = view.sizes;  // inside torch's TensorImpl
    storage_ = view.storage;
  }
  void prefetch() const {
    const auto impl = reinterpret_cast<uintptr_t>(sizes_);
    for (const uintptr_t line : {reinterpret_cast<uintptr_t>(object_), impl - 64, impl, impl + 64, impl + 128,
                                 reinterpret_cast<uintptr_t>(storage_)})
      __builtin_prefetch(reinterpret_cast<const void*>(line));
  }

 private:
  const void *object_ = nullptr, *sizes_ = nullptr, *storage_ = nullptr;
};

}  // namespace optkit

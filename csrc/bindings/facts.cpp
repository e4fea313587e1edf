// SPDX-License-Identifier: Apache-2.0
#include "bindings/facts.h"

#include <algorithm>
#include <functional>
#include <numeric>
#include <utility>

namespace optkit {

bool Facts::hold_for(const TensorView& view) const {
  return view.data == data && view.dtype == dtype && view.num_bytes >= num_bytes &&
         view.dim == static_cast<int64_t>(shape->sizes.size()) &&
         std::equal(shape->sizes.begin(), shape->sizes.end(), view.sizes) &&
         std::equal(shape->strides.begin(), shape->strides.end(), view.strides);
}

int64_t Facts::numel() const {
  return std::accumulate(shape->sizes.begin(), shape->sizes.end(), int64_t{1}, std::multiplies<int64_t>());
}

bool Facts::is_dense() const {
  std::vector<std::pair<int64_t, int64_t>> dims;
  for (std::size_t d = 0; d < shape->sizes.size(); ++d)
    if (shape->sizes[d] != 1) dims.emplace_back(shape->strides[d], shape->sizes[d]);
  std::sort(dims.begin(), dims.end());
  int64_t expected = 1;
  for (const auto& [stride, size] : dims) {
    if (stride != expected && numel() > 0) return false;
    expected *= size;
  }
  return true;
}

bool Facts::is_in_order_of(const Facts& other) const {
  if (shape->sizes != other.shape->sizes) return false;
  for (std::size_t d = 0; d < shape->sizes.size(); ++d)
    if (shape->sizes[d] > 1 && shape->strides[d] != other.shape->strides[d]) return false;
  return true;
}

int64_t span_of(const TensorView& view) {
  int64_t span = 1;
  for (int64_t d = 0; d < view.dim; ++d) {
    if (view.sizes[d] == 0) return 0;
    span += (view.sizes[d] - 1) * view.strides[d];
  }
  return span * size_of(view.dtype);
}

}  // namespace optkit

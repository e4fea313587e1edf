// SPDX-License-Identifier: Apache-2.0
#include "cpu/factor_layout.h"

#include <algorithm>

namespace optkit {
namespace {

constexpr int64_t kStrip = 4 * kChunk;  // elements: large enough that the column sums are few in comparison
constexpr int64_t kMaxStrips = 64;      // per matrix

}  // namespace

void FactorLayout::layout(std::vector<TensorSlot>& tensors) {
  strips.clear();
  matrices.clear();
  factors_.assign(tensors.size(), Factors{});
  std::size_t used = 0;
  const auto take = [&](int64_t count) {
    const std::size_t offset = used;
    used += static_cast<std::size_t>(count);
    return offset;
  };
  struct Offsets {
    std::size_t row_sums, row, column, column_sums;
  };
  std::vector<Offsets> offsets(tensors.size());
  for (std::size_t k = 0; k < tensors.size(); ++k) {
    TensorSlot& t = tensors[k];
    t.factors = nullptr;
    if (!t.active || t.is_vector || t.numel == 0) continue;
    const int64_t size = t.rows * t.columns, count = t.numel / size;
    const int64_t parts = std::min(t.rows, std::clamp<int64_t>(size / kStrip, 1, kMaxStrips));
    factors_[k].num_strips = parts;
    offsets[k] = {take(count * t.rows), take(count * t.rows), take(count * t.columns), take(count * parts * t.columns)};
    // Small matrices are grouped up to a chunk; a large one has one task per strip, and one to combine them.
    const int64_t run = parts > 1 ? 1 : std::max<int64_t>(1, kChunk / size);
    for (int64_t first = 0; first < count * parts; first += run)
      strips.push_back({first, static_cast<int32_t>(k), static_cast<int32_t>(std::min(run, count * parts - first))});
    for (int64_t first = 0; parts > 1 && first < count; ++first)
      matrices.push_back({first, static_cast<int32_t>(k), 1});
  }
  numbers_.resize(used);
  for (std::size_t k = 0; k < tensors.size(); ++k) {
    if (factors_[k].num_strips == 0) continue;
    double* base = numbers_.data();
    factors_[k].row_sums = base + offsets[k].row_sums;
    factors_[k].row = base + offsets[k].row;
    factors_[k].column = base + offsets[k].column;
    factors_[k].column_sums = base + offsets[k].column_sums;
    tensors[k].factors = &factors_[k];
  }
}

}  // namespace optkit

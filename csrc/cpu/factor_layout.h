// SPDX-License-Identifier: Apache-2.0
// Memory of the factors of a plan's matrices, and how their sums are split into tasks.
#pragma once

#include <cstdint>
#include <vector>

#include "core/tables.h"

namespace optkit {

class FactorLayout {
 public:
  // Points every active matrix at its factors.
  void layout(std::vector<TensorSlot>& tensors);

  std::vector<Chunk> strips;    // runs of strips
  std::vector<Chunk> matrices;  // runs of matrices of more than one strip

 private:
  std::vector<Factors> factors_;  // per tensor
  std::vector<double> numbers_;
};

}  // namespace optkit

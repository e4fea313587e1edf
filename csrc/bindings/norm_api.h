// SPDX-License-Identifier: Apache-2.0
// The CPU kernels of the norms, exported from one library to another: a plain table behind a symbol.
#pragma once

#include "norms/layout.h"
#include "norms/tables.h"

namespace optkit {

// Incremented with any change to this table or to the tables in norms/.
constexpr int kNormApiVersion = 1;
constexpr char kNormApiSymbol[] = "optkit_norm_api";

struct NormApi {
  int version;
  void (*forward)(bool centered, const NormForward& arguments, const ForwardStrided& strided);
  void (*backward)(bool centered, const NormBackward& arguments, const BackwardStrided& strided, void* d_weight,
                   void* d_bias);
  void (*fresh)(void* data, int64_t num_bytes);  // called for memory that has not been written yet
};

const NormApi& norm_api();

}  // namespace optkit

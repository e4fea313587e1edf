// SPDX-License-Identifier: Apache-2.0
// The CPU kernels of the norms as one library hands them to another: a plain table, behind a symbol.
#pragma once

#include "norms/layout.h"
#include "norms/tables.h"

namespace optkit {

// Changes with whatever crosses here: the tables of norms/ too.
constexpr int kNormApiVersion = 1;
constexpr char kNormApiSymbol[] = "optkit_norm_api";

struct NormApi {
  int version;
  void (*forward)(bool centered, const NormForward& arguments, const ForwardStrided& strided);
  void (*backward)(bool centered, const NormBackward& arguments, const BackwardStrided& strided, void* d_weight,
                   void* d_bias);
  void (*fresh)(void* data, int64_t num_bytes);  // to be called for memory that nobody has written to yet
};

const NormApi& norm_api();

}  // namespace optkit

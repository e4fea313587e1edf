// SPDX-License-Identifier: Apache-2.0
// The normalization functions of the C interface (cuda/api.h).
#pragma once

#include "norms/tables.h"

namespace optkit {

const char* cuda_norm_forward(int centered, const NormForward* arguments, int device, void* stream);
const char* cuda_norm_backward_parts(int centered, const NormBackward* arguments, int device, int64_t* parts);
const char* cuda_norm_backward(int centered, const NormBackward* arguments, void* d_weight, void* d_bias, int64_t parts,
                               void* space, int device, void* stream);

}  // namespace optkit

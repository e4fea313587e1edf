// SPDX-License-Identifier: Apache-2.0
// Opens liboptkit_cuda once, when the first CUDA tensor appears.
#pragma once

#include <string>

#include "cuda/api.h"

namespace optkit {

// Throws std::runtime_error if the library at `path` cannot be opened or comes from another build.
void open_cuda(const std::string& path);
// Throws if the library was not opened.
const CudaApi& cuda_api();
// Throws std::runtime_error with the message of a failed call.
void check_cuda(const char* error);

}  // namespace optkit

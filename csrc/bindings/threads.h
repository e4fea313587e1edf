// SPDX-License-Identifier: Apache-2.0
// torch's thread pool, in plain types.
#pragma once

#include <cstdint>

namespace optkit {

void torch_parallel(int64_t size, void (*body)(int64_t, int64_t, void*), void* context);
int torch_num_threads();

}  // namespace optkit

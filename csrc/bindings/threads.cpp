// SPDX-License-Identifier: Apache-2.0
// torch's thread pool, through torch's stable ABI: one binary works with every torch from 2.10 on.
#include "bindings/threads.h"

#include <torch/csrc/stable/library.h>

namespace optkit {

void torch_parallel(int64_t size, void (*body)(int64_t, int64_t, void*), void* context) {
  TORCH_ERROR_CODE_CHECK(torch_parallel_for(0, size, 1, body, context));
}

int torch_num_threads() {
  uint32_t count = 1;
  TORCH_ERROR_CODE_CHECK(torch_get_num_threads(&count));
  return static_cast<int>(count);
}

}  // namespace optkit

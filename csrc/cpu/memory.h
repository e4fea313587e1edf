// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstddef>
#include <cstdint>

namespace optkit {

// Asks the kernel to back [address, address + num_bytes) with huge pages. Call before the first write. False if
// refused.
bool advise_huge_pages(uintptr_t address, std::size_t num_bytes);

// The same for a result, if it is large enough to gain from it.
void back_by_huge_pages(void* data, int64_t num_bytes);

}  // namespace optkit

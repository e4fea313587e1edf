// SPDX-License-Identifier: Apache-2.0
#include "cpu/memory.h"

#if defined(__linux__)
#include <sys/mman.h>
#include <unistd.h>
#endif

namespace optkit {

bool advise_huge_pages(uintptr_t address, std::size_t num_bytes) {
#if defined(__linux__) && defined(MADV_HUGEPAGE)
  const uintptr_t page = static_cast<uintptr_t>(sysconf(_SC_PAGESIZE));
  const uintptr_t begin = (address + page - 1) / page * page;
  const uintptr_t end = (address + num_bytes) / page * page;
  return begin < end && madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE) == 0;
#else
  (void)address;
  (void)num_bytes;
  return false;
#endif
}

// For a result of this size malloc often returns fresh pages (from 32 MiB on, always); the page faults then cost more
// than the rows.
constexpr int64_t kHugePagesFrom = int64_t{1} << 22;

void back_by_huge_pages(void* data, int64_t num_bytes) {
  if (num_bytes >= kHugePagesFrom) advise_huge_pages(reinterpret_cast<uintptr_t>(data), static_cast<size_t>(num_bytes));
}

}  // namespace optkit

// SPDX-License-Identifier: Apache-2.0
// Selects the instruction set at run time.
#include <cstdlib>
#include <cstring>

#include "cpu/walk.h"

namespace optkit {
namespace {

struct Candidate {
  const Kernels* kernels;
  bool supported;
};

// In order of preference.
std::vector<Candidate> candidates() {
#if defined(OPTKIT_ONLY_ISA)
  return {{&OPTKIT_ONLY_ISA::kernels, true}};
#elif defined(__x86_64__)
  __builtin_cpu_init();
  const bool has_avx2 =
      __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
  const bool has_avx512 = has_avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                          __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  return {{&avx512::kernels, has_avx512}, {&avx2::kernels, has_avx2}, {&baseline::kernels, true}};
#else
  return {{&baseline::kernels, true}};
#endif
}

const Kernels* best() {
  for (const Candidate& candidate : candidates())
    if (candidate.supported) return candidate.kernels;
  std::abort();  // the last one runs everywhere
}

const Kernels* active = best();

}  // namespace

const Kernels& active_kernels() { return *active; }

bool use_isa(const char* name) {
  for (const Candidate& candidate : candidates())
    if (candidate.supported && std::strcmp(candidate.kernels->isa, name) == 0) {
      active = candidate.kernels;
      return true;
    }
  return false;
}

std::vector<const char*> available_isas() {
  std::vector<const char*> names;
  for (const Candidate& candidate : candidates())
    if (candidate.supported) names.push_back(candidate.kernels->isa);
  return names;
}

}  // namespace optkit

// SPDX-License-Identifier: Apache-2.0
#include "bindings/device.h"

#include <dlfcn.h>

#include <cstring>
#include <stdexcept>

#include "rules/all.h"

namespace optkit {
namespace {

const CudaApi* opened = nullptr;

}  // namespace

void open_cuda(const std::string& path) {
  if (opened != nullptr) return;
  void* library = dlopen(path.c_str(), RTLD_NOW | RTLD_LOCAL);
  if (library == nullptr) throw std::runtime_error(dlerror());
  const auto get = reinterpret_cast<const CudaApi* (*)()>(dlsym(library, "optkit_cuda_api"));
  if (get == nullptr || get()->version != kCudaApiVersion || std::strcmp(get()->rules, kCudaRuleNames) != 0)
    throw std::runtime_error(path + " is of another build of lightning_optkit; install it again.");
  opened = get();
}

const CudaApi& cuda_api() {
  if (opened == nullptr) throw std::runtime_error("The CUDA kernels are not loaded.");
  return *opened;
}

void check_cuda(const char* error) {
  if (error != nullptr) throw std::runtime_error(std::string("lightning_optkit on CUDA: ") + error + ".");
}

}  // namespace optkit

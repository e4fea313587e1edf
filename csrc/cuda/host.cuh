// SPDX-License-Identifier: Apache-2.0
// Host utilities for the CUDA runtime: error messages, the current device, memory, launches.
#pragma once

#include <cuda_runtime.h>

#include <string>
#include <utility>
#include <vector>

namespace optkit {

// Null or an error message, which is valid until the next failure in this thread.
inline const char* failed(cudaError_t status, const char* what) {
  static thread_local std::string message;
  if (status == cudaSuccess) return nullptr;
  message = std::string(what) + ": " + cudaGetErrorString(status);
  return message.c_str();
}

#define OPTKIT_CUDA(what, call)                                 \
  do {                                                          \
    if (const char* error = failed((call), what)) return error; \
  } while (0)

// Makes `device` current within a scope. Does nothing if it already is, the usual case, since setting it would create a
// context on an unused device.
class DeviceGuard {
 public:
  explicit DeviceGuard(int device) {
    changed_ = cudaGetDevice(&before_) != cudaSuccess || before_ != device;
    if (changed_) cudaSetDevice(device);
  }
  ~DeviceGuard() {
    if (changed_) cudaSetDevice(before_);
  }
  DeviceGuard(const DeviceGuard&) = delete;
  DeviceGuard& operator=(const DeviceGuard&) = delete;

 private:
  int before_ = 0;
  bool changed_ = false;
};

template <class T>
class DeviceArray {
 public:
  DeviceArray() = default;
  ~DeviceArray() { cudaFree(data_); }
  DeviceArray(const DeviceArray&) = delete;
  DeviceArray& operator=(const DeviceArray&) = delete;

  // Growing discards the contents. Freeing waits for kernels that use the memory.
  cudaError_t resize(size_t count) {
    if (count <= capacity_) return cudaSuccess;
    cudaFree(data_);
    data_ = nullptr;
    capacity_ = 0;
    const cudaError_t status = cudaMalloc(reinterpret_cast<void**>(&data_), count * sizeof(T));
    if (status == cudaSuccess) capacity_ = count;
    return status;
  }
  cudaError_t upload(const std::vector<T>& host, cudaStream_t stream) {
    const cudaError_t status = resize(host.size());
    if (status != cudaSuccess || host.empty()) return status;
    return cudaMemcpyAsync(data_, host.data(), host.size() * sizeof(T), cudaMemcpyHostToDevice, stream);
  }
  T* get() const { return data_; }

 private:
  T* data_ = nullptr;
  size_t capacity_ = 0;
};

template <class... Parameters, class... Arguments>
cudaError_t launch(void (*kernel)(Parameters...), dim3 grid, dim3 block, size_t shared, cudaStream_t stream,
                   Arguments&&... arguments) {
  cudaLaunchConfig_t config = {};
  config.gridDim = grid;
  config.blockDim = block;
  config.dynamicSmemBytes = shared;
  config.stream = stream;
  return cudaLaunchKernelEx(&config, kernel, std::forward<Arguments>(arguments)...);
}

}  // namespace optkit

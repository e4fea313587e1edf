// SPDX-License-Identifier: Apache-2.0
// What csrc/cuda uses of CUDA, on the host: the same sources compile with a C++ compiler, and their kernels run thread
// by thread. For tests only. Refuses what a device refuses: launches out of bounds, allocations while capturing.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <tuple>
#include <type_traits>

#include "fibers.h"

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline __attribute__((always_inline))
#define __launch_bounds__(...)
#define __grid_constant__
#define __shared__ static
#define __CUDA_ARCH_LIST__ 0
#define CUDART_VERSION 13000

struct alignas(16) float4 {
  float x, y, z, w;
};
struct alignas(16) uint4 {
  uint32_t x, y, z, w;
};
struct alignas(8) uint2 {
  uint32_t x, y;
};
struct alignas(16) double2 {
  double x, y;
};

// --- inside a kernel ---

inline void __syncthreads() { emulation::wait_for_block(0); }
inline int __syncthreads_or(int predicate) { return emulation::wait_for_block(predicate); }
inline void __syncwarp(unsigned mask = 0xffffffffu) { emulation::exchange(mask, 0, 0); }
inline void __threadfence() {}
template <class T>
T __ldcg(const T* p) {
  return *p;
}
template <class T>
T atomicAdd(T* p, T value) {
  const T before = *p;
  *p += value;
  return before;
}
template <class T>
T shuffle(unsigned mask, T value, int source) {
  static_assert(sizeof(T) <= 8, "a shuffle moves at most 8 bytes");
  uint64_t bits = 0;
  std::memcpy(&bits, &value, sizeof(T));
  bits = emulation::exchange(mask, bits, source);
  std::memcpy(&value, &bits, sizeof(T));
  return value;
}
template <class T>
T __shfl_xor_sync(unsigned mask, T value, int lanes) {
  return shuffle(mask, value, emulation::now->lane ^ lanes);
}
template <class T>
T __shfl_down_sync(unsigned mask, T value, int lanes) {
  const int source = emulation::now->lane + lanes;
  return shuffle(mask, value, source < 32 ? source : emulation::now->lane);
}

// --- the runtime ---

enum cudaError_t {
  cudaSuccess = 0,
  cudaErrorInvalidValue = 1,
  cudaErrorMemoryAllocation = 2,
  cudaErrorInvalidConfiguration = 9,
  cudaErrorInvalidDevice = 101,
  cudaErrorStreamCaptureUnsupported = 900,
};
enum cudaMemcpyKind { cudaMemcpyHostToDevice = 1 };
enum cudaDeviceAttr { cudaDevAttrMultiProcessorCount = 16, cudaDevAttrMaxSharedMemoryPerBlockOptin = 97 };
enum cudaFuncAttribute { cudaFuncAttributeMaxDynamicSharedMemorySize = 8 };
enum cudaStreamCaptureStatus { cudaStreamCaptureStatusNone = 0, cudaStreamCaptureStatusActive = 1 };
enum cudaStreamCaptureMode { cudaStreamCaptureModeGlobal = 0, cudaStreamCaptureModeRelaxed = 2 };
using cudaStream_t = struct EmulatedStream*;
using dim3 = emulation::Dim3;

struct cudaLaunchAttribute;
struct cudaLaunchConfig_t {
  dim3 gridDim, blockDim;
  size_t dynamicSmemBytes = 0;
  cudaStream_t stream = nullptr;
  cudaLaunchAttribute* attrs = nullptr;
  unsigned numAttrs = 0;
};

namespace emulation {

constexpr size_t kMaxArguments = 32764, kMaxShared = 49152, kMaxSharedOptin = 232448;

cudaError_t failure();  // what a test asked for, or cudaSuccess
void enqueue(std::function<void()> work);
bool is_capturing();
size_t& shared_limit(const void* kernel);

}  // namespace emulation

cudaError_t cudaMalloc(void** out, size_t size);
cudaError_t cudaFree(void* pointer);
cudaError_t cudaMemcpyAsync(void* to, const void* from, size_t size, cudaMemcpyKind, cudaStream_t);
cudaError_t cudaMemsetAsync(void* to, int value, size_t size, cudaStream_t);
cudaError_t cudaStreamSynchronize(cudaStream_t);
cudaError_t cudaStreamIsCapturing(cudaStream_t, cudaStreamCaptureStatus* out);
cudaError_t cudaThreadExchangeStreamCaptureMode(cudaStreamCaptureMode* mode);
cudaError_t cudaGetDevice(int* device);
cudaError_t cudaSetDevice(int device);
cudaError_t cudaDeviceGetAttribute(int* out, cudaDeviceAttr, int device);
cudaError_t cudaGetLastError();
const char* cudaGetErrorString(cudaError_t);

template <class Kernel>
cudaError_t cudaFuncSetAttribute(Kernel* kernel, cudaFuncAttribute, int value) {
  if (value < 0 || static_cast<size_t>(value) > emulation::kMaxSharedOptin) return cudaErrorInvalidValue;
  emulation::shared_limit(reinterpret_cast<const void*>(kernel)) = static_cast<size_t>(value);
  return cudaSuccess;
}
template <class Kernel>
cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessor(int* out, Kernel*, int threads, size_t shared) {
  if (shared > emulation::kMaxSharedOptin) return cudaErrorInvalidValue;
  *out = threads > 256 ? 1 : 2;
  return cudaSuccess;
}

template <class... Parameters, class... Arguments>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(Parameters...), Arguments&&... given) {
  const cudaLaunchConfig_t c = *config;
  const auto outside = [](unsigned n, unsigned most) { return n == 0 || n > most; };
  if (outside(c.gridDim.x, 0x7fffffffu) || outside(c.gridDim.y, 65535) || outside(c.gridDim.z, 65535) ||
      outside(c.blockDim.x * c.blockDim.y * c.blockDim.z, 1024))
    return cudaErrorInvalidConfiguration;
  if ((sizeof(Parameters) + ... + 0) > emulation::kMaxArguments) return cudaErrorInvalidValue;
  size_t& limit = emulation::shared_limit(reinterpret_cast<const void*>(kernel));
  if (c.dynamicSmemBytes > (limit > emulation::kMaxShared ? limit : emulation::kMaxShared))
    return cudaErrorInvalidValue;
  if (const cudaError_t error = emulation::failure()) return error;
  std::tuple<std::decay_t<Parameters>...> arguments(std::forward<Arguments>(given)...);
  emulation::enqueue(
      [=] { emulation::run(c.gridDim, c.blockDim, c.dynamicSmemBytes, [&] { std::apply(kernel, arguments); }); });
  return cudaSuccess;
}

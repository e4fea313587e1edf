// SPDX-License-Identifier: Apache-2.0
// Memory, streams and captures of the emulated runtime. Every launch is done when its call returns.
#include <unordered_map>
#include <unordered_set>
#include <vector>

#if defined(__x86_64__)
#include <xmmintrin.h>
#endif

#include "cuda_runtime.h"

namespace {

std::unordered_set<void*> allocated;
std::vector<std::function<void()>> captured;
bool capturing = false;
int device = 0, calls_until_failure = 0;
cudaStreamCaptureMode capture_mode = cudaStreamCaptureModeGlobal;

// As -ftz=true does.
class FlushDenormals {
 public:
  FlushDenormals() : saved_(_mm_getcsr()) { _mm_setcsr(saved_ | 0x8040); }
  ~FlushDenormals() { _mm_setcsr(saved_); }

 private:
  unsigned saved_;
};

cudaError_t unless_capturing() {
  if (capturing && capture_mode != cudaStreamCaptureModeRelaxed) return cudaErrorStreamCaptureUnsupported;
  return emulation::failure();
}

}  // namespace

namespace emulation {

cudaError_t failure() {
  return calls_until_failure > 0 && --calls_until_failure == 0 ? cudaErrorMemoryAllocation : cudaSuccess;
}
bool is_capturing() { return capturing; }
void enqueue(std::function<void()> work) {
  if (capturing) {
    captured.push_back(std::move(work));
    return;
  }
  const FlushDenormals flush;
  work();
}
size_t& shared_limit(const void* kernel) {
  static std::unordered_map<const void*, size_t> limits;
  return limits[kernel];
}

}  // namespace emulation

cudaError_t cudaMalloc(void** out, size_t size) {
  if (const cudaError_t error = unless_capturing()) return error;
  *out = size == 0 ? nullptr : std::malloc(size);
  if (*out) {
    std::memset(*out, 0xff, size);
    allocated.insert(*out);
  }
  return cudaSuccess;
}
cudaError_t cudaFree(void* pointer) {
  if (pointer == nullptr) return cudaSuccess;
  if (capturing && capture_mode != cudaStreamCaptureModeRelaxed) return cudaErrorStreamCaptureUnsupported;
  if (allocated.erase(pointer) == 0) return cudaErrorInvalidValue;
  std::free(pointer);
  return cudaSuccess;
}
cudaError_t cudaMemcpyAsync(void* to, const void* from, size_t size, cudaMemcpyKind, cudaStream_t) {
  if (const cudaError_t error = unless_capturing()) return error;  // from pageable memory
  std::memcpy(to, from, size);
  return cudaSuccess;
}
cudaError_t cudaMemsetAsync(void* to, int value, size_t size, cudaStream_t) {
  if (const cudaError_t error = emulation::failure()) return error;
  emulation::enqueue([=] { std::memset(to, value, size); });
  return cudaSuccess;
}
cudaError_t cudaStreamSynchronize(cudaStream_t) { return unless_capturing(); }
cudaError_t cudaStreamIsCapturing(cudaStream_t, cudaStreamCaptureStatus* out) {
  *out = capturing ? cudaStreamCaptureStatusActive : cudaStreamCaptureStatusNone;
  return cudaSuccess;
}
cudaError_t cudaThreadExchangeStreamCaptureMode(cudaStreamCaptureMode* mode) {
  std::swap(*mode, capture_mode);
  return cudaSuccess;
}
cudaError_t cudaGetDevice(int* out) {
  *out = device;
  return cudaSuccess;
}
cudaError_t cudaSetDevice(int chosen) {
  if (chosen < 0 || chosen > 1) return cudaErrorInvalidDevice;
  device = chosen;
  return cudaSuccess;
}
cudaError_t cudaDeviceGetAttribute(int* out, cudaDeviceAttr which, int) {
  *out = which == cudaDevAttrMultiProcessorCount ? 3 : static_cast<int>(emulation::kMaxSharedOptin);
  return cudaSuccess;
}
cudaError_t cudaGetLastError() { return cudaSuccess; }
const char* cudaGetErrorString(cudaError_t error) {
  switch (error) {
    case cudaErrorMemoryAllocation:
      return "out of memory";
    case cudaErrorInvalidConfiguration:
      return "invalid configuration argument";
    case cudaErrorStreamCaptureUnsupported:
      return "operation not permitted when stream is capturing";
    default:
      return "invalid argument";
  }
}

// The call to the runtime that many from now fails; 0: none.
EMULATED void emulated_failure(int calls) { calls_until_failure = calls; }
EMULATED int emulated_allocations() { return static_cast<int>(allocated.size()); }
EMULATED int emulated_device() { return device; }
EMULATED void emulated_capture(int on) {
  if (on) captured.clear();
  capturing = on != 0;
}
// Runs what was captured; returns the number of launches.
EMULATED int emulated_replay() {
  const FlushDenormals flush;
  for (const auto& work : captured) work();
  return static_cast<int>(captured.size());
}

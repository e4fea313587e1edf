// SPDX-License-Identifier: Apache-2.0
// Selects and launches a kernel by row length.
#include <algorithm>
#include <atomic>

#include "cuda/host.cuh"
#include "cuda/layer_norm.cuh"
#include "cuda/layer_norm_api.h"

namespace optkit {
namespace {

// Threads per row. fp64 is only a reference for the others, so one kernel is enough.
int group_of(DType type, int64_t size) {
  if (type == DType::kFloat64) return kLongRow;
  for (const int group : {4, 16, 32, 64, 128, 256, 512, 1024})
    if (size <= int64_t{group} * kHeld) return group;
  return kLongRow;
}

// Whether every access to a row may move 16 bytes.
class Whole {
 public:
  Whole(int64_t size, DType type) : type_(type), fits_(size * bytes_of(type) % 16 == 0) {}
  Whole& rows(const void* base, int64_t stride, DType type) {
    fits_ &= base == nullptr ||
             (type == type_ && reinterpret_cast<uintptr_t>(base) % 16 == 0 && stride * bytes_of(type) % 16 == 0);
    return *this;
  }
  bool fits() const { return fits_; }

 private:
  DType type_;
  bool fits_;
};

bool is_whole(const NormForward& a) {
  const DType x_type = a.residual ? a.x_type : a.type;
  return Whole(a.size, a.type)
      .rows(a.x, a.x_stride, x_type)
      .rows(a.residual, a.size, a.residual_type)
      .rows(a.sum, a.size, a.type)
      .rows(a.y, a.size, a.type)
      .fits();
}
bool is_whole(const NormBackward& a) {
  return Whole(a.size, a.type)
      .rows(a.x, a.x_stride, a.type)
      .rows(a.dy, a.size, a.type)
      .rows(a.d_sum, a.size, a.type)
      .rows(a.dx, a.size, a.type)
      .rows(a.d_input, a.size, a.type)
      .fits();
}

cudaError_t attribute(cudaDeviceAttr which, int device, int* out) { return cudaDeviceGetAttribute(out, which, device); }

// Number of resident blocks of the device.
template <class Kernel>
cudaError_t resident_blocks(Kernel* kernel, int threads, size_t shared, int device, int64_t* out) {
  int processors = 1, per_processor = 1;
  if (const cudaError_t error = attribute(cudaDevAttrMultiProcessorCount, device, &processors)) return error;
  if (const cudaError_t error = cudaOccupancyMaxActiveBlocksPerMultiprocessor(&per_processor, kernel, threads, shared))
    return error;
  *out = int64_t{std::max(per_processor, 1)} * processors;
  return cudaSuccess;
}

int64_t blocks_for(int64_t rows, int group, int64_t most) {
  const int64_t rows_per_block = block_rows(group);
  return std::max<int64_t>(1, std::min((rows + rows_per_block - 1) / rows_per_block, most));
}

constexpr int kOwnShared = 1024;  // at least the static shared memory of the kernels, which counts too

// Sets `shared` to the shared memory for the sums of long rows, and allows the kernel to use it; 0 if not needed or not
// available.
template <DType kType, int kGroup, class Kernel>
cudaError_t shared_for_sums(Kernel* kernel, int64_t size, int device, size_t* shared) {
  *shared = 0;
  if constexpr (kGroup == kLongRow) {
    const auto needed = static_cast<size_t>(2 * long_sums_places(kType, size) * sizeof(typename Pack<kType>::S));
    int most = 0;
    if (const cudaError_t error = attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin, device, &most)) return error;
    most -= kOwnShared;
    if (most < 0 || needed > static_cast<size_t>(most)) return cudaSuccess;
    *shared = needed;
    // Always the maximum: another thread may be about to launch the kernel on longer rows.
    return cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, most);
  }
  return cudaSuccess;
}

template <class Norm, DType kType, int kGroup>
cudaError_t run_forward(const NormForward& a, int device, cudaStream_t stream) {
  const auto kernel = &norm_forward_kernel<Norm, kType, kGroup>;
  static std::atomic<int64_t> known{0};  // all devices of a machine are assumed to be alike
  int64_t resident = known.load(std::memory_order_relaxed);
  if (resident == 0) {
    if (const cudaError_t error = resident_blocks(kernel, block_threads(kGroup), 0, device, &resident)) return error;
    known.store(resident, std::memory_order_relaxed);
  }
  // Few enough blocks that the parameters, held in registers, are loaded once for many rows; enough to balance the
  // load.
  const int64_t blocks = blocks_for(a.rows, kGroup, 4 * resident);
  return launch(kernel, static_cast<unsigned>(blocks), block_threads(kGroup), 0, stream, a, is_whole(a));
}

// `parts`: the number that `space` has room for; if it is 0, nothing is launched and it is set to the number wanted.
template <class Norm, DType kType, int kGroup>
cudaError_t run_backward(const NormBackward& a, int64_t* parts, void* space, int device, cudaStream_t stream) {
  const auto kernel = &norm_backward_kernel<Norm, kType, kGroup>;
  size_t shared = 0;
  if (const cudaError_t error = shared_for_sums<kType, kGroup>(kernel, a.size, device, &shared)) return error;
  if (*parts > 0)
    return launch(kernel, static_cast<unsigned>(*parts), block_threads(kGroup), shared, stream, a, space, is_whole(a),
                  shared > 0);
  int64_t resident = 0;
  if (const cudaError_t error = resident_blocks(kernel, block_threads(kGroup), shared, device, &resident)) return error;
  *parts = blocks_for(a.rows, kGroup, resident);
  return cudaSuccess;
}

#define OPTKIT_BY_GROUP(run, Norm, kType, ...)        \
  switch (group_of(a.type, a.size)) {                 \
    case 4:                                           \
      return run<Norm, kType, 4>(__VA_ARGS__);        \
    case 16:                                          \
      return run<Norm, kType, 16>(__VA_ARGS__);       \
    case 32:                                          \
      return run<Norm, kType, 32>(__VA_ARGS__);       \
    case 64:                                          \
      return run<Norm, kType, 64>(__VA_ARGS__);       \
    case 128:                                         \
      return run<Norm, kType, 128>(__VA_ARGS__);      \
    case 256:                                         \
      return run<Norm, kType, 256>(__VA_ARGS__);      \
    case 512:                                         \
      return run<Norm, kType, 512>(__VA_ARGS__);      \
    case 1024:                                        \
      return run<Norm, kType, 1024>(__VA_ARGS__);     \
    default:                                          \
      return run<Norm, kType, kLongRow>(__VA_ARGS__); \
  }
#define OPTKIT_BY_TYPE(run, Norm, ...)                          \
  switch (a.type) {                                             \
    case DType::kFloat32:                                       \
      OPTKIT_BY_GROUP(run, Norm, DType::kFloat32, __VA_ARGS__)  \
    case DType::kBFloat16:                                      \
    case DType::kFloat16:                                       \
      OPTKIT_BY_GROUP(run, Norm, DType::kBFloat16, __VA_ARGS__) \
    case DType::kFloat64:                                       \
      return run<Norm, DType::kFloat64, kLongRow>(__VA_ARGS__); \
    default:                                                    \
      return cudaErrorInvalidValue;                             \
  }

template <class Norm>
cudaError_t choose_forward(const NormForward& a, int device, cudaStream_t stream) {
  OPTKIT_BY_TYPE(run_forward, Norm, a, device, stream)
}
template <class Norm>
cudaError_t choose_backward(const NormBackward& a, int64_t* parts, void* space, int device, cudaStream_t stream) {
  OPTKIT_BY_TYPE(run_backward, Norm, a, parts, space, device, stream)
}

}  // namespace

const char* cuda_norm_forward(int centered, const NormForward* a, int device, void* stream) {
  const DeviceGuard guard(device);
  const auto choose = centered ? &choose_forward<LayerNorm> : &choose_forward<RmsNorm>;
  return failed(choose(*a, device, static_cast<cudaStream_t>(stream)), "norm_forward");
}

const char* cuda_norm_backward_parts(int centered, const NormBackward* a, int device, int64_t* parts) {
  const DeviceGuard guard(device);
  const auto choose = centered ? &choose_backward<LayerNorm> : &choose_backward<RmsNorm>;
  *parts = 0;
  return failed(choose(*a, parts, nullptr, device, nullptr), "norm_backward");
}

const char* cuda_norm_backward(int centered, const NormBackward* a, void* d_weight, void* d_bias, int64_t parts,
                               void* space, int device, void* stream_pointer) {
  const auto stream = static_cast<cudaStream_t>(stream_pointer);
  const DeviceGuard guard(device);
  const auto choose = centered ? &choose_backward<LayerNorm> : &choose_backward<RmsNorm>;
  OPTKIT_CUDA("norm_backward", choose(*a, &parts, space, device, stream));
  if (d_weight == nullptr && d_bias == nullptr) return nullptr;
  const dim3 grid(static_cast<unsigned>((a->size + kReduceColumns - 1) / kReduceColumns), 2);
  const dim3 block(kReduceColumns, kReduceLanes);
  const auto reduce = [&](auto* kernel, auto* parts_of) {
    return launch(kernel, grid, block, 0, stream, parts_of, parts, a->size, d_weight, d_bias, a->weight_type);
  };
  OPTKIT_CUDA("norm_backward", a->type == DType::kFloat64
                                   ? reduce(&norm_reduce_kernel<double>, static_cast<const double*>(space))
                                   : reduce(&norm_reduce_kernel<float>, static_cast<const float*>(space)));
  return nullptr;
}

}  // namespace optkit

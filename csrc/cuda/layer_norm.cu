// SPDX-License-Identifier: Apache-2.0
// Chooses and launches a kernel by the length of the rows.
#include <algorithm>
#include <string>

#include "cuda/layer_norm.cuh"
#include "cuda/layer_norm_api.h"

namespace optkit {
namespace {

thread_local std::string last_error;

const char* failed(cudaError_t status, const char* what) {
  if (status == cudaSuccess) return nullptr;
  last_error = std::string(what) + ": " + cudaGetErrorString(status);
  return last_error.c_str();
}

class DeviceGuard {
 public:
  explicit DeviceGuard(int device) {
    cudaGetDevice(&before_);
    cudaSetDevice(device);
  }
  ~DeviceGuard() { cudaSetDevice(before_); }

 private:
  int before_ = 0;
};

int64_t multiprocessors(int device) {
  int count = 1;
  cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, device);
  return count;
}

// Threads per row. fp64 is there to check the others: one kernel is enough.
int group_of(DType type, int64_t size) {
  if (type == DType::kFloat64) return kLongRow;
  for (const int group : {32, 128, 512, 1024})
    if (size <= int64_t{group} * kHeld) return group;
  return kLongRow;
}

// Blocks that a multiprocessor works on at a time, about: more would only make more partial sums.
int64_t resident_blocks(int group) {
  return group == 32 ? 8 : group == 128 ? 12 : group == 512 ? 3 : group == 1024 ? 2 : 1;
}

int64_t blocks_of(int64_t rows, int group, int64_t most) {
  const int64_t rows_per_block = block_rows(group);
  return std::max<int64_t>(1, std::min((rows + rows_per_block - 1) / rows_per_block, most));
}

template <class Norm, DType kType, int kGroup>
void run_forward(const NormForward& a, int64_t blocks, cudaStream_t stream) {
  norm_forward_kernel<Norm, kType, kGroup><<<static_cast<unsigned>(blocks), block_threads(kGroup), 0, stream>>>(a);
}
template <class Norm, DType kType, int kGroup>
void run_backward(const NormBackward& a, int64_t blocks, void* space, cudaStream_t stream) {
  norm_backward_kernel<Norm, kType, kGroup>
      <<<static_cast<unsigned>(blocks), block_threads(kGroup), 0, stream>>>(a, space);
}

#define OPTKIT_BY_GROUP(run, Norm, type, ...)        \
  switch (group) {                                   \
    case 32:                                         \
      return run<Norm, type, 32>(__VA_ARGS__);       \
    case 128:                                        \
      return run<Norm, type, 128>(__VA_ARGS__);      \
    case 512:                                        \
      return run<Norm, type, 512>(__VA_ARGS__);      \
    case 1024:                                       \
      return run<Norm, type, 1024>(__VA_ARGS__);     \
    default:                                         \
      return run<Norm, type, kLongRow>(__VA_ARGS__); \
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
  }

template <class Norm>
void choose_forward(const NormForward& a, int group, int64_t blocks, cudaStream_t stream) {
  OPTKIT_BY_TYPE(run_forward, Norm, a, blocks, stream)
}
template <class Norm>
void choose_backward(const NormBackward& a, int group, int64_t blocks, void* space, cudaStream_t stream) {
  OPTKIT_BY_TYPE(run_backward, Norm, a, blocks, space, stream)
}

}  // namespace

const char* cuda_norm_forward(int centered, const NormForward* a, int device, void* stream_pointer) {
  const auto stream = static_cast<cudaStream_t>(stream_pointer);
  const DeviceGuard guard(device);
  const int group = group_of(a->type, a->size);
  // Few enough that the parameters, held in registers, are loaded for many rows.
  const int64_t blocks = blocks_of(a->rows, group, 4 * resident_blocks(group) * multiprocessors(device));
  if (centered)
    choose_forward<LayerNorm>(*a, group, blocks, stream);
  else
    choose_forward<RmsNorm>(*a, group, blocks, stream);
  return failed(cudaGetLastError(), "norm_forward");
}

int64_t cuda_norm_backward_parts(const NormBackward* a, int device) {
  const int group = group_of(a->type, a->size);
  return blocks_of(a->rows, group, resident_blocks(group) * multiprocessors(device));
}

const char* cuda_norm_backward(int centered, const NormBackward* a, void* d_weight, void* d_bias, int64_t parts,
                               void* space, int device, void* stream_pointer) {
  const auto stream = static_cast<cudaStream_t>(stream_pointer);
  const DeviceGuard guard(device);
  const int group = group_of(a->type, a->size);
  if (centered)
    choose_backward<LayerNorm>(*a, group, parts, space, stream);
  else
    choose_backward<RmsNorm>(*a, group, parts, space, stream);
  if (d_weight || d_bias) {
    const dim3 grid(static_cast<unsigned>((a->size + kReduceColumns - 1) / kReduceColumns), 2);
    const dim3 block(kReduceColumns, kReduceLanes);
    if (a->type == DType::kFloat64)
      norm_reduce_kernel<double><<<grid, block, 0, stream>>>(static_cast<const double*>(space), parts, a->size,
                                                             d_weight, d_bias, a->weight_type);
    else
      norm_reduce_kernel<float><<<grid, block, 0, stream>>>(static_cast<const float*>(space), parts, a->size, d_weight,
                                                            d_bias, a->weight_type);
  }
  return failed(cudaGetLastError(), "norm_backward");
}

}  // namespace optkit

// SPDX-License-Identifier: Apache-2.0
// Sum of squares of all gradients in one launch: a block per chunk, and the last block to finish adds the partial sums.
#pragma once

#include "cuda/access.cuh"
#include "cuda/launch.cuh"
#include "cuda/reduce.cuh"

namespace optkit {

constexpr int kAhead = 4;  // accesses in flight per thread

template <class S>
__device__ __forceinline__ S add_squares(uint4 bytes, DType type, S sum) {
  const uint32_t word[4] = {bytes.x, bytes.y, bytes.z, bytes.w};
#pragma unroll
  for (int k = 0; k < 4; ++k) {
    if constexpr (sizeof(S) == 8) {
      if (k % 2 != 0) continue;
      S value;
      const uint64_t bits = word[k] | static_cast<uint64_t>(word[k + 1]) << 32;
      memcpy(&value, &bits, sizeof(value));
      sum = fma(value, value, sum);
    } else if (type == DType::kFloat32) {
      const S value = bits_float(word[k]);
      sum = fma(value, value, sum);
    } else {
      const S low = bits16_to_float(word[k] & 0xffffu, type), high = bits16_to_float(word[k] >> 16, type);
      sum = fma(high, high, fma(low, low, sum));
    }
  }
  return sum;
}

template <class S>
__device__ __forceinline__ S element(const void* base, DType type, int64_t i) {
  if constexpr (sizeof(S) == 8)
    return static_cast<const double*>(base)[i];
  else if (type == DType::kFloat32)
    return static_cast<const float*>(base)[i];
  else
    return bits16_to_float(static_cast<const uint16_t*>(base)[i], type);
}

// This thread's share of the chunk, in 16-byte accesses where possible.
template <class S>
__device__ __forceinline__ S sum_of_squares(const void* grad, DType type, int64_t begin, int64_t end) {
  const int64_t per_access = 16 / size_of(type);
  S sum[kAhead] = {};
  int64_t rest = begin;
  if (is_aligned(grad, 16)) {
    rest = begin + (end - begin) / per_access * per_access;
    for (int64_t first = begin + threadIdx.x * per_access; first < rest; first += kAhead * kThreads * per_access) {
      uint4 bytes[kAhead];
#pragma unroll
      for (int k = 0; k < kAhead; ++k) {
        const int64_t i = first + k * kThreads * per_access;
        bytes[k] = {0, 0, 0, 0};
        if (i < rest) bytes[k] = *reinterpret_cast<const uint4*>(static_cast<const char*>(grad) + i * size_of(type));
      }
#pragma unroll
      for (int k = 0; k < kAhead; ++k) sum[k] = add_squares<S>(bytes[k], type, sum[k]);
    }
  }
  for (int64_t i = rest + threadIdx.x; i < end; i += kThreads) {
    const S value = element<S>(grad, type, i);
    sum[0] = fma(value, value, sum[0]);
  }
  return (sum[0] + sum[1]) + (sum[2] + sum[3]);
}

template <class S>
__device__ double2 chunk_norm(const void* grad, DType type, const Chunk& chunk) {
  const int64_t end = chunk.begin + chunk.count;
  double squares = static_cast<double>(sum_of_squares<S>(grad, type, chunk.begin, end)), nonfinite = 0.0;
  // Over all threads: some may have added nothing, and one overflow is enough.
  const bool holds = __syncthreads_or(squares_hold<S>(squares)) && !__syncthreads_or(squares - squares != 0.0);
  if (!holds) {
    // Rare: in double, to tell an overflowing square from a non-finite gradient.
    squares = 0.0;
    for (int64_t i = chunk.begin + threadIdx.x; i < end; i += kThreads) {
      const double value = static_cast<double>(element<S>(grad, type, i));
      if (value - value != 0.0)
        nonfinite += 1.0;
      else
        squares += value * value;
    }
  }
  const double total = block_sum(squares), bad = block_sum(nonfinite);
  return {total, bad};
}

// Adds the chunks of one launch to the result of earlier launches of the same norm in `out`.
template <class S, int kCount>
__global__ void __launch_bounds__(kThreads)
    norm_kernel(const __grid_constant__ DeviceTables tables, const __grid_constant__ GradTable<kCount> grads,
                const __grid_constant__ Range range, double* out, int accumulate) {
  const Chunk chunk = tables.chunks[range.first_chunk + blockIdx.x];
  const void* grad = grads.pointer[chunk.tensor - range.first_tensor];
  const double2 sums = chunk_norm<S>(grad, tables.tensors[chunk.tensor].grad_type, chunk);

  __shared__ bool is_last;
  if (threadIdx.x == 0) {
    tables.grads[chunk.tensor] = grad;
    tables.partial[range.first_chunk + blockIdx.x] = sums;
    __threadfence();
    is_last = atomicAdd(tables.ticket, 1u) == gridDim.x - 1;
  }
  __syncthreads();
  if (!is_last) return;
  __threadfence();
  double squares = 0.0, nonfinite = 0.0;
  for (int32_t first = threadIdx.x; first < range.num_chunks; first += kAhead * kThreads) {
    double2 part[kAhead];
#pragma unroll
    for (int k = 0; k < kAhead; ++k) {
      const int32_t place = first + k * kThreads;
      part[k] = {0.0, 0.0};
      if (place < range.num_chunks) part[k] = __ldcg(tables.partial + range.first_chunk + place);
    }
#pragma unroll
    for (int k = 0; k < kAhead; ++k) {
      squares += part[k].x;
      nonfinite += part[k].y;
    }
  }
  const double total = block_sum(squares), bad = block_sum(nonfinite);
  if (threadIdx.x == 0) {
    out[0] = accumulate ? out[0] + total : total;
    out[1] = accumulate ? out[1] + bad : bad;
    *tables.ticket = 0;
  }
}

// Stores the addresses on the device if no norm kernel did.
template <int kCount>
__global__ void __launch_bounds__(kThreads)
    grads_kernel(const __grid_constant__ DeviceTables tables, const __grid_constant__ GradTable<kCount> grads,
                 const __grid_constant__ Range range) {
  for (int32_t k = threadIdx.x; k < range.num_tensors; k += kThreads)
    tables.grads[range.first_tensor + k] = grads.pointer[k];
}

}  // namespace optkit

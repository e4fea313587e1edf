// SPDX-License-Identifier: Apache-2.0
// Sums over a block in a fixed order: bitwise reproducible.
#pragma once

namespace optkit {

constexpr int kThreads = 256;

// Every thread must call it; only thread 0 gets the sum.
__device__ __forceinline__ double block_sum(double value) {
  __shared__ double parts[kThreads / 32];
#pragma unroll
  for (int offset = 16; offset > 0; offset /= 2) value += __shfl_down_sync(0xffffffffu, value, offset);
  __syncthreads();  // `parts` may still be in use by the previous sum
  if (threadIdx.x % 32 == 0) parts[threadIdx.x / 32] = value;
  __syncthreads();
  double sum = 0.0;
  if (threadIdx.x == 0)
    for (int warp = 0; warp < kThreads / 32; ++warp) sum += parts[warp];
  return sum;
}

}  // namespace optkit

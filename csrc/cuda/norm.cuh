// SPDX-License-Identifier: Apache-2.0
// Sum of squares of all gradients in one launch: a block per chunk, and the last block to finish adds the partial sums.
#pragma once

#include "cuda/access.cuh"
#include "cuda/launch.cuh"
#include "cuda/reduce.cuh"

namespace optkit {

template <class S>
__device__ void chunk_norm(const TensorSlot& t, const void* grad, const Chunk& chunk, double* out) {
  const int64_t end = chunk.begin + chunk.count;
  S sum = S(0);
  for (int64_t i = chunk.begin + threadIdx.x * kLanes; i < end; i += kThreads * kLanes) {
    Four<S> g;
    load(g, grad, t.grad_type, i, end - i < kLanes ? static_cast<int>(end - i) : kLanes);
#pragma unroll
    for (int k = 0; k < kLanes; ++k) sum = fma(g.v[k], g.v[k], sum);
  }
  double squares = static_cast<double>(sum), nonfinite = 0.0;
  if (__syncthreads_or(!(squares - squares == 0.0))) {
    // Rare: tells an overflow of a square from a bad gradient.
    squares = 0.0;
    for (int64_t i = chunk.begin + threadIdx.x; i < end; i += kThreads) {
      Four<S> g;
      load(g, grad, t.grad_type, i, 1);
      const double value = static_cast<double>(g.v[0]);
      if (value - value != 0.0)
        nonfinite += 1.0;
      else
        squares += value * value;
    }
  }
  const double total = block_sum(squares), bad = block_sum(nonfinite);
  if (threadIdx.x == 0) {
    out[0] = total;
    out[1] = bad;
  }
}

// The chunks of one launch are added to what earlier launches of the same norm left in `out`.
template <class S>
__global__ void __launch_bounds__(kThreads)
    norm_kernel(const __grid_constant__ DeviceTables tables, const __grid_constant__ GradTable grads,
                const __grid_constant__ Range range, double* out, int accumulate) {
  const Chunk chunk = tables.chunks[range.first_chunk + blockIdx.x];
  double* partial = tables.partial + 2 * (range.first_chunk + blockIdx.x);
  chunk_norm<S>(tables.tensors[chunk.tensor], grads.pointer[chunk.tensor - range.first_tensor], chunk, partial);

  __shared__ bool is_last;
  if (threadIdx.x == 0) {
    __threadfence();
    is_last = atomicAdd(tables.ticket, 1u) == gridDim.x - 1;
  }
  __syncthreads();
  if (!is_last) return;
  __threadfence();
  double squares = 0.0, nonfinite = 0.0;
  for (int32_t k = threadIdx.x; k < range.num_chunks; k += kThreads) {
    squares += __ldcg(tables.partial + 2 * (range.first_chunk + k));
    nonfinite += __ldcg(tables.partial + 2 * (range.first_chunk + k) + 1);
  }
  const double total = block_sum(squares), bad = block_sum(nonfinite);
  if (threadIdx.x == 0) {
    out[0] = accumulate ? out[0] + total : total;
    out[1] = accumulate ? out[1] + bad : bad;
    *tables.ticket = 0;
  }
}

}  // namespace optkit

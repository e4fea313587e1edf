// SPDX-License-Identifier: Apache-2.0
// LayerNorm and RMSNorm on CUDA. A group of threads holds a row in registers, so memory is read once, and prefetches
// its next row before it processes this one. A thread holds the same columns of every row, so it accumulates its part
// of the parameter gradients in registers too.
#pragma once

#include "cuda/layer_norm_row.cuh"
#include "norms/layer_norm.h"
#include "norms/rms_norm.h"

namespace optkit {

// The numbers to normalize: the row, or the sum with the residual, which is stored here.
template <DType kType, int kGroup, int kPacks>
__device__ __forceinline__ void take(const NormForward& a, const Columns<kType, kGroup>& columns, int64_t row,
                                     const RawRow<kType, kPacks>& x_raw, const RawRow<kType, kPacks>& residual_raw,
                                     int64_t first, Row<kType, kPacks>& x) {
  x = numbers<kType>(x_raw, a.residual ? a.x_type : a.type);
  if (a.residual == nullptr) return;
  const Row<kType, kPacks> residual = numbers<kType>(residual_raw, a.residual_type);
#pragma unroll
  for (int p = 0; p < kPacks; ++p)
#pragma unroll
    for (int k = 0; k < Pack<kType>::kSize; ++k) {
      const int64_t place = row * a.size + columns.at(first + p, k);
      const auto value = a.dropout.on ? survive(a.dropout, place, x.v[p][k]) : x.v[p][k];
      x.v[p][k] = rounded<kType>(value + residual.v[p][k], a.type);
    }
  put(x, columns, row_at<kType>(a.sum, row * a.size), first, a.type);
}

// Minimum number of blocks per multiprocessor, for enough rows in flight; this limits the registers.
__host__ __device__ constexpr int least_blocks(int group, int threads) {
  return block_threads(group) >= threads ? 1 : threads / block_threads(group);
}

template <class Norm, DType kType, int kGroup>
__global__ void __launch_bounds__(block_threads(kGroup), least_blocks(kGroup, 1024))
    norm_forward_kernel(const __grid_constant__ NormForward a, bool whole) {
  using S = typename Pack<kType>::S;
  constexpr int kSize = Pack<kType>::kSize, kPacks = packs_held(kType, kGroup);
  constexpr bool kLong = kGroup == kLongRow;
  const S inverse_size = S(1) / static_cast<S>(a.size);
  const Columns<kType, kGroup> columns(a.size, whole);
  Row<kType, kPacks> weight, bias, x;
  if constexpr (!kLong) {
    weight = parameters<kType, kPacks>(a.weight, a.weight_type, columns, 0, S(1));
    bias = parameters<kType, kPacks>(a.bias, a.weight_type, columns, 0, S(0));
  }
  RawRow<kType, kPacks> x_raw, residual_raw;
  const auto ask = [&](int64_t row, int64_t first) {
    const bool exists = row < a.rows;
    fetch(x_raw, columns, a.x, a.residual ? a.x_type : a.type, row * a.x_stride, first, exists);
    if (a.residual) fetch(residual_raw, columns, a.residual, a.residual_type, row * a.size, first, exists);
  };
  // All threads of a block iterate to the last row together: the groups of a warp share its shuffles.
  const int64_t step = int64_t{gridDim.x} * block_rows(kGroup);
  int64_t row = int64_t{blockIdx.x} * block_rows(kGroup) + row_in_block(kGroup);
  if constexpr (!kLong) ask(row, 0);
  for (int64_t block_row = row - row_in_block(kGroup); block_row < a.rows; block_row += step, row += step) {
    const bool exists = row < a.rows;
    // A long row is read again instead of being held.
    const auto again = [&](int64_t first) {
      if constexpr (!kLong) return;
      fetch(x_raw, columns, a.residual ? a.sum : a.x, a.type, row * (a.residual ? a.size : a.x_stride), first, exists);
      x = numbers<kType>(x_raw, a.type);
    };
    S mean = S(0), squares = S(0), unused = S(0);
    for_each_pack<kGroup, kType>(a.size, [&](int64_t first) {
      if constexpr (kLong) ask(row, first);
      if (exists)
        take<kType, kGroup, kPacks>(a, columns, row, x_raw, residual_raw, first, x);
      else
        x = {};
      if constexpr (!kLong) ask(row + step, 0);
      mean += sum_of(x);
    });
    if constexpr (Norm::kCentered) {
      group_sum<kGroup>(mean, unused);
      mean *= inverse_size;
    }
    for_each_pack<kGroup, kType>(a.size, [&](int64_t first) {
      again(first);
#pragma unroll
      for (int p = 0; p < kPacks; ++p)
#pragma unroll
        for (int k = 0; k < kSize; ++k) {
          const S d = columns.exists(first + p, k) ? Norm::center(x.v[p][k], mean) : S(0);
          squares = fma(d, d, squares);
        }
    });
    group_sum<kGroup>(squares, unused);
    const S rstd = S(1) / sqrt(squares * inverse_size + static_cast<S>(a.eps));
    if (exists && threadIdx.x % row_threads(kGroup) == 0) {
      if constexpr (Norm::kCentered) static_cast<S*>(a.mean)[row] = mean;
      static_cast<S*>(a.rstd)[row] = rstd;
    }
    if (!exists) continue;
    for_each_pack<kGroup, kType>(a.size, [&](int64_t first) {
      again(first);
      if constexpr (kLong) {
        weight = parameters<kType, kPacks>(a.weight, a.weight_type, columns, first, S(1));
        bias = parameters<kType, kPacks>(a.bias, a.weight_type, columns, first, S(0));
      }
#pragma unroll
      for (int p = 0; p < kPacks; ++p)
#pragma unroll
        for (int k = 0; k < kSize; ++k)
          x.v[p][k] = fma(Norm::center(x.v[p][k], mean) * rstd, weight.v[p][k], bias.v[p][k]);
      put(x, columns, row_at<kType>(a.y, row * a.size), first, a.type);
    });
  }
}

// `space`: [gridDim.x][2][size], sums over the rows of a block for the weight and the bias. Sums of a long row do not
// fit registers: they are in shared memory if it is large enough, otherwise in `space`.
template <class Norm, DType kType, int kGroup>
__global__ void __launch_bounds__(block_threads(kGroup), least_blocks(kGroup, kGroup >= 512 ? 1024 : 640))
    norm_backward_kernel(const __grid_constant__ NormBackward a, void* space, bool whole, bool sums_are_shared) {
  using S = typename Pack<kType>::S;
  constexpr int kSize = Pack<kType>::kSize, kPacks = packs_held(kType, kGroup);
  constexpr bool kLong = kGroup == kLongRow;
  // Large groups have few registers per thread: none for the parameters or a prefetched row.
  constexpr bool kHoldsWeight = kGroup <= 256, kAsksAhead = kHoldsWeight;
  const S inverse_size = S(1) / static_cast<S>(a.size);
  const Columns<kType, kGroup> columns(a.size, whole);
  S* part = static_cast<S*>(space) + int64_t{blockIdx.x} * 2 * a.size;
  S* memory = kLong && sums_are_shared ? static_cast<S*>(dynamic_shared()) : part;
  const LongSums<kType, kGroup> weight_sums = {columns, memory, sums_are_shared};
  const LongSums<kType, kGroup> bias_sums = {
      columns, memory + (sums_are_shared ? long_sums_places(kType, a.size) : a.size), sums_are_shared};
  Row<kType, kPacks> weight, x, dy;  // x: normalized
  Row<kType, kPacks> to_weight = {}, to_bias = {};
  RawRow<kType, kPacks> x_raw, dy_raw;
  const auto ask = [&](int64_t row, int64_t first) {
    fetch(x_raw, columns, a.x, a.type, row * a.x_stride, first, row < a.rows);
    fetch(dy_raw, columns, a.dy, a.type, row * a.size, first, row < a.rows);
  };
  const int64_t step = int64_t{gridDim.x} * block_rows(kGroup);
  int64_t row = int64_t{blockIdx.x} * block_rows(kGroup) + row_in_block(kGroup);
  if constexpr (kHoldsWeight) weight = parameters<kType, kPacks>(a.weight, a.weight_type, columns, 0, S(1));
  if constexpr (kAsksAhead) ask(row, 0);
  if constexpr (kLong) {
    for_each_pack<kGroup, kType>(a.size, [&](int64_t first) {
      weight_sums.put(first, to_weight);
      bias_sums.put(first, to_bias);
    });
  }
  for (int64_t block_row = row - row_in_block(kGroup); block_row < a.rows; block_row += step, row += step) {
    const bool exists = row < a.rows;
    const S mean = Norm::kCentered && exists ? static_cast<const S*>(a.mean)[row] : S(0);
    const S rstd = exists ? static_cast<const S*>(a.rstd)[row] : S(0);
    const auto read = [&](int64_t first) {
      if constexpr (!kAsksAhead) ask(row, first);
      x = numbers<kType>(x_raw, a.type);
      dy = numbers<kType>(dy_raw, a.type);
      if constexpr (kAsksAhead) ask(row + step, first);
      if constexpr (!kHoldsWeight) weight = parameters<kType, kPacks>(a.weight, a.weight_type, columns, first, S(1));
#pragma unroll
      for (int p = 0; p < kPacks; ++p)
#pragma unroll
        for (int k = 0; k < kSize; ++k) x.v[p][k] = Norm::center(x.v[p][k], mean) * rstd;
    };
    S sum_g = S(0), sum_gx = S(0);
    for_each_pack<kGroup, kType>(a.size, [&](int64_t first) {
      read(first);
      if constexpr (kLong) {
        to_weight = weight_sums.take(first);
        to_bias = bias_sums.take(first);
      }
#pragma unroll
      for (int p = 0; p < kPacks; ++p)
#pragma unroll
        for (int k = 0; k < kSize; ++k) {
          // Elements past the end have dy = 0 and add nothing. From here on dy is the gradient of the normalized value.
          to_weight.v[p][k] = fma(dy.v[p][k], x.v[p][k], to_weight.v[p][k]);
          to_bias.v[p][k] += dy.v[p][k];
          dy.v[p][k] *= weight.v[p][k];
          sum_g += dy.v[p][k];
          sum_gx = fma(dy.v[p][k], x.v[p][k], sum_gx);
        }
      if constexpr (kLong) {
        weight_sums.put(first, to_weight);
        bias_sums.put(first, to_bias);
      }
    });
    if (a.dx == nullptr) continue;
    group_sum<kGroup>(sum_g, sum_gx);
    if (!exists) continue;
    const S mean_g = sum_g * inverse_size, mean_gx = sum_gx * inverse_size;
    for_each_pack<kGroup, kType>(a.size, [&](int64_t first) {
      if constexpr (kLong) read(first);
      Row<kType, kPacks> dx;
#pragma unroll
      for (int p = 0; p < kPacks; ++p)
#pragma unroll
        for (int k = 0; k < kSize; ++k) {
          const S g = kLong ? dy.v[p][k] * weight.v[p][k] : dy.v[p][k];
          dx.v[p][k] = Norm::gradient(g, x.v[p][k], rstd, mean_g, mean_gx);
        }
      if (a.d_sum) {
        RawRow<kType, kPacks> raw;
        fetch(raw, columns, a.d_sum, a.type, row * a.size, first, true);
        const Row<kType, kPacks> d_sum = numbers<kType>(raw, a.type);
#pragma unroll
        for (int p = 0; p < kPacks; ++p)
#pragma unroll
          for (int k = 0; k < kSize; ++k) dx.v[p][k] += d_sum.v[p][k];
      }
      put(dx, columns, row_at<kType>(a.dx, row * a.size), first, a.type);
      if (a.d_input == nullptr) return;
#pragma unroll
      for (int p = 0; p < kPacks; ++p)
#pragma unroll
        for (int k = 0; k < kSize; ++k)
          dx.v[p][k] = survive(a.dropout, row * a.size + columns.at(first + p, k), dx.v[p][k]);
      put(dx, columns, row_at<kType>(a.d_input, row * a.size), first, a.type);
    });
  }
  if constexpr (kLong) {
    if (!sums_are_shared) return;
    for_each_pack<kGroup, kType>(a.size, [&](int64_t first) {
      put_accumulator(weight_sums.take(first), columns, part, first);
      put_accumulator(bias_sums.take(first), columns, part + a.size, first);
    });
  } else if constexpr (kGroup <= 32) {
    add_over_block<kType, kGroup, kPacks>(to_weight, to_bias, columns, part);
  } else {
    put_accumulator(to_weight, columns, part, 0);
    put_accumulator(to_bias, columns, part + a.size, 0);
  }
}

constexpr int kReduceColumns = 32, kReduceLanes = 32;

// Sums the parts column by column, in fixed order. blockIdx.y: 0 for the weight, 1 for the bias.
template <class S>
__global__ void __launch_bounds__(kReduceColumns* kReduceLanes)
    norm_reduce_kernel(const S* space, int64_t parts, int64_t size, void* d_weight, void* d_bias, DType type) {
  __shared__ S sums[kReduceLanes][kReduceColumns];
  void* out = blockIdx.y == 0 ? d_weight : d_bias;
  if (out == nullptr) return;
  const int64_t column = int64_t{blockIdx.x} * kReduceColumns + threadIdx.x;
  S sum = S(0);
  if (column < size) {
#pragma unroll 4
    for (int64_t part = threadIdx.y; part < parts; part += kReduceLanes)
      sum += space[(2 * part + blockIdx.y) * size + column];
  }
  sums[threadIdx.y][threadIdx.x] = sum;
  __syncthreads();
  if (threadIdx.y != 0 || column >= size) return;
  for (int lane = 1; lane < kReduceLanes; ++lane) sum += sums[lane][threadIdx.x];
  store_one<S>(out, type, column, sum);
}

}  // namespace optkit

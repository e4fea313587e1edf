// SPDX-License-Identifier: Apache-2.0
// LayerNorm and RMSNorm on CUDA. A group of threads holds a row in registers, so memory is read once; what a thread
// holds lies in the same columns of every row, so it adds its part of the parameter gradients up in registers too.
#pragma once

#include "cuda/access.cuh"
#include "norms/layer_norm.h"
#include "norms/rms_norm.h"
#include "norms/tables.h"

namespace optkit {

template <DType kType>
struct WideOf {
  using type = float;
};
template <>
struct WideOf<DType::kFloat64> {
  using type = double;
};

constexpr int kHeld = 8;      // elements of a row that a thread holds
constexpr int kWarpRows = 8;  // rows that a block of one-warp groups works on
constexpr int kLongRow = 0;   // "group" of rows too long for registers: a block that reads them twice, from the cache
constexpr int kLongThreads = 1024;

__host__ __device__ constexpr int block_threads(int group) {
  return group == kLongRow ? kLongThreads : group == 32 ? 32 * kWarpRows : group;
}
__host__ __device__ constexpr int block_rows(int group) { return group == 32 ? kWarpRows : 1; }
__host__ __device__ constexpr int bytes_of(DType type) {
  return type == DType::kFloat64 ? 8 : type == DType::kFloat32 ? 4 : 2;
}

// 16 bytes of a row: the unit of an access.
template <DType kType>
struct Pack {
  using S = typename WideOf<kType>::type;
  static constexpr int kSize = 16 / bytes_of(kType);
};

template <class S>
__device__ __forceinline__ S load_one(const void* base, DType type, int64_t i) {
  if constexpr (sizeof(S) == 8)
    return static_cast<const double*>(base)[i];
  else if (type == DType::kFloat32)
    return static_cast<const float*>(base)[i];
  else
    return bits16_to_float(static_cast<const uint16_t*>(base)[i], type);
}

template <class S>
__device__ __forceinline__ void store_one(void* base, DType type, int64_t i, S value) {
  if constexpr (sizeof(S) == 8)
    static_cast<double*>(base)[i] = value;
  else if (type == DType::kFloat32)
    static_cast<float*>(base)[i] = value;
  else
    static_cast<uint16_t*>(base)[i] = type == DType::kBFloat16 ? float_to_bfloat16(value) : float_to_half(value);
}

// `count` elements from i on, i a multiple of kSize in the row; the others are zero. `whole`: one access of 16 bytes.
// Both 16-bit dtypes share the kernels compiled for kBFloat16: which of them it is, `type` tells at run time.
template <DType kType>
__device__ __forceinline__ void load_pack(typename Pack<kType>::S (&out)[Pack<kType>::kSize], const void* base,
                                          int64_t i, int count, bool whole, DType type) {
  using S = typename Pack<kType>::S;
  constexpr int kSize = Pack<kType>::kSize;
  if (whole && count == kSize) {
    union {
      uint4 bytes;
      uint16_t half[8];
      S wide[16 / sizeof(S)];
    } u;
    u.bytes = *reinterpret_cast<const uint4*>(static_cast<const char*>(base) + i * bytes_of(kType));
#pragma unroll
    for (int k = 0; k < kSize; ++k) {
      if constexpr (bytes_of(kType) == 2)
        out[k] = bits16_to_float(u.half[k], type);
      else
        out[k] = u.wide[k];
    }
    return;
  }
#pragma unroll
  for (int k = 0; k < kSize; ++k) out[k] = k < count ? load_one<S>(base, type, i + k) : S(0);
}

template <DType kType>
__device__ __forceinline__ void store_pack(const typename Pack<kType>::S (&value)[Pack<kType>::kSize], void* base,
                                           int64_t i, int count, bool whole, DType type) {
  using S = typename Pack<kType>::S;
  constexpr int kSize = Pack<kType>::kSize;
  if (whole && count == kSize) {
    union {
      uint4 bytes;
      uint16_t half[8];
      S wide[16 / sizeof(S)];
    } u;
#pragma unroll
    for (int k = 0; k < kSize; ++k) {
      if constexpr (bytes_of(kType) == 2)
        u.half[k] = type == DType::kBFloat16 ? float_to_bfloat16(value[k]) : float_to_half(value[k]);
      else
        u.wide[k] = value[k];
    }
    *reinterpret_cast<uint4*>(static_cast<char*>(base) + i * bytes_of(kType)) = u.bytes;
    return;
  }
#pragma unroll
  for (int k = 0; k < kSize; ++k)
    if (k < count) store_one<S>(base, type, i + k, value[k]);
}

// What is left of a value after storing it.
template <DType kType>
__device__ __forceinline__ typename Pack<kType>::S rounded(typename Pack<kType>::S value, DType type) {
  if constexpr (bytes_of(kType) == 2)
    return bits16_to_float(type == DType::kBFloat16 ? float_to_bfloat16(value) : float_to_half(value), type);
  else
    return value;
}

template <class S>
__device__ __forceinline__ S survive(const Dropout& dropout, int64_t place, S value) {
  const uint64_t at = static_cast<uint64_t>(place);
  const uint32_t bits = dropout_bits(dropout.key, static_cast<uint32_t>(at), static_cast<uint32_t>(at >> 32));
  return bits < dropout.keep_below ? value * static_cast<S>(dropout.scale) : S(0);
}

// Sums over the group of a row, in an order that never changes; every thread has them.
template <int kGroup, class S>
__device__ __forceinline__ void group_sum(S& a, S& b) {
#pragma unroll
  for (int offset = 16; offset > 0; offset /= 2) {
    a += __shfl_xor_sync(0xffffffffu, a, offset);
    b += __shfl_xor_sync(0xffffffffu, b, offset);
  }
  if constexpr (kGroup != 32) {
    constexpr int kWarps = block_threads(kGroup) / 32;
    __shared__ S parts[2][kWarps];
    __syncthreads();  // the sums before these may still be read
    if (threadIdx.x % 32 == 0) {
      parts[0][threadIdx.x / 32] = a;
      parts[1][threadIdx.x / 32] = b;
    }
    __syncthreads();
    a = b = S(0);
    for (int warp = 0; warp < kWarps; ++warp) {
      a += parts[0][warp];
      b += parts[1][warp];
    }
  }
}

// Calls body(i, count, p) for the packs of a row that belong to this thread; p numbers them.
template <int kGroup, DType kType, class Body>
__device__ __forceinline__ void for_each_pack(int64_t size, Body body) {
  constexpr int kSize = Pack<kType>::kSize, kThreadsOfRow = kGroup == kLongRow ? kLongThreads : kGroup;
  const int64_t thread = threadIdx.x % kThreadsOfRow;
  if constexpr (kGroup == kLongRow) {
    for (int64_t i = thread * kSize; i < size; i += int64_t{kThreadsOfRow} * kSize)
      body(i, size - i < kSize ? static_cast<int>(size - i) : kSize, 0);
  } else {
#pragma unroll
    for (int p = 0; p < kHeld / kSize; ++p) {
      const int64_t i = (thread + int64_t{p} * kThreadsOfRow) * kSize;
      if (i < size) body(i, size - i < kSize ? static_cast<int>(size - i) : kSize, p);
    }
  }
}

__device__ __forceinline__ bool row_aligned(const void* base, DType type, int64_t begin) {
  return is_aligned(static_cast<const char*>(base) + begin * bytes_of(type), 16);
}

template <DType kType>
__device__ __forceinline__ const void* row_at(const void* base, int64_t begin) {
  return static_cast<const char*>(base) + begin * bytes_of(kType);
}
template <DType kType>
__device__ __forceinline__ void* row_at(void* base, int64_t begin) {
  return static_cast<char*>(base) + begin * bytes_of(kType);
}

// The numbers to normalize: the row, or the sum, which is stored on the way.
template <DType kType>
__device__ __forceinline__ void take(const NormForward& a, int64_t row, int64_t i, int count,
                                     typename Pack<kType>::S (&x)[Pack<kType>::kSize]) {
  using S = typename Pack<kType>::S;
  constexpr int kSize = Pack<kType>::kSize;
  if (a.residual == nullptr) {
    const void* base = row_at<kType>(a.x, row * a.x_stride);
    return load_pack<kType>(x, base, i, count, is_aligned(base, 16), a.type);
  }
  const int64_t place = row * a.size + i;
  S residual[kSize];
  const bool whole = row_aligned(a.x, kType, row * a.x_stride) && row_aligned(a.residual, kType, row * a.size);
  if (a.x_type == a.type && a.residual_type == a.type) {
    load_pack<kType>(x, row_at<kType>(a.x, row * a.x_stride), i, count, whole, a.type);
    load_pack<kType>(residual, row_at<kType>(a.residual, row * a.size), i, count, whole, a.type);
  } else {
#pragma unroll
    for (int k = 0; k < kSize; ++k) {
      x[k] = k < count ? load_one<S>(a.x, a.x_type, row * a.x_stride + i + k) : S(0);
      residual[k] = k < count ? load_one<S>(a.residual, a.residual_type, place + k) : S(0);
    }
  }
#pragma unroll
  for (int k = 0; k < kSize; ++k) {
    const S value = a.dropout.on ? survive(a.dropout, place + k, x[k]) : x[k];
    x[k] = rounded<kType>(value + residual[k], a.type);
  }
  void* sum = row_at<kType>(a.sum, row * a.size);
  store_pack<kType>(x, sum, i, count, is_aligned(sum, 16), a.type);
}

template <class Norm, DType kType, int kGroup>
__global__ void __launch_bounds__(block_threads(kGroup)) norm_forward_kernel(const __grid_constant__ NormForward a) {
  using S = typename Pack<kType>::S;
  constexpr int kSize = Pack<kType>::kSize;
  constexpr bool kLong = kGroup == kLongRow;
  constexpr int kPacks = kLong ? 1 : kHeld / kSize;
  const S inverse_size = S(1) / static_cast<S>(a.size);
  S weight[kPacks][kSize], bias[kPacks][kSize], x[kPacks][kSize];
  const auto parameters = [&](int64_t i, int count, int p) {
#pragma unroll
    for (int k = 0; k < kSize; ++k) {
      weight[p][k] = a.weight && k < count ? load_one<S>(a.weight, a.weight_type, i + k) : S(1);
      bias[p][k] = a.bias && k < count ? load_one<S>(a.bias, a.weight_type, i + k) : S(0);
    }
  };
  if constexpr (!kLong) for_each_pack<kGroup, kType>(a.size, parameters);
  const int64_t first = int64_t{blockIdx.x} * block_rows(kGroup) + (kGroup == 32 ? threadIdx.x / 32 : 0);
  for (int64_t row = first; row < a.rows; row += int64_t{gridDim.x} * block_rows(kGroup)) {
    // A long row is read again instead of held.
    const void* held = row_at<kType>(a.residual ? a.sum : a.x, row * (a.residual ? a.size : a.x_stride));
    const auto again = [&](int64_t i, int count) {
      if constexpr (kLong) load_pack<kType>(x[0], held, i, count, is_aligned(held, 16), a.type);
    };
    S mean = S(0), squares = S(0), unused = S(0);
    for_each_pack<kGroup, kType>(a.size, [&](int64_t i, int count, int p) {
      take<kType>(a, row, i, count, x[p]);
#pragma unroll
      for (int k = 0; k < kSize; ++k) mean += x[p][k];
    });
    if constexpr (Norm::kCentered) {
      group_sum<kGroup>(mean, unused);
      mean *= inverse_size;
    }
    for_each_pack<kGroup, kType>(a.size, [&](int64_t i, int count, int p) {
      again(i, count);
#pragma unroll
      for (int k = 0; k < kSize; ++k) {
        const S d = k < count ? Norm::center(x[p][k], mean) : S(0);
        squares = fma(d, d, squares);
      }
    });
    group_sum<kGroup>(squares, unused);
    const S rstd = S(1) / sqrt(squares * inverse_size + static_cast<S>(a.eps));
    if (threadIdx.x % (kGroup == 32 ? 32 : block_threads(kGroup)) == 0) {
      if constexpr (Norm::kCentered) static_cast<S*>(a.mean)[row] = mean;
      static_cast<S*>(a.rstd)[row] = rstd;
    }
    void* y = row_at<kType>(a.y, row * a.size);
    for_each_pack<kGroup, kType>(a.size, [&](int64_t i, int count, int p) {
      again(i, count);
      if constexpr (kLong) parameters(i, count, 0);
      S out[kSize];
#pragma unroll
      for (int k = 0; k < kSize; ++k) out[k] = fma(Norm::center(x[p][k], mean) * rstd, weight[p][k], bias[p][k]);
      store_pack<kType>(out, y, i, count, is_aligned(y, 16), a.type);
    });
  }
}

// `space`: [gridDim.x][2][size], sums over the rows of a block: to the weight, to the bias.
template <class Norm, DType kType, int kGroup>
__global__ void __launch_bounds__(block_threads(kGroup))
    norm_backward_kernel(const __grid_constant__ NormBackward a, void* space) {
  using S = typename Pack<kType>::S;
  constexpr int kSize = Pack<kType>::kSize;
  constexpr bool kLong = kGroup == kLongRow;
  constexpr int kPacks = kLong ? 1 : kHeld / kSize;
  const S inverse_size = S(1) / static_cast<S>(a.size);
  S* part = static_cast<S*>(space) + int64_t{blockIdx.x} * 2 * a.size;
  S weight[kPacks][kSize], x[kPacks][kSize], dy[kPacks][kSize];  // x: normalized
  S to_weight[kPacks][kSize] = {}, to_bias[kPacks][kSize] = {};
  const auto parameters = [&](int64_t i, int count, int p) {
#pragma unroll
    for (int k = 0; k < kSize; ++k)
      weight[p][k] = a.weight && k < count ? load_one<S>(a.weight, a.weight_type, i + k) : S(1);
  };
  for_each_pack<kGroup, kType>(a.size, [&](int64_t i, int count, int p) {
    if constexpr (!kLong) {
      parameters(i, count, p);
    } else {
      for (int k = 0; k < count; ++k) part[i + k] = part[a.size + i + k] = S(0);
    }
  });
  const int64_t first = int64_t{blockIdx.x} * block_rows(kGroup) + (kGroup == 32 ? threadIdx.x / 32 : 0);
  for (int64_t row = first; row < a.rows; row += int64_t{gridDim.x} * block_rows(kGroup)) {
    const S mean = Norm::kCentered ? static_cast<const S*>(a.mean)[row] : S(0);
    const S rstd = static_cast<const S*>(a.rstd)[row];
    const void *x_row = row_at<kType>(a.x, row * a.x_stride), *dy_row = row_at<kType>(a.dy, row * a.size);
    const auto read = [&](int64_t i, int count, int p) {
      load_pack<kType>(x[p], x_row, i, count, is_aligned(x_row, 16), a.type);
      load_pack<kType>(dy[p], dy_row, i, count, is_aligned(dy_row, 16), a.type);
#pragma unroll
      for (int k = 0; k < kSize; ++k) x[p][k] = Norm::center(x[p][k], mean) * rstd;
      if constexpr (kLong) parameters(i, count, p);
    };
    S sum_g = S(0), sum_gx = S(0);
    for_each_pack<kGroup, kType>(a.size, [&](int64_t i, int count, int p) {
      read(i, count, p);
#pragma unroll
      for (int k = 0; k < kSize; ++k) {
        // Places past the end have dy = 0 and add nothing.
        const S g = dy[p][k] * weight[p][k];
        sum_g += g;
        sum_gx = fma(g, x[p][k], sum_gx);
        if constexpr (!kLong) {
          to_weight[p][k] = fma(dy[p][k], x[p][k], to_weight[p][k]);
          to_bias[p][k] += dy[p][k];
        } else if (k < count) {
          part[i + k] = fma(dy[p][k], x[p][k], part[i + k]);
          part[a.size + i + k] += dy[p][k];
        }
      }
    });
    if (a.dx == nullptr) continue;
    group_sum<kGroup>(sum_g, sum_gx);
    const S mean_g = sum_g * inverse_size, mean_gx = sum_gx * inverse_size;
    void* dx_row = row_at<kType>(a.dx, row * a.size);
    for_each_pack<kGroup, kType>(a.size, [&](int64_t i, int count, int p) {
      if constexpr (kLong) read(i, count, p);
      S dx[kSize];
#pragma unroll
      for (int k = 0; k < kSize; ++k) dx[k] = Norm::gradient(dy[p][k] * weight[p][k], x[p][k], rstd, mean_g, mean_gx);
      if (a.d_sum) {
        const void* d_sum_row = row_at<kType>(a.d_sum, row * a.size);
        S d_sum[kSize];
        load_pack<kType>(d_sum, d_sum_row, i, count, is_aligned(d_sum_row, 16), a.type);
#pragma unroll
        for (int k = 0; k < kSize; ++k) dx[k] += d_sum[k];
      }
      store_pack<kType>(dx, dx_row, i, count, is_aligned(dx_row, 16), a.type);
      if (a.d_input) {
        void* d_input_row = row_at<kType>(a.d_input, row * a.size);
#pragma unroll
        for (int k = 0; k < kSize; ++k) dx[k] = survive(a.dropout, row * a.size + i + k, dx[k]);
        store_pack<kType>(dx, d_input_row, i, count, is_aligned(d_input_row, 16), a.type);
      }
    });
  }
  if constexpr (kGroup == 32) {
    // The warps of a block add up one after the other.
    __shared__ S sums[2][32 * kHeld];
    for (int warp = 0; warp < kWarpRows; ++warp) {
      if (static_cast<int>(threadIdx.x / 32) == warp)
        for_each_pack<kGroup, kType>(a.size, [&](int64_t i, int count, int p) {
#pragma unroll
          for (int k = 0; k < kSize; ++k)
            if (k < count) {
              sums[0][i + k] = warp == 0 ? to_weight[p][k] : sums[0][i + k] + to_weight[p][k];
              sums[1][i + k] = warp == 0 ? to_bias[p][k] : sums[1][i + k] + to_bias[p][k];
            }
        });
      __syncthreads();
    }
    for (int64_t i = threadIdx.x; i < a.size; i += block_threads(kGroup)) {
      part[i] = sums[0][i];
      part[a.size + i] = sums[1][i];
    }
  } else if constexpr (!kLong) {
    for_each_pack<kGroup, kType>(a.size, [&](int64_t i, int count, int p) {
#pragma unroll
      for (int k = 0; k < kSize; ++k)
        if (k < count) {
          part[i + k] = to_weight[p][k];
          part[a.size + i + k] = to_bias[p][k];
        }
    });
  }
}

constexpr int kReduceColumns = 32, kReduceLanes = 8;

// Sums the parts column by column, in fixed order. blockIdx.y: 0 the weight, 1 the bias.
template <class S>
__global__ void __launch_bounds__(kReduceColumns* kReduceLanes)
    norm_reduce_kernel(const S* space, int64_t parts, int64_t size, void* d_weight, void* d_bias, DType type) {
  __shared__ S sums[kReduceLanes][kReduceColumns];
  void* out = blockIdx.y == 0 ? d_weight : d_bias;
  const int64_t column = int64_t{blockIdx.x} * kReduceColumns + threadIdx.x;
  S sum = S(0);
  if (out && column < size)
    for (int64_t part = threadIdx.y; part < parts; part += kReduceLanes)
      sum += space[(2 * part + blockIdx.y) * size + column];
  sums[threadIdx.y][threadIdx.x] = sum;
  __syncthreads();
  if (threadIdx.y != 0 || out == nullptr || column >= size) return;
  for (int lane = 1; lane < kReduceLanes; ++lane) sum += sums[lane][threadIdx.x];
  store_one<S>(out, type, column, sum);
}

}  // namespace optkit

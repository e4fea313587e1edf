// SPDX-License-Identifier: Apache-2.0
// One row, distributed over a group of threads: the columns of each thread, loads and stores, and sums over the group.
#pragma once

#include <type_traits>

#include "cuda/access.cuh"
#include "norms/tables.h"

namespace optkit {

template <DType kType>
struct AccumulatorOf {
  using type = float;
};
template <>
struct AccumulatorOf<DType::kFloat64> {
  using type = double;
};

constexpr int kHeld = 8;        // elements of a row per thread
constexpr int kLongRow = 4096;  // "group" of rows too long for registers: a block that reads them twice, from the cache
constexpr int kLongThreads = 1024;
constexpr int kShortThreads = 256;  // per block of groups of at most a warp

__host__ __device__ constexpr int row_threads(int group) { return group == kLongRow ? kLongThreads : group; }
__host__ __device__ constexpr int block_threads(int group) { return group <= 32 ? kShortThreads : row_threads(group); }
__host__ __device__ constexpr int block_rows(int group) { return block_threads(group) / row_threads(group); }
__device__ __forceinline__ int row_in_block(int group) { return static_cast<int>(threadIdx.x) / row_threads(group); }
__host__ __device__ constexpr int bytes_of(DType type) {
  return type == DType::kFloat64 ? 8 : type == DType::kFloat32 ? 4 : 2;
}

// 16 bytes of a row: one access.
template <DType kType>
struct Pack {
  using S = typename AccumulatorOf<kType>::type;
  static constexpr int kSize = 16 / bytes_of(kType);
};
__host__ __device__ constexpr int packs_held(DType type, int group) {
  return group == kLongRow ? 1 : kHeld * bytes_of(type) / 16;
}

// The elements of a row in one thread, as numbers and as stored: a 16-bit element is half a word, unless kType is
// wider.
template <DType kType, int kPacks>
struct Row {
  typename Pack<kType>::S v[kPacks][Pack<kType>::kSize];
};
template <DType kType, int kPacks>
struct RawRow {
  uint4 pack[kPacks];
};

__device__ __forceinline__ uint32_t& word_of(uint4& pack, int k) {
  return k == 0 ? pack.x : k == 1 ? pack.y : k == 2 ? pack.z : pack.w;
}
__device__ __forceinline__ uint32_t word_of(const uint4& pack, int k) {
  return k == 0 ? pack.x : k == 1 ? pack.y : k == 2 ? pack.z : pack.w;
}

// Whole rows: a pack is 16 contiguous bytes. Others are accessed element by element, so that a warp's accesses are
// contiguous whatever the alignment of the row.
template <DType kType, int kGroup>
struct Columns {
  static constexpr int kSize = Pack<kType>::kSize;
  // 32 bits are enough for a row that fits registers, and take half as many registers.
  using Index = std::conditional_t<kGroup == kLongRow, int64_t, int32_t>;
  Index size;
  int32_t thread;
  bool whole;

  __device__ __forceinline__ Columns(int64_t row_size, bool is_whole)
      : size(static_cast<Index>(row_size)),
        thread(static_cast<int>(threadIdx.x) % row_threads(kGroup)),
        whole(is_whole) {}
  // Column of element k of pack `number`.
  __device__ __forceinline__ Index at(int64_t number, int k) const {
    constexpr Index kThreadsOfRow = row_threads(kGroup);
    const auto pack = static_cast<Index>(number);
    return whole ? (pack * kThreadsOfRow + thread) * kSize + k : (pack * kSize + k) * kThreadsOfRow + thread;
  }
  __device__ __forceinline__ bool exists(int64_t pack, int k) const { return at(pack, k) < size; }
  // The same columns, recomputed: kept from row to row, they would fill the registers.
  __device__ __forceinline__ Columns anew() const {
    Columns columns = *this;
#if defined(__CUDA_ARCH__)
    asm volatile("" : "+r"(columns.thread));
#endif
    return columns;
  }
};

// Calls body(first) with the index of the first pack, once for a row that is held; for a long row, once per group of
// packs.
template <int kGroup, DType kType, class Body>
__device__ __forceinline__ void for_each_pack(int64_t size, Body body) {
  if constexpr (kGroup == kLongRow) {
    constexpr int64_t kStride = int64_t{kLongThreads} * Pack<kType>::kSize;
    for (int64_t pack = 0; pack * kStride < size; ++pack) body(pack);
  } else {
    body(int64_t{0});
  }
}

template <DType kType>
__device__ __forceinline__ void* row_at(void* base, int64_t begin) {
  return static_cast<char*>(base) + begin * bytes_of(kType);
}

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
    static_cast<uint16_t*>(base)[i] = float_to_bits16(value, type);
}

// Loads the packs from `first` on of the row at `begin`; zero past the end. `type` is the stored dtype: both 16-bit
// dtypes share the kernels compiled for kBFloat16, and a kernel for kFloat32 may add 16-bit rows.
template <DType kType, int kGroup, int kPacks>
__device__ __forceinline__ void fetch(RawRow<kType, kPacks>& out, const Columns<kType, kGroup>& known, const void* base,
                                      DType type, int64_t begin, int64_t first, bool row_exists) {
  const Columns<kType, kGroup> columns = known.anew();
  constexpr int kSize = Pack<kType>::kSize, kWordsOfElement = bytes_of(kType) / 4;
  const char* row = static_cast<const char*>(base) + begin * size_of(type);
#pragma unroll
  for (int p = 0; p < kPacks; ++p) {
    out.pack[p] = {0, 0, 0, 0};
    if (!row_exists) continue;
    if (columns.whole) {
      const auto column = columns.at(first + p, 0);
      if (column < columns.size) out.pack[p] = *reinterpret_cast<const uint4*>(row + column * bytes_of(kType));
      continue;
    }
#pragma unroll
    for (int k = 0; k < kSize; ++k) {
      if (!columns.exists(first + p, k)) continue;
      const auto i = columns.at(first + p, k);
      if constexpr (kWordsOfElement == 2) {
        const uint2 element = reinterpret_cast<const uint2*>(row)[i];
        word_of(out.pack[p], 2 * k) = element.x;
        word_of(out.pack[p], 2 * k + 1) = element.y;
      } else if constexpr (kWordsOfElement == 1) {
        word_of(out.pack[p], k) = type == DType::kFloat32 ? reinterpret_cast<const uint32_t*>(row)[i]
                                                          : reinterpret_cast<const uint16_t*>(row)[i];
      } else {
        word_of(out.pack[p], k / 2) |= static_cast<uint32_t>(reinterpret_cast<const uint16_t*>(row)[i])
                                       << (16 * (k % 2));
      }
    }
  }
}

template <DType kType, int kPacks>
__device__ __forceinline__ Row<kType, kPacks> numbers(const RawRow<kType, kPacks>& raw, DType type) {
  Row<kType, kPacks> out;
#pragma unroll
  for (int p = 0; p < kPacks; ++p)
#pragma unroll
    for (int k = 0; k < Pack<kType>::kSize; ++k) {
      if constexpr (kType == DType::kFloat64) {
        const uint64_t bits = word_of(raw.pack[p], 2 * k) | static_cast<uint64_t>(word_of(raw.pack[p], 2 * k + 1))
                                                                << 32;
        memcpy(&out.v[p][k], &bits, sizeof(bits));
      } else if constexpr (kType == DType::kFloat32) {
        const uint32_t bits = word_of(raw.pack[p], k);
        out.v[p][k] = type == DType::kFloat32 ? bits_float(bits) : bits16_to_float(bits, type);
      } else {
        out.v[p][k] = bits16_to_float((word_of(raw.pack[p], k / 2) >> (16 * (k % 2))) & 0xffffu, type);
      }
    }
  return out;
}

// Stores the packs from `first` on into the row at `row`.
template <DType kType, int kGroup, int kPacks>
__device__ __forceinline__ void put(const Row<kType, kPacks>& value, const Columns<kType, kGroup>& known, void* row,
                                    int64_t first, DType type) {
  const Columns<kType, kGroup> columns = known.anew();
  using S = typename Pack<kType>::S;
  constexpr int kSize = Pack<kType>::kSize;
#pragma unroll
  for (int p = 0; p < kPacks; ++p) {
    if (columns.whole) {
      const auto column = columns.at(first + p, 0);
      if (column >= columns.size) continue;
      uint4 bytes = {0, 0, 0, 0};
#pragma unroll
      for (int k = 0; k < kSize; ++k) {
        if constexpr (kType == DType::kFloat64) {
          uint64_t bits;
          memcpy(&bits, &value.v[p][k], sizeof(bits));
          word_of(bytes, 2 * k) = static_cast<uint32_t>(bits);
          word_of(bytes, 2 * k + 1) = static_cast<uint32_t>(bits >> 32);
        } else if constexpr (kType == DType::kFloat32) {
          word_of(bytes, k) = float_bits(value.v[p][k]);
        } else {
          word_of(bytes, k / 2) |= static_cast<uint32_t>(float_to_bits16(value.v[p][k], type)) << (16 * (k % 2));
        }
      }
      *reinterpret_cast<uint4*>(row_at<kType>(row, column)) = bytes;
      continue;
    }
#pragma unroll
    for (int k = 0; k < kSize; ++k)
      if (columns.exists(first + p, k)) store_one<S>(row, type, columns.at(first + p, k), value.v[p][k]);
  }
}

// Weight or bias in accumulators; `absent` if there is none.
template <DType kType, int kPacks, int kGroup>
__device__ __forceinline__ Row<kType, kPacks> parameters(const void* base, DType type,
                                                         const Columns<kType, kGroup>& columns, int64_t first,
                                                         typename Pack<kType>::S absent) {
  using S = typename Pack<kType>::S;
  constexpr int kSize = Pack<kType>::kSize;
  const bool in_fours = kSize >= 4 && type == DType::kFloat32 && columns.whole && is_aligned(base, 16);
  Row<kType, kPacks> out;
#pragma unroll
  for (int p = 0; p < kPacks; ++p)
#pragma unroll
    for (int k = 0; k < kSize; ++k) {
      const auto column = columns.at(first + p, k);
      if (base == nullptr || column >= columns.size) {
        out.v[p][k] = absent;
      } else if (!in_fours) {
        out.v[p][k] = load_one<S>(base, type, column);
      } else if (k % 4 == 0) {
        const float4 four = *reinterpret_cast<const float4*>(static_cast<const float*>(base) + column);
        const float v[4] = {four.x, four.y, four.z, four.w};
#pragma unroll
        for (int j = 0; j < 4 && k + j < kSize; ++j) out.v[p][k + j] = v[j];
      }
    }
  return out;
}

// Stores accumulators in their columns.
template <DType kType, int kPacks, int kGroup>
__device__ __forceinline__ void put_accumulator(const Row<kType, kPacks>& value, const Columns<kType, kGroup>& columns,
                                                typename Pack<kType>::S* row, int64_t first) {
#pragma unroll
  for (int p = 0; p < kPacks; ++p)
#pragma unroll
    for (int k = 0; k < Pack<kType>::kSize; ++k)
      if (columns.exists(first + p, k)) row[columns.at(first + p, k)] = value.v[p][k];
}

// Sums of a row too long for registers. In shared memory the accesses of a warp are contiguous, to avoid bank
// conflicts; in global memory the sums are in column order.
template <DType kType, int kGroup>
struct LongSums {
  using S = typename Pack<kType>::S;
  static constexpr int kSize = Pack<kType>::kSize;
  const Columns<kType, kGroup>& columns;
  S* base;
  bool is_shared;

  __device__ __forceinline__ S* at(int64_t pack, int k) const {
    return base + (is_shared ? (pack * kSize + k) * kLongThreads + columns.thread : columns.at(pack, k));
  }
  __device__ __forceinline__ Row<kType, 1> take(int64_t pack) const {
    Row<kType, 1> out = {};
#pragma unroll
    for (int k = 0; k < kSize; ++k)
      if (columns.exists(pack, k)) out.v[0][k] = *at(pack, k);
    return out;
  }
  __device__ __forceinline__ void put(int64_t pack, const Row<kType, 1>& value) const {
#pragma unroll
    for (int k = 0; k < kSize; ++k)
      if (columns.exists(pack, k)) *at(pack, k) = value.v[0][k];
  }
};

// Elements for one row of sums in shared memory.
__host__ __device__ constexpr int64_t long_sums_places(DType type, int64_t size) {
  const int64_t stride = int64_t{kLongThreads} * (16 / bytes_of(type));
  return (size + stride - 1) / stride * stride;
}

// A value after a round trip through its stored dtype.
template <DType kType>
__device__ __forceinline__ typename Pack<kType>::S rounded(typename Pack<kType>::S value, DType type) {
  if constexpr (bytes_of(kType) == 2)
    return bits16_to_float(float_to_bits16(value, type), type);
  else
    return value;
}

template <class S>
__device__ __forceinline__ S survive(const Dropout& dropout, int64_t place, S value) {
  const uint64_t at = static_cast<uint64_t>(place);
  const uint32_t bits = dropout_bits(dropout.key, static_cast<uint32_t>(at), static_cast<uint32_t>(at >> 32));
  return bits < dropout.keep_below ? value * static_cast<S>(dropout.scale) : S(0);
}

template <DType kType, int kPacks>
__device__ __forceinline__ typename Pack<kType>::S sum_of(const Row<kType, kPacks>& row) {
  typename Pack<kType>::S sum(0);
#pragma unroll
  for (int p = 0; p < kPacks; ++p)
#pragma unroll
    for (int k = 0; k < Pack<kType>::kSize; ++k) sum += row.v[p][k];
  return sum;
}

// Sums over the group of a row, in a fixed order; every thread gets them, and every thread of the block must call this.
template <int kGroup, class S>
__device__ __forceinline__ void group_sum(S& a, S& b) {
  constexpr int kThreadsOfRow = row_threads(kGroup), kInWarp = kThreadsOfRow < 32 ? kThreadsOfRow : 32;
#pragma unroll
  for (int offset = kInWarp / 2; offset > 0; offset /= 2) {
    a += __shfl_xor_sync(0xffffffffu, a, offset);
    b += __shfl_xor_sync(0xffffffffu, b, offset);
  }
  if constexpr (kThreadsOfRow > 32) {
    constexpr int kWarps = kThreadsOfRow / 32;
    __shared__ S parts[2][kWarps];
    __syncthreads();  // the sums before these may still be read
    if (threadIdx.x % 32 == 0) {
      parts[0][threadIdx.x / 32] = a;
      parts[1][threadIdx.x / 32] = b;
    }
    __syncthreads();
    const int lane = threadIdx.x % 32;
    a = lane < kWarps ? parts[0][lane] : S(0);
    b = lane < kWarps ? parts[1][lane] : S(0);
#pragma unroll
    for (int offset = 16; offset > 0; offset /= 2) {
      a += __shfl_xor_sync(0xffffffffu, a, offset);
      b += __shfl_xor_sync(0xffffffffu, b, offset);
    }
  }
}

// Adds the sums of all groups of a block into one part: first over the groups of a warp, then over the warps.
template <DType kType, int kGroup, int kPacks>
__device__ __forceinline__ void add_over_block(Row<kType, kPacks>& to_weight, Row<kType, kPacks>& to_bias,
                                               const Columns<kType, kGroup>& columns, typename Pack<kType>::S* part) {
  using S = typename Pack<kType>::S;
  __shared__ S sums[2][kGroup * kHeld];
#pragma unroll
  for (int p = 0; p < kPacks; ++p)
#pragma unroll
    for (int k = 0; k < Pack<kType>::kSize; ++k)
#pragma unroll
      for (int offset = kGroup; offset < 32; offset *= 2) {
        to_weight.v[p][k] += __shfl_xor_sync(0xffffffffu, to_weight.v[p][k], offset);
        to_bias.v[p][k] += __shfl_xor_sync(0xffffffffu, to_bias.v[p][k], offset);
      }
  for (int warp = 0; warp < kShortThreads / 32; ++warp) {
    if (static_cast<int>(threadIdx.x / 32) == warp && threadIdx.x % 32 < kGroup) {
#pragma unroll
      for (int p = 0; p < kPacks; ++p)
#pragma unroll
        for (int k = 0; k < Pack<kType>::kSize; ++k) {
          if (!columns.exists(p, k)) continue;
          const auto i = columns.at(p, k);
          sums[0][i] = warp == 0 ? to_weight.v[p][k] : sums[0][i] + to_weight.v[p][k];
          sums[1][i] = warp == 0 ? to_bias.v[p][k] : sums[1][i] + to_bias.v[p][k];
        }
    }
    __syncthreads();
  }
  for (int64_t i = threadIdx.x; i < columns.size; i += kShortThreads) {
    part[i] = sums[0][i];
    part[columns.size + i] = sums[1][i];
  }
}

// The dynamic shared memory of the block.
__device__ __forceinline__ void* dynamic_shared() {
#if defined(__CUDACC__)
  extern __shared__ uint4 memory[];
  return memory;
#else
  return emulation::dynamic_shared();
#endif
}

}  // namespace optkit

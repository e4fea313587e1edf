// SPDX-License-Identifier: Apache-2.0
// Shared by the row kernels: a walk over a row without a partial last vector, sums over lanes, and the residual
// addition.
#pragma once

#include "cpu/access.h"
#include "norms/tables.h"

namespace optkit {
namespace OPTKIT_ISA {

template <DType kType>
struct AccumulatorOf {
  using type = float;
};
template <>
struct AccumulatorOf<DType::kFloat64> {
  using type = double;
};
template <DType kType>
using accumulator_t = typename AccumulatorOf<kType>::type;

OPTKIT_HD const void* at(const void* base, DType type, int64_t i) {
  return static_cast<const char*>(base) + i * size_of(type);
}
OPTKIT_HD void* at(void* base, DType type, int64_t i) { return static_cast<char*>(base) + i * size_of(type); }

template <class S>
OPTKIT_HD Vec<S> load_accumulator(const void* base, int64_t i) {
  return read<false, typename Vec<S>::Native, S>(base, i, Vec<S>::kLanes);
}
template <class S>
OPTKIT_HD void store_accumulator(void* base, int64_t i, Vec<S> value) {
  write<false, S>(base, i, Vec<S>::kLanes, value.v);
}

// Sum of the lanes as a tree: for a short row, the sequential sum_of_lanes would cost more than the row.
OPTKIT_HD float tree_sum(Vec<float> a) {
#if defined(__AVX512F__)
  return _mm512_reduce_add_ps(a.v);
#elif defined(__AVX2__)
  __m128 half = _mm_add_ps(_mm256_castps256_ps128(a.v), _mm256_extractf128_ps(a.v, 1));
  half = _mm_add_ps(half, _mm_movehl_ps(half, half));
  return _mm_cvtss_f32(_mm_add_ss(half, _mm_movehdup_ps(half)));
#else
  static_assert(Vec<float>::kLanes == 4, "four lanes");
  return (a.v[0] + a.v[2]) + (a.v[1] + a.v[3]);
#endif
}
OPTKIT_HD double tree_sum(Vec<double> a) {
#if defined(__AVX512F__)
  return _mm512_reduce_add_pd(a.v);
#else
  double sum = 0.0;
  for (int i = 0; i < Vec<double>::kLanes; ++i) sum += a.v[i];
  return sum;
#endif
}

// Lanes from `first` on.
template <class S>
OPTKIT_HD Mask<S> lanes_from(int first) {
  typename NativeOf<S>::mask lane;
  for (int k = 0; k < Vec<S>::kLanes; ++k) lane[k] = k;
  using Int = decltype(lane[0] + 0);
  return {lane >= static_cast<Int>(first)};
}

// Results of at least this many bytes use streaming stores: they would not stay in the cache, and reading the old lines
// first costs a third of the traffic. Narrow rows are compute-bound and gain nothing.
constexpr int64_t kStreamFrom = int64_t{1} << 23;

template <DType kType>
OPTKIT_HD bool streams(const void* to, int64_t rows, int64_t size) {
#if defined(__x86_64__)
  constexpr int64_t kBytes = OPTKIT_VECTOR_BYTES;
  const int64_t row_bytes = size * size_of(kType);
  return size_of(kType) >= 4 && rows * row_bytes >= kStreamFrom && row_bytes % kBytes == 0 &&
         reinterpret_cast<uintptr_t>(to) % kBytes == 0;
#else
  (void)to, (void)rows, (void)size;
  return false;
#endif
}

// Makes streamed stores visible before another thread reads them.
OPTKIT_HD void end_stream(bool streamed) {
#if defined(__x86_64__)
  if (streamed) _mm_sfence();
#else
  (void)streamed;
#endif
}

template <class N>
OPTKIT_HD void stream(void* to, N native) {
#if defined(__AVX512F__)
  _mm512_stream_si512(static_cast<__m512i*>(to), reinterpret_cast<__m512i>(native));
#elif defined(__AVX2__)
  _mm256_stream_si256(static_cast<__m256i*>(to), reinterpret_cast<__m256i>(native));
#elif defined(__x86_64__)
  _mm_stream_si128(static_cast<__m128i*>(to), reinterpret_cast<__m128i>(native));
#else
  std::memcpy(to, &native, sizeof(N));
#endif
}

// Stores a vector of results. bfloat16 is rounded without a NaN check: a NaN that comes from arithmetic or from
// bfloat16 has zeros in the bits that rounding adds to, so it is unchanged.
template <DType kType>
OPTKIT_HD void put(void* base, int64_t i, Vec<accumulator_t<kType>> value, bool streamed) {
  if constexpr (kType == DType::kBFloat16) {
    const NativeBits bits = reinterpret_cast<NativeBits>(value.v);
    const NativeHalf half = upper_halves(bits + (((bits >> 16) & 1u) + 0x7fffu));
    write<false, uint16_t>(base, i, kFloatLanes, half);
  } else if (kType != DType::kFloat16 && streamed) {
    stream(at(base, kType, i), value.v);
  } else {
    store<accumulator_t<kType>, false>(base, kType, i, Vec<accumulator_t<kType>>::kLanes, value);
  }
}

struct AllLanes {};
template <class S>
OPTKIT_HD Vec<S> keep(AllLanes, Vec<S> a) {
  return a;
}
template <class S>
OPTKIT_HD Vec<S> keep(Mask<S> mask, Vec<S> a) {
  return select(mask, a, Vec<S>(S(0)));
}

OPTKIT_HD constexpr bool is_whole(AllLanes) { return true; }
template <class S>
OPTKIT_HD constexpr bool is_whole(Mask<S>) {
  return false;
}

// Calls body(i, k, lanes) for the vectors of a row of n >= kLanes; k in [0, 4) names an accumulator. The last vector
// overlaps the previous one instead of being partial: `lanes` then masks the elements already seen, which sums must
// leave out (`keep`) and stores may write again.
template <class S, class Body>
OPTKIT_HD void walk_row(int64_t n, Body body) {
  constexpr int kLanes = Vec<S>::kLanes;
  int64_t i = 0;
  for (; i + 4 * kLanes <= n; i += 4 * kLanes) {
    body(i, 0, AllLanes());
    body(i + kLanes, 1, AllLanes());
    body(i + 2 * kLanes, 2, AllLanes());
    body(i + 3 * kLanes, 3, AllLanes());
  }
  for (; i + kLanes <= n; i += kLanes) body(i, 0, AllLanes());
  if (i < n) body(n - kLanes, 1, lanes_from<S>(static_cast<int>(kLanes - (n - i))));
}

template <class S>
struct Accumulators {
  Vec<S> part[4] = {Vec<S>(S(0)), Vec<S>(S(0)), Vec<S>(S(0)), Vec<S>(S(0))};
  OPTKIT_HD S total() const { return tree_sum((part[0] + part[1]) + (part[2] + part[3])); }
};

#define OPTKIT_INLINE __attribute__((always_inline))

// Cache level to prefetch a row into. From memory, the second level allows more outstanding requests and leaves the
// first to the rows in use; from the second level, only the first helps.
constexpr int kSecondLevel = 2, kFirstLevel = 3;
constexpr int64_t kFarFrom = int64_t{1} << 22;  // bytes of rows that exceed any L2 cache

// Prefetches the cache line at `address` if `k`, the index of the vector among four, is the first one in it.
template <DType kType, int kLevel>
OPTKIT_HD void prefetch(const void* address, int k) {
  constexpr int kVectors = 64 / (Vec<accumulator_t<kType>>::kLanes * size_of(kType));
  if (k % kVectors == 0) __builtin_prefetch(address, 0, kLevel);
}

// The dropout scale where the element at `place` and its successors are kept; 0 elsewhere.
OPTKIT_HD Vec<float> survival(const Dropout& dropout, int64_t place, Vec<float>) {
  NativeBits lane;
  for (int k = 0; k < kFloatLanes; ++k) lane[k] = k;
  const uint32_t first = static_cast<uint32_t>(place);
  const NativeBits low = lane + first;
  const NativeBits carry = reinterpret_cast<NativeBits>(low < (NativeBits{} + first)) & 1u;
  const NativeBits high = carry + static_cast<uint32_t>(static_cast<uint64_t>(place) >> 32);
  const NativeBits bits = dropout_bits(dropout.key, low, high);
  const Mask<float> lives = {reinterpret_cast<NativeOf<float>::mask>(bits < (NativeBits{} + dropout.keep_below))};
  return select(lives, Vec<float>(dropout.scale), Vec<float>(0.0f));
}
OPTKIT_HD Vec<double> survival(const Dropout& dropout, int64_t place, Vec<double>) {
  Vec<double> out(0.0);
  for (int k = 0; k < Vec<double>::kLanes; ++k) {
    const uint64_t here = static_cast<uint64_t>(place) + k;
    const uint32_t bits = dropout_bits(dropout.key, static_cast<uint32_t>(here), static_cast<uint32_t>(here >> 32));
    out.v[k] = bits < dropout.keep_below ? static_cast<double>(dropout.scale) : 0.0;
  }
  return out;
}

template <DType kType, bool kTail>
OPTKIT_HD void add_vector(const NormForward& a, int64_t place, const void* x, int64_t i, int count) {
  using S = accumulator_t<kType>;
  Vec<S> value = load<S, kTail>(x, a.x_type, i, count);
  // A select, since a dropped infinity times 0 would be NaN.
  if (a.dropout.on) {
    const Vec<S> alive = survival(a.dropout, place + i, Vec<S>());
    value = select(Vec<S>(S(0)) < alive, value * alive, Vec<S>(S(0)));
  }
  value = value + load<S, kTail>(a.residual, a.residual_type, place + i, count);
  store<S, kTail>(a.sum, kType, place + i, count, value);
}

// sum = dropout(x) + residual for `count` elements from `place` on.
template <DType kType>
OPTKIT_HD void add_residual(const NormForward& a, int64_t place, const void* x, int64_t count) {
  constexpr int kLanes = Vec<accumulator_t<kType>>::kLanes;
  int64_t i = 0;
  for (; i + kLanes <= count; i += kLanes) add_vector<kType, false>(a, place, x, i, kLanes);
  if (i == count) return;
  if (count >= kLanes)
    add_vector<kType, false>(a, place, x, count - kLanes, kLanes);
  else
    add_vector<kType, true>(a, place, x, i, static_cast<int>(count - i));
}

}  // namespace OPTKIT_ISA
}  // namespace optkit

// SPDX-License-Identifier: Apache-2.0
// The vector type that update rules run on: as many lanes as one register of the instruction set this file is compiled
// for. GCC vector extensions do the arithmetic; intrinsics are used only where they cannot express an operation (fma,
// sqrt, half).
#pragma once

#include <cstdint>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

#include "core/math.h"

#if defined(__AVX512F__)
#define OPTKIT_VECTOR_BYTES 64
#elif defined(__AVX2__)
#define OPTKIT_VECTOR_BYTES 32
#else
#define OPTKIT_VECTOR_BYTES 16
#endif

namespace optkit {
namespace OPTKIT_ISA {

template <class S>
struct NativeOf;
template <>
struct NativeOf<float> {
  typedef float type __attribute__((vector_size(OPTKIT_VECTOR_BYTES)));
  typedef int32_t mask __attribute__((vector_size(OPTKIT_VECTOR_BYTES)));
};
template <>
struct NativeOf<double> {
  typedef double type __attribute__((vector_size(OPTKIT_VECTOR_BYTES)));
  typedef int64_t mask __attribute__((vector_size(OPTKIT_VECTOR_BYTES)));
};
typedef uint32_t NativeBits __attribute__((vector_size(OPTKIT_VECTOR_BYTES)));

template <class S>
struct Vec {
  using Native = typename NativeOf<S>::type;
  static constexpr int kLanes = OPTKIT_VECTOR_BYTES / sizeof(S);
  Native v;

  Vec() = default;
  OPTKIT_HD Vec(Native native) : v(native) {}
  OPTKIT_HD explicit Vec(S scalar) : v(scalar - Native{}) {}
};

template <class S>
struct Mask {
  typename NativeOf<S>::mask m;
};

#define OPTKIT_VECTOR_OPERATOR(op)                   \
  template <class S>                                 \
  OPTKIT_HD Vec<S> operator op(Vec<S> a, Vec<S> b) { \
    return a.v op b.v;                               \
  }                                                  \
  template <class S>                                 \
  OPTKIT_HD Vec<S> operator op(Vec<S> a, S b) {      \
    return a.v op b;                                 \
  }
OPTKIT_VECTOR_OPERATOR(+)
OPTKIT_VECTOR_OPERATOR(-)
OPTKIT_VECTOR_OPERATOR(*)
OPTKIT_VECTOR_OPERATOR(/)
#undef OPTKIT_VECTOR_OPERATOR

#define OPTKIT_VECTOR_COMPARISON(op)                  \
  template <class S>                                  \
  OPTKIT_HD Mask<S> operator op(Vec<S> a, Vec<S> b) { \
    return {a.v op b.v};                              \
  }
OPTKIT_VECTOR_COMPARISON(<)
OPTKIT_VECTOR_COMPARISON(==)
OPTKIT_VECTOR_COMPARISON(!=)
#undef OPTKIT_VECTOR_COMPARISON

template <class S>
OPTKIT_HD Mask<S> operator&(Mask<S> a, Mask<S> b) {
  return {a.m & b.m};
}
template <class S>
OPTKIT_HD Vec<S> select(Mask<S> condition, Vec<S> a, Vec<S> b) {
  return condition.m ? a.v : b.v;
}

OPTKIT_HD Vec<float> fma(Vec<float> a, Vec<float> b, Vec<float> c) {
#if defined(__AVX512F__)
  return NativeOf<float>::type(_mm512_fmadd_ps(a.v, b.v, c.v));
#elif defined(__FMA__)
  return NativeOf<float>::type(_mm256_fmadd_ps(a.v, b.v, c.v));
#else
  return a.v * b.v + c.v;  // no hardware fma: two roundings, as in torch's own baseline kernels
#endif
}
OPTKIT_HD Vec<double> fma(Vec<double> a, Vec<double> b, Vec<double> c) {
#if defined(__AVX512F__)
  return NativeOf<double>::type(_mm512_fmadd_pd(a.v, b.v, c.v));
#elif defined(__FMA__)
  return NativeOf<double>::type(_mm256_fmadd_pd(a.v, b.v, c.v));
#else
  return a.v * b.v + c.v;
#endif
}

template <class S>
OPTKIT_HD Vec<S> sqrt(Vec<S> a) {
#if defined(__AVX512F__)
  if constexpr (sizeof(S) == 4)
    return typename Vec<S>::Native(_mm512_sqrt_ps(a.v));
  else
    return typename Vec<S>::Native(_mm512_sqrt_pd(a.v));
#elif defined(__AVX2__)
  if constexpr (sizeof(S) == 4)
    return typename Vec<S>::Native(_mm256_sqrt_ps(a.v));
  else
    return typename Vec<S>::Native(_mm256_sqrt_pd(a.v));
#elif defined(__x86_64__)
  if constexpr (sizeof(S) == 4)
    return typename Vec<S>::Native(_mm_sqrt_ps(a.v));
  else
    return typename Vec<S>::Native(_mm_sqrt_pd(a.v));
#else
  for (int i = 0; i < Vec<S>::kLanes; ++i) a.v[i] = optkit::sqrt(a.v[i]);
  return a;
#endif
}

template <class S>
OPTKIT_HD Vec<S> abs(Vec<S> a) {
  using Bits = typename NativeOf<S>::mask;
  using Int = decltype(Bits{}[0] + 0);
  const Int all_but_sign = sizeof(S) == 4 ? static_cast<Int>(INT32_MAX) : static_cast<Int>(INT64_MAX);
  return reinterpret_cast<typename Vec<S>::Native>(reinterpret_cast<Bits>(a.v) & all_but_sign);
}

// The first `count` lanes of a; zero in the other lanes.
template <class S>
OPTKIT_HD Vec<S> first_lanes(Vec<S> a, int count) {
  typename NativeOf<S>::mask lane{};
  for (int i = 0; i < Vec<S>::kLanes; ++i) lane[i] = i;
  return lane < count ? a.v : typename Vec<S>::Native{};
}

// Sum of the lanes, in lane order.
template <class S>
OPTKIT_HD double sum_of_lanes(Vec<S> a) {
  double sum = 0.0;
  for (int i = 0; i < Vec<S>::kLanes; ++i) sum += static_cast<double>(a.v[i]);
  return sum;
}

// The lower or the upper half of the lanes, in double.
template <bool kUpper>
OPTKIT_HD Vec<double> widened(Vec<float> a) {
#if defined(__AVX512F__)
  const __m256d half = _mm512_extractf64x4_pd(reinterpret_cast<__m512d>(a.v), kUpper);
  return NativeOf<double>::type(_mm512_cvtps_pd(reinterpret_cast<__m256>(half)));
#elif defined(__AVX2__)
  return NativeOf<double>::type(_mm256_cvtps_pd(_mm256_extractf128_ps(a.v, kUpper)));
#elif defined(__x86_64__)
  return NativeOf<double>::type(_mm_cvtps_pd(kUpper ? _mm_movehl_ps(a.v, a.v) : __m128(a.v)));
#else
  constexpr int kHalf = Vec<double>::kLanes;
  Vec<double> half;
  for (int i = 0; i < kHalf; ++i) half.v[i] = static_cast<double>(a.v[i + kUpper * kHalf]);
  return half;
#endif
}

// A lane-wise sum of products in double: the square of an fp32 number may overflow fp32.
template <class S>
class LaneTotal {
 public:
  OPTKIT_HD LaneTotal() {
    for (Vec<double>& part : sum_) part = Vec<double>(0.0);
  }
  OPTKIT_HD void add(Vec<S> a, Vec<S> b) {
    if constexpr (sizeof(S) == 8) {
      sum_[0] = fma(a, b, sum_[0]);
    } else {
      sum_[0] = fma(widened<false>(a), widened<false>(b), sum_[0]);
      sum_[1] = fma(widened<true>(a), widened<true>(b), sum_[1]);
    }
  }
  OPTKIT_HD double total() const {
    double sum = 0.0;
    for (const Vec<double>& part : sum_) sum += sum_of_lanes(part);
    return sum;
  }

 private:
  static constexpr int kHalves = sizeof(double) / sizeof(S);
  Vec<double> sum_[kHalves];
};

// Counts set lanes, lane by lane (a set lane is -1). A chunk is too short to overflow the counter.
template <class S>
class LaneCounter {
 public:
  OPTKIT_HD void add(Mask<S> mask) { count_ -= mask.m; }
  OPTKIT_HD double total() const {
    double sum = 0.0;
    for (int i = 0; i < Vec<S>::kLanes; ++i) sum += static_cast<double>(count_[i]);
    return sum;
  }

 private:
  typename NativeOf<S>::mask count_{};
};

}  // namespace OPTKIT_ISA

template <class S>
struct scalar_of<OPTKIT_ISA::Vec<S>> {
  using type = S;
};

}  // namespace optkit

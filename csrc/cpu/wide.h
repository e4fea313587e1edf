// SPDX-License-Identifier: Apache-2.0
// Several vectors at once: what the loop over parameters works on. A stage that is switched off, or the dtype of a
// stream, then costs one branch for all of them, and their square roots and divisions run side by side.
#pragma once

#include "cpu/access.h"
#include "cpu/vector.h"

namespace optkit {
namespace OPTKIT_ISA {

// Two: four spill registers and were slower (docs/performance.md). fp64 is there for its precision: one.
template <class S>
constexpr int kParts = sizeof(S) == 8 ? 1 : 2;

// Runs BODY for part k of a wide value; unrolled, so that the parts live in registers.
#define OPTKIT_FOR_PARTS(BODY) _Pragma("GCC unroll 8") for (int k = 0; k < kParts<S>; ++k) BODY

template <class S>
struct Wide {
  static constexpr int kLanes = kParts<S> * Vec<S>::kLanes;
  Vec<S> part[kParts<S>];

  Wide() = default;
  OPTKIT_HD explicit Wide(S scalar) { OPTKIT_FOR_PARTS(part[k] = Vec<S>(scalar);) }
};

template <class S>
struct WideMask {
  Mask<S> part[kParts<S>];
};

#define OPTKIT_WIDE_OPERATOR(op)                               \
  template <class S>                                           \
  OPTKIT_HD Wide<S> operator op(Wide<S> a, const Wide<S>& b) { \
    OPTKIT_FOR_PARTS(a.part[k] = a.part[k] op b.part[k];)      \
    return a;                                                  \
  }                                                            \
  template <class S>                                           \
  OPTKIT_HD Wide<S> operator op(Wide<S> a, S b) {              \
    OPTKIT_FOR_PARTS(a.part[k] = a.part[k] op b;)              \
    return a;                                                  \
  }
OPTKIT_WIDE_OPERATOR(+)
OPTKIT_WIDE_OPERATOR(-)
OPTKIT_WIDE_OPERATOR(*)
OPTKIT_WIDE_OPERATOR(/)
#undef OPTKIT_WIDE_OPERATOR

#define OPTKIT_WIDE_COMPARISON(op)                                        \
  template <class S>                                                      \
  OPTKIT_HD WideMask<S> operator op(const Wide<S>& a, const Wide<S>& b) { \
    WideMask<S> mask;                                                     \
    OPTKIT_FOR_PARTS(mask.part[k] = a.part[k] op b.part[k];)              \
    return mask;                                                          \
  }
OPTKIT_WIDE_COMPARISON(<)
OPTKIT_WIDE_COMPARISON(==)
OPTKIT_WIDE_COMPARISON(!=)
#undef OPTKIT_WIDE_COMPARISON

template <class S>
OPTKIT_HD WideMask<S> operator&(WideMask<S> a, const WideMask<S>& b) {
  OPTKIT_FOR_PARTS(a.part[k] = a.part[k] & b.part[k];)
  return a;
}
template <class S>
OPTKIT_HD Wide<S> select(const WideMask<S>& condition, Wide<S> a, const Wide<S>& b) {
  OPTKIT_FOR_PARTS(a.part[k] = select(condition.part[k], a.part[k], b.part[k]);)
  return a;
}
template <class S>
OPTKIT_HD Wide<S> fma(Wide<S> a, const Wide<S>& b, const Wide<S>& c) {
  OPTKIT_FOR_PARTS(a.part[k] = fma(a.part[k], b.part[k], c.part[k]);)
  return a;
}
template <class S>
OPTKIT_HD Wide<S> sqrt(Wide<S> a) {
  OPTKIT_FOR_PARTS(a.part[k] = sqrt(a.part[k]);)
  return a;
}
template <class S>
OPTKIT_HD Wide<S> abs(Wide<S> a) {
  OPTKIT_FOR_PARTS(a.part[k] = abs(a.part[k]);)
  return a;
}

// The first `count` lanes of a; zero in the others.
template <class S>
OPTKIT_HD Wide<S> first_lanes(Wide<S> a, int count) {
  OPTKIT_FOR_PARTS(a.part[k] = first_lanes(a.part[k], count - k * Vec<S>::kLanes);)
  return a;
}

template <class S>
class WideTotal {
 public:
  OPTKIT_HD void add(const Wide<S>& a, const Wide<S>& b) { OPTKIT_FOR_PARTS(total_.add(a.part[k], b.part[k]);) }
  OPTKIT_HD double total() const { return total_.total(); }

 private:
  LaneTotal<S> total_;
};

template <class S>
class WideCounter {
 public:
  OPTKIT_HD void add(const WideMask<S>& mask) { OPTKIT_FOR_PARTS(counter_.add(mask.part[k]);) }
  OPTKIT_HD double total() const { return counter_.total(); }

 private:
  LaneCounter<S> counter_;
};

template <DType kType, class S>
OPTKIT_HD Wide<S> load_as(const void* base, int64_t i) {
  Wide<S> a;
  OPTKIT_FOR_PARTS(a.part[k] = (load<S, false>(base, kType, i + k * Vec<S>::kLanes, Vec<S>::kLanes));)
  return a;
}
template <DType kType, class S>
OPTKIT_HD Wide<S> store_as(void* base, int64_t i, Wide<S> a) {
  OPTKIT_FOR_PARTS(a.part[k] = (store<S, false>(base, kType, i + k * Vec<S>::kLanes, Vec<S>::kLanes, a.part[k]));)
  return a;
}

// Elements [i, i + kLanes).
template <class S>
OPTKIT_HD Wide<S> load_wide(const void* base, DType type, int64_t i) {
  if constexpr (sizeof(S) == 8) return load_as<DType::kFloat64, S>(base, i);
  if (__builtin_expect(type == DType::kFloat32, 1)) return load_as<DType::kFloat32, S>(base, i);
  return type == DType::kBFloat16 ? load_as<DType::kBFloat16, S>(base, i) : load_as<DType::kFloat16, S>(base, i);
}

// Stores, rounding to nearest, and returns what the stored numbers now are.
template <class S>
OPTKIT_HD Wide<S> store_wide(void* base, DType type, int64_t i, const Wide<S>& a) {
  if constexpr (sizeof(S) == 8) return store_as<DType::kFloat64>(base, i, a);
  if (__builtin_expect(type == DType::kFloat32, 1)) return store_as<DType::kFloat32>(base, i, a);
  return type == DType::kBFloat16 ? store_as<DType::kBFloat16>(base, i, a) : store_as<DType::kFloat16>(base, i, a);
}

// Stores 16-bit numbers by stochastic rounding, and returns what was stored.
OPTKIT_HD Wide<float> store_wide_stochastic(void* base, DType type, int64_t i, Wide<float> a, RandomKey key) {
  using S = float;
  OPTKIT_FOR_PARTS(a.part[k] = store_stochastic<false>(base, type, i + k * kFloatLanes, kFloatLanes, a.part[k], key);)
  return a;
}

}  // namespace OPTKIT_ISA

template <class S>
struct scalar_of<OPTKIT_ISA::Wide<S>> {
  using type = S;
};

}  // namespace optkit

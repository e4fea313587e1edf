// SPDX-License-Identifier: Apache-2.0
// Several vectors at once, the unit that the loop over parameters works on. A branch on a stage or a dtype is then paid
// once for all of them, and their square roots and divisions overlap.
#pragma once

#include "cpu/access.h"
#include "cpu/vector.h"

namespace optkit {
namespace OPTKIT_ISA {

// Two: four vectors spill registers and were slower (docs/performance.md). One for fp64, which is there for precision.
template <class S>
constexpr int kParts = sizeof(S) == 8 ? 1 : 2;

// Runs BODY for part k of a VectorPair; unrolled, so that the parts stay in registers.
#define OPTKIT_FOR_PARTS(BODY) _Pragma("GCC unroll 8") for (int k = 0; k < kParts<S>; ++k) BODY

template <class S>
struct VectorPair {
  static constexpr int kLanes = kParts<S> * Vec<S>::kLanes;
  Vec<S> part[kParts<S>];

  VectorPair() = default;
  OPTKIT_HD VectorPair(Vec<S> first, Vec<S> second) : part{first, second} {}
  OPTKIT_HD explicit VectorPair(S scalar) { OPTKIT_FOR_PARTS(part[k] = Vec<S>(scalar);) }
};

template <class S>
struct PairMask {
  Mask<S> part[kParts<S>];
};

#define OPTKIT_PAIR_OPERATOR(op)                                                 \
  template <class S>                                                             \
  OPTKIT_HD VectorPair<S> operator op(VectorPair<S> a, const VectorPair<S>& b) { \
    OPTKIT_FOR_PARTS(a.part[k] = a.part[k] op b.part[k];)                        \
    return a;                                                                    \
  }                                                                              \
  template <class S>                                                             \
  OPTKIT_HD VectorPair<S> operator op(VectorPair<S> a, S b) {                    \
    OPTKIT_FOR_PARTS(a.part[k] = a.part[k] op b;)                                \
    return a;                                                                    \
  }
OPTKIT_PAIR_OPERATOR(+)
OPTKIT_PAIR_OPERATOR(-)
OPTKIT_PAIR_OPERATOR(*)
OPTKIT_PAIR_OPERATOR(/)
#undef OPTKIT_PAIR_OPERATOR

#define OPTKIT_PAIR_COMPARISON(op)                                                    \
  template <class S>                                                                  \
  OPTKIT_HD PairMask<S> operator op(const VectorPair<S>& a, const VectorPair<S>& b) { \
    PairMask<S> mask;                                                                 \
    OPTKIT_FOR_PARTS(mask.part[k] = a.part[k] op b.part[k];)                          \
    return mask;                                                                      \
  }
OPTKIT_PAIR_COMPARISON(<)
OPTKIT_PAIR_COMPARISON(==)
OPTKIT_PAIR_COMPARISON(!=)
#undef OPTKIT_PAIR_COMPARISON

template <class S>
OPTKIT_HD PairMask<S> operator&(PairMask<S> a, const PairMask<S>& b) {
  OPTKIT_FOR_PARTS(a.part[k] = a.part[k] & b.part[k];)
  return a;
}
template <class S>
OPTKIT_HD VectorPair<S> select(const PairMask<S>& condition, VectorPair<S> a, const VectorPair<S>& b) {
  OPTKIT_FOR_PARTS(a.part[k] = select(condition.part[k], a.part[k], b.part[k]);)
  return a;
}
template <class S>
OPTKIT_HD VectorPair<S> fma(VectorPair<S> a, const VectorPair<S>& b, const VectorPair<S>& c) {
  OPTKIT_FOR_PARTS(a.part[k] = fma(a.part[k], b.part[k], c.part[k]);)
  return a;
}
template <class S>
OPTKIT_HD VectorPair<S> sqrt(VectorPair<S> a) {
  OPTKIT_FOR_PARTS(a.part[k] = sqrt(a.part[k]);)
  return a;
}
template <class S>
OPTKIT_HD VectorPair<S> abs(VectorPair<S> a) {
  OPTKIT_FOR_PARTS(a.part[k] = abs(a.part[k]);)
  return a;
}

// The first `count` lanes of a; zero in the other lanes.
template <class S>
OPTKIT_HD VectorPair<S> first_lanes(VectorPair<S> a, int count) {
  OPTKIT_FOR_PARTS(a.part[k] = first_lanes(a.part[k], count - k * Vec<S>::kLanes);)
  return a;
}

template <class S>
class PairTotal {
 public:
  OPTKIT_HD void add(const VectorPair<S>& a, const VectorPair<S>& b) {
    OPTKIT_FOR_PARTS(total_.add(a.part[k], b.part[k]);)
  }
  OPTKIT_HD double total() const { return total_.total(); }

 private:
  LaneTotal<S> total_;
};

template <class S>
class PairCounter {
 public:
  OPTKIT_HD void add(const PairMask<S>& mask) { OPTKIT_FOR_PARTS(counter_.add(mask.part[k]);) }
  OPTKIT_HD double total() const { return counter_.total(); }

 private:
  LaneCounter<S> counter_;
};

template <DType kType, class S>
OPTKIT_HD VectorPair<S> load_as(const void* base, int64_t i) {
  VectorPair<S> a;
  OPTKIT_FOR_PARTS(a.part[k] = (load<S, false>(base, kType, i + k * Vec<S>::kLanes, Vec<S>::kLanes));)
  return a;
}
template <DType kType, class S>
OPTKIT_HD VectorPair<S> store_as(void* base, int64_t i, VectorPair<S> a) {
  if constexpr (kType == DType::kBFloat16) {
    const NativeBits first = rounded_to_bfloat16(a.part[0]), second = rounded_to_bfloat16(a.part[1]);
    write_upper_halves(base, i, first, second);
    return VectorPair<float>(upper_halves_as_float(first), upper_halves_as_float(second));
  } else {
    OPTKIT_FOR_PARTS(a.part[k] = (store<S, false>(base, kType, i + k * Vec<S>::kLanes, Vec<S>::kLanes, a.part[k]));)
    return a;
  }
}

// Elements [i, i + kLanes).
template <class S>
OPTKIT_HD VectorPair<S> load_pair(const void* base, DType type, int64_t i) {
  if constexpr (sizeof(S) == 8) return load_as<DType::kFloat64, S>(base, i);
  if (__builtin_expect(type == DType::kFloat32, 1)) return load_as<DType::kFloat32, S>(base, i);
  return type == DType::kBFloat16 ? load_as<DType::kBFloat16, S>(base, i) : load_as<DType::kFloat16, S>(base, i);
}

// Stores with round-to-nearest and returns the stored values.
template <class S>
OPTKIT_HD VectorPair<S> store_pair(void* base, DType type, int64_t i, const VectorPair<S>& a) {
  if constexpr (sizeof(S) == 8) {
    return store_as<DType::kFloat64>(base, i, a);
  } else {
    if (__builtin_expect(type == DType::kFloat32, 1)) return store_as<DType::kFloat32>(base, i, a);
    return type == DType::kBFloat16 ? store_as<DType::kBFloat16>(base, i, a) : store_as<DType::kFloat16>(base, i, a);
  }
}

// Random bits for the lanes of a pair of fp32 vectors.
struct PairBits {
  NativeBits part[kParts<float>];
};
OPTKIT_HD PairBits random_pair(RandomKey key, int64_t i) {
  using S = float;
  PairBits random;
  OPTKIT_FOR_PARTS(random.part[k] = random_lanes(key, i + k * kFloatLanes);)
  return random;
}
OPTKIT_HD PairBits bits_of_state(PairBits random, int state) {
  using S = float;
  OPTKIT_FOR_PARTS(random.part[k] = optkit::bits_of_state(random.part[k], state);)
  return random;
}

// Stores 16-bit numbers with stochastic rounding and returns the stored values.
OPTKIT_HD VectorPair<float> store_pair_stochastic(void* base, DType type, int64_t i, VectorPair<float> a,
                                                  const PairBits& random) {
  using S = float;
  if (type == DType::kBFloat16) {
    const NativeBits first = rounded_to_bfloat16(a.part[0], random.part[0]),
                     second = rounded_to_bfloat16(a.part[1], random.part[1]);
    write_upper_halves(base, i, first, second);
    return VectorPair<float>(upper_halves_as_float(first), upper_halves_as_float(second));
  }
  for (int k = 0; k < kParts<S>; ++k) {
    const NativeHalf half = float_to_float16(a.part[k], random.part[k]);
    write<false, uint16_t>(base, i + k * kFloatLanes, kFloatLanes, half);
    a.part[k] = float16_to_float(half);
  }
  return a;
}

}  // namespace OPTKIT_ISA

template <class S>
struct scalar_of<OPTKIT_ISA::VectorPair<S>> {
  using type = S;
};

}  // namespace optkit

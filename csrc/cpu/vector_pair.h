// SPDX-License-Identifier: Apache-2.0
// Several vectors at once, the unit that the loop over parameters works on. A branch on a stage or a dtype is then paid
// once for all of them, and their square roots and divisions overlap.
#pragma once

#include "cpu/vector.h"

namespace optkit {
namespace OPTKIT_ISA {

// Two: four vectors spill registers and were slower (docs/performance.md). One for fp64, which is there for precision.
template <class S>
constexpr int kParts = sizeof(S) == 8 ? 1 : 2;

// Runs BODY for part k of a VectorPair; unrolled, so that the parts stay in registers.
#define OPTKIT_FOR_PARTS(BODY) _Pragma("GCC unroll 8") for (int k = 0; k < kParts<S>; ++k) BODY

enum class PairKind {
  kPlain,        // the second vector continues the first
  kAlternating,  // even elements in the first vector, odd ones in the second: a 16-bit number and its neighbor are the
                 // halves of a word, and take two instructions to load and two to store
};

template <class S, PairKind kKind = PairKind::kPlain>
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

#define OPTKIT_PAIR_OPERATOR(op)                                                                      \
  template <class S, PairKind kKind>                                                                  \
  OPTKIT_HD VectorPair<S, kKind> operator op(VectorPair<S, kKind> a, const VectorPair<S, kKind>& b) { \
    OPTKIT_FOR_PARTS(a.part[k] = a.part[k] op b.part[k];)                                             \
    return a;                                                                                         \
  }                                                                                                   \
  template <class S, PairKind kKind>                                                                  \
  OPTKIT_HD VectorPair<S, kKind> operator op(VectorPair<S, kKind> a, S b) {                           \
    OPTKIT_FOR_PARTS(a.part[k] = a.part[k] op b;)                                                     \
    return a;                                                                                         \
  }
OPTKIT_PAIR_OPERATOR(+)
OPTKIT_PAIR_OPERATOR(-)
OPTKIT_PAIR_OPERATOR(*)
OPTKIT_PAIR_OPERATOR(/)
#undef OPTKIT_PAIR_OPERATOR

#define OPTKIT_PAIR_COMPARISON(op)                                                                  \
  template <class S, PairKind kKind>                                                                \
  OPTKIT_HD PairMask<S> operator op(const VectorPair<S, kKind>& a, const VectorPair<S, kKind>& b) { \
    PairMask<S> mask;                                                                               \
    OPTKIT_FOR_PARTS(mask.part[k] = a.part[k] op b.part[k];)                                        \
    return mask;                                                                                    \
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
template <class S, PairKind kKind>
OPTKIT_HD VectorPair<S, kKind> select(const PairMask<S>& condition, VectorPair<S, kKind> a,
                                      const VectorPair<S, kKind>& b) {
  OPTKIT_FOR_PARTS(a.part[k] = select(condition.part[k], a.part[k], b.part[k]);)
  return a;
}
template <class S, PairKind kKind>
OPTKIT_HD VectorPair<S, kKind> fma(VectorPair<S, kKind> a, const VectorPair<S, kKind>& b,
                                   const VectorPair<S, kKind>& c) {
  OPTKIT_FOR_PARTS(a.part[k] = fma(a.part[k], b.part[k], c.part[k]);)
  return a;
}
template <class S, PairKind kKind>
OPTKIT_HD VectorPair<S, kKind> sqrt(VectorPair<S, kKind> a) {
  OPTKIT_FOR_PARTS(a.part[k] = sqrt(a.part[k]);)
  return a;
}
template <class S, PairKind kKind>
OPTKIT_HD VectorPair<S, kKind> abs(VectorPair<S, kKind> a) {
  OPTKIT_FOR_PARTS(a.part[k] = abs(a.part[k]);)
  return a;
}

// The first `count` lanes of a; zero in the other lanes.
template <class S, PairKind kKind>
OPTKIT_HD VectorPair<S, kKind> first_lanes(VectorPair<S, kKind> a, int count) {
  OPTKIT_FOR_PARTS(a.part[k] = first_lanes(a.part[k], count - k * Vec<S>::kLanes);)
  return a;
}

template <class S>
class PairTotal {
 public:
  template <PairKind kKind>
  OPTKIT_HD void add(const VectorPair<S, kKind>& a, const VectorPair<S, kKind>& b) {
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

}  // namespace OPTKIT_ISA

template <class S, OPTKIT_ISA::PairKind kKind>
struct scalar_of<OPTKIT_ISA::VectorPair<S, kKind>> {
  using type = S;
};

}  // namespace optkit

// SPDX-License-Identifier: Apache-2.0
// Compiled once per instruction set, under the rules of kernels.cpp.
#include "cpu/gather.h"
#include "cpu/layer_norm.h"
#include "cpu/layer_norm_loop.h"
#include "cpu/layer_norm_narrow.h"

namespace optkit {
namespace OPTKIT_ISA {
namespace {

int rows_of(int group, int64_t row, int64_t end) { return end - row < group ? static_cast<int>(end - row) : group; }

template <class Norm, DType kType>
void forward(const NormForward& arguments, int64_t begin, int64_t end) {
  const NormForward a = arguments;
  if (a.size <= kNarrow) return forward_narrow<Norm, kType>(a, begin, end);
  const bool streamed = streams<kType>(a.y, a.rows, a.size);
  const int group = a.size <= kGroupedRow ? kGroup : 1;
  if constexpr (size_of(kType) == 2) {
    alignas(64) accumulator_t<kType> buffer[kBufferSize];
    if (a.size <= kBufferSize) {
      for (int64_t row = begin; row < end; row += group)
        forward_rows<Norm, kType, true>(a, row, rows_of(group, row, end), buffer, streamed);
      return;
    }
  }
  for (int64_t row = begin; row < end; row += group)
    forward_rows<Norm, kType, false>(a, row, rows_of(group, row, end), nullptr, streamed);
  end_stream(streamed);
}

template <class Norm, DType kType>
void backward(const NormBackward& arguments, int64_t begin, int64_t end, void* d_weight, void* d_bias) {
  using S = accumulator_t<kType>;
  const NormBackward a = arguments;
  S *dw = static_cast<S*>(d_weight), *db = static_cast<S*>(d_bias);
  if (a.size <= kNarrow) return backward_narrow<Norm, kType>(a, begin, end, dw, db);
  const bool streamed = streams<kType>(a.dx, a.rows, a.size);
  const int group = a.size <= kGroupedRow ? kGroup : 2;
  for (int64_t row = begin; row < end; row += group)
    backward_rows<Norm, kType>(a, row, rows_of(group, row, end), dw, db, streamed);
  end_stream(streamed);
}

struct Whole {
  static constexpr bool value = false;
};
struct Part {
  static constexpr bool value = true;
};

template <bool kWiden>
OPTKIT_HD void convert(const void* from, DType type, int64_t count, void* to) {
  const auto one = [&](int64_t i, int lanes, auto tail) OPTKIT_INLINE {
    constexpr bool kTail = decltype(tail)::value;
    const DType in = kWiden ? type : DType::kFloat32, out = kWiden ? DType::kFloat32 : type;
    const Vec<float> value = load<float, kTail>(from, in, i, lanes);
    // Replaces any NaN by the canonical one, whatever its payload: `put` relies on it.
    const Vec<float> usual = select(value == value, value, Vec<float>(__builtin_nanf("")));
    store<float, kTail>(to, out, i, lanes, kWiden ? usual : value);
  };
  int64_t i = 0;
  for (; i + kFloatLanes <= count; i += kFloatLanes) one(i, kFloatLanes, Whole());
  if (i < count) one(i, static_cast<int>(count - i), Part());
}

void widen(const void* from, DType type, int64_t count, void* to) {
  if (type == DType::kFloat64)
    __builtin_memcpy(to, from, count * sizeof(double));
  else
    convert<true>(from, type, count, to);
}

void narrow(const void* from, DType type, int64_t count, void* to) {
  if (type == DType::kFloat64)
    __builtin_memcpy(to, from, count * sizeof(double));
  else
    convert<false>(from, type, count, to);
}

void gather_rows(const void* from, int64_t column_stride, DType type, int64_t rows, int64_t columns, void* to) {
  if (type == DType::kFloat64)
    gather(static_cast<const uint64_t*>(from), column_stride, rows, columns, static_cast<uint64_t*>(to));
  else if (type == DType::kFloat32)
    gather(static_cast<const uint32_t*>(from), column_stride, rows, columns, static_cast<uint32_t*>(to));
  else
    gather(static_cast<const uint16_t*>(from), column_stride, rows, columns, static_cast<uint16_t*>(to));
}

template <class S>
OPTKIT_HD void add_parts_of(const S* parts, int64_t num_parts, int64_t stride, int64_t begin, int64_t end, S* out) {
  // A strip of columns stays in the L1 cache while the parts stream through.
  constexpr int64_t kStrip = 1024;
  for (int64_t first = begin; first < end; first += kStrip) {
    const int64_t last = first + kStrip < end ? first + kStrip : end;
    for (int64_t i = first; i < last; ++i) out[i] = parts[i];
    for (int64_t k = 1; k < num_parts; ++k)
      for (int64_t i = first; i < last; ++i) out[i] += parts[k * stride + i];
  }
}

void add_parts(const void* parts, DType type, int64_t num_parts, int64_t stride, int64_t begin, int64_t end,
               void* out) {
  if (type == DType::kFloat64)
    add_parts_of(static_cast<const double*>(parts), num_parts, stride, begin, end, static_cast<double*>(out));
  else
    add_parts_of(static_cast<const float*>(parts), num_parts, stride, begin, end, static_cast<float*>(out));
}

}  // namespace

#define OPTKIT_BY_TYPE(function, Norm)   \
  {                                      \
      &function<Norm, DType::kFloat32>,  \
      &function<Norm, DType::kBFloat16>, \
      &function<Norm, DType::kFloat16>,  \
      &function<Norm, DType::kFloat64>,  \
  }

extern const NormKernels norm_kernels;
const NormKernels norm_kernels = {
    {OPTKIT_BY_TYPE(forward, RmsNorm), OPTKIT_BY_TYPE(forward, LayerNorm)},
    {OPTKIT_BY_TYPE(backward, RmsNorm), OPTKIT_BY_TYPE(backward, LayerNorm)},
    &widen,
    &narrow,
    &gather_rows,
    &add_parts,
};

}  // namespace OPTKIT_ISA
}  // namespace optkit

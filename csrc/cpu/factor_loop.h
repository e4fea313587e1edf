// SPDX-License-Identifier: Apache-2.0
// A second moment stored as row and column means: one read of the gradient for the sums, then a pass over the row and
// column factors; the walk over elements gets their products one chunk at a time.
#pragma once

#include "core/pipeline.h"
#include "cpu/access.h"
#include "cpu/launch.h"
#include "cpu/split_weights.h"

namespace optkit {
namespace OPTKIT_ISA {

// Short enough that fp32 sums lose no visible precision; the sums of a block are then added in double.
constexpr int64_t kFactorColumns = 2048, kFactorRows = 32;
constexpr int kFactorRowsAtOnce = 4;  // sharing one load and one store of the column sums

template <class S, bool kTail>
OPTKIT_HD Vec<S> squared_gradient(const TensorSlot& t, const StageCoefs<S>& stage, int64_t i, int count) {
  const Vec<S> g = load<S, kTail>(t.grad, t.grad_type, i, count);
  Vec<S> p(S(0));
  if (stage.flags & kL2) p = load_weights<S, kTail>(t, i, count);
  const Vec<S> seen = stage_gradient(stage, p, g);
  const Vec<S> square = seen * seen;
  return kTail ? first_lanes(square, count) : square;
}

template <class S, int kRows, bool kTail>
OPTKIT_HD void add_column_vector(const TensorSlot& t, const StageCoefs<S>* stage, int64_t i, int count, Vec<S>* row,
                                 S* column) {
  Vec<S> sum(S(0));
  for (int r = 0; r < kRows; ++r) {
    const Vec<S> square = squared_gradient<S, kTail>(t, stage[r], i + r * t.columns, count);
    row[r] = row[r] + square;
    sum = sum + square;
  }
  const Vec<S> before = read<kTail, typename Vec<S>::Native, S>(column, 0, count);
  write<kTail, S>(column, 0, count, (before + sum).v);
}

// Adds the squares of rows [row, row + kRows), counted over all matrices, in columns [first, last).
template <class S, int kRows>
OPTKIT_HD void add_rows(const TensorSlot& t, const StageCoefs<S>& stages, int64_t row, int64_t first, int64_t last,
                        S* column) {
  constexpr int kLanes = Vec<S>::kLanes;
  StageCoefs<S> stage[kRows];
  Vec<S> sum[kRows];
  for (int r = 0; r < kRows; ++r) {
    stage[r] = stages;
    sum[r] = Vec<S>(S(0));
    if (t.unit_scale == nullptr) continue;
    const int64_t unit = (row + r) * t.columns / t.unit_length;
    stage[r].grad_scale = static_cast<S>(stages.grad_scale * t.unit_scale[unit]);
    stage[r].unit_shift = static_cast<S>(t.unit_shift[unit]);
  }
  int64_t j = first;
  const int64_t base = row * t.columns;
  for (; j + kLanes <= last; j += kLanes)
    add_column_vector<S, kRows, false>(t, stage, base + j, kLanes, sum, column + (j - first));
  if (j < last)
    add_column_vector<S, kRows, true>(t, stage, base + j, static_cast<int>(last - j), sum, column + (j - first));
  for (int r = 0; r < kRows; ++r) t.factors->row_sums[row + r] += sum_of_lanes(sum[r]);
}

// Rows [begin, end) of one matrix; adds their column sums to `column_sums`.
template <class S>
OPTKIT_HD void sum_strip(const TensorSlot& t, const StageCoefs<S>& stage, int64_t begin, int64_t end,
                         double* column_sums) {
  for (int64_t row = begin; row < end; ++row) t.factors->row_sums[row] = 0.0;
  for (int64_t j = 0; j < t.columns; ++j) column_sums[j] = 0.0;
  alignas(64) S block[kFactorColumns];
  for (int64_t first = 0; first < t.columns; first += kFactorColumns) {
    const int64_t last = first + kFactorColumns < t.columns ? first + kFactorColumns : t.columns;
    for (int64_t row = begin; row < end;) {
      for (int64_t j = 0; j < last - first; ++j) block[j] = S(0);
      const int64_t until = row + kFactorRows < end ? row + kFactorRows : end;
      for (; row + kFactorRowsAtOnce <= until; row += kFactorRowsAtOnce)
        add_rows<S, kFactorRowsAtOnce>(t, stage, row, first, last, block);
      for (; row < until; ++row) add_rows<S, 1>(t, stage, row, first, last, block);
      for (int64_t j = first; j < last; ++j) column_sums[j] += static_cast<double>(block[j - first]);
    }
  }
}

// Strips [strips.begin, strips.begin + strips.count), counted over all matrices of the tensor.
template <class Rule, class S>
void sum_strips(const TensorSlot& tensor, const void* prepared, const Chunk& strips) {
  const TensorSlot t = tensor;
  const StageCoefs<S> stage = static_cast<const PreparedTensor<Rule, S>*>(prepared)->stage;
  const int64_t parts = t.factors->num_strips;
  for (int64_t strip = strips.begin; strip < strips.begin + strips.count; ++strip) {
    const int64_t above = strip / parts * t.rows, part = strip % parts;
    const int64_t begin = above + t.rows * part / parts, end = above + t.rows * (part + 1) / parts;
    sum_strip<S>(t, stage, begin, end, t.factors->column_sums + strip * t.columns);
  }
}

// Moves the means [begin, begin + count) of a state toward sums / length; writes them to `out` too. Returns their sum.
template <class S>
OPTKIT_HD double move_means(void* state, DType type, int64_t begin, int64_t count, const double* sums, double length,
                            S share, S* out) {
  double total = 0.0;
  for (int64_t i = 0; i < count; i += Vec<S>::kLanes) {
    const int lanes = static_cast<int>(i + Vec<S>::kLanes < count ? Vec<S>::kLanes : count - i);
    Vec<S> mean(S(0));
    for (int k = 0; k < lanes; ++k) mean.v[k] = static_cast<S>(sums[i + k] / length);
    const Vec<S> next = lerp(load<S, true>(state, type, begin + i, lanes), mean, share);
    store<S, true>(state, type, begin + i, lanes, next);
    write<true, S>(out, i, lanes, next.v);
    for (int k = 0; k < lanes; ++k) total += static_cast<double>(next.v[k]);
  }
  return total;
}

// out[i] = sqrt(numerator / out[i])
template <class S>
OPTKIT_HD void to_factors(S* out, int64_t count, S numerator) {
  for (int64_t i = 0; i < count; ++i) out[i] = optkit::sqrt(numerator / out[i]);
}

// Matrices [matrices.begin, matrices.begin + matrices.count) of the tensor: updates their state, and computes the
// factors whose products are 1 / sqrt(second moment).
template <class Rule, class S>
void make_factors(const TensorSlot& tensor, const void* prepared, const Chunk& matrices) {
  const TensorSlot t = tensor;
  const Factors& factors = *t.factors;
  const auto& coefs = static_cast<const PreparedTensor<Rule, S>*>(prepared)->rule;
  for (int64_t matrix = matrices.begin; matrix < matrices.begin + matrices.count; ++matrix) {
    double* sums = factors.column_sums + matrix * factors.num_strips * t.columns;
    for (int64_t part = 1; part < factors.num_strips; ++part)
      for (int64_t j = 0; j < t.columns; ++j) sums[j] += sums[part * t.columns + j];
    S* row = static_cast<S*>(factors.row) + matrix * t.rows;
    S* column = static_cast<S*>(factors.column) + matrix * t.columns;
    const double total =
        move_means<S>(t.state[Rule::kNumStates], type_of_state<Rule>(t, Rule::kNumStates), matrix * t.rows, t.rows,
                      factors.row_sums + matrix * t.rows, static_cast<double>(t.columns), coefs.share, row);
    move_means<S>(t.state[Rule::kNumStates + 1], type_of_state<Rule>(t, Rule::kNumStates + 1), matrix * t.columns,
                  t.columns, sums, static_cast<double>(t.rows), coefs.share, column);
    to_factors<S>(row, t.rows, optkit::max(static_cast<S>(total / static_cast<double>(t.rows)), coefs.least));
    to_factors<S>(column, t.columns, S(1));
  }
}

// Points the state of a matrix at the products of its factors, in a buffer that stays in the L2 cache, so that the walk
// over elements is the same as for any other state.
template <class Rule, class S>
OPTKIT_HD void spread_factors(TensorSlot* t, const typename Rule::template Coefs<S>& coefs, const Chunk& chunk) {
  if (t->factors == nullptr) return;
  alignas(64) static thread_local S values[kChunk];
  const S most = S(1) / coefs.least;
  int64_t row = chunk.begin / t->columns, first = chunk.begin % t->columns;
  for (int64_t done = 0; done < chunk.count; ++row, first = 0) {
    const int64_t rest = chunk.count - done, count = t->columns - first < rest ? t->columns - first : rest;
    const S factor = static_cast<const S*>(t->factors->row)[row];
    const S* column = static_cast<const S*>(t->factors->column) + row / t->rows * t->columns + first;
    for (int64_t j = 0; j < count; ++j) values[done + j] = optkit::min(factor * column[j], most);
    done += count;
  }
  t->state[0] = values - chunk.begin;
  t->state_type = sizeof(S) == 4 ? DType::kFloat32 : DType::kFloat64;
}

}  // namespace OPTKIT_ISA
}  // namespace optkit

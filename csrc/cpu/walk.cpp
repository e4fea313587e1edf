// SPDX-License-Identifier: Apache-2.0
#include "cpu/walk.h"

#include <algorithm>
#include <cmath>
#include <cstring>

#if defined(__x86_64__)
#include <xmmintrin.h>
#endif

namespace optkit {
namespace {

// Flushes denormals to zero within a scope: a decayed momentum would otherwise cost a microcode assist per element.
class FlushDenormals {
#if defined(__x86_64__)
 public:
  FlushDenormals() : saved_(_mm_getcsr()) { _mm_setcsr(saved_ | 0x8040); }
  ~FlushDenormals() { _mm_setcsr(saved_); }

 private:
  unsigned saved_;
#else
 public:
  FlushDenormals() {}
#endif
};

// `lr` is the rate of the rule: computed from its norms, or 1 while they are measured. Of a rule with a limit, it is
// the limit.
using Prepare = void (*)(const GroupRow&, const TensorSlot&, double grad_scale, double lr, double num_averaged,
                         bool statistics, void* out);
// The rule's rate, given the sums measured at a rate of 1.
using RateOf = double (*)(const GroupRow&, const TensorSlot&, const Sums&);

template <class Rule, class S>
typename Rule::template Coefs<S> prepare_rule(const GroupRow& group, const TensorSlot& slot, double lr, double step) {
  if constexpr (HasFactors<Rule>::value)
    return Rule::template prepare<S>(group.rule, lr, step, slot);
  else if constexpr (HasLimit<Rule>::value)
    return Rule::template prepare<S>(group.rule, group.lr, step, lr);
  else
    return Rule::template prepare<S>(group.rule, lr, step, slot.scalar);
}

template <class Rule, class S>
void prepare(const GroupRow& group, const TensorSlot& slot, double grad_scale, double lr, double num_averaged,
             bool statistics, void* out) {
  const double step = *slot.step;
  const auto tensor = static_cast<uint64_t>(slot.index);
  const double rate = rate_factor<Rule>(group.rule, step);
  const PreparedTensor<Rule, S> result = {
      prepare_stages<S>(group, group.lr * rate, grad_scale, step, num_averaged, tensor, statistics),
      prepare_rule<Rule, S>(group, slot, lr * rate, step)};
  std::memcpy(out, &result, sizeof(result));
}

template <class Rule>
double measured_rate(const GroupRow& group, const TensorSlot& slot, const Sums& sums) {
  if constexpr (HasFactors<Rule>::value)
    return Rule::relative_rate(group.rule, group.lr, *slot.step, static_cast<double>(slot.numel), sums);
  else if constexpr (HasLimit<Rule>::value)
    return Rule::limit(group.rule, sums.update_sq, static_cast<double>(slot.numel));
  else
    return group.lr * Rule::trust_ratio(group.rule, sums);
}

template <class Rule>
constexpr RateOf rate_of() {
  if constexpr (measures_first<Rule>() || HasFactors<Rule>::value)
    return &measured_rate<Rule>;
  else
    return nullptr;
}

struct PrepareEntry {
  Prepare function;
  std::size_t size;
  RateOf rate_of;  // null: the group's learning rate
  bool has_estimate, has_factors;
};
#define OPTKIT_PREPARE_FLOAT(name, type)                                                                  \
  {&prepare<type, float>, sizeof(PreparedTensor<type, float>), rate_of<type>(), HasEstimate<type>::value, \
   HasFactors<type>::value},
#define OPTKIT_PREPARE_DOUBLE(name, type)                                                                   \
  {&prepare<type, double>, sizeof(PreparedTensor<type, double>), rate_of<type>(), HasEstimate<type>::value, \
   HasFactors<type>::value},
constexpr PrepareEntry kPrepareFloat[] = {OPTKIT_FOR_EACH_CPU_RULE(OPTKIT_PREPARE_FLOAT)};
constexpr PrepareEntry kPrepareDouble[] = {OPTKIT_FOR_EACH_CPU_RULE(OPTKIT_PREPARE_DOUBLE)};

}  // namespace

CpuWalk::CpuWalk(int rule, bool is_double, ParallelFor parallel_for, int workers)
    : num_workers(workers), rule_(rule), is_double_(is_double), parallel_for_(parallel_for) {}

void CpuWalk::layout(std::vector<TensorSlot>& tensors) {
  if (kPrepareFloat[rule_].has_factors) factors_.layout(tensors);
  chunks_.clear();
  tasks_.assign(1, 0);
  int64_t in_task = 0, total = 0;
  for (const TensorSlot& tensor : tensors) total += tensor.active ? tensor.numel : 0;
  // Long runs help the hardware prefetcher, but there must be enough of them to balance the cores.
  const int64_t task_size = std::clamp<int64_t>(total / 64, kChunk, 16 * kChunk);
  for (std::size_t t = 0; t < tensors.size(); ++t) {
    if (!tensors[t].active) continue;
    for (int64_t begin = 0; begin < tensors[t].numel; begin += kChunk) {
      const int64_t count = std::min(kChunk, tensors[t].numel - begin);
      if (in_task > 0 && in_task + count > task_size) {
        tasks_.push_back(chunks_.size());
        in_task = 0;
      }
      chunks_.push_back({begin, static_cast<int32_t>(t), static_cast<int32_t>(count)});
      in_task += count;
    }
  }
  if (in_task > 0) tasks_.push_back(chunks_.size());
  chunk_sums_.assign(chunks_.size(), Sums{});
}

template <class Body>
void CpuWalk::run_tasks(std::size_t num_tasks, Body body) {
  for_each_task(parallel_for_, num_workers, static_cast<int64_t>(num_tasks), [&](int64_t task) {
    const FlushDenormals flush;
    body(static_cast<std::size_t>(task));
  });
}

template <class Body>
void CpuWalk::for_each_chunk(Body body) {
  run_tasks(tasks_.size() - 1, [&](std::size_t task) {
    for (std::size_t k = tasks_[task]; k < tasks_[task + 1]; ++k) body(k);
  });
}

void CpuWalk::add_chunks(std::vector<Sums>& sums, std::size_t num_tensors) const {
  sums.assign(num_tensors, Sums{});
  for (std::size_t k = 0; k < chunks_.size(); ++k) {
    Sums& total = sums[chunks_[k].tensor];
    const Sums& part = chunk_sums_[k];
    total.grad_sq += part.grad_sq;
    total.param_sq += part.param_sq;
    total.update_sq += part.update_sq;
    total.nonfinite += part.nonfinite;
    total.lost += part.lost;
    for (int s = 0; s < kObserved; ++s) total.observed[s] += part.observed[s];
  }
}

void CpuWalk::norm(const std::vector<TensorSlot>& tensors, std::vector<Sums>& sums) {
  const Kernels& kernels = active_kernels();
  const NormChunk run = is_double_ ? kernels.norm_double : kernels.norm_float;
  for_each_chunk([&](std::size_t k) { run(tensors[chunks_[k].tensor], chunks_[k], &chunk_sums_[k]); });
  add_chunks(sums, tensors.size());
}

// Assigns to every tensor with per-unit stages its part of `unit_numbers_`, and splits the units into runs.
void CpuWalk::layout_units(std::vector<TensorSlot>& tensors, const std::vector<GroupRow>& groups) {
  unit_tasks_.clear();
  std::size_t num_units = 0;
  const auto treated = [&](const TensorSlot& t) {
    const GroupRow& group = groups[t.group];
    return t.active && t.numel > 0 && (t.is_vector ? is_bounded(group.clip_unit_ratio) : treats_units(group));
  };
  for (const TensorSlot& t : tensors)
    if (treated(t)) num_units += t.numel / t.unit_length;
  unit_numbers_.resize(2 * num_units);
  double* numbers = unit_numbers_.data();
  for (std::size_t k = 0; k < tensors.size(); ++k) {
    TensorSlot& t = tensors[k];
    t.unit_scale = t.unit_shift = nullptr;
    if (!treated(t)) continue;
    const int64_t units = t.numel / t.unit_length;
    t.unit_scale = numbers;
    t.unit_shift = numbers + units;
    numbers += 2 * units;
    const int64_t per_task = std::max<int64_t>(1, kChunk / t.unit_length);
    for (int64_t first = 0; first < units; first += per_task)
      unit_tasks_.push_back({first, static_cast<int32_t>(k), static_cast<int32_t>(std::min(per_task, units - first))});
  }
  clipped_.assign(unit_tasks_.size(), Clipped{});
}

Clipped CpuWalk::measure_units(const std::vector<TensorSlot>& tensors, const std::vector<GroupRow>& groups,
                               const std::vector<double>& grad_scales) {
  const Kernels& kernels = active_kernels();
  const MeasureUnits run = is_double_ ? kernels.units_double : kernels.units_float;
  run_tasks(unit_tasks_.size(), [&](std::size_t k) {
    const TensorSlot& t = tensors[unit_tasks_[k].tensor];
    clipped_[k] = run(t, groups[t.group], grad_scales[unit_tasks_[k].tensor], unit_tasks_[k]);
  });
  Clipped total = {};
  for (const Clipped& part : clipped_) total = {total.grad_sq + part.grad_sq, total.num + part.num};
  return total;
}

// Updates the second moment of matrices that is stored by rows and columns, and computes the factors.
void CpuWalk::measure_factors(const std::vector<TensorSlot>& tensors, std::size_t prepared_size) {
  const Kernels& kernels = active_kernels();
  const FactorKernels& run = is_double_ ? kernels.factors_double[rule_] : kernels.factors_float[rule_];
  const auto prepared = [&](const Chunk& task) { return &prepared_[prepared_size * task.tensor]; };
  run_tasks(factors_.strips.size(), [&](std::size_t k) {
    const Chunk& task = factors_.strips[k];
    const TensorSlot& t = tensors[task.tensor];
    run.sum_strips(t, prepared(task), task);
    if (t.factors->num_strips == 1) run.make_factors(t, prepared(task), task);
  });
  run_tasks(factors_.matrices.size(), [&](std::size_t k) {
    const Chunk& task = factors_.matrices[k];
    run.make_factors(tensors[task.tensor], prepared(task), task);
  });
}

// The rate of each tensor: its group's, or the one computed from the tensor's norms.
std::vector<double> CpuWalk::measure_rates(const std::vector<TensorSlot>& tensors, const std::vector<GroupRow>& groups,
                                           const std::vector<double>& grad_scales) {
  std::vector<double> rates(tensors.size());
  for (std::size_t t = 0; t < tensors.size(); ++t) rates[t] = groups[tensors[t].group].lr;
  const PrepareEntry& entry = is_double_ ? kPrepareDouble[rule_] : kPrepareFloat[rule_];
  if (entry.rate_of == nullptr) return rates;
  prepared_.resize(entry.size * tensors.size());
  for (std::size_t t = 0; t < tensors.size(); ++t)
    if (tensors[t].active)
      entry.function(groups[tensors[t].group], tensors[t], grad_scales[t], 1.0, 0.0, false, &prepared_[entry.size * t]);
  if (entry.has_factors) measure_factors(tensors, entry.size);
  const Kernels& kernels = active_kernels();
  walk(tensors, is_double_ ? kernels.measure_double[rule_] : kernels.measure_float[rule_], entry.size);
  std::vector<Sums> sums;
  add_chunks(sums, tensors.size());
  for (std::size_t t = 0; t < tensors.size(); ++t)
    if (tensors[t].active && tensors[t].numel > 0)
      rates[t] = entry.rate_of(groups[tensors[t].group], tensors[t], sums[t]);
  return rates;
}

void CpuWalk::walk(const std::vector<TensorSlot>& tensors, StepChunk run, std::size_t prepared_size) {
  // Forward order: walking backward, toward what the norm pass left in the cache, cost 20 %, since the hardware
  // prefetcher only runs forward (docs/performance.md).
  for_each_chunk([&](std::size_t k) {
    const std::size_t t = chunks_[k].tensor;
    run(tensors[t], &prepared_[prepared_size * t], chunks_[k], &chunk_sums_[k]);
  });
}

Clipped CpuWalk::step(std::vector<TensorSlot>& tensors, const std::vector<GroupRow>& groups, double grad_scale,
                      bool statistics, std::vector<Sums>& sums) {
  std::vector<double> grad_scales(tensors.size(), grad_scale);
  Clipped clipped = {};
  for (std::size_t t = 0; t < tensors.size(); ++t) {
    if (!tensors[t].active) continue;
    *tensors[t].step += 1.0f;
    const GroupRow& group = groups[tensors[t].group];
    if (!is_bounded(group.clip_tensor_norm)) continue;
    const double coefficient = clip_coefficient(group.clip_tensor_norm, grad_scale * std::sqrt(sums[t].grad_sq));
    grad_scales[t] *= coefficient;
    clipped.grad_sq += coefficient * coefficient * sums[t].grad_sq;
    clipped.num += coefficient < 1.0;
  }
  layout_units(tensors, groups);
  const Clipped units = measure_units(tensors, groups, grad_scales);
  clipped = {clipped.grad_sq + units.grad_sq, clipped.num + units.num};
  const std::vector<double> rates = measure_rates(tensors, groups, grad_scales);

  const PrepareEntry& entry = is_double_ ? kPrepareDouble[rule_] : kPrepareFloat[rule_];
  prepared_.resize(entry.size * tensors.size());
  for (std::size_t t = 0; t < tensors.size(); ++t) {
    if (!tensors[t].active) continue;
    const GroupRow& group = groups[tensors[t].group];
    const double num_averaged = tensors[t].num_averaged ? *tensors[t].num_averaged : 0.0;
    entry.function(group, tensors[t], grad_scales[t], rates[t], num_averaged, statistics, &prepared_[entry.size * t]);
    if (tensors[t].num_averaged && average_weight(group, num_averaged) != 0.0) *tensors[t].num_averaged += 1.0f;
  }
  const Kernels& kernels = active_kernels();
  walk(tensors, is_double_ ? kernels.step_double[rule_] : kernels.step_float[rule_], entry.size);
  if (statistics || entry.has_estimate) add_chunks(sums, tensors.size());
  return clipped;
}

}  // namespace optkit

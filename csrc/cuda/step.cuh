// SPDX-License-Identifier: Apache-2.0
// The step on the device: a small launch that turns what is known only there (norm, loss scale, step counts) into
// coefficients, and one launch that walks the parameters. The arithmetic is csrc/core/pipeline.h and csrc/rules/.
#pragma once

#include "cuda/access.cuh"
#include "cuda/launch.cuh"
#include "cuda/reduce.cuh"

namespace optkit {

// Factor for the gradients; negative: skip the step.
__device__ inline double gradient_scale(const CudaStepControl& control, double* norm, double* coefficient) {
  const double scale = control.scale / (control.loss_scale ? static_cast<double>(*control.loss_scale) : 1.0);
  *norm = 0.0;
  *coefficient = 1.0;
  if (control.found_inf && *control.found_inf != 0.0f) return -1.0;
  if (control.norm == nullptr) return scale;
  if (control.norm[1] != 0.0) {
    *norm = nan("");
    return -1.0;
  }
  *norm = scale * sqrt(control.norm[0]);
  if (control.max_norm != nullptr) *coefficient = fmin(1.0, *control.max_norm / (*norm + 1e-6));
  return scale * *coefficient;
}

// One thread per tensor: advances its counters and computes its coefficients.
template <class Rule, class S>
__global__ void prepare_kernel(const __grid_constant__ DeviceTables tables, const __grid_constant__ GroupTable groups,
                               const __grid_constant__ CudaStepControl control, int32_t num_tensors, Phase phase) {
  const int32_t index = static_cast<int32_t>(blockIdx.x * blockDim.x + threadIdx.x);
  double norm, coefficient;
  const double scale = gradient_scale(control, &norm, &coefficient);
  if (index == 0 && groups.first == 0 && phase != Phase::kMeasured) {
    *tables.skip = scale < 0.0 ? 1 : 0;
    if (control.counts_report) {
      control.report[0] = norm;
      control.report[1] = norm * coefficient;
      control.report[2] += scale < 0.0 ? 0.0 : 1.0;
      control.report[3] += scale >= 0.0 && coefficient < 1.0 ? 1.0 : 0.0;
      control.report[4] += scale < 0.0 ? 1.0 : 0.0;
    }
  }
  if (index >= num_tensors || scale < 0.0) return;
  const TensorSlot& t = tables.tensors[index];
  const int32_t g = t.group - groups.first;
  if (!t.active || g < 0 || g >= groups.count) return;
  const GroupRow& group = groups.row[g];
  if (phase != Phase::kMeasured) *t.step += 1.0f;
  const double step = *t.step;
  const double num_averaged = t.num_averaged ? *t.num_averaged : 0.0;
  double tensor_scale = scale;
  if (group.clip_tensor_norm < 1e300) {
    const double squares = tables.tensor_sq[index], part = tensor_coefficient(group, scale * sqrt(squares));
    tables.tensor_clipped[index] = {part * part * squares, part < 1.0 ? 1.0 : 0.0};
    tensor_scale *= part;
  }
  const double* hyper = group.rule;
  double own[Rule::kNumHypers];
  if constexpr (HasEstimate<Rule>::value) {  // only the device knows it
    for (int k = 0; k < Rule::kNumHypers; ++k) own[k] = hyper[k];
    own[Rule::kNumHypers - 1] = *control.estimate;
    hyper = own;
  }
  double lr = group.lr * rate_factor<Rule>(hyper, step);
  auto* prepared = reinterpret_cast<PreparedTensor<Rule, S>*>(tables.prepared) + index;
  prepared->stage = prepare_stages<S>(group, lr, tensor_scale, step, num_averaged, static_cast<uint64_t>(t.index),
                                      control.statistics != nullptr);
  if constexpr (HasTrust<Rule>::value) {
    if (phase == Phase::kMeasure) lr = 1.0;
    if (phase == Phase::kMeasured) lr *= Rule::trust(hyper, tables.tensor_sums[index]);
  }
  prepared->rule = Rule::template prepare<S>(hyper, lr, step, t.scalar);
  if (phase != Phase::kMeasure && t.num_averaged && average_weight(group, num_averaged) != 0.0) *t.num_averaged += 1.0f;
}

template <class S>
struct ThreadSums {
  double grad_sq = 0.0, param_sq = 0.0, update_sq = 0.0, nonfinite = 0.0, lost = 0.0, observed[kObserved] = {};
};

// 8-bit state is there for fp32 arithmetic only.
__device__ __forceinline__ void load_state(Four<double>& out, const TensorSlot& t, DType, int s, int64_t i, int count) {
  load(out, t.state[s], t.state_type, i, count);
}
__device__ __forceinline__ void load_state(Four<float>& out, const TensorSlot& t, DType type, int s, int64_t i,
                                           int count) {
  if (type == DType::kCode8)
    load_codes(out, t.state[s], t.state_scale[s], !(t.unsigned_states >> s & 1u), i, count);
  else
    load(out, t.state[s], type, i, count);
}
__device__ __forceinline__ void store_state(Four<double>& value, const TensorSlot& t, DType, int s, int64_t i,
                                            int count, RandomKey) {
  store(value, t.state[s], t.state_type, i, count);
}
__device__ __forceinline__ void store_state(Four<float>& value, const TensorSlot& t, DType type, int s, int64_t i,
                                            int count, RandomKey key) {
  if (type == DType::kCode8)
    store_codes(value, t.state[s], t.state_scale[s], !(t.unsigned_states >> s & 1u), i, count, state_key(key, s));
  else
    store(value, t.state[s], type, i, count);
}

// Rounds and stores, averages and counts.
template <class Rule, class S>
__device__ __forceinline__ void store_four(const TensorSlot& t, const PreparedTensor<Rule, S>& launch, int64_t i,
                                           int count, const Four<S>& stored_before, const Four<S>& lost_before,
                                           const Four<S>& grad, const S (&param)[kLanes], const Four<S>& next,
                                           Four<S> (&state)[Rule::kNumStates], ThreadSums<S>& sums) {
  const StageCoefs<S>& stage = launch.stage;
#pragma unroll
  for (int s = 0; s < Rule::kNumStates; ++s)
    if (t.state[s] && writes_state<Rule>(launch.rule, s))
      store_state(state[s], t, type_of_state<Rule>(t, s), s, i, count, stage.key);
  Four<S> stored = next;
  store(stored, t.param, t.param_type, i, count, (stage.flags & kStochastic) ? &stage.key : nullptr);
  Four<S> lost = lost_before;
  if (t.compensation) {
#pragma unroll
    for (int k = 0; k < kLanes; ++k) lost.v[k] = next.v[k] - stored.v[k];
    store(lost, t.compensation, t.param_type, i, count);
  }
  if (stage.flags & kAverage) {
    Four<S> average;
    load(average, t.average, t.average_type, i, count);
#pragma unroll
    for (int k = 0; k < kLanes; ++k) average.v[k] = stage_average(stage, average.v[k], stored.v[k]);
    store(average, t.average, t.average_type, i, count);
  }
  if (stage.flags & kStatistics) {
#pragma unroll
    for (int k = 0; k < kLanes; ++k) {
      if (k >= count) continue;
      const double g = grad.v[k], p = next.v[k], u = next.v[k] - param[k];
      sums.grad_sq += g * g;
      sums.param_sq += p * p;
      sums.update_sq += u * u;
      sums.nonfinite += g - g != 0.0 ? 1.0 : 0.0;
      sums.lost += u != 0.0 && stored.v[k] == stored_before.v[k] && lost.v[k] == lost_before.v[k] ? 1.0 : 0.0;
    }
  }
}

// kMeasure: only sums what a rule's trust is made of; writes nothing.
template <class Rule, class S, bool kMeasure>
__device__ __forceinline__ void step_four(const TensorSlot& t, const void* grad_pointer,
                                          const PreparedTensor<Rule, S>& launch, int64_t i, int count,
                                          ThreadSums<S>& sums) {
  const StageCoefs<S>& stage = launch.stage;
  Four<S> stored_before, grad, lost_before{}, next, state[Rule::kNumStates];
  load(stored_before, t.param, t.param_type, i, count);
  load(grad, grad_pointer, t.grad_type, i, count);
  if (t.compensation) load(lost_before, t.compensation, t.param_type, i, count);
#pragma unroll
  for (int s = 0; s < Rule::kNumStates; ++s) {
    state[s] = {};
    if (t.state[s]) load_state(state[s], t, type_of_state<Rule>(t, s), s, i, count);
  }
  S param[kLanes];
#pragma unroll
  for (int k = 0; k < kLanes; ++k) {
    StageCoefs<S> here = stage;
    if (t.unit_scale && k < count) {
      const int64_t unit = (i + k) / t.unit_length;
      here.grad_scale = static_cast<S>(stage.grad_scale * t.unit_scale[unit]);
      here.unit_shift = static_cast<S>(t.unit_shift[unit]);
    }
    grad.v[k] = stage_gradient(here, stored_before.v[k], grad.v[k]);
    param[k] = stored_before.v[k] + lost_before.v[k];
    S held[Rule::kNumStates];
#pragma unroll
    for (int s = 0; s < Rule::kNumStates; ++s) held[s] = state[s].v[k];
    const S update = Rule::update(launch.rule, param[k], grad.v[k], held);
    if constexpr (HasEstimate<Rule>::value) {
      S seen[kObserved];
      Rule::observe(launch.rule, param[k], grad.v[k], held, seen);
#pragma unroll
      for (int s = 0; s < kObserved; ++s) sums.observed[s] += k < count ? static_cast<double>(seen[s]) : 0.0;
    }
    if constexpr (kMeasure) {
      if (k >= count) continue;
      const double g = grad.v[k], p = param[k], u = update;
      sums.grad_sq += g * g;
      sums.param_sq += p * p;
      sums.update_sq += u * u;
    }
#pragma unroll
    for (int s = 0; s < Rule::kNumStates; ++s) state[s].v[k] = held[s];
    next.v[k] = stage_parameter(stage, param[k], update);
  }
  if constexpr (!kMeasure)
    store_four<Rule, S>(t, launch, i, count, stored_before, lost_before, grad, param, next, state, sums);
}

// A block per chunk, last chunk first: the norm kernel read that one last, and the L2 cache may still have it.
template <class Rule, class S, bool kMeasure>
__global__ void __launch_bounds__(kThreads)
    step_kernel(const __grid_constant__ DeviceTables tables, const __grid_constant__ GradTable grads,
                const __grid_constant__ Range range) {
  if (*tables.skip) return;
  const int32_t place = range.first_chunk + range.num_chunks - 1 - static_cast<int32_t>(blockIdx.x);
  const Chunk chunk = tables.chunks[place];
  const TensorSlot t = tables.tensors[chunk.tensor];
  const void* grad = grads.pointer[chunk.tensor - range.first_tensor];
  const auto launch = reinterpret_cast<const PreparedTensor<Rule, S>*>(tables.prepared)[chunk.tensor];
  const int64_t end = chunk.begin + chunk.count;
  ThreadSums<S> sums;
  // The lanes of a warp go together to the end: a block of 8-bit state is theirs in common.
  for (int64_t first = chunk.begin; first < end; first += kThreads * kLanes) {
    const int64_t i = first + threadIdx.x * kLanes;
    const int count = end - i >= kLanes ? kLanes : (end > i ? static_cast<int>(end - i) : 0);
    if (count > 0 || t.state_type == DType::kCode8) step_four<Rule, S, kMeasure>(t, grad, launch, i, count, sums);
  }
  if (kMeasure || (launch.stage.flags & kStatistics)) {
    Sums total = {block_sum(sums.grad_sq),   block_sum(sums.param_sq), block_sum(sums.update_sq),
                  block_sum(sums.nonfinite), block_sum(sums.lost),     {}};
    if constexpr (HasEstimate<Rule>::value)
      for (int s = 0; s < kObserved; ++s) total.observed[s] = block_sum(sums.observed[s]);
    if (threadIdx.x == 0) tables.sums[place] = total;
  }
}

// A block per tensor adds the sums of its chunks.
__global__ void __launch_bounds__(kThreads) statistics_kernel(const __grid_constant__ DeviceTables tables, Sums* out) {
  if (*tables.skip) return;
  const int32_t first = tables.first_chunk[blockIdx.x], last = tables.first_chunk[blockIdx.x + 1];
  Sums sums = {};
  for (int32_t k = first + threadIdx.x; k < last; k += kThreads) {
    const Sums part = tables.sums[k];
    sums.grad_sq += part.grad_sq;
    sums.param_sq += part.param_sq;
    sums.update_sq += part.update_sq;
    sums.nonfinite += part.nonfinite;
    sums.lost += part.lost;
    for (int s = 0; s < kObserved; ++s) sums.observed[s] += part.observed[s];
  }
  const Sums total = {block_sum(sums.grad_sq),   block_sum(sums.param_sq),
                      block_sum(sums.update_sq), block_sum(sums.nonfinite),
                      block_sum(sums.lost),      {block_sum(sums.observed[0]), block_sum(sums.observed[1])}};
  if (threadIdx.x == 0) out[blockIdx.x] = total;
}

}  // namespace optkit

// SPDX-License-Identifier: Apache-2.0
// The step on the device: a small launch turns values known only there (norm, loss scale, step counts) into
// coefficients, and one launch walks the parameters. The arithmetic is in csrc/core/pipeline.h and csrc/rules/.
#pragma once

#include "cuda/access.cuh"
#include "cuda/launch.cuh"
#include "cuda/reduce.cuh"

namespace optkit {

// Factor of the gradients; negative: skip the step.
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
  const double bound = control.max_norm ? *control.max_norm : control.max_norm_value;
  *coefficient = clip_coefficient(bound, *norm);
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
  const double group_lr = groups.rate[g] ? *groups.rate[g] : group.lr;
  if (phase != Phase::kMeasured) *t.step += 1.0f;
  const double step = *t.step;
  const double num_averaged = t.num_averaged ? *t.num_averaged : 0.0;
  double tensor_scale = scale;
  if (is_bounded(group.clip_tensor_norm)) {
    const double squares = tables.tensor_sq[index],
                 part = clip_coefficient(group.clip_tensor_norm, scale * sqrt(squares));
    tables.tensor_clipped[index] = {part * part * squares, part < 1.0 ? 1.0 : 0.0};
    tensor_scale *= part;
  }
  const double* hyper = group.rule;
  double own[Rule::kNumHyperparameters];
  if constexpr (HasEstimate<Rule>::value) {  // known only to the device
    for (int k = 0; k < Rule::kNumHyperparameters; ++k) own[k] = hyper[k];
    own[Rule::kNumHyperparameters - 1] = *control.estimate;
    hyper = own;
  }
  double lr = group_lr * rate_factor<Rule>(hyper, step);
  auto* prepared = reinterpret_cast<PreparedTensor<Rule, S>*>(tables.prepared) + index;
  prepared->stage = prepare_stages<S>(group, lr, tensor_scale, step, num_averaged, static_cast<uint64_t>(t.index),
                                      control.statistics != nullptr);
  if constexpr (HasTrustRatio<Rule>::value) {
    if (phase == Phase::kMeasure) lr = 1.0;
    if (phase == Phase::kMeasured) lr *= Rule::trust_ratio(hyper, tables.tensor_sums[index]);
  }
  if constexpr (HasLimit<Rule>::value) {
    const double squares = phase == Phase::kMeasured ? tables.tensor_sums[index].update_sq : 0.0;
    const double limit = phase == Phase::kMeasured ? Rule::limit(hyper, squares, static_cast<double>(t.numel)) : 1.0;
    prepared->rule = Rule::template prepare<S>(hyper, lr, step, limit);
  } else {
    prepared->rule = Rule::template prepare<S>(hyper, lr, step, t.scalar);
  }
  if (phase != Phase::kMeasure && t.num_averaged && average_weight(group, num_averaged) != 0.0) *t.num_averaged += 1.0f;
}

// Sums of one thread over one chunk. Products are added in double: the square of an fp32 number may overflow fp32.
struct ThreadSums {
  double grad_sq{}, param_sq{}, update_sq{}, observed[kObserved] = {};
  int32_t nonfinite{}, lost{};
};

__device__ __forceinline__ void add_product(double& sum, double a, double b) { sum = fma(a, b, sum); }

// Which streams of a tensor move four elements in one access.
struct WholeStreams {
  bool param, grad, average, state[kMaxStates];
};

template <class Rule>
__device__ __forceinline__ WholeStreams whole_streams(const TensorSlot& t, const void* grad) {
  return {moves_whole(t.param, t.param_type) && moves_whole(t.compensation, t.compensation_type),
          moves_whole(grad, t.grad_type),
          moves_whole(t.average, t.average_type),
          {moves_whole(t.state[0], type_of_state<Rule>(t, 0)), moves_whole(t.state[1], type_of_state<Rule>(t, 1)),
           moves_whole(t.state[2], type_of_state<Rule>(t, 2)), moves_whole(t.state[3], type_of_state<Rule>(t, 3))}};
}

// Everything that a step reads of four elements, requested together.
template <class Rule, class S>
struct Fetched {
  Raw<S> param, grad, lost, average, state[Rule::kNumStates];
  float scale[Rule::kNumStates];  // of 8-bit state

  __device__ __forceinline__ Fetched(const TensorSlot& t, const void* grad_base, const WholeStreams& whole,
                                     bool averages, int64_t i, int count) {
    fetch(param, t.param, t.param_type, i, count, whole.param);
    fetch(grad, grad_base, t.grad_type, i, count, whole.grad);
#pragma unroll
    for (int s = 0; s < Rule::kNumStates; ++s) {
      state[s] = {};
      scale[s] = 0.0f;
      if (t.state[s] == nullptr) continue;
      const DType type = type_of_state<Rule>(t, s);
      fetch(state[s], t.state[s], type, i, count, whole.state[s]);
      if (type == DType::kQuantized8 && count > 0) scale[s] = t.state_scale[s][i / kQuantizedBlock];
    }
    lost = {};
    if (t.compensation) fetch(lost, t.compensation, t.compensation_type, i, count, whole.param);
    average = {};
    if (averages) fetch(average, t.average, t.average_type, i, count, whole.average);
  }
};

__device__ __forceinline__ void store_split_parameter(Four<double>&, const TensorSlot&, int64_t, int, bool,
                                                      const FourBits&) {}
__device__ __forceinline__ void store_split_parameter(Four<float>& value, const TensorSlot& t, int64_t i, int count,
                                                      bool whole, const FourBits& random) {
  store_split(value, t.param, t.compensation, t.compensation_type, i, count, whole, random);
}

// 8-bit state exists only for fp32 arithmetic.
__device__ __forceinline__ Four<double> state_numbers(const Raw<double>& raw, float, const TensorSlot& t, DType, int) {
  return numbers(raw, t.state_type);
}
__device__ __forceinline__ Four<float> state_numbers(const Raw<float>& raw, float scale, const TensorSlot& t,
                                                     DType type, int s) {
  return type == DType::kQuantized8 ? dequantized(raw, scale, !(t.unsigned_states >> s & 1u)) : numbers(raw, type);
}
__device__ __forceinline__ void store_state(Four<double>& value, const TensorSlot& t, DType, int s, int64_t i,
                                            int count, bool whole, const FourBits&) {
  store(value, t.state[s], t.state_type, i, count, whole);
}
__device__ __forceinline__ void store_state(Four<float>& value, const TensorSlot& t, DType type, int s, int64_t i,
                                            int count, bool whole, const FourBits& random) {
  const bool is_unsigned = t.unsigned_states >> s & 1u;
  if (type == DType::kQuantized8)
    store_quantized(value, t.state[s], t.state_scale[s], !is_unsigned, i, count, whole, bits_of_state(random, s));
  else
    store(value, t.state[s], type, i, count, whole, true, bits_of_state(random, s));
}

// The factor and shift of the tensor, or of the element's unit.
template <class S>
__device__ __forceinline__ S scaled_gradient(const TensorSlot& t, const StageCoefs<S>& stage, int64_t i, S param,
                                             S grad) {
  if (t.unit_scale == nullptr) return stage_gradient(stage, param, grad);
  const int64_t unit = i / t.unit_length;
  StageCoefs<S> here = stage;
  here.grad_scale = static_cast<S>(stage.grad_scale * t.unit_scale[unit]);
  here.unit_shift = static_cast<S>(t.unit_shift[unit]);
  return stage_gradient(here, param, grad);
}

// kMeasure: only accumulates the sums for the trust ratio; writes nothing.
template <class Rule, class S, bool kMeasure>
__device__ __forceinline__ void step_four(const TensorSlot& t, const void* grad_pointer, const WholeStreams& whole,
                                          const PreparedTensor<Rule, S>& launch, int64_t i, int count,
                                          ThreadSums& sums) {
  const StageCoefs<S>& stage = launch.stage;
  const bool averages = !kMeasure && (stage.flags & kAverage);
  const Fetched<Rule, S> raw(t, grad_pointer, whole, averages, i, count);
  const bool splits = is_split(t), keeps_lost = t.compensation && !splits;
  const Four<S> stored_before = parameter_numbers(raw.param, raw.lost, t);
  Four<S> lost_before = numbers(splits ? Raw<S>{} : raw.lost, t.param_type), grad = numbers(raw.grad, t.grad_type),
          next;
  Four<S> state[Rule::kNumStates];
#pragma unroll
  for (int s = 0; s < Rule::kNumStates; ++s)
    state[s] = state_numbers(raw.state[s], raw.scale[s], t, type_of_state<Rule>(t, s), s);
#pragma unroll
  for (int k = 0; k < kLanes; ++k) {
    // Elements past the end are zero, belong to no unit and enter no sum.
    if (k < count) grad.v[k] = scaled_gradient(t, stage, i + k, stored_before.v[k], grad.v[k]);
    lost_before.v[k] = rest_of(stored_before.v[k], lost_before.v[k], static_cast<S>(half_unit(t.param_type)));
    const S param = keeps_lost ? stored_before.v[k] + lost_before.v[k] : stored_before.v[k];
    S held[Rule::kNumStates];
#pragma unroll
    for (int s = 0; s < Rule::kNumStates; ++s) held[s] = state[s].v[k];
    const S update = update_or_limited<Rule, kMeasure>(launch.rule, param, grad.v[k], held);
    if constexpr (HasEstimate<Rule>::value) {
      S seen[kObserved], times[kObserved];
      Rule::observe(launch.rule, param, grad.v[k], held, seen, times);
#pragma unroll
      for (int s = 0; s < kObserved; ++s)
        if (k < count) add_product(sums.observed[s], seen[s], times[s]);
    }
#pragma unroll
    for (int s = 0; s < Rule::kNumStates; ++s) state[s].v[k] = held[s];
    next.v[k] = stage_parameter(stage, param, update);
    if constexpr (kMeasure) {
      if (k >= count) continue;
      if (Rule::kMeasured & kGradSquares) add_product(sums.grad_sq, grad.v[k], grad.v[k]);
      if (Rule::kMeasured & kParamSquares) add_product(sums.param_sq, param, param);
      if (Rule::kMeasured & kUpdateSquares) add_product(sums.update_sq, update, update);
    } else if ((stage.flags & kStatistics) && k < count) {
      const S change = next.v[k] - param;
      add_product(sums.grad_sq, grad.v[k], grad.v[k]);
      add_product(sums.param_sq, next.v[k], next.v[k]);
      add_product(sums.update_sq, change, change);
    }
  }
  if constexpr (kMeasure) return;
  FourBits random = {};
  const bool has_narrow_average = averages && size_of(t.average_type) == 2;
  if (sizeof(S) == 4 && (size_of(t.state_type) < 4 || splits || (stage.flags & kStochastic) || has_narrow_average))
    random = random_four(stage.key, i);
#pragma unroll
  for (int s = 0; s < Rule::kNumStates; ++s)
    if (t.state[s] && writes_state<Rule>(launch.rule, s))
      store_state(state[s], t, type_of_state<Rule>(t, s), s, i, count, whole.state[s], random);
  Four<S> stored = next, lost = lost_before;
  if (splits)
    store_split_parameter(stored, t, i, count, whole.param, random);
  else
    store(stored, t.param, t.param_type, i, count, whole.param, stage.flags & kStochastic, random);
  if (keeps_lost) {
#pragma unroll
    for (int k = 0; k < kLanes; ++k) lost.v[k] = finite_or_zero(next.v[k] - stored.v[k]);  // see cpu/step_loop.h
    store(lost, t.compensation, t.param_type, i, count, whole.param);
  }
  if (averages) {
    Four<S> average = numbers(raw.average, t.average_type);
#pragma unroll
    for (int k = 0; k < kLanes; ++k) average.v[k] = stage_average(stage, average.v[k], stored.v[k]);
    store(average, t.average, t.average_type, i, count, whole.average, true, bits_of_state(random, kAverageState));
  }
  if (stage.flags & kStatistics) {
#pragma unroll
    for (int k = 0; k < kLanes; ++k) {
      if (k >= count) continue;
      const bool is_lost = next.v[k] - (stored_before.v[k] + lost_before.v[k]) != S(0) &&
                           stored.v[k] == stored_before.v[k] && lost.v[k] == lost_before.v[k];
      sums.nonfinite += grad.v[k] - grad.v[k] != S(0) ? 1 : 0;
      sums.lost += is_lost ? 1 : 0;
    }
  }
}

// Blocks that a multiprocessor must hold at least, which bounds the registers of a thread: bytes of 600 to 700 ns must
// be in flight, 18 kB on an H100. Three blocks, at 80 registers, request 36 to 60 kB of fp32, half of it in 16 bits. A
// rule of three states and more would spill there, and two of its blocks request 40 kB.
template <class Rule, class S>
constexpr int min_blocks() {
  return sizeof(S) == 8 ? 1 : Rule::kNumStates >= 3 ? 2 : 3;
}

// A block per chunk, last chunk first: the norm kernel read it last, so it may still be in the L2 cache.
template <class Rule, class S, bool kMeasure>
__global__ void __launch_bounds__(kThreads, min_blocks<Rule, S>())
    step_kernel(const __grid_constant__ DeviceTables tables) {
  const int32_t place = static_cast<int32_t>(gridDim.x - 1 - blockIdx.x);
  const Chunk chunk = tables.chunks[place];
  if (*tables.skip) return;
  const TensorSlot t = tables.tensors[chunk.tensor];
  const void* grad = tables.grads[chunk.tensor];
  const auto launch = reinterpret_cast<const PreparedTensor<Rule, S>*>(tables.prepared)[chunk.tensor];
  const WholeStreams whole = whole_streams<Rule>(t, grad);
  const int64_t end = chunk.begin + chunk.count;
  ThreadSums sums;
  // The lanes of a warp iterate together: they share a block of 8-bit state.
  for (int64_t first = chunk.begin; first < end; first += kThreads * kLanes) {
    const int64_t i = first + threadIdx.x * kLanes;
    const int count = end - i >= kLanes ? kLanes : (end > i ? static_cast<int>(end - i) : 0);
    if (count > 0 || t.state_type == DType::kQuantized8)
      step_four<Rule, S, kMeasure>(t, grad, whole, launch, i, count, sums);
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

// SPDX-License-Identifier: Apache-2.0
// The sums that clipping by tensor or unit and centralizing need before the step.
#pragma once

#include "cuda/access.cuh"
#include "cuda/launch.cuh"
#include "cuda/reduce.cuh"

namespace optkit {

// A block per tensor adds the norm kernel's sums of its chunks.
__global__ void __launch_bounds__(kThreads) tensor_norm_kernel(const __grid_constant__ DeviceTables tables) {
  const int32_t first = tables.first_chunk[blockIdx.x], last = tables.first_chunk[blockIdx.x + 1];
  double squares = 0.0;
  for (int32_t k = first + threadIdx.x; k < last; k += kThreads) squares += tables.partial[k].x;
  const double total = block_sum(squares);
  if (threadIdx.x == 0) tables.tensor_sq[blockIdx.x] = total;
}

// A block per unit. `prepared_size` is the size of PreparedTensor, whose first member is the stage.
template <class S>
__global__ void __launch_bounds__(kThreads) unit_kernel(const __grid_constant__ DeviceTables tables,
                                                        const __grid_constant__ GroupTable groups, int prepared_size) {
  if (*tables.skip) return;
  const Unit unit = tables.units[blockIdx.x];
  const TensorSlot& t = tables.tensors[unit.tensor];
  const int32_t g = t.group - groups.first;
  if (g < 0 || g >= groups.count) return;
  const GroupRow& group = groups.row[g];
  const auto& stage =
      *reinterpret_cast<const StageCoefs<S>*>(tables.prepared + static_cast<int64_t>(prepared_size) * unit.tensor);
  const void* grad = tables.grads[unit.tensor];
  const bool needs_param = is_bounded(group.clip_unit_ratio);
  const int64_t end = (unit.index + 1) * t.unit_length;
  // A unit may begin anywhere in its tensor, so its own address decides how it can be read.
  const int64_t begin = unit.index * t.unit_length;
  const bool grad_whole = moves_whole(grad, t.grad_type) && begin % kLanes == 0,
             param_whole = moves_whole(t.param, t.param_type) && moves_whole(t.compensation, t.compensation_type) &&
                           begin % kLanes == 0;
  UnitSums sums = {0.0, 0.0, 0.0};
  for (int64_t i = begin + threadIdx.x * kLanes; i < end; i += kThreads * kLanes) {
    const int count = end - i < kLanes ? static_cast<int>(end - i) : kLanes;
    const Four<S> grad_four = load<S>(grad, t.grad_type, i, count, grad_whole);
    Four<S> param_four = {};
    if (needs_param) param_four = load_parameter<S>(t, i, count, param_whole);
#pragma unroll
    for (int k = 0; k < kLanes; ++k) {
      if (k >= count) continue;
      const double value = grad_four.v[k], param = param_four.v[k];
      sums.grad += static_cast<double>(stage_clip(stage, grad_four.v[k]));
      sums.grad_sq += value * value;
      sums.param_sq += param * param;
    }
  }
  const UnitSums total = {block_sum(sums.grad), block_sum(sums.grad_sq), block_sum(sums.param_sq)};
  if (threadIdx.x != 0) return;
  const double coefficient = unit_coefficient(group, total, static_cast<double>(stage.grad_scale));
  t.unit_scale[unit.index] = coefficient;
  t.unit_shift[unit.index] =
      t.is_vector ? 0.0 : unit_mean(group, total, coefficient, static_cast<double>(t.unit_length));
  tables.unit_clipped[blockIdx.x] =
      needs_param ? Clipped{coefficient * coefficient * total.grad_sq, coefficient < 1.0 ? 1.0 : 0.0} : Clipped{};
}

// One block adds this plan's clipped count to the step's total; the last plan of a step turns the total into its
// report.
__global__ void __launch_bounds__(kThreads)
    clipped_kernel(const __grid_constant__ DeviceTables tables, const __grid_constant__ CudaStepControl control,
                   const Clipped* parts, int64_t num_parts, double scale) {
  if (*tables.skip) return;
  Clipped sums = {0.0, 0.0};
  for (int64_t k = threadIdx.x; k < num_parts; k += kThreads) {
    sums.grad_sq += parts[k].grad_sq;
    sums.num += parts[k].num;
  }
  const Clipped total = {block_sum(sums.grad_sq), block_sum(sums.num)};
  if (threadIdx.x != 0) return;
  control.clipped->grad_sq += total.grad_sq;
  control.clipped->num += total.num;
  if (!control.counts_report || control.clipped->num == 0.0) return;
  if (control.loss_scale) scale /= static_cast<double>(*control.loss_scale);
  control.report[1] = scale * sqrt(control.clipped->grad_sq);
  control.report[3] += 1.0;
}

}  // namespace optkit

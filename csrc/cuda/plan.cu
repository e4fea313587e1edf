// SPDX-License-Identifier: Apache-2.0
// A plan on one device: tables are uploaded once; a step only launches kernels.
#include <algorithm>
#include <string>
#include <vector>

#include "cuda/host.cuh"
#include "cuda/layer_norm_api.h"
#include "cuda/norm.cuh"
#include "cuda/step.cuh"
#include "cuda/unit.cuh"

namespace optkit {
namespace {

struct CudaPlan {
  int rule, is_double, device;
  std::vector<Range> ranges;
  std::vector<DType> grad_types;             // as uploaded
  std::vector<const void*> grads_on_device;  // as stored by this step's norm; empty: not stored
  int num_tensors = 0, num_chunks = 0;
  DeviceTables tables = {};
  DeviceArray<TensorSlot> tensors;
  DeviceArray<Chunk> chunks;
  DeviceArray<int32_t> first_chunk;
  DeviceArray<const void*> grads;
  DeviceArray<unsigned char> prepared;
  DeviceArray<int32_t> skip;
  DeviceArray<double2> partial;
  DeviceArray<Sums> sums;
  DeviceArray<unsigned int> ticket;
  std::vector<char> treats_units;  // per tensor, as uploaded
  bool is_laid_out = false;        // false: an upload is incomplete
  int64_t num_units = 0;
  DeviceArray<Unit> units;
  DeviceArray<double> tensor_sq, unit_numbers;
  DeviceArray<Clipped> unit_clipped, tensor_clipped;
  DeviceArray<Sums> tensor_sums;
};

constexpr size_t kMaxPreparedBytes = 256;  // per tensor; checked against every rule below

const char* create(int rule, int is_double, int device, void** out) {
  auto* plan = new CudaPlan();
  plan->rule = rule;
  plan->is_double = is_double;
  plan->device = device;
  *out = plan;
  return nullptr;
}

void destroy(void* pointer) {
  auto* plan = static_cast<CudaPlan*>(pointer);
  const DeviceGuard guard(plan->device);
  // Python may collect an optimizer while another thread captures a graph, which freeing must not invalidate.
  auto mode = cudaStreamCaptureModeRelaxed;
  cudaThreadExchangeStreamCaptureMode(&mode);
  delete plan;
  cudaThreadExchangeStreamCaptureMode(&mode);
}

// Enough chunks to balance the multiprocessors, and no more: each costs a block launch and a partial sum. Depends only
// on the size, so that sums have the same order on every device.
int64_t chunk_size(const TensorSlot* tensors, int num_tensors) {
  constexpr int64_t kLeast = 2048, kMost = 65536, kEnough = 4096;
  int64_t total = 0;
  for (int t = 0; t < num_tensors; ++t) total += tensors[t].active ? tensors[t].numel : 0;
  int64_t size = kMost;
  while (size > kLeast && total / size < kEnough) size /= 2;
  return size;
}

void cut(const TensorSlot* tensors, int num_tensors, std::vector<Chunk>& chunks, std::vector<int32_t>& first_chunk,
         std::vector<Range>& ranges) {
  const int64_t size = chunk_size(tensors, num_tensors);
  ranges.clear();
  for (int t = 0; t < num_tensors; ++t) {
    if (t % kMaxGrads == 0) ranges.push_back({t, 0, static_cast<int32_t>(chunks.size()), 0});
    first_chunk.push_back(static_cast<int32_t>(chunks.size()));
    for (int64_t begin = 0; tensors[t].active && begin < tensors[t].numel; begin += size)
      chunks.push_back({begin, t, static_cast<int32_t>(std::min(size, tensors[t].numel - begin))});
    ranges.back().num_tensors += 1;
    ranges.back().num_chunks = static_cast<int32_t>(chunks.size()) - ranges.back().first_chunk;
  }
  first_chunk.push_back(static_cast<int32_t>(chunks.size()));
}

// Assigns to every tensor with per-unit stages its part of the device buffers, and lists the units. `slots` and `units`
// must live until the stream has copied them.
const char* layout_units(CudaPlan& plan, std::vector<TensorSlot>& slots, std::vector<Unit>& units,
                         cudaStream_t stream) {
  const auto treated = [&](size_t t) { return plan.treats_units[t] && slots[t].active && slots[t].numel > 0; };
  for (size_t t = 0; t < slots.size(); ++t)
    for (int64_t unit = 0; treated(t) && unit < slots[t].numel / slots[t].unit_length; ++unit)
      units.push_back({unit, static_cast<int32_t>(t)});
  plan.num_units = static_cast<int64_t>(units.size());
  OPTKIT_CUDA("layout", plan.unit_numbers.resize(2 * units.size()));
  OPTKIT_CUDA("layout", plan.unit_clipped.resize(units.size()));
  OPTKIT_CUDA("layout", plan.units.upload(units, stream));
  double* numbers = plan.unit_numbers.get();
  for (size_t t = 0; t < slots.size(); ++t) {
    slots[t].unit_scale = slots[t].unit_shift = nullptr;
    if (!treated(t)) continue;
    const int64_t count = slots[t].numel / slots[t].unit_length;
    slots[t].unit_scale = numbers;
    slots[t].unit_shift = numbers + count;
    numbers += 2 * count;
  }
  return nullptr;
}

const char* lay_out(CudaPlan& plan, const TensorSlot* tensors, int num_tensors, std::vector<char> treats_units,
                    cudaStream_t stream) {
  cudaStreamCaptureStatus capture = cudaStreamCaptureStatusNone;
  OPTKIT_CUDA("layout", cudaStreamIsCapturing(stream, &capture));
  if (capture != cudaStreamCaptureStatusNone)
    return "a graph is being captured; take one step with the same parameters and gradients before";
  plan.is_laid_out = false;
  plan.grads_on_device.clear();
  plan.treats_units = std::move(treats_units);
  plan.treats_units.resize(num_tensors, 0);
  std::vector<Chunk> chunks;
  std::vector<int32_t> first_chunk;
  cut(tensors, num_tensors, chunks, first_chunk, plan.ranges);
  std::vector<TensorSlot> slots(tensors, tensors + num_tensors);
  plan.num_tensors = num_tensors;
  plan.num_chunks = static_cast<int>(chunks.size());
  plan.grad_types.clear();
  for (const TensorSlot& slot : slots) plan.grad_types.push_back(slot.grad_type);
  // Kernels of an earlier layout may still read the memory replaced here.
  OPTKIT_CUDA("layout", cudaStreamSynchronize(stream));
  std::vector<Unit> units;
  if (const char* error = layout_units(plan, slots, units, stream)) return error;
  OPTKIT_CUDA("layout", plan.tensor_sq.resize(num_tensors));
  OPTKIT_CUDA("layout", plan.tensor_clipped.resize(num_tensors));
  OPTKIT_CUDA("layout", plan.tensor_sums.resize(num_tensors));
  OPTKIT_CUDA("layout", plan.tensors.upload(slots, stream));
  OPTKIT_CUDA("layout", plan.chunks.upload(chunks, stream));
  OPTKIT_CUDA("layout", plan.first_chunk.upload(first_chunk, stream));
  OPTKIT_CUDA("layout", plan.grads.resize(num_tensors));
  OPTKIT_CUDA("layout", plan.prepared.resize(kMaxPreparedBytes * num_tensors));
  OPTKIT_CUDA("layout", plan.partial.resize(chunks.size()));
  OPTKIT_CUDA("layout", plan.sums.resize(chunks.size()));
  OPTKIT_CUDA("layout", plan.skip.resize(1));
  OPTKIT_CUDA("layout", plan.ticket.resize(1));
  OPTKIT_CUDA("layout", cudaMemsetAsync(plan.ticket.get(), 0, sizeof(unsigned int), stream));
  OPTKIT_CUDA("layout", cudaStreamSynchronize(stream));
  plan.tables = {plan.tensors.get(),        plan.chunks.get(),     plan.first_chunk.get(), plan.grads.get(),
                 plan.prepared.get(),       plan.skip.get(),       plan.partial.get(),     plan.sums.get(),
                 plan.ticket.get(),         plan.tensor_sq.get(),  plan.units.get(),       plan.unit_clipped.get(),
                 plan.tensor_clipped.get(), plan.tensor_sums.get()};
  plan.is_laid_out = true;
  return nullptr;
}

const char* layout(void* pointer, const TensorSlot* tensors, int num_tensors, void* stream) {
  auto& plan = *static_cast<CudaPlan*>(pointer);
  const DeviceGuard guard(plan.device);
  return lay_out(plan, tensors, num_tensors, plan.treats_units, static_cast<cudaStream_t>(stream));
}

// Only the dtype of a gradient and the per-unit stages may change between steps; the other tables are static.
const char* refresh(CudaPlan& plan, const TensorSlot* tensors, const std::vector<char>& treats_units,
                    cudaStream_t stream) {
  bool fits = plan.is_laid_out && treats_units == plan.treats_units;
  for (int t = 0; t < plan.num_tensors; ++t) fits &= !tensors[t].active || tensors[t].grad_type == plan.grad_types[t];
  return fits ? nullptr : lay_out(plan, tensors, plan.num_tensors, treats_units, stream);
}

std::vector<const void*> addresses(const CudaPlan& plan, const TensorSlot* tensors) {
  std::vector<const void*> grads(plan.num_tensors);
  for (int t = 0; t < plan.num_tensors; ++t) grads[t] = tensors[t].active ? tensors[t].grad : nullptr;
  return grads;
}

template <int kCount>
GradTable<kCount> table_of(const std::vector<const void*>& grads, const Range& range) {
  GradTable<kCount> table = {};
  std::copy_n(grads.begin() + range.first_tensor, range.num_tensors, table.pointer);
  return table;
}

// Calls `use` with the smallest table that holds the addresses of a range.
template <class Use>
cudaError_t with_table(const std::vector<const void*>& grads, const Range& range, Use use) {
  if (range.num_tensors <= kFewGrads) return use(table_of<kFewGrads>(grads, range));
  if (range.num_tensors <= kSomeGrads) return use(table_of<kSomeGrads>(grads, range));
  return use(table_of<kMaxGrads>(grads, range));
}

template <class S>
cudaError_t launch_norm(const CudaPlan& plan, const std::vector<const void*>& grads, const Range& range, double* out,
                        bool accumulate, cudaStream_t stream) {
  return with_table(grads, range, [&](const auto& table) {
    return launch(&norm_kernel<S, std::decay_t<decltype(table)>::kSize>, range.num_chunks, kThreads, 0, stream,
                  plan.tables, table, range, out, static_cast<int>(accumulate));
  });
}

const char* norm(void* pointer, const TensorSlot* tensors, double* out, void* stream_pointer) {
  auto& plan = *static_cast<CudaPlan*>(pointer);
  const auto stream = static_cast<cudaStream_t>(stream_pointer);
  const DeviceGuard guard(plan.device);
  if (const char* error = refresh(plan, tensors, plan.treats_units, stream)) return error;
  std::vector<const void*> grads = addresses(plan, tensors);
  plan.grads_on_device.clear();
  bool accumulate = false;
  for (const Range& range : plan.ranges) {
    if (range.num_chunks == 0) continue;
    const auto run = plan.is_double ? &launch_norm<double> : &launch_norm<float>;
    OPTKIT_CUDA("norm", run(plan, grads, range, out, accumulate, stream));
    accumulate = true;
  }
  if (!accumulate) OPTKIT_CUDA("norm", cudaMemsetAsync(out, 0, 2 * sizeof(double), stream));
  plan.grads_on_device = std::move(grads);
  return nullptr;
}

// Stores the addresses of the gradients on the device, if this step's norm kernel did not.
const char* hand_over_grads(CudaPlan& plan, const TensorSlot* tensors, cudaStream_t stream) {
  const std::vector<const void*> grads = addresses(plan, tensors), there = std::move(plan.grads_on_device);
  plan.grads_on_device.clear();
  if (grads == there) return nullptr;
  for (const Range& range : plan.ranges)
    OPTKIT_CUDA("step", with_table(grads, range, [&](const auto& table) {
                  return launch(&grads_kernel<std::decay_t<decltype(table)>::kSize>, 1, kThreads, 0, stream,
                                plan.tables, table, range);
                }));
  return nullptr;
}

template <class Rule, class S>
cudaError_t launch_prepare(const CudaPlan& plan, const GroupTable& groups, const CudaStepControl& control, Phase phase,
                           cudaStream_t stream) {
  static_assert(sizeof(PreparedTensor<Rule, S>) <= kMaxPreparedBytes, "kMaxPreparedBytes is too small");
  constexpr int kPrepareThreads = 128;
  return launch(&prepare_kernel<Rule, S>, (plan.num_tensors + kPrepareThreads - 1) / kPrepareThreads, kPrepareThreads,
                0, stream, plan.tables, groups, control, plan.num_tensors, phase);
}

template <class Rule, class S, bool kMeasure>
cudaError_t launch_step(const CudaPlan& plan, cudaStream_t stream) {
  if (plan.num_chunks == 0) return cudaSuccess;
  return launch(&step_kernel<Rule, S, kMeasure>, plan.num_chunks, kThreads, 0, stream, plan.tables);
}

using Launch = cudaError_t (*)(const CudaPlan&, cudaStream_t);

template <class Rule, class S>
constexpr Launch measure_of() {
  if constexpr (measures_first<Rule>())
    return &launch_step<Rule, S, true>;
  else
    return nullptr;
}

struct RuleLaunch {
  size_t prepared_size;
  cudaError_t (*prepare)(const CudaPlan&, const GroupTable&, const CudaStepControl&, Phase, cudaStream_t);
  Launch measure;  // null: the rule needs no sums before its step
  Launch step;
};
#define OPTKIT_LAUNCH_FLOAT(name, type)                                                          \
  {sizeof(PreparedTensor<type, float>), &launch_prepare<type, float>, measure_of<type, float>(), \
   &launch_step<type, float, false>},
#define OPTKIT_LAUNCH_DOUBLE(name, type)                                                            \
  {sizeof(PreparedTensor<type, double>), &launch_prepare<type, double>, measure_of<type, double>(), \
   &launch_step<type, double, false>},
constexpr RuleLaunch kFloatRules[] = {OPTKIT_FOR_EACH_RULE(OPTKIT_LAUNCH_FLOAT)};
constexpr RuleLaunch kDoubleRules[] = {OPTKIT_FOR_EACH_RULE(OPTKIT_LAUNCH_DOUBLE)};

// Additional work that the stages of this step require.
struct Needs {
  bool clips_tensors = false, clips_units = false, treats_any = false;
  std::vector<char> treated;  // per tensor: whether it is clipped or centralized per unit
};

Needs needs_of(const CudaPlan& plan, const TensorSlot* tensors, const GroupRow* groups) {
  Needs needs;
  needs.treated.resize(plan.num_tensors, 0);
  for (int t = 0; t < plan.num_tensors; ++t) {
    const GroupRow& group = groups[tensors[t].group];
    needs.clips_tensors |= is_bounded(group.clip_tensor_norm);
    needs.clips_units |= is_bounded(group.clip_unit_ratio);
    needs.treated[t] = tensors[t].is_vector ? is_bounded(group.clip_unit_ratio) : treats_units(group);
    needs.treats_any |= needs.treated[t] != 0;
  }
  return needs;
}

// Computes the coefficients of every tensor, and the scales and shifts of its units.
const char* prepare(const CudaPlan& plan, const RuleLaunch& rule, const GroupRow* groups, const double* const* rates,
                    int num_groups, const CudaStepControl& control, Phase phase, bool treats_units,
                    cudaStream_t stream) {
  for (int first = 0; first < num_groups; first += kMaxGroupsPerLaunch) {
    GroupTable table = {};
    table.first = first;
    table.count = std::min(kMaxGroupsPerLaunch, num_groups - first);
    std::copy_n(groups + first, table.count, table.row);
    std::copy_n(rates + first, table.count, table.rate);
    OPTKIT_CUDA("step", rule.prepare(plan, table, control, phase, stream));
    if (!treats_units || phase == Phase::kMeasured || plan.num_units == 0) continue;
    OPTKIT_CUDA("step", launch(plan.is_double ? &unit_kernel<double> : &unit_kernel<float>,
                               static_cast<unsigned>(plan.num_units), kThreads, 0, stream, plan.tables, table,
                               static_cast<int>(rule.prepared_size)));
  }
  return nullptr;
}

// Adds the clipped tensors or units to the step's total.
cudaError_t count_clipped(const CudaPlan& plan, const CudaStepControl& control, bool by_unit, cudaStream_t stream) {
  const Clipped* parts = by_unit ? plan.unit_clipped.get() : plan.tensor_clipped.get();
  const int64_t num_parts = by_unit ? plan.num_units : plan.num_tensors;
  return launch(&clipped_kernel, 1, kThreads, 0, stream, plan.tables, control, parts, num_parts, control.scale);
}

const char* step(void* pointer, const TensorSlot* tensors, const GroupRow* groups, const double* const* rates,
                 int num_groups, const CudaStepControl* control, void* stream_pointer) {
  auto& plan = *static_cast<CudaPlan*>(pointer);
  const auto stream = static_cast<cudaStream_t>(stream_pointer);
  const DeviceGuard guard(plan.device);
  const Needs needs = needs_of(plan, tensors, groups);
  if (const char* error = refresh(plan, tensors, needs.treated, stream)) return error;
  if (const char* error = hand_over_grads(plan, tensors, stream)) return error;
  if (needs.clips_tensors) {
    OPTKIT_CUDA("step", launch(&tensor_norm_kernel, plan.num_tensors, kThreads, 0, stream, plan.tables));
    const size_t num_bytes = plan.num_tensors * sizeof(Clipped);
    OPTKIT_CUDA("step", cudaMemsetAsync(plan.tensor_clipped.get(), 0, num_bytes, stream));
  }
  const RuleLaunch& rule = plan.is_double ? kDoubleRules[plan.rule] : kFloatRules[plan.rule];
  const auto prepare_for = [&](Phase phase) {
    return prepare(plan, rule, groups, rates, num_groups, *control, phase, needs.treats_any, stream);
  };
  const auto add_sums = [&](Sums* out) {
    return launch(&statistics_kernel, plan.num_tensors, kThreads, 0, stream, plan.tables, out);
  };
  if (rule.measure != nullptr) {
    if (const char* error = prepare_for(Phase::kMeasure)) return error;
    OPTKIT_CUDA("step", rule.measure(plan, stream));
    OPTKIT_CUDA("step", add_sums(plan.tensor_sums.get()));
    if (const char* error = prepare_for(Phase::kMeasured)) return error;
  } else if (const char* error = prepare_for(Phase::kOnly)) {
    return error;
  }
  if (needs.clips_tensors || needs.clips_units)
    OPTKIT_CUDA("step", count_clipped(plan, *control, needs.clips_units, stream));
  OPTKIT_CUDA("step", rule.step(plan, stream));
  if (control->statistics) OPTKIT_CUDA("step", add_sums(control->statistics));
  return nullptr;
}

#define OPTKIT_STRING2(...) #__VA_ARGS__
#define OPTKIT_STRING(...) OPTKIT_STRING2(__VA_ARGS__)

#if defined(__CUDACC__)
constexpr int kOnHost = 0;
#else
constexpr int kOnHost = 1;
#endif

const CudaApi api = {kCudaApiVersion,
                     kOnHost,
                     &create,
                     &destroy,
                     &layout,
                     &norm,
                     &step,
                     &cuda_norm_forward,
                     &cuda_norm_backward_parts,
                     &cuda_norm_backward,
                     OPTKIT_STRING(__CUDA_ARCH_LIST__),
                     kCudaRuleNames};

}  // namespace
}  // namespace optkit

extern "C" __attribute__((visibility("default"))) const optkit::CudaApi* optkit_cuda_api() { return &optkit::api; }

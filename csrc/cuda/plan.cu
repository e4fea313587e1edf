// SPDX-License-Identifier: Apache-2.0
// A plan on one device: tables uploaded once, then launches only.
#include <algorithm>
#include <string>
#include <vector>

#include "cuda/layer_norm_api.h"
#include "cuda/norm.cuh"
#include "cuda/step.cuh"
#include "cuda/unit.cuh"

namespace optkit {
namespace {

thread_local std::string last_error;

const char* failed(cudaError_t status, const char* what) {
  if (status == cudaSuccess) return nullptr;
  last_error = std::string(what) + ": " + cudaGetErrorString(status);
  return last_error.c_str();
}

#define OPTKIT_CUDA(call)                                        \
  do {                                                           \
    if (const char* error = failed((call), #call)) return error; \
  } while (0)

// Makes `device` current while it lives.
class DeviceGuard {
 public:
  explicit DeviceGuard(int device) {
    cudaGetDevice(&before_);
    cudaSetDevice(device);
  }
  ~DeviceGuard() { cudaSetDevice(before_); }

 private:
  int before_ = 0;
};

template <class T>
class DeviceArray {
 public:
  ~DeviceArray() { cudaFree(data_); }
  cudaError_t resize(size_t count) {
    if (count <= capacity_) return cudaSuccess;
    cudaFree(data_);
    data_ = nullptr;
    capacity_ = 0;
    const cudaError_t status = cudaMalloc(reinterpret_cast<void**>(&data_), count * sizeof(T));
    if (status == cudaSuccess) capacity_ = count;
    return status;
  }
  cudaError_t upload(const std::vector<T>& host, cudaStream_t stream) {
    const cudaError_t status = resize(host.size());
    if (status != cudaSuccess || host.empty()) return status;
    return cudaMemcpyAsync(data_, host.data(), host.size() * sizeof(T), cudaMemcpyHostToDevice, stream);
  }
  T* get() const { return data_; }

 private:
  T* data_ = nullptr;
  size_t capacity_ = 0;
};

struct CudaPlan {
  int rule, is_double, device;
  std::vector<Range> ranges;
  std::vector<DType> grad_types;  // as uploaded
  int num_tensors = 0;
  DeviceTables tables = {};
  DeviceArray<TensorSlot> tensors;
  DeviceArray<Chunk> chunks;
  DeviceArray<int32_t> first_chunk;
  DeviceArray<unsigned char> prepared;
  DeviceArray<int32_t> skip;
  DeviceArray<double> partial;
  DeviceArray<Sums> sums;
  DeviceArray<unsigned int> ticket;
  std::vector<char> treats_units;  // per tensor, as uploaded
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
  delete plan;
}

// Small chunks while there are few: every multiprocessor shall have several.
int64_t chunk_size(const TensorSlot* tensors, int num_tensors) {
  int64_t total = 0;
  for (int t = 0; t < num_tensors; ++t) total += tensors[t].active ? tensors[t].numel : 0;
  return total < int64_t{16} << 20 ? kChunk / 4 : kChunk;
}

void cut(const TensorSlot* tensors, int num_tensors, std::vector<Chunk>& chunks, std::vector<int32_t>& first_chunk,
         std::vector<Range>& ranges) {
  const int64_t size = chunk_size(tensors, num_tensors);
  ranges.clear();
  for (int t = 0; t < num_tensors; ++t) {
    if (t % kMaxGrads == 0) ranges.push_back({t, 0, static_cast<int32_t>(chunks.size()), 0, 0, 0});
    first_chunk.push_back(static_cast<int32_t>(chunks.size()));
    for (int64_t begin = 0; tensors[t].active && begin < tensors[t].numel; begin += size)
      chunks.push_back({begin, t, static_cast<int32_t>(std::min(size, tensors[t].numel - begin))});
    ranges.back().num_tensors += 1;
    ranges.back().num_chunks = static_cast<int32_t>(chunks.size()) - ranges.back().first_chunk;
  }
  first_chunk.push_back(static_cast<int32_t>(chunks.size()));
}

// Points every tensor whose units are treated by themselves at its part of the device's numbers, and lists the units.
const char* layout_units(CudaPlan& plan, std::vector<TensorSlot>& slots, cudaStream_t stream) {
  plan.treats_units.resize(slots.size(), 0);
  std::vector<Unit> units;
  for (Range& range : plan.ranges) {
    range.first_unit = static_cast<int64_t>(units.size());
    for (int32_t t = range.first_tensor; t < range.first_tensor + range.num_tensors; ++t) {
      const TensorSlot& slot = slots[t];
      if (!plan.treats_units[t] || !slot.active || slot.numel == 0) continue;
      for (int64_t unit = 0; unit < slot.numel / slot.unit_length; ++unit) units.push_back({unit, t});
    }
    range.num_units = static_cast<int64_t>(units.size()) - range.first_unit;
  }
  plan.num_units = static_cast<int64_t>(units.size());
  OPTKIT_CUDA(plan.unit_numbers.resize(2 * units.size()));
  OPTKIT_CUDA(plan.unit_clipped.resize(units.size()));
  OPTKIT_CUDA(plan.units.upload(units, stream));
  double* numbers = plan.unit_numbers.get();
  for (size_t t = 0; t < slots.size(); ++t) {
    slots[t].unit_scale = slots[t].unit_shift = nullptr;
    if (!plan.treats_units[t] || !slots[t].active || slots[t].numel == 0) continue;
    const int64_t count = slots[t].numel / slots[t].unit_length;
    slots[t].unit_scale = numbers;
    slots[t].unit_shift = numbers + count;
    numbers += 2 * count;
  }
  return nullptr;
}

const char* layout(void* pointer, const TensorSlot* tensors, int num_tensors, void* stream_pointer) {
  auto& plan = *static_cast<CudaPlan*>(pointer);
  const auto stream = static_cast<cudaStream_t>(stream_pointer);
  const DeviceGuard guard(plan.device);
  std::vector<Chunk> chunks;
  std::vector<int32_t> first_chunk;
  cut(tensors, num_tensors, chunks, first_chunk, plan.ranges);
  std::vector<TensorSlot> slots(tensors, tensors + num_tensors);
  plan.num_tensors = num_tensors;
  plan.grad_types.clear();
  for (const TensorSlot& slot : slots) plan.grad_types.push_back(slot.grad_type);
  // Kernels of an earlier layout may still read what is replaced here.
  OPTKIT_CUDA(cudaStreamSynchronize(stream));
  if (const char* error = layout_units(plan, slots, stream)) return error;
  OPTKIT_CUDA(plan.tensor_sq.resize(num_tensors));
  OPTKIT_CUDA(plan.tensor_clipped.resize(num_tensors));
  OPTKIT_CUDA(plan.tensor_sums.resize(num_tensors));
  OPTKIT_CUDA(plan.tensors.upload(slots, stream));
  OPTKIT_CUDA(plan.chunks.upload(chunks, stream));
  OPTKIT_CUDA(plan.first_chunk.upload(first_chunk, stream));
  OPTKIT_CUDA(plan.prepared.resize(kMaxPreparedBytes * num_tensors));
  OPTKIT_CUDA(plan.partial.resize(2 * chunks.size()));
  OPTKIT_CUDA(plan.sums.resize(chunks.size()));
  OPTKIT_CUDA(plan.skip.resize(1));
  OPTKIT_CUDA(plan.ticket.resize(1));
  OPTKIT_CUDA(cudaMemsetAsync(plan.ticket.get(), 0, sizeof(unsigned int), stream));
  OPTKIT_CUDA(cudaStreamSynchronize(stream));
  plan.tables = {plan.tensors.get(),    plan.chunks.get(),  plan.first_chunk.get(),  plan.prepared.get(),
                 plan.skip.get(),       plan.partial.get(), plan.sums.get(),         plan.ticket.get(),
                 plan.tensor_sq.get(),  plan.units.get(),   plan.unit_clipped.get(), plan.tensor_clipped.get(),
                 plan.tensor_sums.get()};
  return nullptr;
}

// A gradient may come in another dtype than last time; everything else in the tables is static.
const char* refresh(CudaPlan& plan, const TensorSlot* tensors, cudaStream_t stream) {
  for (int t = 0; t < plan.num_tensors; ++t)
    if (tensors[t].active && tensors[t].grad_type != plan.grad_types[t])
      return layout(&plan, tensors, plan.num_tensors, stream);
  return nullptr;
}

GradTable grads_of(const TensorSlot* tensors, const Range& range) {
  GradTable table;
  for (int t = 0; t < range.num_tensors; ++t) table.pointer[t] = tensors[range.first_tensor + t].grad;
  return table;
}

const char* norm(void* pointer, const TensorSlot* tensors, double* out, void* stream_pointer) {
  auto& plan = *static_cast<CudaPlan*>(pointer);
  const auto stream = static_cast<cudaStream_t>(stream_pointer);
  const DeviceGuard guard(plan.device);
  if (const char* error = refresh(plan, tensors, stream)) return error;
  bool accumulate = false;
  for (const Range& range : plan.ranges) {
    if (range.num_chunks == 0) continue;
    const auto kernel = plan.is_double ? &norm_kernel<double> : &norm_kernel<float>;
    kernel<<<range.num_chunks, kThreads, 0, stream>>>(plan.tables, grads_of(tensors, range), range, out, accumulate);
    accumulate = true;
  }
  if (!accumulate) OPTKIT_CUDA(cudaMemsetAsync(out, 0, 2 * sizeof(double), stream));
  return failed(cudaGetLastError(), "norm");
}

template <class Rule, class S>
void launch_prepare(const CudaPlan& plan, const GroupTable& groups, const CudaStepControl& control, Phase phase,
                    cudaStream_t stream) {
  static_assert(sizeof(PreparedTensor<Rule, S>) <= kMaxPreparedBytes, "kMaxPreparedBytes is too small");
  constexpr int kPrepareThreads = 128;
  prepare_kernel<Rule, S><<<(plan.num_tensors + kPrepareThreads - 1) / kPrepareThreads, kPrepareThreads, 0, stream>>>(
      plan.tables, groups, control, plan.num_tensors, phase);
}

template <class Rule, class S>
void launch_step(const CudaPlan& plan, const TensorSlot* tensors, const Range& range, cudaStream_t stream) {
  step_kernel<Rule, S, false><<<range.num_chunks, kThreads, 0, stream>>>(plan.tables, grads_of(tensors, range), range);
}

template <class Rule, class S>
void launch_measure(const CudaPlan& plan, const TensorSlot* tensors, const Range& range, cudaStream_t stream) {
  step_kernel<Rule, S, true><<<range.num_chunks, kThreads, 0, stream>>>(plan.tables, grads_of(tensors, range), range);
}

using Launch = void (*)(const CudaPlan&, const TensorSlot*, const Range&, cudaStream_t);

template <class Rule, class S>
constexpr Launch measure_of() {
  if constexpr (HasTrust<Rule>::value)
    return &launch_measure<Rule, S>;
  else
    return nullptr;
}

template <class S>
void launch_units(const CudaPlan& plan, const TensorSlot* tensors, const Range& range, const GroupTable& groups,
                  size_t prepared_size, cudaStream_t stream) {
  unit_kernel<S><<<static_cast<unsigned>(range.num_units), kThreads, 0, stream>>>(
      plan.tables, grads_of(tensors, range), range, groups, static_cast<int>(prepared_size));
}

struct RuleLaunch {
  size_t prepared_size;
  void (*prepare)(const CudaPlan&, const GroupTable&, const CudaStepControl&, Phase, cudaStream_t);
  Launch measure;  // null: the rule has no trust
  Launch step;
};
#define OPTKIT_LAUNCH_FLOAT(name, type)                                                          \
  {sizeof(PreparedTensor<type, float>), &launch_prepare<type, float>, measure_of<type, float>(), \
   &launch_step<type, float>},
#define OPTKIT_LAUNCH_DOUBLE(name, type)                                                            \
  {sizeof(PreparedTensor<type, double>), &launch_prepare<type, double>, measure_of<type, double>(), \
   &launch_step<type, double>},
constexpr RuleLaunch kFloatRules[] = {OPTKIT_FOR_EACH_RULE(OPTKIT_LAUNCH_FLOAT)};
constexpr RuleLaunch kDoubleRules[] = {OPTKIT_FOR_EACH_RULE(OPTKIT_LAUNCH_DOUBLE)};

// Adds what was clipped to the step's total.
void count_clipped(const CudaPlan& plan, const CudaStepControl& control, bool by_unit, cudaStream_t stream) {
  const Clipped* parts = by_unit ? plan.unit_clipped.get() : plan.tensor_clipped.get();
  const int64_t num_parts = by_unit ? plan.num_units : plan.num_tensors;
  clipped_kernel<<<1, kThreads, 0, stream>>>(plan.tables, control, parts, num_parts, control.scale);
}

const char* step(void* pointer, const TensorSlot* tensors, const GroupRow* groups, int num_groups,
                 const CudaStepControl* control, void* stream_pointer) {
  auto& plan = *static_cast<CudaPlan*>(pointer);
  const auto stream = static_cast<cudaStream_t>(stream_pointer);
  const DeviceGuard guard(plan.device);
  bool clips_tensors = false, clips_units = false, treats_any = false;
  std::vector<char> treated(plan.num_tensors, 0);
  for (int t = 0; t < plan.num_tensors; ++t) {
    const GroupRow& group = groups[tensors[t].group];
    clips_tensors |= group.clip_tensor_norm < 1e300;
    clips_units |= group.clip_unit_ratio < 1e300;
    treated[t] = tensors[t].is_vector ? group.clip_unit_ratio < 1e300 : treats_units(group);
    treats_any |= treated[t] != 0;
  }
  if (treated != plan.treats_units) {
    plan.treats_units = treated;
    if (const char* error = layout(&plan, tensors, plan.num_tensors, stream_pointer)) return error;
  }
  if (const char* error = refresh(plan, tensors, stream)) return error;
  if (clips_tensors) {
    tensor_norm_kernel<<<plan.num_tensors, kThreads, 0, stream>>>(plan.tables);
    OPTKIT_CUDA(cudaMemsetAsync(plan.tensor_clipped.get(), 0, plan.num_tensors * sizeof(Clipped), stream));
  }
  const RuleLaunch& rule = plan.is_double ? kDoubleRules[plan.rule] : kFloatRules[plan.rule];
  CudaStepControl here = *control;
  const auto prepare = [&](Phase phase) {
    for (int first = 0; first < num_groups; first += kMaxGroupsPerLaunch) {
      GroupTable table = {};
      table.first = first;
      table.count = std::min(kMaxGroupsPerLaunch, num_groups - first);
      std::copy(groups + first, groups + first + table.count, table.row);
      rule.prepare(plan, table, here, phase, stream);
      if (!treats_any || phase == Phase::kMeasured) continue;
      const auto units = plan.is_double ? &launch_units<double> : &launch_units<float>;
      for (const Range& range : plan.ranges)
        if (range.num_units > 0) units(plan, tensors, range, table, rule.prepared_size, stream);
    }
  };
  const auto walk = [&](Launch launch) {
    for (const Range& range : plan.ranges)
      if (range.num_chunks > 0) launch(plan, tensors, range, stream);
  };
  if (rule.measure != nullptr && plan.num_tensors > 0) {
    prepare(Phase::kMeasure);
    walk(rule.measure);
    statistics_kernel<<<plan.num_tensors, kThreads, 0, stream>>>(plan.tables, plan.tensor_sums.get());
    prepare(Phase::kMeasured);
  } else {
    prepare(Phase::kOnly);
  }
  if (clips_tensors || clips_units) count_clipped(plan, here, clips_units, stream);
  walk(rule.step);
  if (control->statistics && plan.num_tensors > 0)
    statistics_kernel<<<plan.num_tensors, kThreads, 0, stream>>>(plan.tables, control->statistics);
  return failed(cudaGetLastError(), "step");
}

#define OPTKIT_STRING2(...) #__VA_ARGS__
#define OPTKIT_STRING(...) OPTKIT_STRING2(__VA_ARGS__)

const CudaApi api = {kCudaApiVersion,
                     &create,
                     &destroy,
                     &layout,
                     &norm,
                     &step,
                     &cuda_norm_forward,
                     &cuda_norm_backward_parts,
                     &cuda_norm_backward,
                     OPTKIT_STRING(__CUDA_ARCH_LIST__)};

}  // namespace
}  // namespace optkit

extern "C" __attribute__((visibility("default"))) const optkit::CudaApi* optkit_cuda_api() { return &optkit::api; }

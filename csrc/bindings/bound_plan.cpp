// SPDX-License-Identifier: Apache-2.0
#include "bindings/bound_plan.h"

#include <algorithm>
#include <limits>
#include <numeric>
#include <stdexcept>

#include "core/quantized_state.h"

namespace py = pybind11;

namespace optkit {
namespace {

constexpr const char* kMoved = "a parameter, its state or its gradient was moved or replaced while the step ran.";

[[noreturn]] void refuse(const std::string& name, const std::string& requirement) {
  throw std::invalid_argument("Plan.add_tensor(" + name + "=...): " + requirement + ".");
}

int64_t numel_of(const std::vector<int64_t>& sizes) {
  return std::accumulate(sizes.begin(), sizes.end(), int64_t{1}, std::multiplies<int64_t>());
}

// Bytes from the first element to the end of the last one; strides of our tensors are never negative.
int64_t span_of(const TensorView& view) {
  int64_t span = 1;
  for (int64_t d = 0; d < view.dim; ++d) {
    if (view.sizes[d] == 0) return 0;
    span += (view.sizes[d] - 1) * view.strides[d];
  }
  return span * size_of(view.dtype);
}

// Whether the elements fill a block of memory, in any order of dimensions.
bool is_dense(const Facts& facts) {
  std::vector<std::pair<int64_t, int64_t>> dims;
  for (std::size_t d = 0; d < facts.sizes.size(); ++d)
    if (facts.sizes[d] != 1) dims.emplace_back(facts.strides[d], facts.sizes[d]);
  std::sort(dims.begin(), dims.end());
  int64_t expected = 1;
  for (const auto& [stride, size] : dims) {
    if (stride != expected && numel_of(facts.sizes) > 0) return false;
    expected *= size;
  }
  return true;
}

// Whether writing a parameter would overwrite elements of its gradient before they are read. Both are dense. At the
// same address every element is read before it is written.
bool overlaps(const void* grad, const TensorSlot& slot, int64_t grad_item) {
  const auto g = reinterpret_cast<uintptr_t>(grad), p = reinterpret_cast<uintptr_t>(slot.param);
  const auto numel = static_cast<uintptr_t>(slot.numel);
  return g != p && g < p + numel * static_cast<uintptr_t>(size_of(slot.param_type)) &&
         p < g + numel * static_cast<uintptr_t>(grad_item);
}

// Strides of dimensions of size 1 are ignored.
bool in_same_order(const Facts& a, const Facts& b) {
  if (a.sizes != b.sizes) return false;
  for (std::size_t d = 0; d < a.sizes.size(); ++d)
    if (a.sizes[d] > 1 && a.strides[d] != b.strides[d]) return false;
  return true;
}

std::string text(const py::object& name) { return name.is_none() ? "None" : py::cast<std::string>(py::str(name)); }

int place_of(const std::vector<py::object>& names, PyObject* name) {
  for (std::size_t k = 0; k < names.size(); ++k)
    if (!names[k].is_none() && PyObject_RichCompareBool(names[k].ptr(), name, Py_EQ) == 1) return static_cast<int>(k);
  PyErr_Clear();
  return -1;
}

bool is_named(PyObject* name, const char* expected) {
  return PyUnicode_Check(name) && PyUnicode_CompareWithASCIIString(name, expected) == 0;
}

// A per-parameter number that is carried across steps.
float* number(const Facts& facts, const std::string& name) {
  if (facts.dtype != DType::kFloat32 || numel_of(facts.sizes) != 1) refuse(name, "must be one fp32 number");
  return static_cast<float*>(facts.data);
}

// Fills the slot of one parameter with its state tensors, checking each against the parameter.
class SlotFiller {
 public:
  SlotFiller(const Plan& plan, const Facts& param, const StateNames& names, TensorSlot* slot)
      : traits_(plan.traits()), is_double_(plan.is_double), param_(param), names_(names), slot_(slot) {}

  // Role of a state entry in the walk.
  enum class Role { kNone, kState, kScale, kScalar, kStep, kCompensation, kCorrection, kAverage, kNumAveraged };
  struct Found {
    Role role;
    int place;  // index among those of the rule
  };

  Found find(PyObject* key) const {
    if (const int k = place_of(names_.states, key); k >= 0) return {Role::kState, k};
    if (const int k = place_of(names_.scales, key); k >= 0) return {Role::kScale, k};
    if (const int k = place_of(names_.scalars, key); k >= 0) return {Role::kScalar, k};
    if (is_named(key, "step")) return {Role::kStep, 0};
    if (is_named(key, "compensation")) return {Role::kCompensation, 0};
    if (is_named(key, "correction8")) return {Role::kCorrection, 0};
    if (is_named(key, "correction16")) return {Role::kCorrection, 1};
    if (names_.average.is_none()) return {Role::kNone, 0};
    if (place_of({names_.average}, key) >= 0) return {Role::kAverage, 0};
    return {is_named(key, "num_averaged") ? Role::kNumAveraged : Role::kNone, 0};
  }

  void put(const Found& found, const Facts& facts, const std::string& name) {
    switch (found.role) {
      case Role::kNone:
        break;
      case Role::kState:
        return put_state(found.place, facts, name);
      case Role::kScale:
        return put_scale(found.place, facts, name);
      case Role::kScalar:
        slot_->scalar[found.place] = number(facts, name);
        break;
      case Role::kStep:
        slot_->step = number(facts, name);
        break;
      case Role::kCompensation:
        if (facts.dtype != param_.dtype) refuse(name, "must be like the parameter");
        return put_compensation(facts, name);
      case Role::kCorrection:
        if (param_.dtype != DType::kBFloat16 || facts.dtype != (found.place == 0 ? DType::kInt8 : DType::kInt16))
          refuse(name, "must be in as many bits as its name says, beside a bfloat16 parameter");
        return put_compensation(facts, name);
      case Role::kAverage:
        return put_average(facts, name);
      case Role::kNumAveraged:
        slot_->num_averaged = number(facts, name);
        break;
    }
  }

  void check_complete() const {
    if (slot_->step == nullptr) refuse("step", "must be in the state");
    for (std::size_t k = 0; k < names_.states.size(); ++k) {
      if (!names_.states[k].is_none() && slot_->state[k] == nullptr && param_numel() > 0)
        refuse(text(names_.states[k]), "must be in the state");
      const bool is_code = slot_->state[k] != nullptr && type_of(static_cast<int>(k)) == DType::kQuantized8;
      if (is_code && slot_->state_scale[k] == nullptr && param_numel() > 0)
        refuse(text(names_.states[k]), "must have scales");
    }
    for (int n = 0; n < traits_.num_scalars; ++n)
      if (slot_->scalar[n] == nullptr && (traits_.needs_scalars || !names_.scalars.empty()))
        refuse("scalars", "every number of the rule must be in the state");
    if (!names_.average.is_none() &&
        (slot_->num_averaged == nullptr || (slot_->average == nullptr && param_numel() > 0)))
      refuse("average", "it and num_averaged must be in the state");
  }

 private:
  int64_t param_numel() const { return numel_of(param_.sizes); }
  DType type_of(int k) const {
    return traits_.full_precision_states >> k & 1u && !is_double_ ? DType::kFloat32 : slot_->state_type;
  }
  bool is_by_element(int k) const { return k < traits_.num_states - traits_.num_factor_states; }

  void put_state(int k, const Facts& facts, const std::string& name) {
    const bool is_full_precision = traits_.full_precision_states >> k & 1u;
    if (is_double_ != (facts.dtype == DType::kFloat64))
      refuse(name, "must be fp64 beside an fp64 parameter, only there");
    if (is_full_precision && !is_double_ && facts.dtype != DType::kFloat32) refuse(name, "must be fp32");
    if (!is_floating(facts.dtype) && facts.dtype != DType::kQuantized8)
      refuse(name, "must be floating-point numbers or 8-bit codes");
    if (!is_full_precision && has_type_ && facts.dtype != slot_->state_type)
      refuse(name, "must have the dtype of the others");
    if (!is_full_precision) slot_->state_type = facts.dtype, has_type_ = true;
    if (is_by_element(k)) {
      if (!in_same_order(facts, param_)) refuse(name, "must have the shape and strides of the parameter");
    } else {
      const int64_t other = k == traits_.num_states - 2 ? slot_->columns : slot_->rows;
      if (param_numel() > 0 && (numel_of(facts.sizes) * other != param_numel() || !is_dense(facts)))
        refuse(name, "must hold one number for each row, or each column, without gaps");
    }
    slot_->state[k] = facts.data;
  }
  void put_scale(int k, const Facts& facts, const std::string& name) {
    const int64_t blocks = (param_numel() + kQuantizedBlock - 1) / kQuantizedBlock;
    if (facts.dtype != DType::kFloat32 || numel_of(facts.sizes) != blocks || !is_dense(facts))
      refuse(name, "must be " + std::to_string(blocks) + " fp32 numbers without gaps");
    slot_->state_scale[k] = static_cast<float*>(facts.data);
  }
  void put_compensation(const Facts& facts, const std::string& name) {
    if (!in_same_order(facts, param_)) refuse(name, "must be like the parameter");
    if (slot_->compensation != nullptr) refuse(name, "must be the only rest of its parameter");
    slot_->compensation = facts.data;
    slot_->compensation_type = facts.dtype;
  }
  void put_average(const Facts& facts, const std::string& name) {
    if (!is_floating(facts.dtype) || is_double_ != (facts.dtype == DType::kFloat64) || !in_same_order(facts, param_))
      refuse(name, "must have the shape and strides of the parameter, and be fp64 beside an fp64 one, only there");
    slot_->average = facts.data;
    slot_->average_type = facts.dtype;
  }

  const RuleTraits& traits_;
  const bool is_double_;
  const Facts& param_;
  const StateNames& names_;
  TensorSlot* slot_;
  bool has_type_ = false;
};

}  // namespace

bool Facts::hold_for(const TensorView& view) const {
  return view.data == data && view.dtype == dtype && view.num_bytes >= num_bytes &&
         view.dim == static_cast<int64_t>(sizes.size()) && std::equal(sizes.begin(), sizes.end(), view.sizes) &&
         std::equal(strides.begin(), strides.end(), view.strides);
}

// Marks a plan as in use: its buffers serve only one walk at a time.
class BoundPlan::Use {
 public:
  Use(BoundPlan* plan, const char* method) : plan_(plan) {
    if (plan->is_in_use_) throw std::runtime_error(std::string("Plan.") + method + ": another thread is in this plan.");
    plan->is_in_use_ = true;
  }
  ~Use() { plan_->is_in_use_ = false; }
  Use(const Use&) = delete;
  Use& operator=(const Use&) = delete;

 private:
  BoundPlan* plan_;
};

BoundPlan::BoundPlan(const std::string& rule, bool is_double, int device) : plan_(rule, is_double, device) {}

BoundPlan::~BoundPlan() = default;

Facts BoundPlan::facts_of(PyObject* tensor, const std::string& name) const {
  TensorView view;
  const Local part(tensor);
  if (!part.look_at(&view)) refuse(name, "must be a tensor with plain memory of its own");
  const int32_t device = plan_.device >= 0 && plan_.is_on_cuda() ? plan_.device : kCpu;
  if (view.device != device) refuse(name, "must be on the device of the plan");
  Facts facts = {view.data,
                 view.dtype,
                 {view.sizes, view.sizes + view.dim},
                 {view.strides, view.strides + view.dim},
                 span_of(view)};
  if (view.num_bytes < facts.num_bytes) refuse(name, "has less memory than its shape needs");
  return facts;
}

void BoundPlan::add_tensor(const py::object& param, const py::dict& state, const StateNames& names,
                           uint32_t unsigned_states, int group, int tensor_index) {
  const Use use(this, "add_tensor");
  const RuleTraits& traits = plan_.traits();
  if (names.states.size() != static_cast<std::size_t>(traits.num_states) || names.scales.size() != names.states.size())
    refuse("states", "and scales must name one for each state of the rule");
  if (names.scalars.size() > static_cast<std::size_t>(traits.num_scalars))
    refuse("scalars", "must name those of the rule");
  if (group < 0 || tensor_index < 0) refuse("group", "and tensor_index must not be negative");

  Watched watched;
  watched.param = facts_of(param.ptr(), "param");
  const Facts& facts = watched.param;
  if (!is_floating(facts.dtype) || plan_.is_double != (facts.dtype == DType::kFloat64) || !is_dense(facts))
    refuse("param", "must be without gaps, and in fp64 under a plan in fp64, only there");
  TensorSlot slot = {};
  const auto& sizes = facts.sizes;
  slot.param = facts.data;
  slot.unsigned_states = unsigned_states;
  slot.numel = numel_of(sizes);
  slot.is_vector = sizes.size() < 2 ? 1 : 0;
  slot.unit_length = sizes.size() < 2 || sizes[0] == 0 ? slot.numel : slot.numel / sizes[0];
  slot.columns = sizes.empty() ? 1 : sizes.back();
  slot.rows = sizes.size() < 2 ? 1 : sizes[sizes.size() - 2];
  slot.param_type = slot.grad_type = slot.state_type = slot.average_type = slot.compensation_type = facts.dtype;
  slot.group = group;
  slot.index = tensor_index;

  SlotFiller filler(plan_, facts, names, &slot);
  for (const auto& [key, value] : state) {
    const SlotFiller::Found found = filler.find(key.ptr());
    Named named = {py::reinterpret_borrow<py::object>(key), found.role != SlotFiller::Role::kNone, {}};
    if (named.is_walked) {
      named.facts = facts_of(value.ptr(), text(named.name));
      filler.put(found, named.facts, text(named.name));
    }
    watched.state.push_back(std::move(named));
  }
  filler.check_complete();
  plan_.tensors.push_back(slot);
  watched_.push_back(std::move(watched));
  release();
  is_active_set_ = false;
}

void BoundPlan::set_active(const std::vector<int>& indices) {
  const Use use(this, "set_active");
  release();
  plan_.set_active(indices);
  is_active_set_ = true;
}

// Whether a gradient can be walked with the indexing of the parameter.
bool BoundPlan::fits(const TensorView& grad, const Facts& param) const {
  const int32_t device = plan_.is_on_cuda() ? plan_.device : kCpu;
  if (grad.device != device || grad.dim != static_cast<int64_t>(param.sizes.size())) return false;
  if (!is_floating(grad.dtype) || (grad.dtype == DType::kFloat64) != plan_.is_double) return false;
  for (int64_t d = 0; d < grad.dim; ++d) {
    if (grad.sizes[d] != param.sizes[d]) return false;
    if (grad.sizes[d] > 1 && grad.strides[d] != param.strides[d]) return false;
  }
  return grad.num_bytes >= span_of(grad);
}

int64_t BoundPlan::bind(const py::list& params, const py::list& states, const py::list& grads, int64_t start) {
  const Use use(this, "bind");
  const auto count = static_cast<int64_t>(plan_.active.size());
  if (!is_active_set_) throw std::invalid_argument("Plan.bind: call set_active before.");
  if (PyList_GET_SIZE(params.ptr()) != count || PyList_GET_SIZE(states.ptr()) != count ||
      PyList_GET_SIZE(grads.ptr()) != count)
    throw std::invalid_argument("Plan.bind: needs lists of one parameter, state and gradient for each active tensor.");
  if (start < 0 || start > num_looked_at_)
    throw std::invalid_argument("Plan.bind(start=...): those before it must have been looked at.");
  params_ = params;
  states_ = states;
  grads_ = grads;
  has_norm_ = false;
  for (num_looked_at_ = start; num_looked_at_ < count; ++num_looked_at_) {
    const int tensor = plan_.active[num_looked_at_];
    TensorView view;
    const Local param(PyList_GET_ITEM(params.ptr(), num_looked_at_)),
        grad(PyList_GET_ITEM(grads.ptr(), num_looked_at_));
    if (!param.look_at(&view) || !watched_[tensor].param.hold_for(view)) throw Moved(kMoved);
    if (!grad.look_at(&view) || !fits(view, watched_[tensor].param)) return num_looked_at_;
    if (overlaps(view.data, plan_.tensors[tensor], size_of(view.dtype))) return num_looked_at_;
    plan_.tensors[tensor].grad = view.data;
    plan_.tensors[tensor].grad_type = view.dtype;
  }
  return kBound;
}

void BoundPlan::release() {
  num_looked_at_ = 0;
  has_norm_ = false;
  params_ = states_ = grads_ = py::object();
}

void BoundPlan::check_bound(const char* method, bool on_cuda) const {
  const bool is_bound = is_active_set_ && grads_ && num_looked_at_ == static_cast<int64_t>(plan_.active.size());
  if (!is_bound) throw std::invalid_argument(std::string("Plan.") + method + ": call bind before.");
  if (on_cuda != (plan_.device >= 0))
    throw std::invalid_argument(std::string("Plan.") + method + ": the plan is for " +
                                (on_cuda ? "the CPU." : "CUDA."));
}

// Holds references to everything that a walk touches, so that the GIL can be released. A short walk keeps the GIL.
class BoundPlan::Hold {
 public:
  explicit Hold(const Plan& plan) {
    int64_t numel = 0;
    for (const int i : plan.active) numel += plan.tensors[i].numel;
    is_long_ = numel >= kReleaseFrom;
  }
  ~Hold() {
    for (PyObject* object : held_) Py_DECREF(object);
  }
  Hold(const Hold&) = delete;
  Hold& operator=(const Hold&) = delete;

  void keep(PyObject* object) {
    if (is_long_) held_.push_back(Py_NewRef(object));
  }
  template <class Walk>
  auto run(Walk walk) const {
    if (!is_long_) return walk();
    const py::gil_scoped_release release;
    return walk();
  }

 private:
  static constexpr int64_t kReleaseFrom = 1 << 18;  // elements: some 100 us
  bool is_long_;
  std::vector<PyObject*> held_;
};

void BoundPlan::check_gradients(Hold* hold) const {
  if (PyList_GET_SIZE(grads_.ptr()) != num_looked_at_) throw Moved(kMoved);
  for (int64_t i = 0; i < num_looked_at_; ++i) {
    const int tensor = plan_.active[i];
    const TensorSlot& slot = plan_.tensors[tensor];
    TensorView view;
    const Local grad(PyList_GET_ITEM(grads_.ptr(), i));
    if (!grad.look_at(&view) || view.data != slot.grad || view.dtype != slot.grad_type ||
        !fits(view, watched_[tensor].param))
      throw Moved(kMoved);
    hold->keep(grad.get());
  }
}

// Checks parameters and state.
void BoundPlan::check_state(Hold* hold) const {
  if (PyList_GET_SIZE(params_.ptr()) != num_looked_at_ || PyList_GET_SIZE(states_.ptr()) != num_looked_at_)
    throw Moved(kMoved);
  const auto is_same = [hold](PyObject* tensor, const Facts& facts) {
    TensorView view;
    const Local part(tensor);
    if (!part.look_at(&view) || !facts.hold_for(view)) return false;
    hold->keep(part.get());
    return true;
  };
  for (int64_t i = 0; i < num_looked_at_; ++i) {
    const Watched& watched = watched_[plan_.active[i]];
    PyObject *state = PyList_GET_ITEM(states_.ptr(), i), *key, *value;
    if (!is_same(PyList_GET_ITEM(params_.ptr(), i), watched.param) || !PyDict_Check(state) ||
        PyDict_GET_SIZE(state) != static_cast<Py_ssize_t>(watched.state.size()))
      throw Moved(kMoved);
    Py_ssize_t position = 0;
    for (const Named& named : watched.state)
      if (!PyDict_Next(state, &position, &key, &value) || key != named.name.ptr() ||
          (named.is_walked && !is_same(value, named.facts)))
        throw Moved(kMoved);
  }
}

void BoundPlan::check() {
  const Use use(this, "check");
  check_bound("check", plan_.device >= 0);
  Hold hold(plan_);
  check_gradients(&hold);
  check_state(&hold);
}

py::tuple BoundPlan::norm() {
  const Use use(this, "norm");
  check_bound("norm", false);
  Hold hold(plan_);
  check_gradients(&hold);
  const Norm norm = hold.run([&] { return plan_.norm(); });
  has_norm_ = true;
  return py::make_tuple(norm.grad_sq, norm.nonfinite);
}

py::tuple BoundPlan::step(const std::vector<std::vector<double>>& rows, double grad_scale, bool statistics) {
  const Use use(this, "step");
  check_bound("step", false);
  plan_.set_groups(rows);
  if (plan_.clips_tensors() && !has_norm_)
    throw std::invalid_argument("Plan.step: clipping by tensor needs norm to be called before.");
  Hold hold(plan_);
  check_gradients(&hold);
  check_state(&hold);
  const Clipped clipped = hold.run([&] { return plan_.step(grad_scale, statistics); });
  return py::make_tuple(clipped.grad_sq, clipped.num);
}

void BoundPlan::cuda_norm(const py::object& norm_out, uintptr_t stream) {
  const Use use(this, "cuda_norm");
  check_bound("cuda_norm", true);
  Hold hold(plan_);
  check_gradients(&hold);
  if (norm_out.is_none()) throw std::invalid_argument("Plan.cuda_norm(norm_out=None): must be a tensor.");
  plan_.cuda_norm(device_memory<double>(norm_out, "norm_out", DType::kFloat64, 2), stream);
}

void BoundPlan::cuda_step(const std::vector<std::vector<double>>& rows, const CudaStepControl& control,
                          const std::vector<const double*>& rates, uintptr_t stream) {
  const Use use(this, "cuda_step");
  check_bound("cuda_step", true);
  plan_.set_groups(rows);
  if (rates.size() != rows.size()) throw std::invalid_argument("Plan.cuda_step(rates=...): needs one for each group.");
  if (control.report == nullptr || control.clipped == nullptr)
    throw std::invalid_argument("Plan.cuda_step(report=..., clipped=...): must be tensors.");
  if (plan_.traits().has_estimate && (control.estimate == nullptr || control.statistics == nullptr))
    throw std::invalid_argument("Plan.cuda_step(estimate=..., statistics=...): must be tensors under this rule.");
  Hold hold(plan_);
  check_gradients(&hold);
  check_state(&hold);
  plan_.cuda_step(control, rates, stream);
}

void* BoundPlan::device_memory(const py::object& tensor, const char* name, DType dtype, int64_t count) const {
  if (tensor.is_none()) return nullptr;
  TensorView view;
  const int32_t device = plan_.is_on_cuda() ? plan_.device : kCpu;
  if (!look(tensor.ptr(), &view) || view.dtype != dtype || view.device != device ||
      view.num_bytes < count * size_of(dtype))
    throw std::invalid_argument(std::string("Plan(") + name + "=...): must be a tensor of " + std::to_string(count) +
                                (dtype == DType::kFloat64 ? " fp64" : " fp32") + " numbers on the device of the plan.");
  int64_t numel = 1;
  bool is_packed = true;
  for (int64_t d = view.dim - 1; d >= 0; --d) {
    is_packed &= view.sizes[d] == 1 || view.strides[d] == numel;
    numel *= view.sizes[d];
  }
  if (numel != count || !is_packed)
    throw std::invalid_argument(std::string("Plan(") + name + "=...): must hold " + std::to_string(count) +
                                " numbers without gaps.");
  return view.data;
}

// [(grad_sq, param_sq, update_sq, nonfinite, lost)] per tensor.
py::list BoundPlan::sums() const {
  py::list rows;
  for (const Sums& s : plan_.sums())
    rows.append(py::make_tuple(s.grad_sq, s.param_sq, s.update_sq, s.nonfinite, s.lost));
  return rows;
}

// The sums over all tensors that a rule with an estimate observed in the last step.
py::tuple BoundPlan::observed() const {
  double total[kObserved] = {};
  for (const Sums& s : plan_.sums())
    for (int k = 0; k < kObserved; ++k) total[k] += s.observed[k];
  return py::make_tuple(total[0], total[1]);
}

}  // namespace optkit

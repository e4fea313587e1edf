// SPDX-License-Identifier: Apache-2.0
#include "bindings/bound_plan.h"

#include <stdexcept>

namespace optkit {
namespace {

constexpr const char* kMoved = "a parameter, its state or its gradient was moved or replaced while the step ran.";

constexpr int64_t kAhead = 4;  // tensors whose records are prefetched before they are looked at

// Whether writing a parameter would overwrite elements of its gradient before they are read. Both are dense. At the
// same address every element is read before it is written.
bool overlaps(const void* grad, const TensorSlot& slot, int64_t grad_item) {
  const auto g = reinterpret_cast<uintptr_t>(grad), p = reinterpret_cast<uintptr_t>(slot.param);
  const auto numel = static_cast<uintptr_t>(slot.numel);
  return g != p && g < p + numel * static_cast<uintptr_t>(size_of(slot.param_type)) &&
         p < g + numel * static_cast<uintptr_t>(grad_item);
}

}  // namespace

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

Facts BoundPlan::facts_of(PyObject* tensor, const std::string& name) {
  TensorView view;
  const Local part(tensor);
  if (!part.look_at(&view)) refuse(name, "must be a tensor with plain memory of its own");
  const int32_t device = plan_.device >= 0 && plan_.is_on_cuda() ? plan_.device : kCpu;
  if (view.device != device) refuse(name, "must be on the device of the plan");
  const auto shape = shapes_.insert({{view.sizes, view.sizes + view.dim}, {view.strides, view.strides + view.dim}});
  const Facts facts = {view.data, view.dtype, &*shape.first, span_of(view)};
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
  if (!is_floating(facts.dtype) || plan_.is_double != (facts.dtype == DType::kFloat64) || !facts.is_dense())
    refuse("param", "must be without gaps, and in fp64 under a plan in fp64, only there");
  TensorSlot slot = {};
  const auto& sizes = facts.shape->sizes;
  slot.param = facts.data;
  slot.unsigned_states = unsigned_states;
  slot.numel = facts.numel();
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
    Named named = {py::reinterpret_borrow<py::object>(key), found.role != SlotFiller::Role::kNone, {}, {}};
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
  if (grad.device != device || grad.dim != static_cast<int64_t>(param.shape->sizes.size())) return false;
  if (!is_floating(grad.dtype) || (grad.dtype == DType::kFloat64) != plan_.is_double) return false;
  for (int64_t d = 0; d < grad.dim; ++d) {
    if (grad.sizes[d] != param.shape->sizes[d]) return false;
    if (grad.sizes[d] > 1 && grad.strides[d] != param.shape->strides[d]) return false;
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
    if (num_looked_at_ + kAhead < count) watched_[plan_.active[num_looked_at_ + kAhead]].records.prefetch();
    TensorView view;
    const Local param(PyList_GET_ITEM(params.ptr(), num_looked_at_)),
        grad(PyList_GET_ITEM(grads.ptr(), num_looked_at_));
    if (!param.look_at(&view) || !watched_[tensor].param.hold_for(view)) throw Moved(kMoved);
    watched_[tensor].records.remember(param.get(), view);
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
  const auto is_same = [hold](PyObject* tensor, const Facts& facts, Records* records) {
    TensorView view;
    const Local part(tensor);
    if (!part.look_at(&view) || !facts.hold_for(view)) return false;
    records->remember(part.get(), view);
    hold->keep(part.get());
    return true;
  };
  for (int64_t i = 0; i < num_looked_at_; ++i) {
    if (i + kAhead < num_looked_at_) {
      const Watched& later = watched_[plan_.active[i + kAhead]];
      later.records.prefetch();
      for (const Named& named : later.state) named.records.prefetch();
    }
    const Watched& watched = watched_[plan_.active[i]];
    PyObject *state = PyList_GET_ITEM(states_.ptr(), i), *key, *value;
    if (!is_same(PyList_GET_ITEM(params_.ptr(), i), watched.param, &watched.records) || !PyDict_Check(state) ||
        PyDict_GET_SIZE(state) != static_cast<Py_ssize_t>(watched.state.size()))
      throw Moved(kMoved);
    Py_ssize_t position = 0;
    for (const Named& named : watched.state)
      if (!PyDict_Next(state, &position, &key, &value) || key != named.name.ptr() ||
          (named.is_walked && !is_same(value, named.facts, &named.records)))
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

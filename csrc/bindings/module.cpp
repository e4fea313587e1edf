// SPDX-License-Identifier: Apache-2.0
// The Python module: the plan, and what the build can do. Pointers cross as integers, so no torch header is needed.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "bindings/device.h"
#include "bindings/exchange.h"
#include "bindings/norm_api.h"
#include "bindings/plan.h"
#include "cpu/memory.h"

namespace py = pybind11;

namespace {

using optkit::Plan;

template <class T>
T* pointer(uintptr_t address) {
  return reinterpret_cast<T*>(address);
}

void add_tensor(Plan& plan, uintptr_t param, const std::vector<uintptr_t>& states,
                const std::vector<uintptr_t>& state_scales, uint32_t unsigned_states,
                const std::vector<uintptr_t>& scalars, uintptr_t average, uintptr_t compensation, uintptr_t step,
                uintptr_t num_averaged, std::vector<int64_t> sizes, std::vector<int64_t> strides, int param_type,
                int state_type, int average_type, int group, int tensor_index) {
  optkit::TensorSlot slot = {};
  if (states.size() > optkit::kMaxStates) throw std::invalid_argument("Plan.add_tensor: too many states.");
  slot.param = pointer<void>(param);
  for (size_t k = 0; k < states.size(); ++k) slot.state[k] = pointer<void>(states[k]);
  for (size_t k = 0; k < states.size() && k < state_scales.size(); ++k)
    slot.state_scale[k] = pointer<float>(state_scales[k]);
  slot.unsigned_states = unsigned_states;
  for (size_t k = 0; k < scalars.size() && k < optkit::kMaxScalars; ++k) slot.scalar[k] = pointer<float>(scalars[k]);
  slot.average = pointer<void>(average);
  slot.compensation = pointer<void>(compensation);
  slot.step = pointer<float>(step);
  slot.num_averaged = pointer<float>(num_averaged);
  slot.numel = 1;
  for (const int64_t size : sizes) slot.numel *= size;
  slot.is_vector = sizes.size() < 2 ? 1 : 0;
  slot.unit_length = sizes.size() < 2 || sizes[0] == 0 ? slot.numel : slot.numel / sizes[0];
  slot.columns = sizes.empty() ? 1 : sizes.back();
  slot.rows = sizes.size() < 2 ? 1 : sizes[sizes.size() - 2];
  slot.param_type = slot.grad_type = static_cast<optkit::DType>(param_type);
  slot.state_type = static_cast<optkit::DType>(state_type);
  slot.average_type = static_cast<optkit::DType>(average_type);
  slot.group = group;
  slot.index = tensor_index;
  plan.add_tensor(slot, {std::move(sizes), std::move(strides)});
}

void cuda_step(Plan& plan, const std::vector<uintptr_t>& rates, uintptr_t norm, uintptr_t loss_scale,
               uintptr_t found_inf, double scale, uintptr_t max_norm, double max_norm_value, uintptr_t estimate,
               uintptr_t report, uintptr_t clipped, bool counts_report, uintptr_t statistics, uintptr_t stream) {
  const optkit::CudaStepControl control = {pointer<double>(norm),
                                           pointer<float>(loss_scale),
                                           pointer<float>(found_inf),
                                           scale,
                                           pointer<double>(max_norm),
                                           max_norm_value,
                                           pointer<double>(estimate),
                                           pointer<double>(report),
                                           pointer<optkit::Clipped>(clipped),
                                           pointer<optkit::Sums>(statistics),
                                           counts_report ? 1 : 0};
  std::vector<const double*> rate_of;
  for (const uintptr_t rate : rates) rate_of.push_back(pointer<const double>(rate));
  plan.cuda_step(control, rate_of, stream);
}

// [(grad_sq, param_sq, update_sq, nonfinite, lost)] per tensor.
py::list sums(const Plan& plan) {
  py::list rows;
  for (const optkit::Sums& s : plan.sums())
    rows.append(py::make_tuple(s.grad_sq, s.param_sq, s.update_sq, s.nonfinite, s.lost));
  return rows;
}

// What a rule with an estimate observed in the last step: its sums over all tensors.
py::tuple observed(const Plan& plan) {
  double total[optkit::kObserved] = {};
  for (const optkit::Sums& s : plan.sums())
    for (int k = 0; k < optkit::kObserved; ++k) total[k] += s.observed[k];
  return py::make_tuple(total[0], total[1]);
}

// {rule: (state names, scalar names, hyperparameter names)}
py::dict rules() {
  py::dict all;
#define OPTKIT_DESCRIBE(name, type)                                                                            \
  all[#name] =                                                                                                 \
      py::make_tuple(std::vector<std::string>(type::kStates, type::kStates + optkit::num_state_names<type>()), \
                     std::vector<std::string>(type::kScalars, type::kScalars + type::kNumScalars),             \
                     std::vector<std::string>(type::kHypers, type::kHypers + type::kNumHypers));
  OPTKIT_FOR_EACH_CPU_RULE(OPTKIT_DESCRIBE)
#undef OPTKIT_DESCRIBE
  return all;
}

}  // namespace

// What the plan relies on in Python: the parameter lists, the state and every tensor in it, by identity. Looking is a
// few nanoseconds each, so it is done before every step.
class Snapshot {
 public:
  Snapshot(py::dict state, std::vector<py::list> lists) : state_(std::move(state)), lists_(std::move(lists)) {
    take(seen_);
  }
  bool unchanged() const {
    std::vector<PyObject*> now;
    now.reserve(seen_.size());
    take(now);
    return now == seen_;
  }

 private:
  void take(std::vector<PyObject*>& out) const {
    PyObject *key, *value, *name, *tensor;
    for (const py::list& list : lists_)
      for (Py_ssize_t i = 0; i < PyList_GET_SIZE(list.ptr()); ++i) out.push_back(PyList_GET_ITEM(list.ptr(), i));
    for (Py_ssize_t i = 0; PyDict_Next(state_.ptr(), &i, &key, &value);) {
      out.push_back(key);
      out.push_back(value);
      if (!PyDict_Check(value)) continue;
      for (Py_ssize_t k = 0; PyDict_Next(value, &k, &name, &tensor);) out.push_back(tensor);
    }
  }

  py::dict state_;
  std::vector<py::list> lists_;
  std::vector<PyObject*> seen_;  // compared only: what was there is kept alive by the plan's entries
};

PYBIND11_MODULE(_C, m) {
  m.doc() = "The compiled half of lightning_optkit.";
  py::class_<Plan>(m, "Plan")
      .def(py::init<const std::string&, bool, int>(), py::arg("rule"), py::arg("is_double"), py::arg("device"))
      .def_property_readonly("id", &Plan::id)
      .def("add_tensor", &add_tensor, py::kw_only(), py::arg("param"), py::arg("states"), py::arg("state_scales"),
           py::arg("unsigned_states"), py::arg("scalars"), py::arg("average"), py::arg("compensation"), py::arg("step"),
           py::arg("num_averaged"), py::arg("sizes"), py::arg("strides"), py::arg("param_type"), py::arg("state_type"),
           py::arg("average_type"), py::arg("group"), py::arg("tensor_index"))
      .def("set_active", &Plan::set_active, py::arg("indices"))
      .def(
          "bind",
          [](Plan& plan, py::list params, py::list grads) {
            return optkit::bind_lists(plan, params.ptr(), grads.ptr());
          },
          py::arg("params"), py::arg("grads"))
      .def("set_groups", &Plan::set_groups, py::arg("rows"))
      .def("norm",
           [](Plan& plan) {
             const optkit::Norm norm = [&] {
               const py::gil_scoped_release release;
               return plan.norm();
             }();
             return py::make_tuple(norm.grad_sq, norm.nonfinite);
           })
      .def(
          "step",
          [](Plan& plan, double grad_scale, bool statistics) {
            const optkit::Clipped clipped = [&] {
              const py::gil_scoped_release release;
              return plan.step(grad_scale, statistics);
            }();
            return py::make_tuple(clipped.grad_sq, clipped.num);
          },
          py::arg("grad_scale"), py::arg("statistics"))
      .def("cuda_norm", &Plan::cuda_norm, py::arg("norm_out"), py::arg("stream"))
      .def("cuda_step", &cuda_step, py::kw_only(), py::arg("rates"), py::arg("norm"), py::arg("loss_scale"),
           py::arg("found_inf"), py::arg("scale"), py::arg("max_norm"), py::arg("max_norm_value"), py::arg("estimate"),
           py::arg("report"), py::arg("clipped"), py::arg("counts_report"), py::arg("statistics"), py::arg("stream"))
      .def("sums", &sums)
      .def("observed", &observed);
  py::class_<Snapshot>(m, "Snapshot")
      .def(py::init<py::dict, std::vector<py::list>>(), py::arg("state"), py::arg("lists"))
      .def("unchanged", &Snapshot::unchanged);
  m.attr("GROUP_FIELDS") =
      std::vector<std::string>(optkit::kGroupFields, optkit::kGroupFields + optkit::kNumGroupFields);
  m.def("rules", &rules);
  m.def("open_exchange", [](py::capsule capsule) { return optkit::open_exchange(capsule.ptr()); }, py::arg("capsule"));
  m.def("open_cuda", &optkit::open_cuda, py::arg("path"));
  m.def("cuda_architectures", [] { return std::string(optkit::cuda_api().architectures); });
  m.def("cpu_isa", [] { return std::string(optkit::active_kernels().isa); });
  m.def("cpu_isas", [] {
    std::vector<std::string> names;
    for (const char* name : optkit::available_isas()) names.emplace_back(name);
    return names;
  });
  m.def("use_cpu_isa", [](const std::string& name) { return optkit::use_isa(name.c_str()); });
  m.def("norm_api", [] { return reinterpret_cast<uintptr_t>(&optkit::norm_api()); });
  m.def("advise_huge_pages", &optkit::advise_huge_pages, py::arg("address"), py::arg("num_bytes"));
}

// SPDX-License-Identifier: Apache-2.0
// The Python module: the plan, and the capabilities of the build.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "bindings/bound_plan.h"
#include "bindings/device.h"
#include "bindings/look.h"
#include "bindings/membership.h"
#include "cpu/memory.h"

namespace py = pybind11;

namespace {

using optkit::BoundPlan;
using optkit::DType;

constexpr int64_t kReportNumbers = 5;  // of CudaStepControl::report

void cuda_step(BoundPlan& plan, const std::vector<std::vector<double>>& rows, const std::vector<py::object>& rates,
               const py::object& norm, const py::object& loss_scale, const py::object& found_inf, double scale,
               const py::object& max_norm, double max_norm_value, const py::object& estimate, const py::object& report,
               const py::object& clipped, bool counts_report, const py::object& statistics, uintptr_t stream) {
  const auto doubles = [&plan](const py::object& tensor, const char* name, int64_t count) {
    return plan.device_memory<double>(tensor, name, DType::kFloat64, count);
  };
  constexpr int64_t kClipped = sizeof(optkit::Clipped) / sizeof(double), kSums = sizeof(optkit::Sums) / sizeof(double);
  const auto rows_of_sums = static_cast<int64_t>(plan.num_tensors());
  const optkit::CudaStepControl control = {
      doubles(norm, "norm", 2),
      plan.device_memory<float>(loss_scale, "loss_scale", DType::kFloat32, 1),
      plan.device_memory<float>(found_inf, "found_inf", DType::kFloat32, 1),
      scale,
      doubles(max_norm, "max_norm", 1),
      max_norm_value,
      doubles(estimate, "estimate", 1),
      doubles(report, "report", kReportNumbers),
      reinterpret_cast<optkit::Clipped*>(doubles(clipped, "clipped", kClipped)),
      reinterpret_cast<optkit::Sums*>(doubles(statistics, "statistics", kSums * rows_of_sums)),
      counts_report ? 1 : 0};
  std::vector<const double*> rate_of;
  for (const py::object& rate : rates) rate_of.push_back(doubles(rate, "rates", 1));
  plan.cuda_step(rows, control, rate_of, stream);
}

// {rule: (state names, scalar names, hyperparameter names)}
py::dict rules() {
  py::dict all;
#define OPTKIT_DESCRIBE(name, type)                                                             \
  all[#name] = py::make_tuple(                                                                  \
      std::vector<std::string>(type::kStates, type::kStates + optkit::num_state_names<type>()), \
      std::vector<std::string>(type::kScalars, type::kScalars + type::kNumScalars),             \
      std::vector<std::string>(type::kHyperparameters, type::kHyperparameters + type::kNumHyperparameters));
  OPTKIT_FOR_EACH_CPU_RULE(OPTKIT_DESCRIBE)
#undef OPTKIT_DESCRIBE
  return all;
}

// Asks the kernel to back a tensor's memory with huge pages.
bool advise_huge_pages(const py::object& tensor) {
  optkit::TensorView view;
  if (!optkit::look(tensor.ptr(), &view) || view.device != optkit::kCpu)
    throw std::invalid_argument("advise_huge_pages(tensor=...): must be a plain tensor on the CPU.");
  int64_t num_bytes = optkit::size_of(view.dtype);
  for (int64_t d = 0; d < view.dim; ++d) num_bytes *= view.sizes[d];
  if (num_bytes > view.num_bytes) throw std::invalid_argument("advise_huge_pages(tensor=...): must have no gaps.");
  return optkit::advise_huge_pages(reinterpret_cast<uintptr_t>(view.data), static_cast<std::size_t>(num_bytes));
}

bool is_plain(const py::object& tensor) {
  optkit::TensorView view;
  return optkit::look(tensor.ptr(), &view);
}

template <std::size_t kNum>
std::vector<std::string> names(const char* const (&each)[kNum]) {
  return {each, each + kNum};
}

void define_plan(py::module_& m) {
  py::register_exception<optkit::Moved>(m, "Moved");
  py::class_<BoundPlan>(m, "Plan")
      .def(py::init<const std::string&, bool, int>(), py::arg("rule"), py::arg("is_double"), py::arg("device"))
      .def(
          "add_tensor",
          [](BoundPlan& plan, const py::object& param, const py::dict& state, std::vector<py::object> states,
             std::vector<py::object> scales, std::vector<py::object> scalars, py::object average,
             uint32_t unsigned_states, int group, int tensor_index) {
            const optkit::StateNames names = {std::move(states), std::move(scales), std::move(scalars),
                                              std::move(average)};
            plan.add_tensor(param, state, names, unsigned_states, group, tensor_index);
          },
          py::kw_only(), py::arg("param"), py::arg("state"), py::arg("states"), py::arg("scales"), py::arg("scalars"),
          py::arg("average"), py::arg("unsigned_states"), py::arg("group"), py::arg("tensor_index"))
      .def("set_active", &BoundPlan::set_active, py::arg("indices"))
      .def("bind", &BoundPlan::bind, py::arg("params"), py::arg("states"), py::arg("grads"), py::arg("start") = 0)
      .def("release", &BoundPlan::release)
      .def("check", &BoundPlan::check)
      .def("norm", &BoundPlan::norm)
      .def("step", &BoundPlan::step, py::arg("rows"), py::arg("grad_scale"), py::arg("statistics"))
      .def("cuda_norm", &BoundPlan::cuda_norm, py::arg("norm_out"), py::arg("stream"))
      .def("cuda_step", &cuda_step, py::kw_only(), py::arg("rows"), py::arg("rates"), py::arg("norm"),
           py::arg("loss_scale"), py::arg("found_inf"), py::arg("scale"), py::arg("max_norm"),
           py::arg("max_norm_value"), py::arg("estimate"), py::arg("report"), py::arg("clipped"),
           py::arg("counts_report"), py::arg("statistics"), py::arg("stream"))
      .def("sums", &BoundPlan::sums)
      .def("observed", &BoundPlan::observed);
  py::class_<optkit::Membership>(m, "Membership")
      .def(py::init<py::dict, py::list, py::list>(), py::arg("state"), py::arg("lists"), py::arg("entries"))
      .def("states", &optkit::Membership::states, py::arg("state"), py::arg("lists"));
  m.attr("GROUP_FIELDS") = names(optkit::kGroupFields);
  m.attr("ROUNDINGS") = names(optkit::kRoundings);
  m.attr("AVERAGE_KINDS") = names(optkit::kAverageKinds);
  m.def("rules", &rules);
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "The compiled half of lightning_optkit.";
  define_plan(m);
  m.def(
      "open_exchange",
      [](const py::capsule& capsule, const py::type& tensor_type, const py::object& no_dispatch) {
        return optkit::open_exchange(capsule.ptr(), tensor_type.ptr(), no_dispatch.ptr());
      },
      py::arg("capsule"), py::arg("tensor_type"), py::arg("no_dispatch"));
  m.def("use_look", [](const py::object& capsule) { optkit::use_look(capsule.ptr()); }, py::arg("capsule"));
  m.def("set_sharded_type", [](const py::type& type) { optkit::set_sharded_type(type.ptr()); }, py::arg("type"));
  m.def("is_plain", &is_plain, py::arg("tensor"));
  m.def("open_cuda", &optkit::open_cuda, py::arg("path"));
  m.def("cuda_architectures", [] { return std::string(optkit::cuda_api().architectures); });
  m.def("cpu_isa", [] { return std::string(optkit::active_kernels().isa); });
  m.def("cpu_isas", [] {
    std::vector<std::string> names;
    for (const char* name : optkit::available_isas()) names.emplace_back(name);
    return names;
  });
  m.def("use_cpu_isa", [](const std::string& name) { return optkit::use_isa(name.c_str()); });
  m.def("advise_huge_pages", &advise_huge_pages, py::arg("tensor"));
}

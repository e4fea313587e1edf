// SPDX-License-Identifier: Apache-2.0
// The CPU norms with an autograd node in C++, for eager calls on ordinary tensors. torch's stable ABI has no autograd
// nodes, so this is the only library that uses torch's unstable headers: it works only with the torch it was built for,
// and is optional.
#include <ATen/EmptyTensor.h>
#include <ATen/core/Tensor.h>
#include <ATen/record_function.h>
#include <dlfcn.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/csrc/autograd/python_variable.h>

#include <array>
#include <optional>
#include <vector>

#include "bindings/node_call.h"
#include "bindings/node_tensor.h"
#include "bindings/norm_api.h"

namespace optkit {

PyObject* gradients(PyObject*, PyObject* params);  // node_gradients.cpp

namespace {

using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

const NormApi* api = nullptr;
PyObject* reference = nullptr;  // the backward in differentiable torch operators

constexpr int64_t kReleaseFrom = 1 << 15;  // number of elements from which the GIL is released

Tensor empty(at::IntArrayRef sizes, at::ScalarType type) {
  Tensor t = at::detail::empty_cpu(sizes, type, false, std::nullopt);
  api->fresh(t.mutable_data_ptr(), static_cast<int64_t>(t.nbytes()));
  return t;
}

struct Outputs {
  Tensor y, sum, stats;
};

Outputs run_forward(const Call& call, const Tensor& input, const Tensor& residual, const Parameter& weight,
                    const Parameter& bias) {
  Outputs out = {empty(input.sizes(), call.type), Tensor(),
                 empty({call.centered ? 2 : 1, call.rows}, call.accumulator())};
  if (call.adds) out.sum = empty(input.sizes(), call.type);
  const Rows x = rows_of(input, call.dims, true), r = rows_of(residual, call.dims, false);
  char* stats = static_cast<char*>(out.stats.mutable_data_ptr());
  NormForward a = {};
  a.x = x.data();
  a.residual = r.data();
  a.sum = data_or_null(out.sum);
  a.y = out.y.mutable_data_ptr();
  a.mean = call.centered ? stats : nullptr;
  a.rstd = stats + call.mean_bytes();
  a.weight = data_or_null(weight);
  a.bias = data_or_null(bias);
  a.rows = call.rows;
  a.size = call.size;
  a.x_stride = x.layout.stride;
  a.x_type = dtype_of(call.input_type);
  a.residual_type = dtype_of(call.residual_type);
  a.type = dtype_of(call.type);
  a.weight_type = dtype_of(call.parameter_type);
  a.dropout = make_dropout(call.dropout, call.seed);
  a.eps = call.eps;
  api->forward(call.centered, a, {x.layout.strided, r.layout.strided});
  return out;
}

class NormFunction : public torch::autograd::Function<NormFunction> {
 public:
  static variable_list forward(AutogradContext* ctx, const Tensor& input, const Parameter& residual,
                               const Parameter& weight, const Parameter& bias, const Call& call) {
    Outputs out = run_forward(call, input, residual.value_or(Tensor()), weight, bias);
    variable_list saved = {call.adds ? out.sum : input, std::move(out.stats)};
    if (weight) saved.push_back(*weight);
    ctx->save_for_backward(std::move(saved));
    ctx->saved_data["call"] = packed(call);
    ctx->set_materialize_grads(false);
    return call.adds ? variable_list{std::move(out.y), std::move(out.sum)} : variable_list{std::move(out.y)};
  }

  // Returns one gradient per argument of `forward`.
  static variable_list backward(AutogradContext* ctx, const variable_list& grads);
};

// Gradients of: the normalized input, the input before the dropout, the weight, the bias.
using Gradients = std::array<Tensor, 4>;

Gradients run_backward(const Call& call, const Tensor& dy, const Tensor& d_sum, const Tensor& input,
                       const Tensor& stats, const Tensor& weight, const std::array<bool, 3>& wants) {
  const Rows x = rows_of(input, call.dims, true), dy_rows = rows_of(dy, call.dims, false),
             d_sum_rows = rows_of(d_sum, call.dims, false);
  const char* rows = static_cast<const char*>(stats.const_data_ptr());
  const at::IntArrayRef row_sizes = input.sizes().slice(input.dim() - call.dims);
  NormBackward a = {};
  a.dropout = make_dropout(call.dropout, call.seed);
  Gradients out;
  if (wants[0]) out[0] = empty(input.sizes(), call.type);
  if (wants[0] && a.dropout.on) out[1] = empty(input.sizes(), call.type);
  if (wants[1]) out[2] = empty(row_sizes, call.parameter_type);
  if (wants[2]) out[3] = empty(row_sizes, call.parameter_type);
  a.dy = dy_rows.data();
  a.d_sum = d_sum_rows.data();
  a.x = x.data();
  a.mean = call.centered ? rows : nullptr;
  a.rstd = rows + call.mean_bytes();
  a.weight = weight.defined() ? weight.const_data_ptr() : nullptr;
  a.dx = data_or_null(out[0]);
  a.d_input = data_or_null(out[1]);
  a.rows = call.rows;
  a.size = call.size;
  a.x_stride = x.layout.stride;
  a.type = dtype_of(call.type);
  a.weight_type = dtype_of(call.parameter_type);
  a.wants_weight = wants[1];
  a.wants_bias = wants[2];
  const BackwardStrided strided = {x.layout.strided, dy_rows.layout.strided, d_sum_rows.layout.strided};
  api->backward(call.centered, a, strided, data_or_null(out[2]), data_or_null(out[3]));
  if (wants[0] && !a.dropout.on) out[1] = out[0];
  return out;
}

// Saved tensors come back through hooks, which may have replaced them.
bool is_saved_parameter(const Tensor& t, at::IntArrayRef sizes, at::ScalarType type) {
  return is_plain(t) && t.is_contiguous() && t.sizes() == sizes && t.scalar_type() == type;
}
bool takes_kernel(const Call& call, const Tensor& dy, const Tensor& d_sum, const Tensor& input, const Tensor& stats,
                  const Tensor& weight) {
  for (const Tensor* t : {&dy, &d_sum, &input})
    if ((t != &d_sum || t->defined()) && (!is_plain(*t) || t->scalar_type() != call.type)) return false;
  const at::IntArrayRef row_sizes = input.sizes().slice(input.dim() - call.dims);
  return is_saved_parameter(stats, {call.centered ? 2 : 1, call.rows}, call.accumulator()) &&
         (!call.has_weight || is_saved_parameter(weight, row_sizes, call.parameter_type));
}

// For double backward, or for tensors whose memory the kernels cannot read.
Gradients run_reference(const Call& call, const Tensor& dy, const Tensor& d_sum, const Tensor& input,
                        const Tensor& weight) {
  const pybind11::gil_scoped_acquire gil;
  const auto wrap = [](const Tensor& t) {
    return pybind11::reinterpret_steal<pybind11::object>(t.defined() ? THPVariable_Wrap(t) : Py_NewRef(Py_None));
  };
  const pybind11::object found = pybind11::reinterpret_borrow<pybind11::object>(reference)(
      call.centered, wrap(dy), wrap(d_sum), wrap(input), wrap(weight), call.dims, call.eps, call.dropout, call.seed);
  Gradients out;
  bool fits = PyTuple_Check(found.ptr()) && PyTuple_GET_SIZE(found.ptr()) == static_cast<Py_ssize_t>(out.size());
  for (size_t k = 0; fits && k < out.size(); ++k) {
    PyObject* const item = PyTuple_GET_ITEM(found.ptr(), k);
    fits = THPVariable_Check(item);
    if (fits) out[k] = THPVariable_Unpack(item);
  }
  TORCH_CHECK_TYPE(fits, "connect(reference): must return a tuple of ", out.size(), " tensors.");
  return out;
}

variable_list NormFunction::backward(AutogradContext* ctx, const variable_list& grads) {
  RECORD_FUNCTION("lightning_optkit::norm_backward", std::vector<c10::IValue>());
  const Call call = unpacked(ctx->saved_data.at("call"));
  const variable_list saved = ctx->get_saved_variables();
  const Tensor &input = saved[0], &stats = saved[1], weight = call.has_weight ? saved[2] : Tensor();
  const Tensor d_sum = call.adds ? grads[1] : Tensor(), dy = grads[0].defined() ? grads[0] : at::zeros_like(input);
  TORCH_CHECK_VALUE(input.sizes() == dy.sizes() && input.dim() >= call.dims && input.numel() == call.rows * call.size,
                    "norm_backward(input.shape=", input.sizes(), "): must be ", dy.sizes(),
                    ", the shape that was saved.");
  // There are edges only for the arguments that were tensors.
  size_t edge = 0;
  const auto wanted = [&](bool given) { return given && ctx->needs_input_grad(edge++); };
  const bool wants_input = wanted(true), wants_residual = wanted(call.adds), wants_weight = wanted(call.has_weight),
             wants_bias = wanted(call.has_bias);
  const bool fused = !at::GradMode::is_enabled() && is_eager() && takes_kernel(call, dy, d_sum, input, stats, weight);
  Gradients found = fused ? run_backward(call, dy, d_sum, input, stats, weight,
                                         {wants_input || wants_residual, wants_weight, wants_bias})
                          : run_reference(call, dy, d_sum, input, weight);
  variable_list out(5);
  if (wants_input) out[0] = found[1].to(call.input_type);
  if (wants_residual) out[1] = found[0].to(call.residual_type);
  if (wants_weight) out[2] = std::move(found[2]);
  if (wants_bias) out[3] = std::move(found[3]);
  return out;
}

// The outputs in Python: y, or (y, sum). None if the node does not support the call.
PyObject* call_norm(const char* owner, PyObject* centered, PyObject* const* tensors, PyObject* sizes, PyObject* eps,
                    double dropout, PyObject* seed) {
  HANDLE_TH_ERRORS
  TORCH_CHECK(api != nullptr, owner, "(): connect must be called first.");
  TORCH_CHECK_TYPE(PyBool_Check(centered), owner, "(centered=", Py_TYPE(centered)->tp_name, "): must be a bool.");
  TORCH_CHECK_VALUE(dropout >= 0.0 && dropout <= 1.0, owner, "(dropout=", dropout, "): must be in [0, 1].");
  Parameter input, residual, weight, bias;
  Call call = {};
  call.centered = centered == Py_True;
  call.dropout = dropout;
  const bool takes = take_seed(seed, owner, dropout, &call.seed) & take(tensors[0], owner, "input", &input) &
                     take(tensors[1], owner, "residual", &residual) & take(tensors[2], owner, "weight", &weight) &
                     take(tensors[3], owner, "bias", &bias);
  if (!takes || !is_eager() || !input || !describe(sizes, eps, *input, residual, weight, bias, &call)) Py_RETURN_NONE;
  bool needs_grad = false;
  for (const Parameter* t : {&input, &residual, &weight, &bias}) {
    if (!*t) continue;
    if (has_tangent(**t)) Py_RETURN_NONE;
    needs_grad = needs_grad || (*t)->requires_grad();
  }
  needs_grad = needs_grad && at::GradMode::is_enabled();
  RECORD_FUNCTION("lightning_optkit::norm", std::vector<c10::IValue>());
  Tensor y, sum;
  {
    std::optional<pybind11::gil_scoped_release> released;
    if (input->numel() >= kReleaseFrom) released.emplace();
    if (needs_grad) {
      variable_list out = NormFunction::apply(*input, residual, weight, bias, call);
      y = std::move(out[0]);
      if (call.adds) sum = std::move(out[1]);
    } else {
      Outputs out = run_forward(call, *input, residual.value_or(Tensor()), weight, bias);
      y = std::move(out.y);
      sum = std::move(out.sum);
    }
  }
  if (!call.adds) return THPVariable_Wrap(std::move(y));
  PyObject* pair = PyTuple_New(2);
  PyTuple_SET_ITEM(pair, 0, THPVariable_Wrap(std::move(y)));
  PyTuple_SET_ITEM(pair, 1, THPVariable_Wrap(std::move(sum)));
  return pair;
  END_HANDLE_TH_ERRORS
}

// norm(centered, input, sizes, weight, bias, eps)
PyObject* norm(PyObject*, PyObject* const* a, Py_ssize_t count) {
  if (!takes(count, 6, "norm")) return nullptr;
  if (a[1] == Py_None) return wrong_kind("norm", "input", a[1], "a tensor");
  PyObject* const tensors[4] = {a[1], Py_None, a[3], a[4]};
  return call_norm("norm", a[0], tensors, a[2], a[5], 0.0, Py_None);
}

// add_norm(centered, input, residual, sizes, weight, bias, eps, dropout, seed)
PyObject* add_norm(PyObject*, PyObject* const* a, Py_ssize_t count) {
  if (!takes(count, 9, "add_norm")) return nullptr;
  if (a[1] == Py_None) return wrong_kind("add_norm", "input", a[1], "a tensor");
  if (a[2] == Py_None) return wrong_kind("add_norm", "residual", a[2], "a tensor");
  const double dropout = PyFloat_AsDouble(a[7]);
  if (PyErr_Occurred()) return wrong_kind("add_norm", "dropout", a[7], "a number");
  PyObject* const tensors[4] = {a[1], a[2], a[4], a[5]};
  return call_norm("add_norm", a[0], tensors, a[3], a[6], dropout, a[8]);
}

// connect(path of the library with the kernels, backward in torch operators)
PyObject* connect(PyObject*, PyObject* const* a, Py_ssize_t count) {
  if (!takes(count, 2, "connect")) return nullptr;
  if (!PyUnicode_Check(a[0])) return wrong_kind("connect", "library", a[0], "the path of lightning_optkit's extension");
  if (!PyCallable_Check(a[1])) return wrong_kind("connect", "reference", a[1], "callable");
  PyObject* const path = PyUnicode_EncodeFSDefault(a[0]);
  if (path == nullptr) return wrong_kind("connect", "library", a[0], "the path of lightning_optkit's extension");
  // Looked up in the library itself: an address passed by the caller could be anything.
  void* const library = dlopen(PyBytes_AS_STRING(path), RTLD_LAZY | RTLD_NOLOAD);
  Py_DECREF(path);
  const auto get =
      library == nullptr ? nullptr : reinterpret_cast<const NormApi* (*)()>(dlsym(library, kNormApiSymbol));
  if (get == nullptr || get()->version != kNormApiVersion)
    return PyErr_Format(PyExc_ValueError, "connect(library=%R): must be lightning_optkit's extension of this build.",
                        a[0]);
  api = get();
  Py_XSETREF(reference, Py_NewRef(a[1]));
  Py_RETURN_NONE;
}

PyCFunction fast(PyObject* (*function)(PyObject*, PyObject* const*, Py_ssize_t)) {
  return reinterpret_cast<PyCFunction>(reinterpret_cast<void*>(function));
}

// is_observed(): whether a profiler or another torch observer records operators.
PyObject* is_observed(PyObject*, PyObject*) { return PyBool_FromLong(at::hasCallbacks()); }

PyMethodDef methods[] = {
    {"norm", fast(&norm), METH_FASTCALL, nullptr},       {"add_norm", fast(&add_norm), METH_FASTCALL, nullptr},
    {"connect", fast(&connect), METH_FASTCALL, nullptr}, {"is_observed", &is_observed, METH_NOARGS, nullptr},
    {"gradients", &gradients, METH_O, nullptr},          {nullptr, nullptr, 0, nullptr}};
PyModuleDef definition = {
    PyModuleDef_HEAD_INIT, "_node", nullptr, -1, methods, nullptr, nullptr, nullptr, nullptr,
};

}  // namespace

PyObject* look_capsule();

}  // namespace optkit

PyMODINIT_FUNC PyInit__node() {
  PyObject* module = PyModule_Create(&optkit::definition);
  if (module == nullptr) return nullptr;
  PyModule_AddStringConstant(module, "TORCH_VERSION", OPTKIT_TORCH_VERSION);
  PyModule_AddObject(module, "look", optkit::look_capsule());
  return module;
}

// SPDX-License-Identifier: Apache-2.0
// The norms on CPU with an autograd node in C++, for eager calls on ordinary tensors. torch's stable ABI has no such
// node, so this library alone sees more of torch, serves only the torch that it was built with, and may be absent.
#include <ATen/EmptyTensor.h>
#include <ATen/core/Tensor.h>
#include <ATen/record_function.h>
#include <torch/csrc/Exceptions.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/csrc/autograd/python_variable.h>

#include <array>
#include <cstring>
#include <limits>
#include <optional>
#include <vector>

#include "bindings/norm_api.h"

namespace optkit {
namespace {

using at::Tensor;
using torch::autograd::AutogradContext;
using torch::autograd::variable_list;
using Parameter = std::optional<Tensor>;

const NormApi* api = nullptr;
PyObject* reference = nullptr;  // the gradients in differentiable operators of torch

constexpr int64_t kReleaseFrom = 1 << 15;  // elements from which other Python threads may run meanwhile

// What a call is, besides its tensors.
struct Call {
  double eps, dropout;
  int64_t dims, rows, size, seed;
  at::ScalarType input_type, residual_type, type, parameter_type;
  bool centered, adds, has_weight, has_bias;

  at::ScalarType wide() const { return type == at::kDouble ? at::kDouble : at::kFloat; }
  int64_t mean_bytes() const { return centered ? rows * static_cast<int64_t>(c10::elementSize(wide())) : 0; }
};

// The autograd context keeps values that torch knows: a call goes in as a list of integers.
using Words = std::array<int64_t, (sizeof(Call) + 7) / 8>;

c10::IValue packed(const Call& call) {
  Words words = {};
  std::memcpy(words.data(), &call, sizeof(call));
  return std::vector<int64_t>(words.begin(), words.end());
}

Call unpacked(const c10::IValue& value) {
  const std::vector<int64_t> words = value.toIntVector();
  Call call;
  std::memcpy(&call, words.data(), sizeof(call));
  return call;
}

bool to_dtype(at::ScalarType type, DType* dtype) {
  switch (type) {
    case at::kFloat:
      return *dtype = DType::kFloat32, true;
    case at::kBFloat16:
      return *dtype = DType::kBFloat16, true;
    case at::kHalf:
      return *dtype = DType::kFloat16, true;
    case at::kDouble:
      return *dtype = DType::kFloat64, true;
    default:
      return false;
  }
}

DType dtype_of(at::ScalarType type) {
  DType dtype = DType::kFloat32;
  to_dtype(type, &dtype);
  return dtype;
}

// Memory on the CPU and nothing else: no subclass, no function transform, no lazy negation.
bool is_plain(const Tensor& t) {
  static const uint64_t allowed =
      c10::DispatchKeySet({c10::DispatchKey::CPU, c10::DispatchKey::AutogradCPU, c10::DispatchKey::ADInplaceOrView,
                           c10::DispatchKey::AutocastCPU})
          .raw_repr();
  DType dtype;
  return t.defined() && (t.key_set().raw_repr() & ~allowed) == 0 && to_dtype(t.scalar_type(), &dtype);
}

bool has_tangent(const Tensor& t) { return t._fw_grad(0).defined(); }

// Nobody is tracing, transforming or intercepting operators.
bool is_eager() {
  const c10::impl::LocalDispatchKeySet keys = c10::impl::tls_local_dispatch_key_set();
  return (keys.included_ - c10::default_included_set).empty();
}

// A tensor as the kernels read it: rows that lie packed or turned, in a copy if need be.
struct Rows {
  Tensor tensor;
  RowLayout layout = {0, {0, 0, 0}};

  const void* data() const { return tensor.defined() ? tensor.const_data_ptr() : nullptr; }
};

RowLayout layout_of(const Tensor& t, int64_t row_dims) {
  return row_layout(t.sizes().data(), t.strides().data(), t.dim(), row_dims);
}

// `spaced`: packed rows may lie apart.
Rows rows_of(const Tensor& t, int64_t row_dims, bool spaced) {
  if (!t.defined()) return {};
  const RowLayout layout = layout_of(t, row_dims);
  if (layout.turned.column_stride != 0 || (spaced ? layout.stride >= 0 : t.is_contiguous())) return {t, layout};
  const Tensor copy = t.contiguous();
  return {copy, layout_of(copy, row_dims)};
}

Tensor empty(at::IntArrayRef sizes, at::ScalarType type) {
  Tensor t = at::detail::empty_cpu(sizes, type, false, std::nullopt);
  api->fresh(t.mutable_data_ptr(), static_cast<int64_t>(t.nbytes()));
  return t;
}

const void* data_or_null(const Parameter& t) { return t ? t->const_data_ptr() : nullptr; }
void* data_or_null(const Tensor& t) { return t.defined() ? t.mutable_data_ptr() : nullptr; }

struct Outputs {
  Tensor y, sum, stats;
};

Outputs run_forward(const Call& call, const Tensor& input, const Tensor& residual, const Parameter& weight,
                    const Parameter& bias) {
  Outputs out = {empty(input.sizes(), call.type), Tensor(), empty({call.centered ? 2 : 1, call.rows}, call.wide())};
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
  api->forward(call.centered, a, {x.layout.turned, r.layout.turned});
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

  // One gradient for each argument of `forward`.
  static variable_list backward(AutogradContext* ctx, const variable_list& grads);
};

// [of what was normalized, the same through the dropout, of the weight, of the bias]
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
  const BackwardTurns turns = {x.layout.turned, dy_rows.layout.turned, d_sum_rows.layout.turned};
  api->backward(call.centered, a, turns, data_or_null(out[2]), data_or_null(out[3]));
  if (wants[0] && !a.dropout.on) out[1] = out[0];
  return out;
}

// Where a gradient of the gradient is wanted, or the incoming gradient is no plain memory.
Gradients run_reference(const Call& call, const Tensor& dy, const Tensor& d_sum, const Tensor& input,
                        const Tensor& weight) {
  const pybind11::gil_scoped_acquire gil;
  const auto wrap = [](const Tensor& t) {
    return pybind11::reinterpret_steal<pybind11::object>(t.defined() ? THPVariable_Wrap(t) : Py_NewRef(Py_None));
  };
  const pybind11::tuple found = pybind11::reinterpret_borrow<pybind11::object>(reference)(
      call.centered, wrap(dy), wrap(d_sum), wrap(input), wrap(weight), call.dims, call.eps, call.dropout, call.seed);
  Gradients out;
  for (size_t k = 0; k < out.size(); ++k) out[k] = THPVariable_Unpack(pybind11::object(found[k]).ptr());
  return out;
}

variable_list NormFunction::backward(AutogradContext* ctx, const variable_list& grads) {
  RECORD_FUNCTION("lightning_optkit::norm_backward", std::vector<c10::IValue>());
  const Call call = unpacked(ctx->saved_data.at("call"));
  const variable_list saved = ctx->get_saved_variables();
  const Tensor &input = saved[0], &stats = saved[1], weight = call.has_weight ? saved[2] : Tensor();
  const Tensor d_sum = call.adds ? grads[1] : Tensor(), dy = grads[0].defined() ? grads[0] : at::zeros_like(input);
  // Edges lead to those arguments only that were tensors.
  size_t edge = 0;
  const auto wanted = [&](bool given) { return given && ctx->needs_input_grad(edge++); };
  const bool wants_input = wanted(true), wants_residual = wanted(call.adds), wants_weight = wanted(call.has_weight),
             wants_bias = wanted(call.has_bias);
  const bool fused = !at::GradMode::is_enabled() && is_eager() && is_plain(dy) && is_plain(input) &&
                     dy.scalar_type() == call.type && (!d_sum.defined() || is_plain(d_sum));
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

// A tensor argument; false where it is none, or none that this road takes.
bool take(PyObject* object, Parameter* out) {
  if (object == Py_None) return true;
  if (!THPVariable_CheckExact(object)) return false;
  const Tensor& t = THPVariable_Unpack(object);
  if (!is_plain(t)) return false;
  *out = t;
  return true;
}

// Fills in what follows from the tensors; false where they do not fit, and the dispatcher op says why.
bool describe(PyObject* sizes, PyObject* eps, const Tensor& input, const Parameter& residual, const Parameter& weight,
              const Parameter& bias, Call* call) {
  if (!(PyTuple_Check(sizes) || PyList_Check(sizes)) || input.numel() == 0) return false;
  call->dims = PySequence_Fast_GET_SIZE(sizes);
  if (call->dims < 1 || call->dims > input.dim()) return false;
  call->size = 1;
  for (int64_t k = 0; k < call->dims; ++k) {
    const int64_t size = PyLong_AsLongLong(PySequence_Fast_GET_ITEM(sizes, k));
    if (size != input.size(input.dim() - call->dims + k)) return PyErr_Clear(), false;
    call->size *= size;
  }
  call->rows = input.numel() / call->size;
  call->adds = residual.has_value();
  call->has_weight = weight.has_value();
  call->has_bias = bias.has_value();
  call->input_type = call->type = call->residual_type = input.scalar_type();
  if (residual) {
    call->residual_type = residual->scalar_type();
    if (residual->sizes() != input.sizes()) return false;
    if ((call->input_type == at::kDouble) != (call->residual_type == at::kDouble)) return false;
    if (call->residual_type != call->input_type) call->type = at::kFloat;
  }
  const at::IntArrayRef row_sizes = input.sizes().slice(input.dim() - call->dims);
  call->parameter_type = weight ? weight->scalar_type() : bias ? bias->scalar_type() : call->wide();
  for (const Parameter* parameter : {&weight, &bias}) {
    if (!*parameter) continue;
    const Tensor& t = **parameter;
    if (t.sizes() != row_sizes || !t.is_contiguous() || t.scalar_type() != call->parameter_type) return false;
    if (t.scalar_type() != call->type && t.scalar_type() != call->wide()) return false;
  }
  call->eps = eps == Py_None ? (call->wide() == at::kDouble ? std::numeric_limits<double>::epsilon()
                                                            : std::numeric_limits<float>::epsilon())
                             : PyFloat_AsDouble(eps);
  return !PyErr_Occurred() || (PyErr_Clear(), false);
}

// The outputs in Python: y, or (y, sum). None where this road does not lead.
PyObject* call_norm(PyObject* centered, PyObject* const* tensors, PyObject* sizes, PyObject* eps, double dropout,
                    int64_t seed) {
  HANDLE_TH_ERRORS
  Parameter input, residual, weight, bias;
  Call call = {};
  if (!is_eager() || !take(tensors[0], &input) || !take(tensors[1], &residual) || !take(tensors[2], &weight) ||
      !take(tensors[3], &bias) || !input || !describe(sizes, eps, *input, residual, weight, bias, &call))
    Py_RETURN_NONE;
  call.centered = centered == Py_True;
  call.dropout = dropout;
  call.seed = seed;
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
  if (count != 6) return PyErr_Format(PyExc_TypeError, "norm takes 6 arguments");
  PyObject* const tensors[4] = {a[1], Py_None, a[3], a[4]};
  return call_norm(a[0], tensors, a[2], a[5], 0.0, 0);
}

// add_norm(centered, input, residual, sizes, weight, bias, eps, dropout, seed)
PyObject* add_norm(PyObject*, PyObject* const* a, Py_ssize_t count) {
  if (count != 9) return PyErr_Format(PyExc_TypeError, "add_norm takes 9 arguments");
  const double dropout = PyFloat_AsDouble(a[7]);
  const int64_t seed = PyLong_AsLongLong(a[8]);
  if (PyErr_Occurred()) return nullptr;
  PyObject* const tensors[4] = {a[1], a[2], a[4], a[5]};
  return call_norm(a[0], tensors, a[3], a[6], dropout, seed);
}

// connect(address of the NormApi, gradients in operators of torch)
PyObject* connect(PyObject*, PyObject* const* a, Py_ssize_t count) {
  if (count != 2) return PyErr_Format(PyExc_TypeError, "connect takes 2 arguments");
  api = static_cast<const NormApi*>(PyLong_AsVoidPtr(a[0]));
  if (PyErr_Occurred()) return nullptr;
  reference = Py_NewRef(a[1]);
  Py_RETURN_NONE;
}

PyCFunction fast(PyObject* (*function)(PyObject*, PyObject* const*, Py_ssize_t)) {
  return reinterpret_cast<PyCFunction>(reinterpret_cast<void*>(function));
}

// is_observed(): does a profiler, or any other observer of torch's, want to know what is run?
PyObject* is_observed(PyObject*, PyObject*) { return PyBool_FromLong(at::hasCallbacks()); }

PyMethodDef methods[] = {{"norm", fast(&norm), METH_FASTCALL, nullptr},
                         {"add_norm", fast(&add_norm), METH_FASTCALL, nullptr},
                         {"connect", fast(&connect), METH_FASTCALL, nullptr},
                         {"is_observed", &is_observed, METH_NOARGS, nullptr},
                         {nullptr, nullptr, 0, nullptr}};
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

// SPDX-License-Identifier: Apache-2.0
// LayerNorm and RMSNorm as dispatcher ops, through torch's stable ABI: checks, outputs, kernel calls.
#include <dlfcn.h>

#include <algorithm>
#include <utility>

#include "bindings/device.h"
#include "bindings/norm_api.h"
#include "bindings/norm_checks.h"
#include "bindings/threads.h"
#include "cpu/layer_norm.h"
#include "cpu/memory.h"

namespace optkit {
namespace {

using torch::stable::detail::to;

// The function is in libtorch_cuda, which CPU builds of torch lack, so it is looked up in the loaded library.
void* current_stream(int32_t device_index) {
  using GetStream = AOTITorchError (*)(int32_t, void**);
  static const GetStream get = [] {
    void* library = dlopen("libtorch_cuda.so", RTLD_LAZY | RTLD_NOLOAD);
    return reinterpret_cast<GetStream>(dlsym(library ? library : RTLD_DEFAULT, "aoti_torch_get_current_cuda_stream"));
  }();
  STD_TORCH_CHECK(get != nullptr, "this torch has no CUDA streams");
  void* stream = nullptr;
  TORCH_ERROR_CODE_CHECK(get(device_index, &stream));
  return stream;
}

const Workers workers = {&torch_parallel, &torch_num_threads};

// Whether the elements are contiguous and aligned.
bool is_packed(const Argument& t) { return t.is_aligned() && (t.dim == 0 || t.layout(t.dim).stride >= 0); }

void pack(Argument* t) {
  if (*t && !is_packed(*t)) *t = std::move(*t).contiguous();
}

// Brings a tensor into a layout that the kernels read, copying it if necessary: rows that are packed or, on CPU,
// strided. `spaced`: gaps between packed rows are allowed.
RowLayout lay_out(Argument* t, int64_t row_dims, bool spaced) {
  if (!*t) return {0, {0, 0, 0}};
  const RowLayout layout = t->layout(row_dims);
  const bool reads = layout.strided.column_stride != 0 ? t->on_cpu() : spaced ? layout.stride >= 0 : is_packed(*t);
  if (reads && t->is_aligned()) return layout;
  *t = std::move(*t).contiguous();
  return t->layout(row_dims);
}

struct Forward {
  Output y, sum, stats;
};

void* row_of(void* stats, int64_t row, int64_t rows, DType type) {
  return static_cast<char*>(stats) + row * rows * (type == DType::kFloat64 ? 8 : 4);
}

Forward forward(const NormChecks& checks, bool centered, Argument x, Argument residual, int64_t dims, Argument weight,
                Argument bias, double eps, double p, const Argument& given_seed) {
  const Sizes sizes = checks.check_input(x, dims);
  NormForward a = {};
  a.type = a.x_type = x.dtype;
  if (residual) {
    checks.check_residual(residual, x);
    if (residual.dtype != x.dtype) a.type = DType::kFloat32;
    a.residual_type = residual.dtype;
  }
  checks.check_parameter(weight, x, a.type, sizes);
  checks.check_parameter(bias, x, a.type, sizes);
  if (weight && bias) checks.check_dtype(bias, weight.dtype);
  checks.check_eps(eps);
  const int64_t seed = checks.check_dropout(p, given_seed);
  pack(&weight);
  pack(&bias);
  const RowLayout x_layout = lay_out(&x, dims, true), residual_layout = lay_out(&residual, dims, false);
  a.x_stride = x_layout.stride;
  const DType accumulator = a.type == DType::kFloat64 ? a.type : DType::kFloat32;
  const int64_t stats_sizes[2] = {centered ? 2 : 1, sizes.rows};
  Forward out = {empty(x, x.sizes, x.dim, a.type), nullptr, empty(x, stats_sizes, 2, accumulator)};
  if (residual) out.sum = empty(x, x.sizes, x.dim, a.type);
  if (x.numel == 0) return out;
  void* stats = data_of(out.stats);
  a.x = x.data;
  a.residual = residual.data;
  a.y = data_of(out.y);
  a.sum = out.sum ? data_of(out.sum) : nullptr;
  a.mean = centered ? stats : nullptr;
  a.rstd = row_of(stats, centered ? 1 : 0, sizes.rows, accumulator);
  a.weight = weight.data;
  a.bias = bias.data;
  a.weight_type = weight ? weight.dtype : bias ? bias.dtype : accumulator;
  a.rows = sizes.rows;
  a.size = sizes.size;
  a.eps = eps;
  a.dropout = make_dropout(p, seed);
  if (x.on_cpu())
    norm_forward(centered, a, {x_layout.strided, residual_layout.strided}, workers);
  else
    check_cuda(cuda_api().norm_forward(centered, &a, x.device_index, current_stream(x.device_index)));
  return out;
}

struct Backward {
  Output dx, d_input, d_weight, d_bias;
};

Backward backward(const NormChecks& checks, bool centered, Argument dy, Argument d_sum, Argument x, Argument stats,
                  Argument weight, int64_t dims, double p, const Argument& given_seed, bool wants_x, bool wants_weight,
                  bool wants_bias) {
  const Sizes sizes = checks.check_input(x, dims);
  checks.check_gradient(dy, x);
  if (d_sum) checks.check_gradient(d_sum, x);
  checks.check_stats(stats, x, centered, sizes);
  checks.check_parameter(weight, x, x.dtype, sizes);
  const int64_t seed = checks.check_dropout(p, given_seed);
  pack(&stats);
  pack(&weight);
  const RowLayout x_layout = lay_out(&x, dims, true), dy_layout = lay_out(&dy, dims, false),
                  d_sum_layout = lay_out(&d_sum, dims, false);
  NormBackward a = {};
  const BackwardStrided strided = {x_layout.strided, dy_layout.strided, d_sum_layout.strided};
  a.x_stride = x_layout.stride;
  a.type = x.dtype;
  const DType accumulator = a.type == DType::kFloat64 ? a.type : DType::kFloat32;
  a.weight_type = weight ? weight.dtype : accumulator;
  a.dropout = make_dropout(p, seed);
  const int64_t* row_sizes = x.sizes + x.dim - dims;
  Backward out = {};
  out.dx = wants_x ? empty(x, x.sizes, x.dim, a.type) : nothing(x);
  out.d_input = wants_x && a.dropout.on ? empty(x, x.sizes, x.dim, a.type) : nothing(x);
  out.d_weight = wants_weight ? empty(x, row_sizes, dims, a.weight_type) : nothing(x);
  out.d_bias = wants_bias ? empty(x, row_sizes, dims, a.weight_type) : nothing(x);
  void *d_weight = wants_weight ? data_of(out.d_weight) : nullptr, *d_bias = wants_bias ? data_of(out.d_bias) : nullptr;
  a.dy = dy.data;
  a.d_sum = d_sum ? d_sum.data : nullptr;
  a.x = x.data;
  a.mean = centered ? stats.data : nullptr;
  a.rstd = row_of(stats.data, centered ? 1 : 0, sizes.rows, accumulator);
  a.weight = weight.data;
  a.dx = wants_x ? data_of(out.dx) : nullptr;
  a.d_input = wants_x && a.dropout.on ? data_of(out.d_input) : nullptr;
  a.rows = sizes.rows;
  a.size = sizes.size;
  a.wants_weight = wants_weight;
  a.wants_bias = wants_bias;
  if (x.on_cpu()) {
    norm_backward(centered, a, strided, d_weight, d_bias, workers);
    return out;
  }
  // The allocator reuses the workspace only on this stream, so it may be freed before the kernels have run.
  int64_t parts = 0;
  check_cuda(cuda_api().norm_backward_parts(centered, &a, x.device_index, &parts));
  const int64_t space_size = 2 * parts * sizes.size;
  const Output space = empty(x, &space_size, 1, accumulator);
  check_cuda(cuda_api().norm_backward(centered, &a, d_weight, d_bias, parts, data_of(space), x.device_index,
                                      current_stream(x.device_index)));
  return out;
}

// Names of the ops, for error messages.
constexpr char kNorm[] = "norm", kPlainNorm[] = "_norm", kAddNorm[] = "add_norm", kPlainAddNorm[] = "_add_norm",
               kNormBackward[] = "norm_backward";

// norm(centered, input, weight, bias, dims, eps) -> (y, stats)
template <const char* kName>
void norm_op(StableIValue* stack, uint64_t, uint64_t) {
  Argument x = required("input", stack[1]), weight = optional("weight", stack[2]), bias = optional("bias", stack[3]);
  Forward out =
      forward(NormChecks(kName), to<bool>(stack[0]), std::move(x), Argument("residual"), to<int64_t>(stack[4]),
              std::move(weight), std::move(bias), to<double>(stack[5]), 0.0, Argument("seed"));
  stack[0] = give(std::move(out.y));
  stack[1] = give(std::move(out.stats));
}

// add_norm(centered, input, residual, weight, bias, dims, eps, dropout, seed) -> (y, sum, stats)
template <const char* kName>
void add_norm_op(StableIValue* stack, uint64_t, uint64_t) {
  Argument x = required("input", stack[1]), residual = required("residual", stack[2]),
           weight = optional("weight", stack[3]), bias = optional("bias", stack[4]);
  const Argument seed = optional("seed", stack[8]);
  Forward out = forward(NormChecks(kName), to<bool>(stack[0]), std::move(x), std::move(residual), to<int64_t>(stack[5]),
                        std::move(weight), std::move(bias), to<double>(stack[6]), to<double>(stack[7]), seed);
  stack[0] = give(std::move(out.y));
  stack[1] = give(std::move(out.sum));
  stack[2] = give(std::move(out.stats));
}

// norm_backward(centered, dy, d_sum, input, stats, weight, dims, dropout, seed, wants_input, wants_weight, wants_bias)
//   -> (dx, d_input, d_weight, d_bias)
void norm_backward_op(StableIValue* stack, uint64_t, uint64_t) {
  Argument dy = required("dy", stack[1]), d_sum = optional("d_sum", stack[2]), x = required("input", stack[3]),
           stats = required("stats", stack[4]), weight = optional("weight", stack[5]);
  const Argument seed = optional("seed", stack[8]);
  Backward out = backward(NormChecks(kNormBackward), to<bool>(stack[0]), std::move(dy), std::move(d_sum), std::move(x),
                          std::move(stats), std::move(weight), to<int64_t>(stack[6]), to<double>(stack[7]), seed,
                          to<bool>(stack[9]), to<bool>(stack[10]), to<bool>(stack[11]));
  stack[0] = give(std::move(out.dx));
  stack[1] = give(std::move(out.d_input));
  stack[2] = give(std::move(out.d_weight));
  stack[3] = give(std::move(out.d_bias));
}

}  // namespace

const NormApi& norm_api() {
  static const NormApi api = {
      kNormApiVersion,
      [](bool centered, const NormForward& a, const ForwardStrided& strided) {
        norm_forward(centered, a, strided, workers);
      },
      [](bool centered, const NormBackward& a, const BackwardStrided& strided, void* d_weight, void* d_bias) {
        norm_backward(centered, a, strided, d_weight, d_bias, workers);
      },
      &back_by_huge_pages,
  };
  return api;
}

}  // namespace optkit

// kNormApiSymbol
extern "C" __attribute__((visibility("default"))) const optkit::NormApi* optkit_norm_api() {
  return &optkit::norm_api();
}

// `norm` and `add_norm` have an autograd formula, registered in Python, for traced graphs. Their underscore variants
// have none: an eager call brings its own autograd node, at half the cost.
STABLE_TORCH_LIBRARY_FRAGMENT(lightning_optkit, m) {
#define OPTKIT_NORM \
  "norm(bool centered, Tensor input, Tensor? weight, Tensor? bias, int dims, float eps) -> (Tensor, Tensor)"
#define OPTKIT_ADD_NORM                                                                                        \
  "add_norm(bool centered, Tensor input, Tensor residual, Tensor? weight, Tensor? bias, int dims, float eps, " \
  "float dropout, Tensor? seed) -> (Tensor, Tensor, Tensor)"
  m.def(OPTKIT_NORM);
  m.def("_" OPTKIT_NORM);
  m.def(OPTKIT_ADD_NORM);
  m.def("_" OPTKIT_ADD_NORM);
  m.def(
      "norm_backward(bool centered, Tensor dy, Tensor? d_sum, Tensor input, Tensor stats, Tensor? weight, int dims, "
      "float dropout, Tensor? seed, bool wants_input, bool wants_weight, bool wants_bias) "
      "-> (Tensor, Tensor, Tensor, Tensor)");
}

// Registered for every device and layout, with a separate line for nested tensors, so that the checks refuse with a
// message what the kernels cannot read.
#define OPTKIT_NORM_KERNELS                                         \
  m.impl("norm", &optkit::norm_op<optkit::kNorm>);                  \
  m.impl("_norm", &optkit::norm_op<optkit::kPlainNorm>);            \
  m.impl("add_norm", &optkit::add_norm_op<optkit::kAddNorm>);       \
  m.impl("_add_norm", &optkit::add_norm_op<optkit::kPlainAddNorm>); \
  m.impl("norm_backward", &optkit::norm_backward_op);
// clang-format off
STABLE_TORCH_LIBRARY_IMPL(lightning_optkit, CompositeExplicitAutograd, m) { OPTKIT_NORM_KERNELS }
STABLE_TORCH_LIBRARY_IMPL(lightning_optkit, NestedTensorCPU, m) { OPTKIT_NORM_KERNELS }
STABLE_TORCH_LIBRARY_IMPL(lightning_optkit, NestedTensorCUDA, m) { OPTKIT_NORM_KERNELS }
STABLE_TORCH_LIBRARY_IMPL(lightning_optkit, NestedTensorMeta, m) { OPTKIT_NORM_KERNELS }
// clang-format on
STABLE_TORCH_LIBRARY_IMPL(lightning_optkit, AutogradNestedTensor, m) {
  m.impl("_norm", &optkit::norm_op<optkit::kPlainNorm>);
  m.impl("_add_norm", &optkit::add_norm_op<optkit::kPlainAddNorm>);
  m.impl("norm_backward", &optkit::norm_backward_op);
}

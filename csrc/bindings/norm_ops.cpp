// SPDX-License-Identifier: Apache-2.0
// LayerNorm and RMSNorm as dispatcher ops, on torch's stable ABI: checks, outputs, and the call of a kernel.
#include <dlfcn.h>

#include <algorithm>
#include <utility>

#include "bindings/argument.h"
#include "bindings/device.h"
#include "bindings/norm_api.h"
#include "bindings/threads.h"
#include "cpu/layer_norm.h"
#include "cpu/memory.h"

namespace optkit {
namespace {

using torch::stable::detail::to;

struct Sizes {
  int64_t rows, size, row_dims;
};

// Rows are made of as many dimensions as the weight has, or of `dims` without a weight.
Sizes cut(const Argument& x, int64_t row_dims) {
  STD_TORCH_CHECK(row_dims >= 1 && row_dims <= x.dim, "the input has fewer dimensions than are normalized");
  int64_t size = 1;
  for (int64_t d = x.dim - row_dims; d < x.dim; ++d) size *= x.sizes[d];
  STD_TORCH_CHECK(size > 0, "a row must hold at least one element");
  return {x.numel / size, size, row_dims};
}

void check_parameter(const Argument& parameter, const Argument& x, DType type, const Sizes& sizes) {
  if (!parameter) return;
  STD_TORCH_CHECK(parameter.dim == sizes.row_dims &&
                      std::equal(parameter.sizes, parameter.sizes + parameter.dim, x.sizes + x.dim - sizes.row_dims),
                  "weight and bias must have the shape of a row");
  STD_TORCH_CHECK(
      parameter.is_known && (parameter.dtype == type || (parameter.dtype == DType::kFloat32 && is_half(type))),
      "weight and bias must have the dtype of the input, or float32 beside 16 bits");
  STD_TORCH_CHECK(parameter.device == x.device && parameter.device_index == x.device_index,
                  "weight and bias must be on the device of the input");
}

// The function lives in libtorch_cuda, which a CPU build of torch lacks: it is looked up where torch has loaded it.
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

// One element behind the other.
bool is_packed(const Argument& t) { return t.dim == 0 || t.layout(t.dim).stride >= 0; }

Argument packed(Argument argument) {
  return is_packed(argument) ? std::move(argument) : std::move(argument).contiguous();
}

Argument packed_optional(StableIValue value) {
  Argument argument = optional(value);
  return argument ? packed(std::move(argument)) : std::move(argument);
}

// A tensor as the kernels read it: rows that lie packed or, on CPU, turned; in a copy if need be. `spaced`: packed rows
// may lie apart.
RowLayout lay_out(Argument* t, int64_t row_dims, bool spaced) {
  if (!*t) return {0, {0, 0, 0}};
  const RowLayout layout = t->layout(row_dims);
  if (layout.turned.column_stride != 0 ? t->on_cpu() : (spaced ? layout.stride >= 0 : is_packed(*t))) return layout;
  *t = std::move(*t).contiguous();
  return t->layout(row_dims);
}

void check_x(const Argument& x) {
  STD_TORCH_CHECK(x.is_known, "the input must be float64, float32, bfloat16 or float16");
}

struct Forward {
  Output y, sum, stats;
};

void* row_of(void* stats, int64_t row, int64_t rows, DType type) {
  return static_cast<char*>(stats) + row * rows * (type == DType::kFloat64 ? 8 : 4);
}

Forward forward(bool centered, Argument x, Argument residual, int64_t dims, const Argument& weight,
                const Argument& bias, double eps, double p, int64_t seed) {
  check_x(x);
  const Sizes sizes = cut(x, dims);
  NormForward a = {};
  a.type = a.x_type = x.dtype;
  if (residual) {
    check_x(residual);
    STD_TORCH_CHECK(x.same_shape(residual), "input and residual must have one shape");
    STD_TORCH_CHECK(x.device == residual.device && x.device_index == residual.device_index,
                    "input and residual must be on one device");
    STD_TORCH_CHECK((x.dtype == DType::kFloat64) == (residual.dtype == DType::kFloat64),
                    "float64 goes with float64 only");
    if (residual.dtype != x.dtype) a.type = DType::kFloat32;
    a.residual_type = residual.dtype;
  }
  check_parameter(weight, x, a.type, sizes);
  check_parameter(bias, x, a.type, sizes);
  STD_TORCH_CHECK(!weight || !bias || weight.dtype == bias.dtype, "weight and bias must have one dtype");
  const RowLayout x_layout = lay_out(&x, dims, true), residual_layout = lay_out(&residual, dims, false);
  a.x_stride = x_layout.stride;
  const DType wide = a.type == DType::kFloat64 ? a.type : DType::kFloat32;
  const int64_t stats_sizes[2] = {centered ? 2 : 1, sizes.rows};
  Forward out = {empty(x, x.sizes, x.dim, a.type), nullptr, empty(x, stats_sizes, 2, wide)};
  if (residual) out.sum = empty(x, x.sizes, x.dim, a.type);
  if (x.numel == 0) return out;
  void* stats = data_of(out.stats);
  a.x = x.data;
  a.residual = residual.data;
  a.y = data_of(out.y);
  a.sum = out.sum ? data_of(out.sum) : nullptr;
  a.mean = centered ? stats : nullptr;
  a.rstd = row_of(stats, centered ? 1 : 0, sizes.rows, wide);
  a.weight = weight.data;
  a.bias = bias.data;
  a.weight_type = weight ? weight.dtype : bias ? bias.dtype : wide;
  a.rows = sizes.rows;
  a.size = sizes.size;
  a.eps = eps;
  a.dropout = make_dropout(p, seed);
  if (x.on_cpu())
    norm_forward(centered, a, {x_layout.turned, residual_layout.turned}, workers);
  else
    check_cuda(cuda_api().norm_forward(centered, &a, x.device_index, current_stream(x.device_index)));
  return out;
}

struct Backward {
  Output dx, d_input, d_weight, d_bias;
};

Backward backward(bool centered, Argument dy, Argument d_sum, Argument x, const Argument& stats, const Argument& weight,
                  int64_t dims, double p, int64_t seed, bool wants_x, bool wants_weight, bool wants_bias) {
  check_x(x);
  const Sizes sizes = cut(x, dims);
  STD_TORCH_CHECK(dy.same_shape(x) && dy.is_known && dy.dtype == x.dtype, "the gradient must be like the output");
  STD_TORCH_CHECK(!d_sum || (d_sum.same_shape(x) && d_sum.dtype == x.dtype), "the gradient must be like the sum");
  check_parameter(weight, x, x.dtype, sizes);
  const RowLayout x_layout = lay_out(&x, dims, true), dy_layout = lay_out(&dy, dims, false),
                  d_sum_layout = lay_out(&d_sum, dims, false);
  NormBackward a = {};
  const BackwardTurns turns = {x_layout.turned, dy_layout.turned, d_sum_layout.turned};
  a.x_stride = x_layout.stride;
  a.type = x.dtype;
  const DType wide = a.type == DType::kFloat64 ? a.type : DType::kFloat32;
  a.weight_type = weight ? weight.dtype : wide;
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
  a.rstd = row_of(stats.data, centered ? 1 : 0, sizes.rows, wide);
  a.weight = weight.data;
  a.dx = wants_x ? data_of(out.dx) : nullptr;
  a.d_input = wants_x && a.dropout.on ? data_of(out.d_input) : nullptr;
  a.rows = sizes.rows;
  a.size = sizes.size;
  a.wants_weight = wants_weight;
  a.wants_bias = wants_bias;
  if (x.on_cpu()) {
    norm_backward(centered, a, turns, d_weight, d_bias, workers);
    return out;
  }
  // The allocator hands the workspace out again on this stream only, so it may go before the kernels have run.
  int64_t parts = 0;
  check_cuda(cuda_api().norm_backward_parts(centered, &a, x.device_index, &parts));
  const int64_t space_size = 2 * parts * sizes.size;
  const Output space = empty(x, &space_size, 1, wide);
  check_cuda(cuda_api().norm_backward(centered, &a, d_weight, d_bias, parts, data_of(space), x.device_index,
                                      current_stream(x.device_index)));
  return out;
}

int64_t seed_of(const Argument& seed) { return seed ? *static_cast<const int64_t*>(seed.data) : 0; }

// norm(centered, input, weight, bias, dims, eps) -> (y, stats)
void norm_op(StableIValue* stack, uint64_t, uint64_t) {
  Argument x = required(stack[1]);
  const Argument weight = packed_optional(stack[2]), bias = packed_optional(stack[3]);
  Forward out = forward(to<bool>(stack[0]), std::move(x), Argument(), to<int64_t>(stack[4]), weight, bias,
                        to<double>(stack[5]), 0.0, 0);
  stack[0] = give(std::move(out.y));
  stack[1] = give(std::move(out.stats));
}

// add_norm(centered, input, residual, weight, bias, dims, eps, dropout, seed) -> (y, sum, stats)
void add_norm_op(StableIValue* stack, uint64_t, uint64_t) {
  Argument x = required(stack[1]), residual = required(stack[2]);
  const Argument weight = packed_optional(stack[3]), bias = packed_optional(stack[4]), seed = optional(stack[8]);
  Forward out = forward(to<bool>(stack[0]), std::move(x), std::move(residual), to<int64_t>(stack[5]), weight, bias,
                        to<double>(stack[6]), to<double>(stack[7]), seed_of(seed));
  stack[0] = give(std::move(out.y));
  stack[1] = give(std::move(out.sum));
  stack[2] = give(std::move(out.stats));
}

// norm_backward(centered, dy, d_sum, input, stats, weight, dims, dropout, seed, wants_input, wants_weight, wants_bias)
//   -> (dx, d_input, d_weight, d_bias)
void norm_backward_op(StableIValue* stack, uint64_t, uint64_t) {
  Argument dy = required(stack[1]), d_sum = optional(stack[2]), x = required(stack[3]);
  const Argument stats = packed(required(stack[4])), weight = packed_optional(stack[5]), seed = optional(stack[8]);
  Backward out =
      backward(to<bool>(stack[0]), std::move(dy), std::move(d_sum), std::move(x), stats, weight, to<int64_t>(stack[6]),
               to<double>(stack[7]), seed_of(seed), to<bool>(stack[9]), to<bool>(stack[10]), to<bool>(stack[11]));
  stack[0] = give(std::move(out.dx));
  stack[1] = give(std::move(out.d_input));
  stack[2] = give(std::move(out.d_weight));
  stack[3] = give(std::move(out.d_bias));
}

}  // namespace

const NormApi& norm_api() {
  static const NormApi api = {
      [](bool centered, const NormForward& a, const ForwardTurns& turns) { norm_forward(centered, a, turns, workers); },
      [](bool centered, const NormBackward& a, const BackwardTurns& turns, void* d_weight, void* d_bias) {
        norm_backward(centered, a, turns, d_weight, d_bias, workers);
      },
      &back_by_huge_pages,
  };
  return api;
}

}  // namespace optkit

// `norm` and `add_norm` have an autograd formula, registered in Python, for graphs that are traced. The same under a
// name with an underscore have none: an eager call brings its own autograd node, which costs half as much.
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

#define OPTKIT_NORM_KERNELS                  \
  m.impl("norm", &optkit::norm_op);          \
  m.impl("_norm", &optkit::norm_op);         \
  m.impl("add_norm", &optkit::add_norm_op);  \
  m.impl("_add_norm", &optkit::add_norm_op); \
  m.impl("norm_backward", &optkit::norm_backward_op);

STABLE_TORCH_LIBRARY_IMPL(lightning_optkit, CPU, m){OPTKIT_NORM_KERNELS} STABLE_TORCH_LIBRARY_IMPL(lightning_optkit,
                                                                                                   CUDA, m) {
  OPTKIT_NORM_KERNELS
}

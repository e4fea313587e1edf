// SPDX-License-Identifier: Apache-2.0
// Checks of the norms' arguments, before memory is touched: the kernels do not check again.
#pragma once

#include <cmath>
#include <cstring>
#include <sstream>
#include <string>

#include "bindings/argument_text.h"

namespace optkit {

// Rows consist of the last `row_dims` dimensions.
struct Sizes {
  int64_t rows, size, row_dims;
};

class NormChecks : public Refusals {
 public:
  using Refusals::Refusals;

  Sizes check_input(const Argument& x, int64_t row_dims) const {
    check_floating(x);
    if (row_dims < 1 || row_dims > x.dim)
      refuse("dims", std::to_string(row_dims),
             "must be in [1, " + std::to_string(x.dim) + "], the number of dimensions of the input");
    if (x.dim > kMaxDims)
      refuse(field(x, "ndim"), std::to_string(x.dim), "must be at most " + std::to_string(kMaxDims));
    int64_t size = 1;
    for (int64_t d = x.dim - row_dims; d < x.dim; ++d) size *= x.sizes[d];
    if (size == 0) refuse(field(x, "shape"), shape_of(x), "a row must hold at least one element");
    return {x.numel / size, size, row_dims};
  }

  void check_residual(const Argument& residual, const Argument& x) const {
    check_like(residual, x);
    if ((x.dtype == DType::kFloat64) != (residual.dtype == DType::kFloat64))
      refuse(field(residual, "dtype"), name_of_dtype(residual.dtype_code),
             "float64 goes with float64 only, and the input is " + name_of_dtype(x.dtype_code));
  }

  // Requires a gradient with the shape and dtype of `x`.
  void check_gradient(const Argument& gradient, const Argument& x) const {
    check_like(gradient, x);
    check_dtype(gradient, x.dtype);
  }

  // `type`: dtype of the output.
  void check_parameter(const Argument& parameter, const Argument& x, DType type, const Sizes& sizes) const {
    if (!parameter) return;
    check_floating(parameter);
    check_device(parameter, x);
    check_shape(parameter, x.sizes + x.dim - sizes.row_dims, sizes.row_dims);
    if (parameter.dtype != type && !(is_half(type) && parameter.dtype == DType::kFloat32))
      refuse(field(parameter, "dtype"), name_of_dtype(parameter.dtype_code),
             "must be " + name_of_dtype(code_of(type)) + (is_half(type) ? " or torch.float32" : ""));
  }

  void check_stats(const Argument& stats, const Argument& x, bool centered, const Sizes& sizes) const {
    const int64_t shape[2] = {centered ? 2 : 1, sizes.rows};
    check_floating(stats);
    check_device(stats, x);
    check_shape(stats, shape, 2);
    check_dtype(stats, x.dtype == DType::kFloat64 ? DType::kFloat64 : DType::kFloat32);
  }

  void check_eps(double eps) const {
    if (!(eps >= 0.0 && std::isfinite(eps))) refuse("eps", number(eps), "must be in [0, inf)");
  }

  // The value of the seed, which the host reads; 0 without dropout.
  int64_t check_dropout(double dropout, const Argument& seed) const {
    if (!(dropout >= 0.0 && dropout <= 1.0)) refuse("dropout", number(dropout), "must be in [0, 1]");
    if (!seed) {
      if (dropout > 0.0) refuse("seed", "None", "must be an int64 number on CPU where dropout is above 0");
      return 0;
    }
    check_ordinary(seed);
    if (seed.dtype_code != aoti_torch_dtype_int64())
      refuse(field(seed, "dtype"), name_of_dtype(seed.dtype_code), "must be torch.int64");
    if (seed.numel != 1) refuse(field(seed, "shape"), shape_of(seed), "must be one number");
    if (!seed.on_cpu()) refuse(field(seed, "device"), name_of_device(seed), "must be cpu");
    int64_t value;
    std::memcpy(&value, seed.data, sizeof(value));
    return value;
  }

 private:
  static constexpr int64_t kMaxDims = 64;

  void check_like(const Argument& t, const Argument& x) const {
    check_floating(t);
    check_device(t, x);
    check_shape(t, x.sizes, x.dim);
  }
  static std::string number(double value) {
    std::ostringstream text;
    text << value;
    return text.str();
  }
};

}  // namespace optkit

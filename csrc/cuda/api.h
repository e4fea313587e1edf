// SPDX-License-Identifier: Apache-2.0
// The C interface of liboptkit_cuda, and the only interface to CUDA. The library is opened when the first CUDA tensor
// appears, so that importing the package never touches a driver. Functions return null or an error message. No call
// synchronizes with the device, except after a layout change.
#pragma once

#include <cstdint>

#include "core/tables.h"
#include "norms/tables.h"

namespace optkit {

constexpr int kCudaApiVersion = 4;

// Values that a step reads on the device, so that the host need not wait for them. Null: absent.
struct CudaStepControl {
  const double* norm;       // {sum of squares, non-finite elements} of all gradients, before unscaling
  const float* loss_scale;  // of a GradScaler
  const float* found_inf;   // of a GradScaler
  double scale;             // factor known to the host; 1 by default
  const double* max_norm;   // bound of the global norm; null: `max_norm_value`
  double max_norm_value;    // +inf: no bound
  const double* estimate;   // for a rule with an estimate, which requires `statistics` for its sums
  double* report;           // out, 5 doubles: norm after unscaling, after clipping, steps, clipped steps, skipped steps
  Clipped* clipped;         // in and out, accumulated over plans: result of clipping by tensor or by unit
  Sums* statistics;         // out, one row per tensor; null: do not count
  int32_t counts_report;    // 1: this plan advances the counters in `report` (the last plan of a step does)
};

struct CudaApi {
  int version;
  int on_host;  // 1: an emulation in host memory, for tests
  const char* (*create)(int rule, int is_double, int device, void** plan);
  void (*destroy)(void* plan);
  // Uploads the static tables, after waiting for kernels that use the old ones. Not allowed during graph capture.
  const char* (*layout)(void* plan, const TensorSlot* tensors, int num_tensors, void* stream);
  // Sum of squares and number of non-finite elements into norm_out[0], norm_out[1]: one launch.
  const char* (*norm)(void* plan, const TensorSlot* tensors, double* norm_out, void* stream);
  // `rates`: per group, a learning rate on the device that replaces the one in its row, or null.
  const char* (*step)(void* plan, const TensorSlot* tensors, const GroupRow* groups, const double* const* rates,
                      int num_groups, const CudaStepControl* control, void* stream);
  // LayerNorm and RMSNorm. The backward works in `space`: 2 * parts * size accumulators.
  const char* (*norm_forward)(int centered, const NormForward* arguments, int device, void* stream);
  const char* (*norm_backward_parts)(int centered, const NormBackward* arguments, int device, int64_t* parts);
  const char* (*norm_backward)(int centered, const NormBackward* arguments, void* d_weight, void* d_bias, int64_t parts,
                               void* space, int device, void* stream);
  const char* architectures;  // "80;90;...", as compiled
  const char* rules;          // kCudaRuleNames, as compiled: `create` takes a rule by its number
};

}  // namespace optkit

extern "C" const optkit::CudaApi* optkit_cuda_api();

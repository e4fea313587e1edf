// SPDX-License-Identifier: Apache-2.0
// Walks the tables of a plan on CPU: splits them into chunks, distributes chunks over threads, adds partial sums in
// fixed order.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

#include "core/tables.h"
#include "cpu/factor_layout.h"
#include "cpu/launch.h"
#include "cpu/work_stealing.h"

namespace optkit {

// The active kernels: the best instruction set of this CPU, or the requested one.
const Kernels& active_kernels();
// "baseline", "avx2" or "avx512"; false if this CPU or this build lacks it.
bool use_isa(const char* name);
std::vector<const char*> available_isas();

class CpuWalk {
 public:
  CpuWalk(int rule, bool is_double, ParallelFor parallel_for, int num_workers);

  // Call after tensors were added, removed, activated or deactivated.
  void layout(std::vector<TensorSlot>& tensors);
  // Sum of squares and non-finite count of the active gradients, per tensor, into `sums`.
  void norm(const std::vector<TensorSlot>& tensors, std::vector<Sums>& sums);
  // One update of every active tensor. Advances the counters first. Clipping by tensor reads `sums` as left by `norm`;
  // with statistics, the sums per tensor are written there. Returns the result of clipping by tensor or by unit.
  Clipped step(std::vector<TensorSlot>& tensors, const std::vector<GroupRow>& groups, double grad_scale,
               bool statistics, std::vector<Sums>& sums);

  int num_workers;

 private:
  template <class Body>
  void run_tasks(std::size_t num_tasks, Body body);
  template <class Body>
  void for_each_chunk(Body body);
  void add_chunks(std::vector<Sums>& sums, std::size_t num_tensors) const;
  void layout_units(std::vector<TensorSlot>& tensors, const std::vector<GroupRow>& groups);
  Clipped measure_units(const std::vector<TensorSlot>& tensors, const std::vector<GroupRow>& groups,
                        const std::vector<double>& grad_scales);
  void measure_factors(const std::vector<TensorSlot>& tensors, std::size_t prepared_size);
  std::vector<double> measure_rates(const std::vector<TensorSlot>& tensors, const std::vector<GroupRow>& groups,
                                    const std::vector<double>& grad_scales);
  void walk(const std::vector<TensorSlot>& tensors, StepChunk run, std::size_t prepared_size);

  int rule_;
  bool is_double_;
  ParallelFor parallel_for_;
  std::vector<Chunk> chunks_;
  std::vector<std::size_t> tasks_;  // chunks [tasks_[i], tasks_[i + 1]) form one task
  std::vector<Sums> chunk_sums_;
  std::vector<unsigned char> prepared_;
  std::vector<Chunk> unit_tasks_;  // runs of units
  std::vector<double> unit_numbers_;
  FactorLayout factors_;
  std::vector<Clipped> clipped_;  // per run of units
};

}  // namespace optkit

// SPDX-License-Identifier: Apache-2.0
#include "cpu/layer_norm.h"

#include <algorithm>
#include <cstring>
#include <initializer_list>
#include <memory>

#include "cpu/walk.h"
#include "cpu/work_stealing.h"

namespace optkit {
namespace {

constexpr int64_t kTaskElements = 32768;  // of rows per thread: less does not pay for waking another thread
constexpr int64_t kTasksPerShare = 4;     // of a forward, so that threads that start late take fewer tasks
constexpr int64_t kRowsTogether = 16;     // the most rows that a kernel processes together
constexpr int64_t kMaxParts = 64;         // partial sums of the parameter gradients
constexpr int64_t kMinPartRows = 16;
constexpr int64_t kGatheredBytes = 1 << 18;  // of strided rows packed at a time; more if rows are long
constexpr int64_t kRunBytes = 256;           // per column at least, unless the rows are too short

bool is_accumulator(DType type) { return type == DType::kFloat32 || type == DType::kFloat64; }
DType accumulator_of(DType type) { return type == DType::kFloat64 ? type : DType::kFloat32; }

// A buffer that a thread reuses across calls.
class Scratch {
 public:
  char* take(int64_t num_bytes) {
    if (num_bytes > capacity_) {
      memory_.reset(new char[static_cast<size_t>(num_bytes)]);
      capacity_ = num_bytes;
    }
    return memory_.get();
  }

 private:
  std::unique_ptr<char[]> memory_;
  int64_t capacity_ = 0;
};

char* scratch(int64_t num_bytes) {
  thread_local Scratch memory;
  return memory.take(num_bytes);
}

void fill(void* to, DType type, int64_t count, double value) {
  if (type == DType::kFloat64)
    std::fill_n(static_cast<double*>(to), count, value);
  else
    std::fill_n(static_cast<float*>(to), count, static_cast<float>(value));
}

// A parameter in accumulators: itself, or a converted copy at `space`, filled with `absent` if there is none.
const void* widened(const void* parameter, DType type, DType row_type, int64_t count, double absent, void* space) {
  if (parameter == nullptr) {
    fill(space, accumulator_of(row_type), count, absent);
    return space;
  }
  if (is_accumulator(row_type)) return parameter;
  active_norm_kernels().widen(parameter, type, count, space);
  return space;
}

template <class Body>
void for_each_task(const Workers& workers, int64_t num_tasks, const Body& body) {
  for_each_task(workers.parallel_for, num_tasks > 1 ? workers.count() : 1, num_tasks, body);
}

bool is_strided(const StridedRows& strided) { return strided.column_stride != 0; }

// Number of rows that are adjacent in every strided operand; 0 if no operand is strided. Each is a product of the last
// dimensions, so the shortest run divides the others.
int64_t run_of_neighbors(std::initializer_list<StridedRows> operands) {
  int64_t shortest = 0;
  for (const StridedRows& strided : operands)
    if (is_strided(strided) && (shortest == 0 || strided.inner < shortest)) shortest = strided.inner;
  return shortest;
}

// Strided rows are packed one block at a time: several cache lines of every column, but few enough to stay in the
// cache.
int64_t block_rows(DType type, int64_t size) {
  const int64_t run = (size * kRunBytes > kGatheredBytes ? 64 : kRunBytes) / size_of(type);
  return std::max<int64_t>(1, kGatheredBytes / 4 / (size * size_of(type)) / run) * run;
}

// Packs the rows [row, row + count) and returns the address that row 0 would have there.
const void* gathered(const void* from, const StridedRows& strided, DType type, int64_t size, int64_t row, int64_t count,
                     char** space) {
  if (strided.column_stride == 0) return from;
  const int64_t first = row / strided.inner * strided.outer_stride + row % strided.inner;
  active_norm_kernels().gather(static_cast<const char*>(from) + first * size_of(type), strided.column_stride, type,
                               count, size, *space);
  const char* zeroth = *space - row * size * size_of(type);
  *space += count * size * size_of(type);
  return zeroth;
}

// An operand of a forward or backward: its pointer, layout and dtype.
template <class Arguments>
struct Operand {
  const void* Arguments::* rows;
  StridedRows strided;
  DType type;
};

// Calls run(arguments, first, last) for the rows [begin, end): at once, or if an operand is strided, for blocks of rows
// that are adjacent in every strided operand, packed in a buffer.
template <class Arguments, class Run>
void for_each_block(const Arguments& a, std::initializer_list<Operand<Arguments>> operands, int64_t neighbors,
                    int64_t block, int64_t begin, int64_t end, const Run& run) {
  if (neighbors == 0) return run(a, begin, end);
  thread_local Scratch memory;
  int64_t row_bytes = 0;
  for (const Operand<Arguments>& operand : operands) row_bytes += a.size * size_of(operand.type);
  for (int64_t first = begin; first < end;) {
    const int64_t last = std::min({end, first + block, (first / neighbors + 1) * neighbors});
    char* space = memory.take(block * row_bytes);
    Arguments b = a;
    for (const Operand<Arguments>& operand : operands)
      b.*operand.rows = gathered(a.*operand.rows, operand.strided, operand.type, a.size, first, last - first, &space);
    run(b, first, last);
    first = last;
  }
}

}  // namespace

const NormKernels& active_norm_kernels() { return *active_kernels().norms; }

void norm_forward(bool centered, const NormForward& given, const ForwardStrided& strided, const Workers& workers) {
  NormForward a = given;
  if (is_strided(strided.x)) a.x_stride = a.size;  // packed
  const DType accumulator = accumulator_of(a.type);
  char* space = scratch(2 * a.size * size_of(accumulator));
  a.weight = widened(a.weight, a.weight_type, a.type, a.size, 1.0, space);
  a.bias = widened(a.bias, a.weight_type, a.type, a.size, 0.0, space + a.size * size_of(accumulator));
  const NormForwardRows run = active_norm_kernels().forward[centered][static_cast<int>(a.type)];
  // Rows are independent, so this split may depend on the number of threads.
  const bool alone = a.rows * a.size <= kTaskElements || workers.count() == 1;
  const int64_t few = kTaskElements / kTasksPerShare / a.size;
  const int64_t neighbors = run_of_neighbors({strided.x, strided.residual}), block = block_rows(a.x_type, a.size);
  const int64_t share = (a.rows + workers.count() - 1) / workers.count();  // few strided rows: one share per thread
  const int64_t together = neighbors != 0 ? std::min(block, share) : few < kRowsTogether ? 4 : kRowsTogether;
  const int64_t task_rows = alone ? a.rows : (few / together + 1) * together;
  for_each_task(workers, (a.rows + task_rows - 1) / task_rows, [&](int64_t task) {
    for_each_block<NormForward>(
        a, {{&NormForward::x, strided.x, a.x_type}, {&NormForward::residual, strided.residual, a.residual_type}},
        neighbors, block, task * task_rows, std::min(a.rows, (task + 1) * task_rows), run);
  });
}

void norm_backward(bool centered, const NormBackward& given, const BackwardStrided& strided, void* d_weight,
                   void* d_bias, const Workers& workers) {
  NormBackward a = given;
  if (is_strided(strided.x)) a.x_stride = a.size;  // packed
  const NormKernels& kernels = active_norm_kernels();
  const NormBackwardRows run = kernels.backward[centered][static_cast<int>(a.type)];
  const DType accumulator = accumulator_of(a.type);
  const int64_t vector_bytes = a.size * size_of(accumulator);
  // The split depends only on the shape, so the sums do not depend on the number of threads.
  const int64_t enough =
      std::max({(a.rows + kMaxParts - 1) / kMaxParts, kMinPartRows, (kTaskElements / 2 + a.size - 1) / a.size});
  // Strided rows are split at cache lines of a column.
  const int64_t neighbors = run_of_neighbors({strided.x, strided.dy, strided.d_sum}),
                block = block_rows(a.type, a.size);
  const int64_t together = neighbors != 0 ? 64 / size_of(a.type) : 1;
  const int64_t part_rows = (enough + together - 1) / together * together;
  const int64_t num_parts = std::max<int64_t>(1, (a.rows + part_rows - 1) / part_rows);
  char* space = scratch((2 * num_parts + 3) * vector_bytes);
  a.weight = widened(a.weight, a.weight_type, a.type, a.size, 1.0, space);
  char *weight_sum = space + vector_bytes, *bias_sum = space + 2 * vector_bytes, *parts = space + 3 * vector_bytes;
  for_each_task(workers, num_parts, [&](int64_t part) {
    char* here = parts + 2 * part * vector_bytes;
    std::memset(here, 0, static_cast<size_t>(2 * vector_bytes));
    for_each_block<NormBackward>(a,
                                 {{&NormBackward::x, strided.x, a.type},
                                  {&NormBackward::dy, strided.dy, a.type},
                                  {&NormBackward::d_sum, strided.d_sum, a.type}},
                                 neighbors, block, part * part_rows, std::min(a.rows, (part + 1) * part_rows),
                                 [&](const NormBackward& b, int64_t begin, int64_t end) {
                                   run(b, begin, end, d_weight ? here : nullptr,
                                       d_bias ? here + vector_bytes : nullptr);
                                 });
  });
  const auto finish = [&](char* part, char* sum, void* out) {
    if (out == nullptr) return;
    void* target = is_accumulator(a.weight_type) ? out : sum;
    constexpr int64_t kColumns = 2048;
    const bool few = num_parts * a.size < kTaskElements;
    const int64_t columns = few ? a.size : kColumns;
    for_each_task(workers, (a.size + columns - 1) / columns, [&](int64_t task) {
      kernels.add_parts(part, accumulator, num_parts, 2 * a.size, task * columns,
                        std::min(a.size, (task + 1) * columns), target);
    });
    if (target != out) kernels.narrow(sum, a.weight_type, a.size, out);
  };
  finish(parts, weight_sum, d_weight);
  finish(parts + vector_bytes, bias_sum, d_bias);
}

}  // namespace optkit

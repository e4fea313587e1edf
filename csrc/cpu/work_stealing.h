// SPDX-License-Identifier: Apache-2.0
// Distributes tasks over threads. Each thread has its own share, the same in every call, and steals from the others
// when it is done: data that a thread wrote last is likely still in its caches, and a core that is slow for a moment
// delays nobody. The assignment does not affect any bit of the result, since every task has its own outputs.
#pragma once

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <vector>

namespace optkit {

// torch's thread pool with a plain signature: body(begin, end, context) for parts of [0, size).
using ParallelFor = void (*)(int64_t size, void (*body)(int64_t, int64_t, void*), void* context);

// Calls body(task) for every task in [0, num_tasks).
template <class Body>
void for_each_task(ParallelFor parallel_for, int64_t num_workers, int64_t num_tasks, const Body& body) {
  const int64_t count = std::min(num_workers, num_tasks);
  if (count <= 1) {
    for (int64_t task = 0; task < num_tasks; ++task) body(task);
    return;
  }
  struct alignas(64) Share {
    std::atomic<int64_t> next;
  };
  struct Context {
    const Body* body;
    int64_t num_tasks, count;
    std::vector<Share> shares;
    int64_t first_of(int64_t share) const { return share * num_tasks / count; }
  } context{&body, num_tasks, count, std::vector<Share>(static_cast<std::size_t>(count))};
  for (int64_t k = 0; k < count; ++k)
    context.shares[static_cast<std::size_t>(k)].next.store(context.first_of(k), std::memory_order_relaxed);
  const auto work = [](int64_t worker, int64_t, void* pointer) {
    Context& c = *static_cast<Context*>(pointer);
    for (int64_t k = 0; k < c.count; ++k) {
      const int64_t share = (worker + k) % c.count, end = c.first_of(share + 1);
      std::atomic<int64_t>& next = c.shares[static_cast<std::size_t>(share)].next;
      for (int64_t task; (task = next.fetch_add(1, std::memory_order_relaxed)) < end;) (*c.body)(task);
    }
  };
  parallel_for(count, work, &context);
}

}  // namespace optkit

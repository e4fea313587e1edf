// SPDX-License-Identifier: Apache-2.0
// The threads of a block as fibers: each runs until it waits for others, in an order that a test can choose.
#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>

// For tests, by ctypes.
#define EMULATED extern "C" __attribute__((visibility("default")))

namespace emulation {

struct Dim3 {
  unsigned x = 1, y = 1, z = 1;
  Dim3(unsigned a = 1, unsigned b = 1, unsigned c = 1) : x(a), y(b), z(c) {}
};

struct Thread {
  Dim3 index;
  int number, lane;
  enum { kReady, kAtBlock, kAtWarp, kDone } state;
  unsigned mask;       // of the exchange it waits in
  unsigned exchanges;  // so far
  int vote;
  void* stack_pointer;
  void* fake_stack;  // of AddressSanitizer
};

extern Thread* now;

void run(Dim3 grid, Dim3 block, size_t shared_bytes, const std::function<void()>& kernel);
// Returns whether a thread's vote was not 0.
int wait_for_block(int vote);
// Returns what lane `source` of the warp gave. Every lane in `mask` must take part.
uint64_t exchange(unsigned mask, uint64_t value, int source);
unsigned char* dynamic_shared();

}  // namespace emulation

extern emulation::Dim3 threadIdx, blockIdx, blockDim, gridDim;

// SPDX-License-Identifier: Apache-2.0
#include "fibers.h"

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <memory>
#include <numeric>
#include <random>
#include <vector>

#if !defined(__x86_64__)
#error "The emulation switches between stacks in x86-64 assembly."
#endif
#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif

// Saves what a call must keep, and goes on where `to` was saved.
extern "C" void optkit_switch_stack(void** save, void* to);
asm(R"(
.text
.type optkit_switch_stack, @function
optkit_switch_stack:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
)");

emulation::Dim3 threadIdx, blockIdx, blockDim, gridDim;

namespace emulation {

Thread* now = nullptr;

namespace {

constexpr size_t kStack = 256 * 1024;
constexpr int kMaxThreads = 1024, kWarp = 32;

struct Block {
  std::vector<Thread> threads;
  std::vector<uint64_t> given;  // two exchanges by lane, per warp
  int votes;
  const std::function<void()>* kernel;
  void* scheduler;
  void* scheduler_fake_stack = nullptr;
  const void* scheduler_bottom = nullptr;
  size_t scheduler_size = 0;
};
Block block;
std::vector<std::unique_ptr<char[]>> stacks;
std::vector<unsigned char> shared;

unsigned order = 0;  // 0 forward, 1 backward, else the seed of a shuffle

[[noreturn]] void die(const char* what) {
  std::fprintf(stderr, "emulated CUDA: %s (block %u, %u)\n", what, blockIdx.x, blockIdx.y);
  std::abort();
}

void to_scheduler(bool forever) {
  Thread* me = now;
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_start_switch_fiber(forever ? nullptr : &me->fake_stack, block.scheduler_bottom, block.scheduler_size);
#endif
  (void)forever;
  optkit_switch_stack(&me->stack_pointer, block.scheduler);
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(me->fake_stack, &block.scheduler_bottom, &block.scheduler_size);
#endif
}

void enter() {
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(nullptr, &block.scheduler_bottom, &block.scheduler_size);
#endif
  (*block.kernel)();
  now->state = Thread::kDone;
  to_scheduler(true);
  die("a finished thread went on");
}

void prepare(Thread& thread, char* stack) {
#if defined(__SANITIZE_ADDRESS__)
  __asan_unpoison_memory_region(stack, kStack);
#endif
  auto** top = reinterpret_cast<void**>(stack + kStack);
  // A call leaves the stack 8 bytes off a multiple of 16: enter() finds a return address that it never uses.
  *--top = nullptr;
  *--top = reinterpret_cast<void*>(&enter);
  for (int k = 0; k < 6; ++k) *--top = nullptr;
  thread.stack_pointer = top;
}

void resume(Thread& thread) {
  now = &thread;
  threadIdx = thread.index;
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_start_switch_fiber(&block.scheduler_fake_stack, stacks[thread.number].get(), kStack);
#endif
  optkit_switch_stack(&block.scheduler, thread.stack_pointer);
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(block.scheduler_fake_stack, nullptr, nullptr);
#endif
}

// Lets a warp go on whose lanes all arrived at their exchange.
bool release_warp(Thread* first, int count) {
  unsigned arrived = 0;
  for (int k = 0; k < count; ++k) arrived |= first[k].state == Thread::kAtWarp ? 1u << k : 0u;
  bool any = false;
  for (int k = 0; k < count; ++k) {
    if (first[k].state != Thread::kAtWarp) continue;
    const unsigned named = first[k].mask & (count == kWarp ? ~0u : (1u << count) - 1);
    if ((named & arrived) == named) {
      first[k].state = Thread::kReady;
      any = true;
    }
  }
  return any;
}

bool release_block() {
  block.votes = 0;
  for (const Thread& thread : block.threads) {
    if (thread.state == Thread::kAtWarp) die("some threads wait for their warp, and lanes they name do not come");
    if (thread.state == Thread::kAtBlock) block.votes |= thread.vote;
  }
  bool any = false;
  for (Thread& thread : block.threads) {
    if (thread.state != Thread::kAtBlock) continue;
    thread.state = Thread::kReady;
    any = true;
  }
  return any;
}

void run_block(std::mt19937& random) {
  const int count = static_cast<int>(block.threads.size());
  std::vector<int> turn(count);
  std::iota(turn.begin(), turn.end(), 0);
  if (order == 1) std::reverse(turn.begin(), turn.end());
  for (bool goes_on = true; goes_on;) {
    if (order > 1) std::shuffle(turn.begin(), turn.end(), random);
    for (const int k : turn)
      if (block.threads[k].state == Thread::kReady) resume(block.threads[k]);
    goes_on = false;
    for (int k = 0; k < count; k += kWarp)
      goes_on |= release_warp(&block.threads[k], count - k < kWarp ? count - k : kWarp);
    if (!goes_on) goes_on = release_block();
  }
}

}  // namespace

int wait_for_block(int vote) {
  now->state = Thread::kAtBlock;
  now->vote = vote != 0;
  to_scheduler(false);
  return block.votes;
}

uint64_t exchange(unsigned mask, uint64_t value, int source) {
  // Two sets by turns: who reads the last exchange is not overtaken by who gives to the next.
  uint64_t* given = &block.given[(now->number / kWarp * 2 + now->exchanges % 2) * kWarp];
  ++now->exchanges;
  given[now->lane] = value;
  now->state = Thread::kAtWarp;
  now->mask = mask;
  to_scheduler(false);
  return given[source];
}

unsigned char* dynamic_shared() {
  return reinterpret_cast<unsigned char*>((reinterpret_cast<uintptr_t>(shared.data()) + 15) & ~uintptr_t{15});
}

void run(Dim3 grid, Dim3 size, size_t shared_bytes, const std::function<void()>& kernel) {
  std::mt19937 random(order);
  gridDim = grid;
  blockDim = size;
  const int count = static_cast<int>(size.x * size.y * size.z);
  while (static_cast<int>(stacks.size()) < count) stacks.emplace_back(new char[kStack]);
  shared.resize(shared_bytes + 16);
  block.kernel = &kernel;
  std::vector<unsigned> places(static_cast<size_t>(grid.x) * grid.y * grid.z);
  std::iota(places.begin(), places.end(), 0u);
  if (order == 1) std::reverse(places.begin(), places.end());
  if (order > 1) std::shuffle(places.begin(), places.end(), random);
  for (const unsigned place : places) {
    blockIdx = Dim3(place % grid.x, place / grid.x % grid.y, place / grid.x / grid.y);
    block.threads.assign(count, Thread{});
    block.given.assign((count + kWarp - 1) / kWarp * 2 * kWarp, 0);
    std::fill(shared.begin(), shared.end(), 0xff);  // NaN: nobody may read what was not written
    for (int k = 0; k < count; ++k) {
      Thread& thread = block.threads[k];
      const unsigned n = static_cast<unsigned>(k);
      thread.index = Dim3(n % size.x, n / size.x % size.y, n / size.x / size.y);
      thread.number = k;
      thread.lane = k % kWarp;
      prepare(thread, stacks[k].get());
    }
    run_block(random);
  }
}

}  // namespace emulation

EMULATED void emulated_order(unsigned chosen) { emulation::order = chosen; }

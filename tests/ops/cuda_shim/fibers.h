// The threads of a block as fibers: one runs until it waits, then another, in a random order that SHIM_SEED repeats.
#pragma once

#include <ucontext.h>
#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/common_interface_defs.h>
#endif

namespace shim {

struct Barrier {
  int expected = 0, arrived = 0, generation = 0;
};

struct Warp {
  std::atomic<uint64_t> slots[2][kWarp];
  Barrier barrier;
};

struct Block {
  dim3 index;
  int threads = 0, finished = 0;
  Memory shared;
  std::vector<Warp> warps;
  Barrier barrier;
};

struct Thread {
  Block* block = nullptr;
  dim3 thread_index;
  int rank = 0, shuffles = 0;

  std::vector<unsigned char> stack;
  ucontext_t context;
  void* fake_stack = nullptr;
  bool done = false;
  const Barrier* waits_for = nullptr;
  int generation = 0;

  bool ready() const { return !done && (waits_for == nullptr || waits_for->generation != generation); }
};

struct Scheduler {
  Thread* current = nullptr;
  const std::function<void()>* body = nullptr;
  ucontext_t context;
  void* fake_stack = nullptr;
  const void* stack = nullptr;
  size_t stack_bytes = 0;
};

inline Scheduler& scheduler() {
  static Scheduler only;
  return only;
}

inline Thread& self() {
  return *scheduler().current;
}

// AddressSanitizer must know on which stack the program is.
inline void before_switch(void** save, const void* stack, size_t bytes) {
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_start_switch_fiber(save, stack, bytes);
#endif
}
inline void after_switch(void* saved, const void** stack, size_t* bytes) {
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(saved, stack, bytes);
#endif
}

inline void leave(Thread& thread) {
  Scheduler& s = scheduler();
  before_switch(thread.done ? nullptr : &thread.fake_stack, s.stack, s.stack_bytes);
  swapcontext(&thread.context, &s.context);
  after_switch(thread.fake_stack, &s.stack, &s.stack_bytes);
}

inline void enter(Thread& thread) {
  Scheduler& s = scheduler();
  s.current = &thread;
  thread.waits_for = nullptr;
  before_switch(&s.fake_stack, thread.stack.data(), thread.stack.size());
  swapcontext(&s.context, &thread.context);
  after_switch(s.fake_stack, nullptr, nullptr);
}

inline void first_entry() {
  Scheduler& s = scheduler();
  after_switch(nullptr, &s.stack, &s.stack_bytes);
  (*s.body)();
  s.current->done = true;
  leave(*s.current);
}

inline void wait(Barrier& barrier) {
  Thread& thread = self();
  thread.waits_for = &barrier;
  thread.generation = barrier.generation;
  if (++barrier.arrived == barrier.expected) {
    barrier.arrived = 0;
    ++barrier.generation;
  }
  leave(thread);
}

inline void block_barrier() {
  if (self().block->finished > 0) die("__syncthreads after a thread of the block has returned");
  wait(self().block->barrier);
}

inline void warp_barrier() {
  wait(self().block->warps[self().rank / kWarp].barrier);
}

inline void run_block(Block& block, std::vector<Thread>& threads, std::mt19937& random) {
  std::vector<Thread*> order;
  for (Thread& thread : threads) order.push_back(&thread);
  std::shuffle(order.begin(), order.end(), random);
  while (block.finished < block.threads) {
    bool moved = false;
    for (Thread* thread : order) {
      if (!thread->ready()) continue;
      moved = true;
      enter(*thread);
      if (!thread->done) continue;
      ++block.finished;
      if (block.barrier.arrived > 0) die("a thread returned while others wait in __syncthreads");
    }
    if (!moved) die("deadlock: not all threads reach a __syncthreads or a shuffle");
  }
}

inline void run_blocks(const std::vector<dim3>& blocks, const cudaLaunchConfig_t& config,
                       const std::function<void()>& body, std::mt19937& random) {
  const int count = static_cast<int>(config.blockDim.x);
  static std::vector<Thread> threads;  // their stacks are kept
  if (static_cast<int>(threads.size()) < count) threads.resize(count);
  scheduler().body = &body;
  for (const dim3& index : blocks) {
    Block block;
    block.index = index;
    block.threads = block.barrier.expected = count;
    block.shared = poisoned(config.dynamicSmemBytes);
    block.warps = std::vector<Warp>((count + kWarp - 1) / kWarp);
    for (Warp& warp : block.warps) warp.barrier.expected = kWarp;
    std::vector<Thread> running(std::make_move_iterator(threads.begin()), std::make_move_iterator(threads.begin() + count));
    for (int rank = 0; rank < count; ++rank) {
      Thread& thread = running[rank];
      std::vector<unsigned char> stack = std::move(thread.stack);
      stack.resize(64 << 10);
      thread = Thread();
      thread.stack = std::move(stack);
      thread.block = &block;
      thread.thread_index = dim3(rank, 0, 0);
      thread.rank = rank;
      getcontext(&thread.context);
      thread.context.uc_stack.ss_sp = thread.stack.data();
      thread.context.uc_stack.ss_size = thread.stack.size();
      thread.context.uc_link = nullptr;
      makecontext(&thread.context, first_entry, 0);
    }
    run_block(block, running, random);
    std::move(running.begin(), running.end(), threads.begin());
  }
}

}  // namespace shim

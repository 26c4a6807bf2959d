// The threads of a block as operating system threads, two blocks at a time, for ThreadSanitizer.
#pragma once

#include <pthread.h>
#include <sched.h>

#include <thread>

namespace shim {

struct Warp {
  std::atomic<uint64_t> slots[2][kWarp];
  std::atomic<int> arrived{0}, generation{0};
};

struct Block {
  dim3 index;
  int threads = 0;
  Memory shared;
  std::vector<Warp> warps;
  pthread_barrier_t barrier;
};

struct Thread {
  Block* block = nullptr;
  dim3 thread_index;
  int rank = 0, shuffles = 0;
};

inline Thread& self() {
  static thread_local Thread thread;
  return thread;
}

inline void block_barrier() {
  pthread_barrier_wait(&self().block->barrier);
}

// Relaxed on purpose: see shuffle().
inline void warp_barrier() {
  Warp& warp = self().block->warps[self().rank / kWarp];
  const int generation = warp.generation.load(std::memory_order_relaxed);
  if (warp.arrived.fetch_add(1, std::memory_order_relaxed) + 1 == kWarp) {
    warp.arrived.store(0, std::memory_order_relaxed);
    warp.generation.store(generation + 1, std::memory_order_relaxed);
  } else {
    while (warp.generation.load(std::memory_order_relaxed) == generation) sched_yield();
  }
}

inline void run_blocks(const std::vector<dim3>& blocks, const cudaLaunchConfig_t& config,
                       const std::function<void()>& body, std::mt19937&) {
  constexpr size_t kAtOnce = 2;
  const int count = static_cast<int>(config.blockDim.x);
  for (size_t first = 0; first < blocks.size(); first += kAtOnce) {
    const size_t last = std::min(first + kAtOnce, blocks.size());
    std::vector<std::unique_ptr<Block>> running;
    std::vector<std::thread> threads;
    for (size_t i = first; i < last; ++i) {
      Block& block = *running.emplace_back(std::make_unique<Block>());
      block.index = blocks[i];
      block.threads = count;
      block.shared = poisoned(config.dynamicSmemBytes);
      block.warps = std::vector<Warp>((count + kWarp - 1) / kWarp);
      pthread_barrier_init(&block.barrier, nullptr, count);
    }
    for (const auto& block : running) {
      for (int rank = 0; rank < count; ++rank) {
        threads.emplace_back([&body, rank, block = block.get()] {
          self() = Thread{block, dim3(rank, 0, 0), rank, 0};
          body();
        });
      }
    }
    for (std::thread& thread : threads) thread.join();
    for (const auto& block : running) pthread_barrier_destroy(&block->barrier);
  }
}

}  // namespace shim

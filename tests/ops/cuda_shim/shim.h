// Runs CUDA kernel source on the CPU, to test it without a GPU: g++ -I<this folder> -include shim.h forward.cu
//
// Every CUDA thread of a block runs as its own fiber (fibers.h), or, with -DSHIM_THREADS, as an operating system thread
// (threads.h) for ThreadSanitizer. Blocks run in random order: none may depend on another of the same launch. What goes
// wrong shows as a wrong result, as an abort with a message, or in a sanitizer:
//   - shared memory is poisoned with NaN before each block, and allocated at its exact size
//   - __syncthreads or a shuffle that not all threads reach is an abort
//   - launch shapes that the driver would refuse are refused
// Modelled: what csrc/cuda uses. A shuffle is always of a full warp. Not modelled: speed, streams, expf's last bit.
#pragma once

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <initializer_list>
#include <memory>
#include <numeric>
#include <random>
#include <vector>

// ---- the part of the CUDA runtime's interface that is used ----

struct dim3 {
  unsigned x = 1, y = 1, z = 1;
  dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};
struct alignas(16) uint4 {
  unsigned x, y, z, w;
};
enum cudaError_t { cudaSuccess, cudaErrorInvalidConfiguration };
using cudaStream_t = void*;
struct cudaLaunchConfig_t {
  dim3 gridDim, blockDim;
  size_t dynamicSmemBytes = 0;
  cudaStream_t stream = nullptr;
};

#define __global__
#define __device__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define CC_DYNAMIC_SHARED(name) unsigned char* const name = shim::self().block->shared.get()
#define threadIdx (shim::self().thread_index)
#define blockIdx (shim::self().block->index)
#define __syncthreads() shim::block_barrier()
#define __trap() shim::die("__trap")

namespace shim {

constexpr int kWarp = 32;

[[noreturn]] inline void die(const char* message) {
  std::fprintf(stderr, "cuda_shim: %s\n", message);
  std::abort();
}

inline int setting(const char* name, int otherwise) {
  const char* text = std::getenv(name);
  return text == nullptr ? otherwise : std::atoi(text);
}

struct Aligned {
  void operator()(unsigned char* p) const { std::free(p); }
};
using Memory = std::unique_ptr<unsigned char[], Aligned>;

inline Memory poisoned(size_t bytes) {
  if (bytes == 0) return nullptr;
  void* p = nullptr;
  if (posix_memalign(&p, 16, bytes) != 0) die("out of memory");
  std::memset(p, 0xff, bytes);  // a NaN in every floating type
  return Memory(static_cast<unsigned char*>(p));
}

}  // namespace shim

#ifdef SHIM_THREADS
#include "threads.h"
#else
#include "fibers.h"
#endif

namespace shim {

// What lane `source` of the warp passed. Two sets of slots in turn, so that one barrier per shuffle is enough. Relaxed
// atomics: a shuffle orders no other memory, and ThreadSanitizer must not believe that it does.
template <class T>
T shuffle(unsigned mask, T value, int source) {
  static_assert(sizeof(T) <= 8);
  Thread& thread = self();
  if (mask != 0xffffffffu) die("a shuffle of part of a warp is not modelled");
  if (thread.block->threads % kWarp != 0) die("a block that is not whole warps is not modelled");
  auto& slots = thread.block->warps[thread.rank / kWarp].slots[thread.shuffles++ & 1];
  uint64_t bits = 0;
  std::memcpy(&bits, &value, sizeof value);
  slots[thread.rank % kWarp].store(bits, std::memory_order_relaxed);
  warp_barrier();
  bits = slots[source].load(std::memory_order_relaxed);
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

inline void launch(const cudaLaunchConfig_t& config, const std::function<void()>& body) {
  static std::mt19937 random(setting("SHIM_SEED", 1));
  std::vector<int64_t> order(static_cast<int64_t>(config.gridDim.x) * config.gridDim.y);
  std::iota(order.begin(), order.end(), int64_t{0});
  std::shuffle(order.begin(), order.end(), random);
  std::vector<dim3> blocks;
  for (const int64_t i : order) blocks.emplace_back(i % config.gridDim.x, i / config.gridDim.x);
  run_blocks(blocks, config, body, random);
}

}  // namespace shim

template <class T>
T __shfl_xor_sync(unsigned mask, T value, int lanes) {
  return shim::shuffle(mask, value, (shim::self().rank % shim::kWarp) ^ lanes);
}

template <class... Parameters, class... Arguments>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(Parameters...),
                               const Arguments&... arguments) {
  const dim3 &grid = config->gridDim, &block = config->blockDim;
  const bool accepted = grid.x > 0 && grid.x <= 0x7fffffff && grid.y > 0 && grid.y <= 65535 && grid.z == 1 &&
                        block.x > 0 && block.x <= 1024 && block.y == 1 && block.z == 1 &&
                        config->dynamicSmemBytes <= 48 * 1024;
  if (!accepted) return cudaErrorInvalidConfiguration;
  shim::launch(*config, [&] { kernel(arguments...); });
  return cudaSuccess;
}

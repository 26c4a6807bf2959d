// What the forward's and the backward's kernels share: 16-byte packs, sums and softmax of a warp, and launching.
//
// Every thread keeps several 16-byte loads in flight: the grids are small, about a block or two per multiprocessor, so that
// loads in flight matter more than occupancy. Every sum has a fixed order, so results repeat bit for bit. Blocks talk to
// each other only from one launch to the next.
//
// kVector: every row starts on 16 bytes and H is a multiple of a pack, so that a pack lies wholly inside a row or outside.
//
// The tests compile the kernels for the CPU too (tests/ops/cuda_shim), which is why shared memory goes through a macro and
// launches through cudaLaunchKernelEx.
#pragma once

#include <cuda_runtime.h>
#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include <cmath>
#include <initializer_list>

#include "../gate.h"

#ifndef CC_DYNAMIC_SHARED
#define CC_DYNAMIC_SHARED(name) extern __shared__ __align__(16) unsigned char name[]
#endif

namespace cc_ds::cuda {
namespace {

constexpr unsigned kFullMask = 0xffffffffu;
constexpr int kWarp = 32;
constexpr int kThreads = 128;  // of a block, but for decide
constexpr int kWarps = kThreads / kWarp;

template <class T>
struct alignas(16) Pack {
  static constexpr int size = 16 / sizeof(T);
  T x[size];
};

// A pack at p, of which `left` elements lie inside the row; the others are zero.
template <bool kVector, class T>
__device__ __forceinline__ Pack<T> load(const T* p, int64_t left) {
  Pack<T> pack;
  if constexpr (kVector) {
    const uint4 bits = left > 0 ? *reinterpret_cast<const uint4*>(p) : uint4{0, 0, 0, 0};
    memcpy(&pack, &bits, sizeof pack);
  } else {
#pragma unroll
    for (int i = 0; i < Pack<T>::size; ++i) pack.x[i] = i < left ? p[i] : T(0.0f);
  }
  return pack;
}

// The same from a row with any stride along H; with kVector the stride is one.
template <bool kVector, class T>
__device__ __forceinline__ Pack<T> load_row(const T* row, int64_t h, int64_t stride, int64_t left) {
  if constexpr (kVector) {
    return load<true>(row + h, left);
  } else {
    Pack<T> pack;
#pragma unroll
    for (int i = 0; i < Pack<T>::size; ++i) pack.x[i] = i < left ? row[(h + i) * stride] : T(0.0f);
    return pack;
  }
}

template <bool kVector, class T>
__device__ __forceinline__ void store(T* p, const Pack<T>& pack, int64_t left) {
  if constexpr (kVector) {
    uint4 bits;
    memcpy(&bits, &pack, sizeof pack);
    if (left > 0) *reinterpret_cast<uint4*>(p) = bits;
  } else {
#pragma unroll
    for (int i = 0; i < Pack<T>::size; ++i) {
      if (i < left) p[i] = pack.x[i];
    }
  }
}

template <class T>
__device__ __forceinline__ Accumulate<T> wide(T x) {
  return static_cast<Accumulate<T>>(x);
}

template <class A>
__device__ __forceinline__ A warp_sum(A value) {
#pragma unroll
  for (int offset = kWarp / 2; offset > 0; offset /= 2) value += __shfl_xor_sync(kFullMask, value, offset);
  return value;
}

// Softmax of x (L) in place, by one warp; every lane reads and writes its own elements only. Returns the argmax.
template <class A>
__device__ __forceinline__ int warp_softmax(A* x, int layers, int lane) {
  A largest = -INFINITY;
  int best = layers;
  for (int l = lane; l < layers; l += kWarp) {
    if (wins<A>(x[l], l, largest, best)) largest = x[l], best = l;
  }
#pragma unroll
  for (int offset = kWarp / 2; offset > 0; offset /= 2) {
    const A other = __shfl_xor_sync(kFullMask, largest, offset);
    const int other_best = __shfl_xor_sync(kFullMask, best, offset);
    if (wins<A>(other, other_best, largest, best)) largest = other, best = other_best;
  }
  A sum = 0;
  for (int l = lane; l < layers; l += kWarp) sum += x[l] = exp(x[l] - largest);
  sum = warp_sum(sum);
  for (int l = lane; l < layers; l += kWarp) x[l] /= sum;
  return argmax_or_first(best, sum);
}

// ---- launches ----

int64_t ceil_div(int64_t a, int64_t b) {
  return (a + b - 1) / b;
}

template <class T>
bool packs(const void* data, std::initializer_list<int64_t> strides) {
  bool aligned = reinterpret_cast<uintptr_t>(data) % 16 == 0;
  for (const int64_t stride : strides) aligned = aligned && stride % Pack<T>::size == 0;
  return aligned;
}

template <class T>
bool gate_packs(const Gate<T>& g) {
  return g.hidden % Pack<T>::size == 0 && packs<T>(g.english, {g.english_stride_l, g.english_stride_b}) &&
         packs<T>(g.weight, {g.weight_stride_l});
}

template <class T, class Element>
bool rows_pack(const Rows<Element>& rows) {
  return rows.data == nullptr || (rows.stride_h == 1 && packs<T>(rows.data, {rows.stride_b, rows.stride_t}));
}

template <class Arguments>
cudaError_t launch(void (*kernel)(Arguments), int64_t blocks_x, int64_t blocks_y, int threads, size_t shared_bytes,
                   cudaStream_t stream, const Arguments& arguments) {
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(static_cast<unsigned>(blocks_x), static_cast<unsigned>(blocks_y));
  config.blockDim = dim3(static_cast<unsigned>(threads));
  config.dynamicSmemBytes = shared_bytes;
  config.stream = stream;
  return cudaLaunchKernelEx(&config, kernel, arguments);
}

}  // namespace
// What the kernels are compiled for.
#define CC_FOR_EACH_DTYPE(F) F(float) F(double) F(c10::BFloat16) F(c10::Half)

}  // namespace cc_ds::cuda

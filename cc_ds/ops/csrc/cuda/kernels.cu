// The fused gate on CUDA: two launches forward, two backward.
//
//   decide        (tile of H, b)   d = mean_l english + embedding on the tile; its part of z = d weight^T
//   fuse          (tile of H, b)   z, softmax, argmax, then the row of ffn_output += what was chosen of english
//   grad_gate     warp: (2 l, b)   d loss / d s = <gradient of the anchor row, english[l, b]>
//   grad_inputs   (tile of H, b)   gradients of embedding and english; (tile of H, 4 l): gradient of weight
//
// english is read once forward (hard gate: and one row of L again; soft: twice) and once backward, in 16-byte loads of
// which every thread keeps several in flight: the grids are small, about a block or two per multiprocessor, so that loads
// in flight matter more than occupancy. Every sum has a fixed order, so results repeat bit for bit. Blocks talk to each
// other only from one launch to the next.
//
// kVector: every row starts on 16 bytes and H is a multiple of a pack, so that a pack lies wholly inside a row or outside.
//
// The tests compile this file for the CPU too (tests/ops/cuda_shim), which is why shared memory goes through a macro and
// launches through cudaLaunchKernelEx.

#include "kernels.h"

#include <cuda_runtime.h>
#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include <cmath>

#ifndef CC_DYNAMIC_SHARED
#define CC_DYNAMIC_SHARED(name) extern __shared__ __align__(16) unsigned char name[]
#endif

namespace cc_ds::cuda {
namespace {

constexpr unsigned kFullMask = 0xffffffffu;
constexpr int kWarp = 32;

// decide: kLanes threads side by side along H, kGroups of them taking turns along L.
constexpr int kLanes = 64, kGroups = 4, kDecideThreads = kLanes * kGroups;
constexpr int kDecideInFlight = 5;
constexpr int kThreads = 128;  // of the other three
constexpr int kWarps = kThreads / kWarp;
constexpr int kFuseInFlight = 8;
constexpr int kGateRows = 2, kGateInFlight = 4;
constexpr int kWeightInFlight = 4;
constexpr int kWeightRows = 4, kWeightExamples = 32;

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

// ---- forward ----

template <class T>
constexpr int kDecideTile = kLanes * Pack<T>::size;

template <class T, bool kVector>
__global__ void __launch_bounds__(kDecideThreads, 1) decide(const Forward<T> f) {
  using A = Accumulate<T>;
  constexpr int size = Pack<T>::size, tile = kDecideTile<T>;
  CC_DYNAMIC_SHARED(shared);
  A* const sums = reinterpret_cast<A*>(shared);  // (kGroups, tile)
  A* const decision = sums + kGroups * tile;     // (tile)

  const int layers = static_cast<int>(f.layers), thread = threadIdx.x;
  const int64_t b = blockIdx.y, h0 = static_cast<int64_t>(blockIdx.x) * tile;
  {
    const int lane = thread % kLanes, group = thread / kLanes;
    const int64_t h = h0 + lane * size, left = f.hidden - h;
    A sum[size] = {};
    for (int l = group; l < layers; l += kGroups * kDecideInFlight) {
      Pack<T> x[kDecideInFlight];
#pragma unroll
      for (int u = 0; u < kDecideInFlight; ++u) {
        const int k = l + u * kGroups;
        x[u] = load<kVector>(f.english_at(k, b) + h, k < layers ? left : 0);
      }
#pragma unroll
      for (int u = 0; u < kDecideInFlight; ++u) {
#pragma unroll
        for (int i = 0; i < size; ++i) sum[i] += wide(x[u].x[i]);
      }
    }
#pragma unroll
    for (int i = 0; i < size; ++i) sums[group * tile + lane * size + i] = sum[i];
  }
  __syncthreads();
  for (int j = thread; j < tile; j += kDecideThreads) {
    A d = 0;
    if (h0 + j < f.hidden) {
      const A sum = (sums[j] + sums[tile + j]) + (sums[2 * tile + j] + sums[3 * tile + j]);
      d = sum / static_cast<A>(layers) + wide(f.embedding[b * f.embedding_stride_b + h0 + j]);
      f.decision[b * f.hidden + h0 + j] = d;
    }
    decision[j] = d;
  }
  __syncthreads();
  const int lane = thread % kWarp;
  for (int l = thread / kWarp; l < layers; l += 2 * kDecideThreads / kWarp) {
    const int second = l + kDecideThreads / kWarp;
    A z0 = 0, z1 = 0;
#pragma unroll
    for (int k = lane; k < kLanes; k += kWarp) {
      const int64_t h = h0 + k * size, left = f.hidden - h;
      const Pack<T> w0 = load<kVector>(f.weight + l * f.weight_stride_l + h, left);
      const Pack<T> w1 = load<kVector>(f.weight + second * f.weight_stride_l + h, second < layers ? left : 0);
#pragma unroll
      for (int i = 0; i < size; ++i) {
        z0 += wide(w0.x[i]) * decision[k * size + i];
        z1 += wide(w1.x[i]) * decision[k * size + i];
      }
    }
    z0 = warp_sum(z0);
    z1 = warp_sum(z1);
    if (lane == 0) {
      A* const out = f.partial + (blockIdx.x * f.batch + b) * layers;
      out[l] = z0;
      if (second < layers) out[second] = z1;
    }
  }
}

template <class T, bool kVector>
__global__ void __launch_bounds__(kThreads, 1) fuse(const Forward<T> f) {
  using A = Accumulate<T>;
  constexpr int size = Pack<T>::size;
  CC_DYNAMIC_SHARED(shared);
  const int layers = static_cast<int>(f.layers), thread = threadIdx.x;
  A* const gate = reinterpret_cast<A*>(shared);               // (L)
  int* const chosen = reinterpret_cast<int*>(gate + layers);  // one

  const int64_t b = blockIdx.y;
  const int64_t parts = (f.hidden + kDecideTile<T> - 1) / kDecideTile<T>;
  for (int l = thread; l < layers; l += kThreads) {
    A z = 0;
    for (int64_t part = 0; part < parts; ++part) z += f.partial[(part * f.batch + b) * layers + l];
    if (blockIdx.x == 0) f.logits[b * layers + l] = z;
    gate[l] = (z + f.noise[b * layers + l]) / f.temperature;
  }
  __syncthreads();
  if (thread < kWarp) {
    const int best = warp_softmax(gate, layers, thread);
    if (thread == 0) *chosen = best;
  }
  __syncthreads();
  const int best = *chosen;
  const bool fuses = f.fuses(b);
  if (blockIdx.x == 0) {
    for (int l = thread; l < layers; l += kThreads) {
      f.choice[b * layers + l] = !fuses ? A(0) : f.hard ? A(l == best) : gate[l];
    }
  }
  const int64_t anchor = f.anchors[b];
  if (anchor < 0 || anchor >= f.positions) __trap();  // nobody waits for the device, so nobody else could say it
  const int64_t h = (static_cast<int64_t>(blockIdx.x) * kThreads + thread) * size, left = f.hidden - h;
  if (!fuses || left <= 0) return;

  A sum[size] = {};
  if (f.hard) {
    const Pack<T> x = load<kVector>(f.english_at(best, b) + h, left);
    const A s = straight_through(gate[best]);
#pragma unroll
    for (int i = 0; i < size; ++i) sum[i] = s * wide(x.x[i]);
  } else {
    for (int l = 0; l < layers; l += kFuseInFlight) {
      Pack<T> x[kFuseInFlight];
#pragma unroll
      for (int u = 0; u < kFuseInFlight; ++u) x[u] = load<kVector>(f.english_at(l + u, b) + h, l + u < layers ? left : 0);
#pragma unroll
      for (int u = 0; u < kFuseInFlight; ++u) {
        const A s = l + u < layers ? gate[l + u] : A(0);
#pragma unroll
        for (int i = 0; i < size; ++i) sum[i] += s * wide(x[u].x[i]);
      }
    }
  }
  T* const row = f.ffn_output.at(b, anchor);
  const int64_t stride = f.ffn_output.stride_h;
  Pack<T> x = load_row<kVector>(static_cast<const T*>(row), h, stride, left);
#pragma unroll
  for (int i = 0; i < size; ++i) x.x[i] = static_cast<T>(wide(x.x[i]) + sum[i]);
  if constexpr (kVector) {
    store<true>(row + h, x, left);
  } else {
#pragma unroll
    for (int i = 0; i < size; ++i) {
      if (i < left) row[(h + i) * stride] = x.x[i];
    }
  }
}

// ---- backward ----

template <class T, bool kVector>
__global__ void __launch_bounds__(kThreads, 1) grad_gate(const Backward<T> g) {
  using A = Accumulate<T>;
  constexpr int size = Pack<T>::size;
  const int layers = static_cast<int>(g.layers), lane = threadIdx.x % kWarp;
  // neighbouring warps take neighbouring examples, as english lies in memory
  const int64_t warp = static_cast<int64_t>(blockIdx.x) * kWarps + threadIdx.x / kWarp;
  const int64_t b = warp % g.batch;
  const int l = static_cast<int>(warp / g.batch) * kGateRows;
  if (l >= layers) return;

  A sum[kGateRows] = {};
  if (g.grad_fused.data != nullptr && g.fuses(b)) {
    const T* const row = g.grad_fused.at(b, g.anchors[b]);
    for (int64_t h0 = 0; h0 < g.hidden; h0 += kWarp * size * kGateInFlight) {
      Pack<T> y[kGateInFlight], x[kGateRows][kGateInFlight];
#pragma unroll
      for (int u = 0; u < kGateInFlight; ++u) {
        const int64_t h = h0 + (u * kWarp + lane) * size, left = g.hidden - h;
        y[u] = load_row<kVector>(row, h, g.grad_fused.stride_h, left);
#pragma unroll
        for (int r = 0; r < kGateRows; ++r) {
          x[r][u] = load<kVector>(g.english_at(l + r, b) + h, l + r < layers ? left : 0);
        }
      }
#pragma unroll
      for (int u = 0; u < kGateInFlight; ++u) {
#pragma unroll
        for (int r = 0; r < kGateRows; ++r) {
#pragma unroll
          for (int i = 0; i < size; ++i) sum[r] += wide(y[u].x[i]) * wide(x[r][u].x[i]);
        }
      }
    }
  }
#pragma unroll
  for (int r = 0; r < kGateRows; ++r) {
    const A total = warp_sum(sum[r]);
    if (lane == 0 && l + r < layers) g.grad_gate[b * layers + l + r] = total;
  }
}

// x (L) = d loss / d z of example b, by one warp; every lane reads and writes its own elements only.
template <class T>
__device__ __forceinline__ void grad_logits_of(const Backward<T>& g, int64_t b, Accumulate<T>* x, int lane) {
  using A = Accumulate<T>;
  const int layers = static_cast<int>(g.layers);
  const A* const grad_gate = g.grad_gate + b * layers;
  for (int l = lane; l < layers; l += kWarp) x[l] = (g.logits[b * layers + l] + g.noise[b * layers + l]) / g.temperature;
  warp_softmax(x, layers, lane);
  A inner = 0;
  for (int l = lane; l < layers; l += kWarp) inner += x[l] * grad_gate[l];
  inner = warp_sum(inner);
  for (int l = lane; l < layers; l += kWarp) {
    const A incoming = g.grad_logits != nullptr ? g.grad_logits[b * layers + l] : A(0);
    x[l] = grad_logit(x[l], grad_gate[l], inner, g.temperature, incoming);
  }
}

// Gradients of one example's embedding and English activations on one tile of H.
template <class T, bool kVector>
__device__ __forceinline__ void grad_example(const Backward<T>& g, int64_t b, int64_t h, Accumulate<T>* grad_logits) {
  using A = Accumulate<T>;
  constexpr int size = Pack<T>::size;
  const int layers = static_cast<int>(g.layers);
  if (threadIdx.x < kWarp) grad_logits_of(g, b, grad_logits, threadIdx.x);
  __syncthreads();
  const int64_t left = g.hidden - h;
  A d[size] = {};
  for (int l = 0; l < layers; l += kWeightInFlight) {
    Pack<T> w[kWeightInFlight];
#pragma unroll
    for (int u = 0; u < kWeightInFlight; ++u) {
      w[u] = load<kVector>(g.weight + (l + u) * g.weight_stride_l + h, l + u < layers ? left : 0);
    }
#pragma unroll
    for (int u = 0; u < kWeightInFlight; ++u) {
      const A dz = l + u < layers ? grad_logits[l + u] : A(0);
#pragma unroll
      for (int i = 0; i < size; ++i) d[i] += dz * wide(w[u].x[i]);
    }
  }
  Pack<T> out;
#pragma unroll
  for (int i = 0; i < size; ++i) out.x[i] = static_cast<T>(d[i]);
  store<kVector>(g.grad_embedding + b * g.hidden + h, out, left);
  if (g.grad_english == nullptr) return;

  Pack<T> y = {};
  if (g.grad_fused.data != nullptr && g.fuses(b)) {
    y = load_row<kVector>(g.grad_fused.at(b, g.anchors[b]), h, g.grad_fused.stride_h, left);
  }
#pragma unroll
  for (int i = 0; i < size; ++i) d[i] /= static_cast<A>(layers);
  for (int l = 0; l < layers; ++l) {
    const A s = g.choice[b * layers + l];
#pragma unroll
    for (int i = 0; i < size; ++i) out.x[i] = static_cast<T>(d[i] + s * wide(y.x[i]));
    store<kVector>(g.grad_english + (l * g.batch + b) * g.hidden + h, out, left);
  }
}

// Gradient of kWeightRows rows of the weight on one tile of H.
template <class T, bool kVector>
__device__ __forceinline__ void grad_weight(const Backward<T>& g, int l0, int64_t h, Accumulate<T>* shared) {
  using A = Accumulate<T>;
  constexpr int size = Pack<T>::size;
  const int layers = static_cast<int>(g.layers), lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  A* const scratch = shared + warp * layers;          // (L) of each warp
  A* const grad_logits = shared + kWarps * layers;  // (kWeightExamples, kWeightRows)
  const int64_t left = g.hidden - h;
  A sum[kWeightRows][size] = {};
  for (int64_t b0 = 0; b0 < g.batch; b0 += kWeightExamples) {
    const int examples = static_cast<int>(g.batch - b0 < kWeightExamples ? g.batch - b0 : kWeightExamples);
    __syncthreads();  // the previous examples' gradients have been read
    for (int e = warp; e < examples; e += kWarps) {
      grad_logits_of(g, b0 + e, scratch, lane);
      for (int l = lane; l < layers; l += kWarp) {
        if (l >= l0 && l < l0 + kWeightRows) grad_logits[e * kWeightRows + l - l0] = scratch[l];
      }
    }
    __syncthreads();
    for (int e = 0; e < examples; ++e) {
      const A* const decision = g.decision + (b0 + e) * g.hidden + h;
      A d[size];
      constexpr int wide_size = Pack<A>::size;
#pragma unroll
      for (int i = 0; i < size; i += wide_size) {
        const Pack<A> part = load<kVector>(decision + i, left - i);
#pragma unroll
        for (int j = 0; j < wide_size; ++j) d[i + j] = part.x[j];
      }
#pragma unroll
      for (int r = 0; r < kWeightRows; ++r) {
        const A dz = l0 + r < layers ? grad_logits[e * kWeightRows + r] : A(0);
#pragma unroll
        for (int i = 0; i < size; ++i) sum[r][i] += dz * d[i];
      }
    }
  }
#pragma unroll
  for (int r = 0; r < kWeightRows; ++r) {
    Pack<T> out;
#pragma unroll
    for (int i = 0; i < size; ++i) out.x[i] = static_cast<T>(sum[r][i]);
    store<kVector>(g.grad_weight + (l0 + r) * g.hidden + h, out, l0 + r < layers ? left : 0);
  }
}

template <class T, bool kVector>
__global__ void __launch_bounds__(kThreads, 1) grad_inputs(const Backward<T> g) {
  CC_DYNAMIC_SHARED(shared);
  auto* const memory = reinterpret_cast<Accumulate<T>*>(shared);
  constexpr int tile = kThreads * Pack<T>::size;
  const int64_t tiles = (g.hidden + tile - 1) / tile, block = blockIdx.x;
  const int64_t h = block % tiles * tile + threadIdx.x * Pack<T>::size;
  const int64_t task = block / tiles;  // the examples first, then groups of the weight's rows
  if (task < g.batch) {
    grad_example<T, kVector>(g, task, h, memory);
  } else {
    grad_weight<T, kVector>(g, static_cast<int>(task - g.batch) * kWeightRows, h, memory);
  }
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

int64_t tiles(int64_t hidden, int64_t element_size) {
  return ceil_div(hidden, kLanes * 16 / element_size);
}

template <class T>
cudaError_t forward(const Forward<T>& f, cudaStream_t stream) {
  using A = Accumulate<T>;
  const bool vector = gate_packs<T>(f) && rows_pack<T>(f.ffn_output);
  const size_t decide_bytes = (kGroups + 1) * kDecideTile<T> * sizeof(A), fuse_bytes = f.layers * sizeof(A) + sizeof(int);
  const cudaError_t error = launch(vector ? decide<T, true> : decide<T, false>, tiles(f.hidden, sizeof(T)), f.batch,
                                   kDecideThreads, decide_bytes, stream, f);
  if (error != cudaSuccess) return error;
  return launch(vector ? fuse<T, true> : fuse<T, false>, ceil_div(f.hidden, kThreads * Pack<T>::size), f.batch, kThreads,
                fuse_bytes, stream, f);
}

template <class T>
cudaError_t backward(const Backward<T>& g, cudaStream_t stream) {
  using A = Accumulate<T>;
  const bool vector = gate_packs<T>(g) && rows_pack<T>(g.grad_fused);
  const int64_t warps = ceil_div(g.layers, kGateRows) * g.batch;
  if (warps > 0) {
    const cudaError_t error = launch(vector ? grad_gate<T, true> : grad_gate<T, false>, ceil_div(warps, kWarps), 1,
                                     kThreads, 0, stream, g);
    if (error != cudaSuccess) return error;
  }
  const int64_t tasks = g.batch + ceil_div(g.layers, kWeightRows);
  const size_t bytes = (kWarps * g.layers + kWeightExamples * kWeightRows) * sizeof(A);
  return launch(vector ? grad_inputs<T, true> : grad_inputs<T, false>, ceil_div(g.hidden, kThreads * Pack<T>::size) * tasks,
                1, kThreads, bytes, stream, g);
}

#define CC_INSTANTIATE(T)                                            \
  template cudaError_t forward<T>(const Forward<T>&, cudaStream_t); \
  template cudaError_t backward<T>(const Backward<T>&, cudaStream_t)
CC_INSTANTIATE(float);
CC_INSTANTIATE(double);
CC_INSTANTIATE(c10::BFloat16);
CC_INSTANTIATE(c10::Half);

}  // namespace cc_ds::cuda

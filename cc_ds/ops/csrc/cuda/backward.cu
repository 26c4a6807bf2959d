// The fused gate's backward on CUDA, in two launches:
//
//   grad_gate     warp: (2 l, b)   d loss / d s = <gradient of the anchor row, english[l, b]>
//   grad_inputs   (tile of H, b)   gradients of embedding and english; (tile of H, 4 l): gradient of weight
//
// english is read once.

#include "common.cuh"
#include "kernels.h"

namespace cc_ds::cuda {
namespace {

constexpr int kGateRows = 2, kGateInFlight = 4;
constexpr int kWeightInFlight = 4;
constexpr int kWeightRows = 4, kWeightExamples = 32;

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

}  // namespace

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

#define CC_INSTANTIATE(T) template cudaError_t backward<T>(const Backward<T>&, cudaStream_t);
CC_FOR_EACH_DTYPE(CC_INSTANTIATE)
#undef CC_INSTANTIATE

}  // namespace cc_ds::cuda

// The fused gate's forward on CUDA, in two launches:
//
//   decide        (tile of H, b)   d = mean_l english + embedding on the tile; its part of z = d weight^T
//   fuse          (tile of H, b)   z, softmax, argmax, then the row of ffn_output += what was chosen of english
//
// english is read once (hard gate: and one row of L again; soft: twice).

#include "common.cuh"
#include "kernels.h"

namespace cc_ds::cuda {
namespace {

// decide: kLanes threads side by side along H, kGroups of them taking turns along L.
constexpr int kLanes = 64, kGroups = 4, kDecideThreads = kLanes * kGroups;
constexpr int kDecideInFlight = 5;
constexpr int kFuseInFlight = 8;

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

#define CC_INSTANTIATE(T) template cudaError_t forward<T>(const Forward<T>&, cudaStream_t);
CC_FOR_EACH_DTYPE(CC_INSTANTIATE)
#undef CC_INSTANTIATE

}  // namespace cc_ds::cuda

// What the CPU and the CUDA kernels share: their arguments, and the arithmetic of one gate.
//
//   d = mean_l english[l] + embedding, z = d weight^T, p = softmax((z + noise) / temperature), s = one_hot(argmax p) or p
//   ffn_output[b, anchors[b]] += sum_l s[b, l] english[l, b]
//
// Shapes: B examples, T positions, L layers, H hidden size. Strides are in elements; a stride that is not named here is
// that of a contiguous tensor. T is the tensors' element type, A = Accumulate<T> that of every sum.
#pragma once

#include <cstdint>

#if defined(__CUDACC__)
#define CC_MEMBER __host__ __device__ __forceinline__
#define CC_SHARED_MATH CC_MEMBER
#else
// Static and always inlined: the CPU kernels are compiled once per instruction set, and the linker must not merge them.
#define CC_MEMBER inline __attribute__((always_inline))
#define CC_SHARED_MATH static CC_MEMBER
#endif

namespace cc_ds {

template <class T>
struct AccumulateOf {
  using type = float;
};
template <>
struct AccumulateOf<double> {
  using type = double;
};
template <class T>
using Accumulate = typename AccumulateOf<T>::type;

// A (B, T, H) tensor of which only the rows at the anchors are touched: any strides, zero among them.
template <class T>
struct Rows {
  T* data;
  int64_t stride_b, stride_t, stride_h;

  CC_MEMBER T* at(int64_t b, int64_t t) const {
    return data + b * stride_b + t * stride_t;
  }
};

// What forward and backward both read.
template <class T>
struct Gate {
  using A = Accumulate<T>;
  int64_t layers, batch, positions, hidden;
  const T* english;  // (L, B, H), unit stride in H
  int64_t english_stride_l, english_stride_b;
  const T* weight;  // (L, H), unit stride in H
  int64_t weight_stride_l;
  const A* noise;          // (B, L)
  const int64_t* anchors;  // (B)
  const bool* mask;        // (B), or null: every row has English
  A temperature;
  bool hard;

  CC_MEMBER bool fuses(int64_t b) const {
    return mask == nullptr || mask[b];
  }
  CC_MEMBER const T* english_at(int64_t l, int64_t b) const {
    return english + l * english_stride_l + b * english_stride_b;
  }
};

template <class T>
struct Forward : Gate<T> {
  using A = Accumulate<T>;
  Rows<T> ffn_output;
  const T* embedding;  // (B, H), unit stride in H
  int64_t embedding_stride_b;
  A* partial;                     // (tiles, B, L): each tile of H adds its part to z; summed in the order of the tiles
  A *choice, *logits, *decision;  // (B, L), (B, L), (B, H)
};

template <class T>
struct Backward : Gate<T> {
  using A = Accumulate<T>;
  Rows<const T> grad_fused;                      // data null: no gradient came in through the fused output
  const A* grad_logits;                          // (B, L), or null
  const A *decision, *logits, *choice;           // (B, H), (B, L), (B, L)
  A* grad_gate;                                  // (B, L): d loss / d s
  T *grad_english, *grad_embedding, *grad_weight;  // (L, B, H) or null, (B, H), (L, H)
};

// Does (value, index) win the argmax over (best, best_index)? Ties go to the first.
template <class A>
CC_SHARED_MATH bool wins(A value, int64_t index, A best, int64_t best_index) {
  return value > best || (value == best && index < best_index);
}

// The argmax of a softmax of which `best` is the largest input and `sum` the denominator: with a NaN in the inputs all of
// the softmax is NaN, and its argmax, as torch takes it, the first.
template <class A, class Index>
CC_SHARED_MATH Index argmax_or_first(Index best, A sum) {
  return sum == sum ? best : 0;
}

// The straight-through gate's value at the chosen layer: 1 + (p - p), so that a NaN is not hidden.
template <class A>
CC_SHARED_MATH A straight_through(A p) {
  return A(1) + (p - p);
}

// d loss / d z[l], from d loss / d s[l], the softmax p[l], and inner = sum_l p[l] d loss / d s[l].
template <class A>
CC_SHARED_MATH A grad_logit(A p, A grad_gate, A inner, A temperature, A grad_logits) {
  return p * (grad_gate - inner) / temperature + grad_logits;
}

}  // namespace cc_ds

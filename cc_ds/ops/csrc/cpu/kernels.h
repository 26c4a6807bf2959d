// The CPU kernels, for one instruction set: kernels_generic.cpp and kernels_avx2.cpp include this file.
// Each function is one independent unit of work; gated_fuse.cpp spreads the units over threads. No unit's result depends
// on how many threads there are.
//
// H is cut into tiles of kTile elements, so that what a unit reads twice stays in the first-level cache.

namespace CC_INSTRUCTION_SET {

#include "lanes.h"

// ---- forward ----

// sum[i] (+)= sum over kCount layers from l of english[l, b, h0 + i].
template <int kCount, class T>
CC_INLINE void add_layers(const Forward<T>& f, int64_t l, int64_t b, int64_t h0, int64_t count, Accumulate<T>* sum) {
  using V = Lanes<Accumulate<T>>;
  const T* e[kCount];
  for (int k = 0; k < kCount; ++k) e[k] = f.english_at(l + k, b) + h0;
  for_lanes(count, [&](int64_t i, auto read, auto write) CC_ALWAYS_INLINE {
    V part[kCount];
    for (int k = 0; k < kCount; ++k) part[k] = read(e[k] + i);
    for (int half = kCount / 2; half > 0; half /= 2) {  // kCount is a power of two
      for (int k = 0; k < half; ++k) part[k] += part[k + half];
    }
    write(sum + i, l == 0 ? part[0] : V(read(sum + i) + part[0]));
  });
}

// sum[i] = sum over all layers: eight at a time, so that the sums are not what is waited for.
template <class T>
CC_INLINE void sum_layers(const Forward<T>& f, int64_t b, int64_t h0, int64_t count, Accumulate<T>* sum) {
  int64_t l = 0;
  for (; l + 8 <= f.layers; l += 8) add_layers<8>(f, l, b, h0, count, sum);
  for (; l < f.layers; ++l) add_layers<1>(f, l, b, h0, count, sum);
}

// partial[tile, b, l] for kCount examples from b: products of their decision vectors with every row of the weight.
template <int kCount, class T>
CC_INLINE void multiply(const Forward<T>& f, int64_t tile, int64_t b, int64_t count) {
  using A = Accumulate<T>;
  using V = Lanes<A>;
  const A* const decision = f.decision + b * f.hidden + tile * kTile;
  A* const out = f.partial + (tile * f.batch + b) * f.layers;
  for (int64_t l = 0; l < f.layers; l += 2) {
    const int64_t second = l + 1 < f.layers ? l + 1 : l;
    const T* w0 = f.weight + l * f.weight_stride_l + tile * kTile;
    const T* w1 = f.weight + second * f.weight_stride_l + tile * kTile;
    V sum0[kCount] = {}, sum1[kCount] = {};
    for_lanes(count, [&](int64_t i, auto read, auto) CC_ALWAYS_INLINE {
      const V x0 = read(w0 + i), x1 = read(w1 + i);
      for (int r = 0; r < kCount; ++r) {
        const V d = read(decision + r * f.hidden + i);
        sum0[r] += d * x0;
        sum1[r] += d * x1;
      }
    });
    for (int r = 0; r < kCount; ++r) {
      out[r * f.layers + l] = sum_lanes(sum0[r]);
      out[r * f.layers + second] = sum_lanes(sum1[r]);
    }
  }
}

// The decision vectors of examples [first, last) on one tile of H, and then what they add to the logits: so the weight
// is read from memory once for all of them.
template <class T>
void decide(const Forward<T>& f, int64_t tile, int64_t first, int64_t last) {
  using A = Accumulate<T>;
  using V = Lanes<A>;
  const int64_t h0 = tile * kTile;
  const int64_t count = f.hidden - h0 < kTile ? f.hidden - h0 : kTile;
  const A share = A(1) / static_cast<A>(f.layers);
  for (int64_t b = first; b < last; ++b) {
    A* const d = f.decision + b * f.hidden + h0;
    sum_layers(f, b, h0, count, d);
    const T* embedding = f.embedding + b * f.embedding_stride_b + h0;
    for_lanes(count, [&](int64_t i, auto read, auto write) CC_ALWAYS_INLINE {
      write(d + i, read(d + i) * share + read(embedding + i));
    });
  }
  int64_t b = first;
  for (; b + 4 <= last; b += 4) multiply<4>(f, tile, b, count);
  for (; b < last; ++b) multiply<1>(f, tile, b, count);
}

// ffn_output[b, anchor, tile] += sum over [first, last) of scale[l] english[l, b, tile].
template <class T>
void fuse(const Forward<T>& f, int64_t tile, int64_t b, int64_t first, int64_t last, const Accumulate<T>* scale) {
  using A = Accumulate<T>;
  using V = Lanes<A>;
  const int64_t h0 = tile * kTile;
  const int64_t count = f.hidden - h0 < kTile ? f.hidden - h0 : kTile;
  alignas(64) A sum[kTile];
  for (int64_t l = first; l < last; ++l) {
    const T* e = f.english_at(l, b) + h0;
    const A s = scale[l];
    for_lanes(count, [&](int64_t i, auto read, auto) CC_ALWAYS_INLINE {
      const V term = read(e + i) * s;
      store(sum + i, l == first ? term : load(sum + i) + term);
    });
  }
  T* row = f.ffn_output.at(b, f.anchors[b]) + h0 * f.ffn_output.stride_h;
  if (f.ffn_output.stride_h == 1) {
    for_lanes(count, [&](int64_t i, auto read, auto write) CC_ALWAYS_INLINE {
      write(row + i, V(read(row + i)) + load(sum + i));
    });
  } else {
    for (int64_t i = 0; i < count; ++i) {
      T& x = row[i * f.ffn_output.stride_h];
      x = static_cast<T>(static_cast<A>(x) + sum[i]);
    }
  }
}

// ---- backward ----

// grad_gate[b, l] for kCount layers from l: products of the anchor row's gradient with each English activation.
template <int kCount, class T>
CC_INLINE void dot(const Backward<T>& g, const T* grad_row, int64_t b, int64_t l) {
  using V = Lanes<Accumulate<T>>;
  const T* e[kCount];
  for (int k = 0; k < kCount; ++k) e[k] = g.english_at(l + k, b);
  V sum[kCount][2] = {};
  for_lanes(g.hidden, [&](int64_t i, auto read, auto) CC_ALWAYS_INLINE {
    const V row = read(grad_row + i);
    for (int k = 0; k < kCount; ++k) sum[k][(i / kLanes) & 1] += read(e[k] + i) * row;
  });
  for (int k = 0; k < kCount; ++k) g.grad_gate[b * g.layers + l + k] = sum_lanes(sum[k][0] + sum[k][1]);
}

// The same for up to kLayers layers.
template <class T>
void grad_gate(const Backward<T>& g, const T* grad_row, int64_t b, int64_t l) {
  if (l + kLayers <= g.layers) return dot<kLayers>(g, grad_row, b, l);
  for (; l < g.layers; ++l) dot<1>(g, grad_row, b, l);
}

// out[r][i] (+)= sum over kTerms terms of scale(term + k, r) x(term + k)[i], for kRows rows of one tile.
template <int kRows, int kTerms, class A, class X, class Scale>
CC_INLINE void add_terms(A (*out)[kTile], int64_t count, int64_t term, const X& x, const Scale& scale) {
  using V = Lanes<A>;
  V s[kRows][kTerms];
  decltype(x(0)) p[kTerms];
  for (int k = 0; k < kTerms; ++k) {
    p[k] = x(term + k);
    for (int r = 0; r < kRows; ++r) s[r][k] = V{} + scale(term + k, r);
  }
  for_lanes(count, [&](int64_t i, auto read, auto) CC_ALWAYS_INLINE {
    V value[kTerms];
    for (int k = 0; k < kTerms; ++k) value[k] = read(p[k] + i);
    for (int r = 0; r < kRows; ++r) {
      V sum = term == 0 ? V{} : load(out[r] + i);
      for (int k = 0; k < kTerms; ++k) sum += s[r][k] * value[k];
      store(out[r] + i, sum);
    }
  });
}

// out[r][i] = sum over all terms: four at a time, so that the sums are not what is waited for.
template <int kRows, class A, class X, class Scale>
CC_INLINE void combine(A (*out)[kTile], int64_t count, int64_t terms, const X& x, const Scale& scale) {
  int64_t term = 0;
  for (; term + 4 <= terms; term += 4) add_terms<kRows, 4>(out, count, term, x, scale);
  for (; term < terms; ++term) add_terms<kRows, 1>(out, count, term, x, scale);
}

// Gradients of the English activations and embeddings of up to kPair examples from b0 on one tile.
// grad_logits: (B, L), d loss / d z; grad_rows: of each example, or null where none came in.
template <class T>
void grad_examples(const Backward<T>& g, const Accumulate<T>* grad_logits, const T* const* grad_rows, int64_t tile,
                   int64_t b0) {
  using A = Accumulate<T>;
  using V = Lanes<A>;
  const int64_t h0 = tile * kTile;
  const int64_t count = g.hidden - h0 < kTile ? g.hidden - h0 : kTile;
  const int64_t examples = g.batch - b0 < kPair ? g.batch - b0 : kPair;
  alignas(64) A grad_decision[kPair][kTile];
  const auto weight = [&](int64_t l) { return g.weight + l * g.weight_stride_l + h0; };
  const auto scale = [&](int64_t l, int64_t r) { return grad_logits[(b0 + r) * g.layers + l]; };
  if (examples == kPair) {
    combine<kPair>(grad_decision, count, g.layers, weight, scale);
  } else {
    combine<1>(grad_decision, count, g.layers, weight, scale);
  }
  const A share = A(1) / static_cast<A>(g.layers);
  for (int64_t r = 0; r < examples; ++r) {
    const int64_t b = b0 + r;
    A* const d = grad_decision[r];
    T* const embedding = g.grad_embedding + b * g.hidden + h0;
    for_lanes(count, [&](int64_t i, auto, auto write) CC_ALWAYS_INLINE {
      write(embedding + i, load(d + i));
      store(d + i, load(d + i) * share);
    });
    for (int64_t l = 0; g.grad_english != nullptr && l < g.layers; ++l) {
      T* const out = g.grad_english + (l * g.batch + b) * g.hidden + h0;
      const A s = grad_rows[b] != nullptr ? g.choice[b * g.layers + l] : A(0);
      if (s != 0) {
        const T* const row = grad_rows[b] + h0;
        for_lanes(count, [&](int64_t i, auto read, auto write) CC_ALWAYS_INLINE {
          write(out + i, V(load(d + i) + read(row + i) * s));
        });
      } else {  // most layers of the hard gate
        for_lanes(count, [&](int64_t i, auto, auto write) CC_ALWAYS_INLINE { write(out + i, load(d + i)); });
      }
    }
  }
}

// grad_weight[l, tile] = sum over examples of grad_logits[b, l] decision[b, tile], for up to kPair layers from l0.
template <class T>
void grad_weight(const Backward<T>& g, const Accumulate<T>* grad_logits, int64_t tile, int64_t l0) {
  using A = Accumulate<T>;
  const int64_t h0 = tile * kTile;
  const int64_t count = g.hidden - h0 < kTile ? g.hidden - h0 : kTile;
  const int64_t layers = g.layers - l0 < kPair ? g.layers - l0 : kPair;
  alignas(64) A sum[kPair][kTile] = {};  // what it stays without examples
  const auto decision = [&](int64_t b) { return g.decision + b * g.hidden + h0; };
  const auto scale = [&](int64_t b, int64_t r) { return grad_logits[b * g.layers + l0 + r]; };
  if (layers == kPair) {
    combine<kPair>(sum, count, g.batch, decision, scale);
  } else {
    combine<1>(sum, count, g.batch, decision, scale);
  }
  for (int64_t r = 0; r < layers; ++r) {
    T* const out = g.grad_weight + (l0 + r) * g.hidden + h0;
    for_lanes(count, [&](int64_t i, auto, auto write) CC_ALWAYS_INLINE { write(out + i, load(sum[r] + i)); });
  }
}

template <class T>
Units<T> units() {
  return {decide<T>, fuse<T>, grad_gate<T>, grad_examples<T>, grad_weight<T>};
}

template Units<float> units<float>();
template Units<double> units<double>();
template Units<c10::BFloat16> units<c10::BFloat16>();
template Units<c10::Half> units<c10::Half>();

}  // namespace CC_INSTRUCTION_SET

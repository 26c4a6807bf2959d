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
  for_lanes(count, [&](int64_t i, auto read, auto) CC_ALWAYS_INLINE {
    V part[kCount];
    for (int k = 0; k < kCount; ++k) part[k] = read(e[k] + i);
    for (int half = kCount / 2; half > 0; half /= 2) {  // kCount is a power of two
      for (int k = 0; k < half; ++k) part[k] += part[k + half];
    }
    store(sum + i, l == 0 ? part[0] : load(sum + i) + part[0]);
  });
}

// sum[i] = sum over all layers: eight at a time, so that the sums are not what is waited for.
template <class T>
CC_INLINE void sum_layers(const Forward<T>& f, int64_t b, int64_t h0, int64_t count, Accumulate<T>* sum) {
  int64_t l = 0;
  for (; l + 8 <= f.layers; l += 8) add_layers<8>(f, l, b, h0, count, sum);
  for (; l < f.layers; ++l) add_layers<1>(f, l, b, h0, count, sum);
}

// partial[tile, b, l] for kCount examples from b0: products of their decision tiles with every row of the weight.
template <int kCount, class T>
CC_INLINE void multiply(const Forward<T>& f, const Accumulate<T> (*decision)[kTile], int64_t tile, int64_t b0,
                        int64_t count) {
  using V = Lanes<Accumulate<T>>;
  for (int64_t l = 0; l < f.layers; l += 2) {
    const int64_t second = l + 1 < f.layers ? l + 1 : l;
    const T* w0 = f.weight + l * f.weight_stride_l + tile * kTile;
    const T* w1 = f.weight + second * f.weight_stride_l + tile * kTile;
    V sum0[kCount] = {}, sum1[kCount] = {};
    for_lanes(count, [&](int64_t i, auto read, auto) CC_ALWAYS_INLINE {
      const V x0 = read(w0 + i), x1 = read(w1 + i);
      for (int r = 0; r < kCount; ++r) {
        const V d = load(decision[r] + i);  // beyond `count` the tile holds zeros
        sum0[r] += d * x0;
        sum1[r] += d * x1;
      }
    });
    for (int r = 0; r < kCount; ++r) {
      auto* out = f.partial + (tile * f.batch + b0 + r) * f.layers;
      out[l] = sum_lanes(sum0[r]);
      out[second] = sum_lanes(sum1[r]);
    }
  }
}

// The decision vectors of up to kExamples examples on one tile of H, and what they add to the logits.
template <class T>
void decide(const Forward<T>& f, int64_t tile, int64_t b0) {
  using A = Accumulate<T>;
  using V = Lanes<A>;
  alignas(64) A decision[kExamples][kTile];
  const int64_t h0 = tile * kTile;
  const int64_t count = f.hidden - h0 < kTile ? f.hidden - h0 : kTile;
  const int64_t examples = f.batch - b0 < kExamples ? f.batch - b0 : kExamples;
  const A share = A(1) / static_cast<A>(f.layers);
  for (int64_t r = 0; r < examples; ++r) {
    const int64_t b = b0 + r;
    A* d = decision[r];
    sum_layers(f, b, h0, count, d);
    const T* embedding = f.embedding + b * f.embedding_stride_b + h0;
    A* out = f.decision + b * f.hidden + h0;
    for_lanes(count, [&](int64_t i, auto read, auto write) CC_ALWAYS_INLINE {
      const V value = load(d + i) * share + read(embedding + i);
      store(d + i, value);
      write(out + i, value);
    });
  }
  switch (examples) {
    case 4: return multiply<4>(f, decision, tile, b0, count);
    case 3: return multiply<3>(f, decision, tile, b0, count);
    case 2: return multiply<2>(f, decision, tile, b0, count);
    default: return multiply<1>(f, decision, tile, b0, count);
  }
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

// grad_gate[b, l] for l in [first, last): the product of the anchor row's gradient with each English activation.
template <class T>
void grad_gate(const Backward<T>& g, const Accumulate<T>* grad_row, int64_t b, int64_t first, int64_t last) {
  using V = Lanes<Accumulate<T>>;
  for (int64_t l = first; l < last; ++l) {
    const T* e = g.english_at(l, b);
    V sum[4] = {};
    for_lanes(g.hidden, [&](int64_t i, auto read, auto) CC_ALWAYS_INLINE {
      sum[(i / kLanes) & 3] += read(e + i) * read(grad_row + i);
    });
    g.grad_gate[b * g.layers + l] = sum_lanes((sum[0] + sum[1]) + (sum[2] + sum[3]));
  }
}

// Gradients of one example's English activations and embedding on one tile; grad_logits: (L), d loss / d z.
template <class T>
void grad_example(const Backward<T>& g, const Accumulate<T>* grad_logits, const Accumulate<T>* grad_row, int64_t tile,
                  int64_t b) {
  using A = Accumulate<T>;
  using V = Lanes<A>;
  const int64_t h0 = tile * kTile;
  const int64_t count = g.hidden - h0 < kTile ? g.hidden - h0 : kTile;
  alignas(64) A grad_decision[kTile] = {};
  for (int64_t l = 0; l < g.layers; ++l) {
    const T* w = g.weight + l * g.weight_stride_l + h0;
    const A dz = grad_logits[l];
    for_lanes(count, [&](int64_t i, auto read, auto) CC_ALWAYS_INLINE {
      store(grad_decision + i, load(grad_decision + i) + read(w + i) * dz);
    });
  }
  T* embedding = g.grad_embedding + b * g.hidden + h0;
  for_lanes(count, [&](int64_t i, auto, auto write) CC_ALWAYS_INLINE {
    write(embedding + i, load(grad_decision + i));
  });
  if (g.grad_english == nullptr) return;
  const A share = A(1) / static_cast<A>(g.layers);
  const A* row = grad_row + h0;
  for (int64_t l = 0; l < g.layers; ++l) {
    T* out = g.grad_english + (l * g.batch + b) * g.hidden + h0;
    const A s = g.choice[b * g.layers + l];
    for_lanes(count, [&](int64_t i, auto read, auto write) CC_ALWAYS_INLINE {
      write(out + i, V(load(grad_decision + i) * share + read(row + i) * s));
    });
  }
}

// grad_weight[l, tile] = sum over examples of grad_logits[b, l] decision[b, tile].
template <class T>
void grad_weight(const Backward<T>& g, const Accumulate<T>* grad_logits, int64_t tile, int64_t l) {
  using A = Accumulate<T>;
  const int64_t h0 = tile * kTile;
  const int64_t count = g.hidden - h0 < kTile ? g.hidden - h0 : kTile;
  alignas(64) A sum[kTile] = {};
  for (int64_t b = 0; b < g.batch; ++b) {
    const A dz = grad_logits[b * g.layers + l];
    const A* decision = g.decision + b * g.hidden + h0;
    for_lanes(count, [&](int64_t i, auto read, auto) CC_ALWAYS_INLINE {
      store(sum + i, load(sum + i) + read(decision + i) * dz);
    });
  }
  T* out = g.grad_weight + l * g.hidden + h0;
  for_lanes(count, [&](int64_t i, auto, auto write) CC_ALWAYS_INLINE { write(out + i, load(sum + i)); });
}

template <class T>
Units<T> units() {
  return {decide<T>, fuse<T>, grad_gate<T>, grad_example<T>, grad_weight<T>};
}

template Units<float> units<float>();
template Units<double> units<double>();
template Units<c10::BFloat16> units<c10::BFloat16>();
template Units<c10::Half> units<c10::Half>();

}  // namespace CC_INSTRUCTION_SET

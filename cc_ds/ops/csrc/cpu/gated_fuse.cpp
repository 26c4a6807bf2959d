// The CPU backend: spreads the units of kernels.h over torch's threads, and takes the softmax between them.
#include <algorithm>
#include <cmath>
#include <vector>

#include "../binding.h"
#include "units.h"

namespace cc_ds {
namespace {

template <class T>
Units<T> units_of_this_machine() {
#if CC_X86
  static const bool has_avx2 =
      __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
  if (has_avx2) return avx2::units<T>();
#endif
  return generic::units<T>();
}

int64_t ceil_div(int64_t a, int64_t b) {
  return (a + b - 1) / b;
}

// f(begin, end) for ranges that make up [0, count), on torch's threads; `work` is roughly how many elements are read
// for one of [0, count).
template <class F>
void parallel_ranges(int64_t count, int64_t work, F&& f) {
  constexpr int64_t kElementsPerTask = 32768;  // as torch: below this a thread costs more than it saves
  torch::stable::parallel_for(0, count, ceil_div(kElementsPerTask, work > 0 ? work : 1), f);
}

template <class F>
void parallel(int64_t count, int64_t work, F&& f) {
  parallel_ranges(count, work, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) f(i);
  });
}

// p (L) = softmax((z + noise) / temperature); returns the argmax.
template <class A>
int64_t softmax(const A* logits, const A* noise, A temperature, int64_t layers, A* p) {
  int64_t best = 0;
  for (int64_t l = 0; l < layers; ++l) {
    p[l] = (logits[l] + noise[l]) / temperature;
    if (wins(p[l], l, p[best], best)) best = l;
  }
  const A largest = p[best];
  A sum = 0;
  for (int64_t l = 0; l < layers; ++l) sum += p[l] = std::exp(p[l] - largest);
  for (int64_t l = 0; l < layers; ++l) p[l] /= sum;
  return argmax_or_first(best, sum);
}

void check_anchor(int64_t anchor, int64_t positions, int64_t b) {
  STD_TORCH_CHECK(0 <= anchor && anchor < positions, "gated_fuse: anchors[", b, "] is ", anchor, ", outside [0, ",
                  positions, ")");
}

// Logits, softmax and choice of one example. gate (L): what each English activation is multiplied with; its range of
// layers that are not zero is returned.
template <class T>
std::pair<int64_t, int64_t> choose(const Forward<T>& f, int64_t tiles, int64_t b, Accumulate<T>* gate) {
  using A = Accumulate<T>;
  A *logits = f.logits + b * f.layers, *choice = f.choice + b * f.layers;
  for (int64_t l = 0; l < f.layers; ++l) {
    A sum = 0;
    for (int64_t tile = 0; tile < tiles; ++tile) sum += f.partial[(tile * f.batch + b) * f.layers + l];
    logits[l] = sum;
  }
  const int64_t best = softmax(logits, f.noise + b * f.layers, f.temperature, f.layers, gate);
  const bool fuses = f.fuses(b);
  for (int64_t l = 0; l < f.layers; ++l) choice[l] = !fuses ? A(0) : f.hard ? A(l == best) : gate[l];
  if (!fuses) return {0, 0};
  if (!f.hard) return {0, f.layers};
  gate[best] = straight_through(gate[best]);
  return {best, best + 1};
}

struct Cpu {
  static int64_t tiles(int64_t hidden, int64_t) { return ceil_div(hidden, kTile); }

  template <class T>
  static void forward(const Forward<T>& f, int32_t) {
    using A = Accumulate<T>;
    const Units<T> units = units_of_this_machine<T>();
    const int64_t tiles = Cpu::tiles(f.hidden, sizeof(T));
    for (int64_t b = 0; b < f.batch; ++b) check_anchor(f.anchors[b], f.positions, b);
    parallel_ranges(tiles * f.batch, 2 * kTile * f.layers, [&](int64_t begin, int64_t end) {
      while (begin < end) {
        const int64_t tile = begin / f.batch, b = begin % f.batch;
        const int64_t count = std::min({kExamples, f.batch - b, end - begin});
        units.decide(f, tile, b, b + count);
        begin += count;
      }
    });
    std::vector<A> gate(f.batch * f.layers);
    std::vector<std::pair<int64_t, int64_t>> chosen(f.batch);
    parallel(f.batch, 16 * f.layers, [&](int64_t b) { chosen[b] = choose(f, tiles, b, &gate[b * f.layers]); });
    parallel(tiles * f.batch, kTile * (f.hard ? 2 : f.layers), [&](int64_t i) {
      const int64_t b = i / tiles;
      if (f.fuses(b)) units.fuse(f, i % tiles, b, chosen[b].first, chosen[b].second, &gate[b * f.layers]);
    });
  }

  template <class T>
  static void backward(const Backward<T>& g, int32_t) {
    using A = Accumulate<T>;
    const Units<T> units = units_of_this_machine<T>();
    const int64_t tiles = Cpu::tiles(g.hidden, sizeof(T));
    // the gradient of the connection, by example, with unit stride; null where there is none
    const bool fused = g.grad_fused.data != nullptr, gather = fused && g.grad_fused.stride_h != 1;
    std::vector<T> gathered(gather ? g.batch * g.hidden : 0);
    std::vector<const T*> rows(g.batch);
    for (int64_t b = 0; b < g.batch; ++b) {
      if (!fused || !g.fuses(b)) continue;
      rows[b] = g.grad_fused.at(b, g.anchors[b]);
      if (!gather) continue;
      T* const copy = &gathered[b * g.hidden];
      for (int64_t h = 0; h < g.hidden; ++h) copy[h] = rows[b][h * g.grad_fused.stride_h];
      rows[b] = copy;
    }
    parallel(g.batch * ceil_div(g.layers, kLayers), kLayers * g.hidden, [&](int64_t i) {
      const int64_t b = i % g.batch, l = i / g.batch * kLayers;  // the order in which english lies in memory
      if (rows[b]) return units.grad_gate(g, rows[b], b, l);
      for (int64_t k = l; k < l + kLayers && k < g.layers; ++k) g.grad_gate[b * g.layers + k] = 0;
    });
    std::vector<A> grad_logits(g.batch * g.layers);  // (B, L)
    parallel(g.batch, 16 * g.layers, [&](int64_t b) { gate_backward(g, b, &grad_logits[b * g.layers]); });
    const int64_t pairs = ceil_div(g.batch, kPair), weight_pairs = ceil_div(g.layers, kPair);
    parallel(tiles * pairs, 2 * kPair * kTile * g.layers, [&](int64_t i) {
      units.grad_examples(g, grad_logits.data(), rows.data(), i / pairs, i % pairs * kPair);
    });
    parallel(tiles * weight_pairs, kPair * kTile * g.batch, [&](int64_t i) {
      units.grad_weight(g, grad_logits.data(), i / weight_pairs, i % weight_pairs * kPair);
    });
  }

  // out (L): d loss / d z of one example.
  template <class T>
  static void gate_backward(const Backward<T>& g, int64_t b, Accumulate<T>* out) {
    using A = Accumulate<T>;
    const A *grad_gate = g.grad_gate + b * g.layers, *incoming = g.grad_logits ? g.grad_logits + b * g.layers : nullptr;
    softmax(g.logits + b * g.layers, g.noise + b * g.layers, g.temperature, g.layers, out);
    A inner = 0;
    for (int64_t l = 0; l < g.layers; ++l) inner += out[l] * grad_gate[l];
    for (int64_t l = 0; l < g.layers; ++l) {
      out[l] = grad_logit(out[l], grad_gate[l], inner, g.temperature, incoming ? incoming[l] : A(0));
    }
  }
};

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(cc_ds, CPU, m) {
  m.impl("gated_fuse_", TORCH_BOX(&gated_fuse_<Cpu>));
  m.impl("gated_fuse_backward", TORCH_BOX(&gated_fuse_backward<Cpu>));
}

}  // namespace cc_ds

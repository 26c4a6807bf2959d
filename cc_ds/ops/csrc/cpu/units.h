// The units of work that the CPU kernels consist of (kernels.h), and the instruction sets they are compiled for.
#pragma once

#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include <cstdint>

#include "../gate.h"

#if defined(__x86_64__) && defined(__GNUC__)
#define CC_X86 1
#include <immintrin.h>
#endif

namespace cc_ds {

constexpr int64_t kTile = 1024;  // elements of H per unit
constexpr int64_t kExamples = 16;  // examples of a unit at most, which share one reading of the weight
constexpr int64_t kLayers = 4;    // layers that share one reading of an anchor row's gradient
constexpr int64_t kPair = 2;      // rows of a gradient that share one reading of what they are sums of

template <class T>
struct Units {
  using A = Accumulate<T>;
  void (*decide)(const Forward<T>&, int64_t tile, int64_t first, int64_t last);
  void (*fuse)(const Forward<T>&, int64_t tile, int64_t b, int64_t first, int64_t last, const A* scale);
  void (*grad_gate)(const Backward<T>&, const T* grad_row, int64_t b, int64_t l);
  void (*grad_examples)(const Backward<T>&, const A* grad_logits, const T* const* grad_rows, int64_t tile, int64_t b0);
  void (*grad_weight)(const Backward<T>&, const A* grad_logits, int64_t tile, int64_t l0);
};

namespace generic {
template <class T>
Units<T> units();
}

#if CC_X86
namespace avx2 {
template <class T>
Units<T> units();
}
#endif

}  // namespace cc_ds

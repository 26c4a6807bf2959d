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
constexpr int64_t kExamples = 4;  // examples that share one reading of the weight

template <class T>
struct Units {
  using A = Accumulate<T>;
  void (*decide)(const Forward<T>&, int64_t tile, int64_t b0);
  void (*fuse)(const Forward<T>&, int64_t tile, int64_t b, int64_t first, int64_t last, const A* scale);
  void (*grad_gate)(const Backward<T>&, const A* grad_row, int64_t b, int64_t first, int64_t last);
  void (*grad_example)(const Backward<T>&, const A* grad_logits, const A* grad_row, int64_t tile, int64_t b);
  void (*grad_weight)(const Backward<T>&, const A* grad_logits, int64_t tile, int64_t l);
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

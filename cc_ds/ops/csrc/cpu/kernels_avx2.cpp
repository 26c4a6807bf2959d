// The CPU kernels for AVX2, FMA and F16C; chosen at run time (gated_fuse.cpp).
#include "units.h"

#if CC_X86
// After every other header: nothing that is shared with the generic build may be compiled for AVX2.
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma,f16c"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx2,fma,f16c")
#endif

namespace cc_ds {
#define CC_AVX2 1
#define CC_INSTRUCTION_SET avx2
#include "kernels.h"
}  // namespace cc_ds

#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif
#endif

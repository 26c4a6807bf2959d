// The CUDA kernels as torch operators on CPU tensors, under the namespace cc_ds_shim.
#include "shim.h"

#include "binding.h"
#include "cuda/kernels.h"

namespace cc_ds {
namespace {

struct Shim {
  static int64_t tiles(int64_t hidden, int64_t element_size) { return cuda::tiles(hidden, element_size); }
  template <class T>
  static void forward(const Forward<T>& f, int32_t) {
    check(cuda::forward<T>(f, nullptr));
  }
  template <class T>
  static void backward(const Backward<T>& g, int32_t) {
    check(cuda::backward<T>(g, nullptr));
  }
  static void check(cudaError_t error) { STD_TORCH_CHECK(error == cudaSuccess, "the launch was refused"); }
};

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(cc_ds_shim, CPU, m) {
  m.impl("gated_fuse_", TORCH_BOX(&gated_fuse_<Shim>));
  m.impl("gated_fuse_backward", TORCH_BOX(&gated_fuse_backward<Shim>));
}

}  // namespace cc_ds

// The CUDA backend: torch's current device and stream for the kernels (kernels.h).
#include <torch/csrc/stable/accelerator.h>

#include "../binding.h"
#include "kernels.h"

namespace cc_ds {
namespace {

struct Cuda {
  static int64_t tiles(int64_t hidden, int64_t element_size) { return cuda::tiles(hidden, element_size); }

  template <class T>
  static void forward(const Forward<T>& f, int32_t device) {
    on_device(f, device, cuda::forward<T>);
  }

  template <class T>
  static void backward(const Backward<T>& g, int32_t device) {
    on_device(g, device, cuda::backward<T>);
  }

  template <class Arguments>
  static void on_device(const Arguments& arguments, int32_t device,
                        cudaError_t (*run)(const Arguments&, cudaStream_t)) {
    STD_TORCH_CHECK(arguments.layers <= cuda::kMaxLayers && arguments.batch <= cuda::kMaxBatch,
                    "gated_fuse: on CUDA at most ", cuda::kMaxLayers, " layers and ", cuda::kMaxBatch, " examples");
    const torch::stable::accelerator::DeviceGuard guard(device);
    check(cudaSetDevice(device));  // the CUDA runtime is linked statically: it has a current device of its own
    const auto stream = torch::stable::accelerator::getCurrentStream(device);
    check(run(arguments, static_cast<cudaStream_t>(stream.nativeHandle())));
  }

  static void check(cudaError_t error) {
    STD_TORCH_CHECK(error == cudaSuccess, "gated_fuse: CUDA: ", cudaGetErrorString(error));
  }
};

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(cc_ds, CUDA, m) {
  m.impl("gated_fuse_", TORCH_BOX(&gated_fuse_<Cuda>));
  m.impl("gated_fuse_backward", TORCH_BOX(&gated_fuse_backward<Cuda>));
}

}  // namespace cc_ds

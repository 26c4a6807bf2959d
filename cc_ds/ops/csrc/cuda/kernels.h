// The CUDA kernels' launchers (forward.cu, backward.cu): two launches each, on the given stream, nothing allocated, nothing waited for.
#pragma once

#include <cuda_runtime_api.h>

#include "../gate.h"

namespace cc_ds::cuda {

constexpr int64_t kMaxLayers = 1024;   // what shared memory is planned for
constexpr int64_t kMaxBatch = 65535;  // of a grid's second dimension

// How many tiles of H the forward's partial sums have.
int64_t tiles(int64_t hidden, int64_t element_size);

template <class T>
cudaError_t forward(const Forward<T>& f, cudaStream_t stream);

template <class T>
cudaError_t backward(const Backward<T>& g, cudaStream_t stream);

}  // namespace cc_ds::cuda

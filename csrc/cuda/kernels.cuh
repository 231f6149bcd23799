// The __global__ functions, under the names that binaries and tools show.
#pragma once

#include "instances.h"
#include "pack.cuh"
#include "recursion_forward.cuh"

namespace trmfast {
namespace gpu {

// One block per multiprocessor: it fills shared memory and may use all registers.
template <class I>
__global__ void __launch_bounds__(kThreads, 1)
    recursion_forward_kernel(const __grid_constant__ ForwardParams<typename I::T> p) {
  recursion_forward<I>(p);
}

template <class T> __global__ void __launch_bounds__(kThreads) pack_kernel(const __grid_constant__ PackParams<T> p) {
  pack_layer(p);
}

} // namespace gpu
} // namespace trmfast

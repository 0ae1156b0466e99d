// The kernels of a family of cells and their launch.
#pragma once

#include "cuda/device_block.cuh"
#include "cuda/persistent.h"

namespace seqkernels::persistent {
namespace {

template <class Cell, class E>
__global__ void __launch_bounds__(kThreads, 1) forward_kernel(const __grid_constant__ Launch launch) {
  DeviceBlock block;
  Forward<DeviceBlock, Cell, E>(block, launch, place_of(launch, static_cast<int>(blockIdx.x))).run();
}

template <class Cell, class E, bool kTall>
__global__ void __launch_bounds__(kThreads, 1) backward_kernel(const __grid_constant__ Launch launch) {
  DeviceBlock block;
  Backward<DeviceBlock, Cell, E, kTall>(block, launch, place_of(launch, static_cast<int>(blockIdx.x))).run();
}

template <class Cell, class E>
Kernel kernel_of(const Plan& plan) {
  if (!plan.backward) return &forward_kernel<Cell, E>;
  if constexpr (E::kProduct != Product::kExact) {
    if (plan.tall) return &backward_kernel<Cell, E, true>;
  }
  return &backward_kernel<Cell, E, false>;
}

template <class Cell>
Kernel kernel_of(const Plan& plan) {
  switch (plan.product) {
    case Product::kFloat16:
      return kernel_of<Cell, OfFloat16>(plan);
    case Product::kBFloat16:
      return kernel_of<Cell, OfBFloat16>(plan);
    case Product::kTf32x3:
      return kernel_of<Cell, OfTf32x3>(plan);
    default:
      return kernel_of<Cell, OfExact>(plan);
  }
}

}  // namespace
}  // namespace seqkernels::persistent

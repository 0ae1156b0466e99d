// What every launch needs: errors that name the kernel, and the device of its tensors as the current one.
#pragma once

#include <cuda_runtime_api.h>

#include <stdexcept>
#include <string>

namespace seqkernels::cuda {

// Raises what CUDA says as RuntimeError: "lstm_forward: no kernel image is available for execution on the device".
inline void check(cudaError_t error, const char* what) {
  if (error == cudaSuccess) return;
  cudaGetLastError();  // it is told here, and not again by the next launch
  throw std::runtime_error(std::string(what) + ": " + cudaGetErrorString(error) + " (" + cudaGetErrorName(error) + ")");
}

// After each launch, with the name of the kernel: arguments of the launch that do not fit. Errors inside of a kernel
// are found by a later call, as launches do not wait.
inline void check_launch(const char* kernel) { check(cudaGetLastError(), kernel); }

// Makes a device the current one, and the earlier one again at the end.
class DeviceGuard {
 public:
  explicit DeviceGuard(int device) {
    check(cudaGetDevice(&before_), "cudaGetDevice");
    changed_ = device != before_;
    if (changed_) check(cudaSetDevice(device), "cudaSetDevice");
  }
  ~DeviceGuard() {
    if (changed_) cudaSetDevice(before_);
  }
  DeviceGuard(const DeviceGuard&) = delete;
  DeviceGuard& operator=(const DeviceGuard&) = delete;

 private:
  int before_ = 0;
  bool changed_ = false;
};

}  // namespace seqkernels::cuda

// Where the kernels of a call run: the device of its tensors and the stream that the caller works on.
#pragma once

#include <vector>

#include "cuda/launch.h"
#include "python/tensor.h"

namespace seqkernels {

// Makes the device of `first` the current one as long as it lives. The `others`, which may be absent, have to lie there
// too; the first that does not is named in the error.
class Work {
 public:
  explicit Work(const Tensor& first, const std::vector<const Tensor*>& others = {})
      : device_(device_of(first, others)), stream_(static_cast<cudaStream_t>(first.stream())), guard_(device_) {}

  int device() const { return device_; }
  cudaStream_t stream() const { return stream_; }

 private:
  static int device_of(const Tensor& first, const std::vector<const Tensor*>& others) {
    for (const Tensor* other : others) other->expect_device_of(first);
    return first.device_id();
  }

  int device_;
  cudaStream_t stream_;
  cuda::DeviceGuard guard_;
};

}  // namespace seqkernels

#include "cuda/persistent.cuh"

namespace seqkernels::persistent {

Kernel lstm_kernel(const Plan& plan) { return kernel_of<Lstm<float>>(plan); }

}  // namespace seqkernels::persistent

#include "cuda/persistent.cuh"

namespace seqkernels::persistent {

Kernel gru_kernel(const Plan& plan) { return kernel_of<Gru<float>>(plan); }

}  // namespace seqkernels::persistent

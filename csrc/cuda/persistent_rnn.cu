#include "cuda/persistent.cuh"

namespace seqkernels::persistent {

Kernel rnn_kernel(const Plan& plan) { return kernel_of<RnnTanh<float>>(plan); }

}  // namespace seqkernels::persistent

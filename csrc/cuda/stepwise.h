// A recurrence of a launch for each step, on a device. The products between are the caller's.
#pragma once

#include <cuda_runtime_api.h>

#include "core/stepwise_job.h"

namespace seqkernels::stepwise {

// What comes before the steps of a call, and the pass of a step; on the current device.
void begin(Product product, const Begin& given, cudaStream_t stream);
void step(CellKind cell, Product product, bool backward, const Step& given, cudaStream_t stream);

// Has the kernel of step() loaded, which a launch must not do while its stream is captured.
void prepare(CellKind cell, Product product, bool backward);

}  // namespace seqkernels::stepwise

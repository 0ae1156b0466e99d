// Persistent recurrences on a device.
#pragma once

#include <cuda_runtime_api.h>

#include "core/persistent_job.h"

namespace seqkernels::persistent {

using Kernel = void (*)(Launch);

// The kernel of a plan; one source for each family of cells.
Kernel lstm_kernel(const Plan& plan);
Kernel gru_kernel(const Plan& plan);
Kernel rnn_kernel(const Plan& plan);

// What plans depend on, of the current device.
Device current_device();

// Launches a plan on the current device: at once, but for teams of a grid that do not all have a place, which take
// turns.
void run(const Launch& launch, cudaStream_t stream);

}  // namespace seqkernels::persistent

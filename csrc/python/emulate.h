// A launch of the persistent kernels of a family of cells, emulated. One source for each, as of the kernels themselves.
#pragma once

#include "core/persistent_job.h"

namespace seqkernels::persistent {

void emulate_lstm(const Launch& launch);
void emulate_gru(const Launch& launch);
void emulate_rnn(const Launch& launch);

}  // namespace seqkernels::persistent

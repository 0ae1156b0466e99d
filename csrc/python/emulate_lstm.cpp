#include "core/emulator.h"
#include "python/emulate.h"

namespace seqkernels::persistent {

void emulate_lstm(const Launch& launch) { emulate(launch, run_product<Lstm<float>>); }

}  // namespace seqkernels::persistent

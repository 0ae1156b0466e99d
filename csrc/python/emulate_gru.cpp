#include "core/emulator.h"
#include "python/emulate.h"

namespace seqkernels::persistent {

void emulate_gru(const Launch& launch) { emulate(launch, run_product<Gru<float>>); }

}  // namespace seqkernels::persistent

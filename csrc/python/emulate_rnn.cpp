#include "core/emulator.h"
#include "python/emulate.h"

namespace seqkernels::persistent {

void emulate_rnn(const Launch& launch) { emulate(launch, run_product<RnnTanh<float>>); }

}  // namespace seqkernels::persistent

// Asks the processor once which instruction sets it has and keeps a table of kernels for the best. Compiled without
// any instruction set flag.
#include <atomic>
#include <cstring>

#include "core/kernels.h"

namespace seqkernels {

#define SEQKERNELS_DECLARE(isa)                              \
  void recurrence_forward_##isa(const RecurrenceForward&);   \
  void recurrence_backward_##isa(const RecurrenceBackward&); \
  void step_forward_##isa(const CellStepForward&);           \
  void step_backward_##isa(const CellStepBackward&);         \
  void attention_forward_##isa(const AttentionForward&);     \
  void attention_backward_##isa(const AttentionBackward&);   \
  void attention_weights_##isa(const AttentionWeights&);     \
  void rotary_##isa(const Rotary&);                          \
  void activation_##isa(const char*, std::int64_t, const void*, void*, DType);
#define SEQKERNELS_TABLE(isa, name)                                                                                \
  Kernels {                                                                                                        \
    name, recurrence_forward_##isa, recurrence_backward_##isa, step_forward_##isa, step_backward_##isa,            \
        attention_forward_##isa, attention_backward_##isa, attention_weights_##isa, rotary_##isa, activation_##isa \
  }

#if defined(SEQKERNELS_HAS_baseline)
SEQKERNELS_DECLARE(baseline)
#else
SEQKERNELS_DECLARE(v2)
#if defined(SEQKERNELS_HAS_v3)
SEQKERNELS_DECLARE(v3)
#endif
SEQKERNELS_DECLARE(v4)
#endif

namespace {

struct Available {
  Kernels tables[4];
  int count = 0;

  Available() {
#if defined(SEQKERNELS_HAS_baseline)
    tables[count++] = SEQKERNELS_TABLE(baseline, "baseline");
#else
    __builtin_cpu_init();
    if (__builtin_cpu_supports("x86-64-v2")) tables[count++] = SEQKERNELS_TABLE(v2, "x86-64-v2");
#if defined(SEQKERNELS_HAS_v3)
    if (__builtin_cpu_supports("x86-64-v3")) tables[count++] = SEQKERNELS_TABLE(v3, "x86-64-v3");
#endif
    if (__builtin_cpu_supports("x86-64-v4")) tables[count++] = SEQKERNELS_TABLE(v4, "x86-64-v4");
#endif
  }
};

const Available& available() {
  static const Available instance;
  return instance;
}

std::atomic<const Kernels*> chosen{nullptr};

}  // namespace

int available_kernels(const Kernels** tables) {
  for (int i = 0; i < available().count; ++i) tables[i] = &available().tables[i];
  return available().count;
}

bool choose_kernels(const char* isa) {
  for (int i = available().count - 1; i >= 0; --i) {
    if (isa == nullptr || std::strcmp(available().tables[i].isa, isa) == 0) {
      chosen.store(&available().tables[i], std::memory_order_release);
      return true;
    }
  }
  return false;
}

const Kernels& kernels() {
  const Kernels* table = chosen.load(std::memory_order_acquire);
  if (table == nullptr) {
    choose_kernels(nullptr);
    table = chosen.load(std::memory_order_acquire);
  }
  return *table;
}

}  // namespace seqkernels

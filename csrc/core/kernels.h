// What one instruction set offers, and the choice among those that were built.
#pragma once

#include "core/attention.h"
#include "core/recurrence.h"
#include "core/rotary.h"
#include "core/step.h"

namespace seqkernels {

struct Kernels {
  const char* isa;
  void (*recurrence_forward)(const RecurrenceForward&);
  void (*recurrence_backward)(const RecurrenceBackward&);
  void (*step_forward)(const CellStepForward&);
  void (*step_backward)(const CellStepBackward&);
  void (*attention_forward)(const AttentionForward&);
  void (*attention_backward)(const AttentionBackward&);
  void (*attention_weights)(const AttentionWeights&);
  void (*rotary)(const Rotary&);
  void (*activation)(const char* name, std::int64_t count, const void* x, void* y, DType dtype);
};

const Kernels& kernels();                       // the ones in use
int available_kernels(const Kernels** tables);  // those this processor can run (at most 4), best last
bool choose_kernels(const char* isa);           // null: the best; false where `isa` cannot run here

}  // namespace seqkernels

// Names of the entry points of one instruction set: recurrence_forward_v3, for example.
#define SEQKERNELS_JOIN_(a, b) a##_##b
#define SEQKERNELS_JOIN(a, b) SEQKERNELS_JOIN_(a, b)
#define SEQKERNELS_ENTRY(name) SEQKERNELS_JOIN(name, SEQKERNELS_ISA)

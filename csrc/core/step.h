// One step of a cell for a few rows: parameters and entry points. The weights are read once, where they are: packing
// them, as the recurrence does, would cost more than the step.
//
// B batch, I input, H hidden; G, S, R gates, states and reserve of the cell; storage and compute as in recurrence.h.
#pragma once

#include "core/recurrence.h"

namespace seqkernels {

struct CellStep {
  std::int64_t batch, inputs, hidden;
  CellKind cell;
  DType dtype;
  int threads;
  const void* input;  // (B, I) storage, rows contiguous, as all matrices here
  std::int64_t input_row;
  const void* states[2];  // S of (B, H) storage; null for zeros
  std::int64_t state_rows[2];
  const void* weight_ih;  // (G*H, I) storage
  std::int64_t weight_ih_row;
  const void* weight_hh;  // (G*H, H) storage
  std::int64_t weight_hh_row;
};

struct CellStepForward : CellStep {
  const void *bias_ih, *bias_hh;  // (G*H) storage, or null
  void* next[2];                  // S of (B, H) storage, contiguous
  void* reserve;                  // (B, R, H) compute, or null
};

struct CellStepBackward : CellStep {
  const void* grads[2];  // S of (B, H) storage, of the next states; null for zeros
  std::int64_t grad_rows[2];
  const void* next[2];  // S of (B, H) storage, contiguous
  const void* reserve;  // (B, R, H) compute
  // Results in storage, contiguous; null where not wanted.
  void* grad_input;      // (B, I)
  void* grad_states[2];  // S of (B, H)
  void* grad_weight_ih;  // (G*H, I)
  void* grad_weight_hh;  // (G*H, H)
  void* grad_bias_ih;    // (G*H)
  void* grad_bias_hh;    // (G*H)
};

}  // namespace seqkernels

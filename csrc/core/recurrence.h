// The recurrence: parameters and entry points. Formulas in docs/recurrence.md, semantics in ops/recurrence.py.
//
// T time, B batch, H hidden; G, S, R gates, states and reserve of the cell. "Storage" is the dtype of the tensors,
// "compute" the dtype of the arithmetic: float32 for 16-bit storage, else the same.
#pragma once

#include "core/types.h"

namespace seqkernels {

enum class CellKind : int { kRnnTanh, kRnnRelu, kLstm, kGru };

// Bits of the control tensor.
constexpr std::uint8_t kReset = 1;
constexpr std::uint8_t kHold = 2;

struct RecurrenceForward {
  std::int64_t steps, batch, hidden;
  CellKind cell;
  DType dtype;
  bool reverse;
  bool save;                               // whether a backward pass may follow: all states and the reserve are stored
  int threads;                             // at most
  const void* gates_x;                     // (T, B, G*H) storage, last dimension contiguous
  std::int64_t gates_x_step, gates_x_row;  // its strides
  const void* weight_hh;                   // (G*H, H) storage, rows contiguous
  std::int64_t weight_row;
  const void* bias_hh;          // (G*H) storage, or null
  const void* state0;           // (S, B, H) storage, contiguous
  const std::uint8_t* control;  // (T, B) or null
  std::int64_t control_step, control_row;
  void* states;   // (S, T+1, B, H) storage; (1, T+1, B, H) without `save`
  void* state_n;  // (S, B, H) storage
  void* reserve;  // (T, B, R, H) compute, with `save`
};

struct RecurrenceBackward {
  std::int64_t steps, batch, hidden;
  CellKind cell;
  DType dtype;
  bool reverse;
  int threads;
  const void* grad_hidden;  // (T, B, H) storage, last dimension contiguous, or null
  std::int64_t grad_hidden_step, grad_hidden_row;
  const void* grad_cells;  // (T, B, H) storage, or null
  std::int64_t grad_cells_step, grad_cells_row;
  const void* grad_state_n;  // (S, B, H) storage, contiguous, or null
  const void* weight_hh;     // (G*H, H) storage, rows contiguous
  std::int64_t weight_row;
  const void* states;   // (S, T+1, B, H) storage
  const void* reserve;  // (T, B, R, H) compute
  const std::uint8_t* control;
  std::int64_t control_step, control_row;
  void* grad_gates_x;  // (T, B, G*H) compute
  void* grad_gates_h;  // (T, B, G*H) compute: of the recurrent part; grad_gates_x itself where it is the same
  void* grad_state0;   // (S, B, H) compute
};

}  // namespace seqkernels

// The recurrence: parameters and entry points. Formulas in docs/recurrence.md, semantics in ops/recurrence.py.
//
// T time, B batch, I input, H hidden; G, S, R gates, states and reserve of the cell. "Storage" is the dtype of the
// tensors, "compute" the dtype of the arithmetic: float32 for 16-bit storage, else the same.
#pragma once

#include "core/types.h"

namespace seqkernels {

enum class CellKind : int { kRnnTanh, kRnnRelu, kLstm, kGru };

// Bits of the control tensor.
constexpr std::uint8_t kReset = 1;
constexpr std::uint8_t kHold = 2;
constexpr std::uint8_t kDetach = 4;

// What both passes are given.
struct Recurrence {
  std::int64_t steps, batch, inputs, hidden;
  CellKind cell;
  DType dtype;
  bool reverse;
  bool project;       // whether `input` is to be multiplied by weight_ih; else it is the input part of the gates
  int threads;        // at most
  const void* input;  // (T, B, I) storage, last dimension contiguous; I = G*H without `project`
  std::int64_t input_step, input_row;  // its strides
  const void* weight_ih;               // (G*H, I) storage, rows contiguous; with `project`
  std::int64_t weight_ih_row;
  const void* weight_hh;  // (G*H, H) storage, rows contiguous
  std::int64_t weight_hh_row;
  const void* reset_state;  // (S, H) storage: the state after a reset; null for zero
  // What may be added to a cell, null where it is not. Storage, contiguous.
  const void* peephole;         // (3, H)
  const void* recurrent_mask;   // (B, H): factors of the hidden state in the recurrent product
  const void* norm_h;           // (G*H): gain of the layer norm of the recurrent product
  const void* norm_c;           // (2, H): gain and bias of the layer norm of c where it becomes h
  const float* zoneout;         // (S): probabilities
  const std::int64_t* seed;     // (): of the random zoneout; null for its expectation
  const std::uint8_t* control;  // (T, B) or null
  std::int64_t control_step, control_row;
  // A segment of a longer sequence: all its steps, for which threads are chosen, and the time of the first one here.
  std::int64_t whole, offset;
  std::int64_t every;  // steps between checkpoints; 0 for none
};

struct RecurrenceForward : Recurrence {
  bool save;              // whether a backward pass may follow: all states and the reserve are stored
  const void* bias_ih;    // (G*H) storage, or null
  const void* bias_hh;    // (G*H) storage, or null
  const void* state0[2];  // each (B, H) storage, contiguous, or null for zeros
  const void* carried;    // (S, B, H) compute: in place of state0, or null
  void* states;           // (S, T+1, B, H) storage; (1, T+1, B, H) without `save`
  void* state_n[2];       // each (B, H) storage
  void* reserve;          // (T, B, R, H) compute, with `save`
  void* checkpoints;      // (ceil(T / every), S, B, H) compute: the states before each segment
};

struct RecurrenceBackward : Recurrence {
  const void* grad_hidden;  // (T, B, H) storage, last dimension contiguous, or null
  std::int64_t grad_hidden_step, grad_hidden_row;
  const void* grad_cells;  // (T, B, H) storage, or null
  std::int64_t grad_cells_step, grad_cells_row;
  const void* grad_state_n;  // (S, B, H) storage, contiguous, or null
  const void* grad_gates;    // (T, B, G, H) storage, last dimension contiguous, or null; an RNN's gate is h itself
  std::int64_t grad_gates_step, grad_gates_row, grad_gates_gate;
  const void* states;       // (S, T+1, B, H) storage; with checkpoints (1, T+1, B, H)
  const void* reserve;      // (T, B, R, H) compute; null with checkpoints
  const void* checkpoints;  // as in the forward pass, which `every`, bias_ih and bias_hh make again from them
  const void *bias_ih, *bias_hh;
  const void* made;  // (T, B, H) storage: for an RNN with the expectation of zoneout h before it, else null
  // Results in compute dtype, contiguous; null where not wanted.
  void* grad_input;        // (T, B, I) storage
  void* grad_weight_ih;    // (G*H, I)
  void* grad_weight_hh;    // (G*H, H)
  void* grad_bias_ih;      // (G*H)
  void* grad_bias_hh;      // (G*H)
  void* grad_reset_state;  // (S, H)
  void* grad_peephole;     // (3, H)
  void* grad_norm_h;       // (G*H)
  void* grad_norm_c;       // (2, H)
  void* grad_state0;       // (S, B, H), never null
};

}  // namespace seqkernels

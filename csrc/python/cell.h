// The cells by name.
#pragma once

#include <string>

#include "core/recurrence.h"
#include "python/tensor.h"

namespace seqkernels {

struct CellShape {
  CellKind kind;
  std::int64_t gates, states, reserve;
};

inline CellShape cell_shape(const std::string& name) {
  if (name == "rnn_tanh") return {CellKind::kRnnTanh, 1, 1, 0};
  if (name == "rnn_relu") return {CellKind::kRnnRelu, 1, 1, 0};
  if (name == "lstm") return {CellKind::kLstm, 4, 2, 4};
  if (name == "gru") return {CellKind::kGru, 3, 1, 4};
  fail_argument("cell", "'rnn_tanh', 'rnn_relu', 'lstm' or 'gru'", "'" + name + "'");
}

}  // namespace seqkernels

// Attention: parameters and entry points. Formulas in docs/attention.md, semantics in ops/attention.py.
//
// B batch, Hq query heads, Hk key heads (query head h reads key head h / (Hq / Hk)), M queries, N keys, D head size,
// Dv value size. Strides count elements; the last dimension of q, k, v, out and their gradients is contiguous.
#pragma once

#include "core/types.h"

namespace seqkernels {

// A (B, heads, length, size) tensor; stride[3] is 1 except in masks and biases, where any stride may be 0.
struct Strided {
  const void* data;  // null where absent
  std::int64_t stride[4];
};
struct StridedOut {
  void* data;
  std::int64_t stride[4];
};

struct AttentionForward {
  std::int64_t batch, heads, kv_heads, queries, keys, head_size, value_size;
  DType dtype;
  double scale;
  bool is_causal;
  int threads;
  Strided q, k, v;
  Strided mask;    // bool, broadcast to (B, Hq, M, N) by strides of 0, or absent
  Strided bias;    // storage dtype, likewise
  StridedOut out;  // (B, Hq, M, Dv)
  void* lse;       // (B, Hq, M) compute, contiguous
};

struct AttentionBackward {
  std::int64_t batch, heads, kv_heads, queries, keys, head_size, value_size;
  DType dtype;
  double scale;
  bool is_causal;
  int threads;
  Strided grad_out, q, k, v, mask, bias;
  const void* lse;                    // (B, Hq, M) compute, contiguous
  const void* delta;                  // (B, Hq, M) compute, contiguous
  StridedOut grad_q, grad_k, grad_v;  // storage
  void* grad_bias;  // compute, contiguous in its own (possibly broadcast) shape, zero on entry; or null
  std::int64_t grad_bias_stride[4];  // strides of grad_bias, 0 where it is broadcast
  std::int64_t grad_bias_size;       // its number of elements
};

}  // namespace seqkernels

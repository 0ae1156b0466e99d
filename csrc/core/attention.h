// Attention: parameters and entry points. Formulas in docs/attention.md, semantics in seqkernels/scores.py.
//
// B batch, Hq query heads, Hk key heads (query head h reads key head h / (Hq / Hk)), M queries, N keys, D head size,
// Dv value size. Strides count elements; the last dimension of q, k, v, out and their gradients is contiguous.
//
// Documents behind one another: B is their number, M and N are those of the longest, and the batch stride of q, k, v,
// out and lse is 0.
//
// A block table: k and v are (pages, Hk, page_size, D), and key j of batch entry b is key j % page_size of page
// block_table[b][j / page_size]. N is what the pages of an entry hold, or that of the longest document.
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

// What the scores are made of, and their sizes.
struct AttentionScores {
  std::int64_t batch, heads, kv_heads, queries, keys, head_size, value_size;
  DType dtype;
  int threads;
  double scale, softcap;     // softcap 0: none
  std::int64_t left, right;  // keys on either side of the diagonal; negative: all
  bool bottom_right;
  Strided q, k, v;
  Strided mask;                                     // bool, broadcast to (B, Hq, M, N) by strides of 0, or absent
  Strided bias;                                     // likewise
  DType bias_dtype;                                 // dtype, or float32
  const std::int32_t* key_lengths;                  // (B,), or null
  const std::int32_t *cu_seqlens_q, *cu_seqlens_k;  // (B + 1,), or null; of keys in pages only lengths count
  const std::int32_t* block_table;                  // (B, pages of an entry), or null
  std::int64_t block_stride, page_size;             // of its batch; keys of a page
  const float* slopes;                              // or null
  std::int64_t slope_stride[2];                     // of batch and head
  const void* sink;                                 // (Hq,) compute, or null
  double dropout;                                   // probability
  std::uint64_t threshold;                          // random words of 32 bits below it drop a weight; 0: no dropout
  std::uint64_t seed;
  std::int64_t lse_stride[2];  // of batch and head; 1 along the queries
};

struct AttentionForward : AttentionScores {
  StridedOut out;  // (B, Hq, M, Dv)
  void* lse;       // (B, Hq, M) compute, or null
};

struct AttentionBackward : AttentionScores {
  Strided grad_out, out;
  const void* lse;
  const void* grad_lse;               // as lse, or null
  StridedOut grad_q, grad_k, grad_v;  // storage; null where not wanted
  void* grad_bias;  // compute, contiguous in its own (possibly broadcast) shape, zero on entry; or null
  std::int64_t grad_bias_stride[4];  // strides of grad_bias, 0 where it is broadcast
  std::int64_t grad_bias_size;       // its number of elements
};

struct AttentionWeights : AttentionScores {
  const void* lse;
  void* weights;  // compute, contiguous: (B, Hq, M, N), or their mean over the heads (B, M, N)
  bool average;
};

}  // namespace seqkernels

// The rotation of rotary position embeddings: parameters and entry point.
//
// x of up to three leading dimensions, D elements in a row; P pairs of them are turned, at most D / 2.
#pragma once

#include "core/attention.h"

namespace seqkernels {

struct Rotary {
  std::int64_t sizes[3];     // of the leading dimensions
  std::int64_t size, pairs;  // D, P
  DType dtype;
  int threads;
  bool interleaved;  // pairs are elements 0 and 1, 2 and 3, ...; else the first P elements with the next P
  bool inverse;      // by the negative angles
  Strided x;         // (..., D) storage
  Strided cos, sin;  // (..., P) compute, strides of 0 where they are broadcast
  StridedOut out;    // (..., D) storage, memory apart from that of the others
};

}  // namespace seqkernels

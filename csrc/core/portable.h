// Code that both a processor and a GPU run: the host's emulation of a kernel is the kernel's own text.
#pragma once

#include <cstdint>
#include <cstring>

#include "core/types.h"

#if defined(__CUDACC__)
#define SEQKERNELS_FN __device__ __forceinline__
#define SEQKERNELS_BOTH __host__ __device__ inline
#define SEQKERNELS_ONCE __device__ __noinline__  // what runs once need not be fast
#else
#define SEQKERNELS_FN inline
#define SEQKERNELS_BOTH inline
#define SEQKERNELS_ONCE inline
#endif

namespace seqkernels {
namespace {

template <class I>
SEQKERNELS_BOTH constexpr I least(I a, I b) {
  return a < b ? a : b;
}
template <class I>
SEQKERNELS_BOTH constexpr I most(I a, I b) {
  return a > b ? a : b;
}
template <class I>
SEQKERNELS_BOTH constexpr I parts_of(I whole, I part) {
  return (whole + part - 1) / part;
}
template <class I>
SEQKERNELS_BOTH constexpr I round_up(I x, I to) {
  return parts_of(x, to) * to;
}

}  // namespace
}  // namespace seqkernels

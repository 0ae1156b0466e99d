// The register-blocked micro-kernel that recurrence and attention share: C (+)= A B for a few rows of A and a few
// vectors of columns of B. The accumulators stay in registers over the whole depth; B is read once per block of rows.
#pragma once

#include "core/simd.h"

namespace seqkernels {
namespace {

#if defined(__AVX512F__) || defined(__aarch64__)
constexpr int kVectorRegisters = 32;
#else
constexpr int kVectorRegisters = 16;
#endif

constexpr int kMaxVectors = 4;  // columns of a block, in vectors
constexpr int kMaxRows = 8;

// Rows of a block of `vectors` vectors: as many as leave registers for B and one broadcast.
constexpr int block_rows(int vectors) {
  const int rows = (kVectorRegisters - vectors - 1) / vectors;
  return rows < 1 ? 1 : rows > kMaxRows ? kMaxRows : rows;
}

constexpr int min_of_constant(int a, int b) { return a < b ? a : b; }

// How A is addressed: row m at depth k is
//   kRows:        a[m][k]           pointers to contiguous rows
//   kTransposed:  a[0][k * step + m]
enum class Layout { kRows, kTransposed };

// c: (rows, vectors * lanes) with leading dimension ldc; b: (depth, vectors * lanes) with leading dimension ldb.
template <class T>
using MicroKernel = void (*)(std::int64_t depth, const T* const* a, std::int64_t step, const T* b, std::int64_t ldb,
                             T* c, std::int64_t ldc);

// Unrolled by hand of the compiler: accumulators that are indexed in a loop would live in memory at its edges.
template <class T, int kRows, int kVectors, Layout kLayout, bool kAdd>
void micro_kernel(std::int64_t depth, const T* const* a, std::int64_t step, const T* b, std::int64_t ldb, T* c,
                  std::int64_t ldc) {
  constexpr int n = kLanes<T>;
  // Few accumulators cannot hide the latency of the multiply-add: give them two turns. Not where the product is added
  // to something: sums of many rows in few blocks then do not depend on how many rows there are.
  constexpr int kTurns = kRows * kVectors <= 4 && !kAdd ? 2 : 1;
  Vec<T> sum[kTurns][kRows][kVectors];
  const T* row[kRows];
#pragma GCC unroll 8
  for (int m = 0; m < kRows; ++m) row[m] = kLayout == Layout::kRows ? a[m] : a[0] + m;
#pragma GCC unroll 8
  for (int m = 0; m < kRows; ++m) {
#pragma GCC unroll 8
    for (int v = 0; v < kVectors; ++v) {
#pragma GCC unroll 8
      for (int u = 0; u < kTurns; ++u) sum[u][m][v] = Vec<T>{};
    }
  }
  const std::int64_t stride = kLayout == Layout::kRows ? 1 : step;
  std::int64_t k = 0;
  for (; k + kTurns <= depth; k += kTurns) {
#pragma GCC unroll 8
    for (int u = 0; u < kTurns; ++u) {
      Vec<T> column[kVectors];
#pragma GCC unroll 8
      for (int v = 0; v < kVectors; ++v) column[v] = load_full(b + (k + u) * ldb + v * n);
#pragma GCC unroll 8
      for (int m = 0; m < kRows; ++m) {
        const T x = row[m][(k + u) * stride];
#pragma GCC unroll 8
        for (int v = 0; v < kVectors; ++v) sum[u][m][v] += column[v] * x;
      }
    }
  }
  for (; k < depth; ++k) {
#pragma GCC unroll 8
    for (int m = 0; m < kRows; ++m) {
      const T x = row[m][k * stride];
#pragma GCC unroll 8
      for (int v = 0; v < kVectors; ++v) sum[0][m][v] += load_full(b + k * ldb + v * n) * x;
    }
  }
#pragma GCC unroll 8
  for (int m = 0; m < kRows; ++m) {
#pragma GCC unroll 8
    for (int v = 0; v < kVectors; ++v) {
#pragma GCC unroll 8
      for (int u = 1; u < kTurns; ++u) sum[0][m][v] += sum[u][m][v];
      // Added last: a sum of sums is more exact than one long sum.
      if constexpr (kAdd) sum[0][m][v] += load_full(c + m * ldc + v * n);
      store_full(c + m * ldc + v * n, sum[0][m][v]);
    }
  }
}

template <class T, int kVectors, Layout kLayout, bool kAdd>
inline MicroKernel<T> micro_kernel_of_rows(int rows) {
  static constexpr MicroKernel<T> kTable[kMaxRows] = {
      micro_kernel<T, 1, kVectors, kLayout, kAdd>,
      micro_kernel<T, min_of_constant(2, block_rows(kVectors)), kVectors, kLayout, kAdd>,
      micro_kernel<T, min_of_constant(3, block_rows(kVectors)), kVectors, kLayout, kAdd>,
      micro_kernel<T, min_of_constant(4, block_rows(kVectors)), kVectors, kLayout, kAdd>,
      micro_kernel<T, min_of_constant(5, block_rows(kVectors)), kVectors, kLayout, kAdd>,
      micro_kernel<T, min_of_constant(6, block_rows(kVectors)), kVectors, kLayout, kAdd>,
      micro_kernel<T, min_of_constant(7, block_rows(kVectors)), kVectors, kLayout, kAdd>,
      micro_kernel<T, min_of_constant(8, block_rows(kVectors)), kVectors, kLayout, kAdd>,
  };
  return kTable[rows - 1];
}

// rows from 1 to block_rows(vectors), vectors from 1 to kMaxVectors.
template <class T, Layout kLayout, bool kAdd>
inline MicroKernel<T> micro_kernel_for(int rows, int vectors) {
  switch (vectors) {
    case 1:
      return micro_kernel_of_rows<T, 1, kLayout, kAdd>(rows);
    case 2:
      return micro_kernel_of_rows<T, 2, kLayout, kAdd>(rows);
    case 3:
      return micro_kernel_of_rows<T, 3, kLayout, kAdd>(rows);
    default:
      return micro_kernel_of_rows<T, 4, kLayout, kAdd>(rows);
  }
}

// Depth of a block of B that stays in the nearest cache while all rows pass by.
constexpr std::int64_t kPanelDepth = 256;

// c (rows, vectors * lanes) (+)= a b: `a` points to rows of `depth` elements, b is (depth, vectors * lanes). The rows
// go in blocks of even size: a last block of one row would cost as much as a full one.
template <class T>
inline void product(std::int64_t rows, std::int64_t depth, const T* const* a, const T* b, int vectors, bool add, T* c,
                    std::int64_t ldc) {
  if (rows == 0) return;
  const std::int64_t width = vectors * kLanes<T>;
  const std::int64_t blocks = ceil_div(rows, block_rows(vectors));
  const std::int64_t size = rows / blocks, larger = rows % blocks;
  for (std::int64_t k = 0; k == 0 || k < depth; k += kPanelDepth) {
    const std::int64_t part = min_of(depth - k, kPanelDepth);
    std::int64_t r = 0;
    for (std::int64_t i = 0; i < blocks; ++i) {
      const int count = static_cast<int>(size + (i < larger));
      const T* at[kMaxRows];
      for (int m = 0; m < count; ++m) at[m] = a[r + m] + k;
      const auto kernel = add || k > 0 ? micro_kernel_for<T, Layout::kRows, true>(count, vectors)
                                       : micro_kernel_for<T, Layout::kRows, false>(count, vectors);
      kernel(part, at, 1, b + k * width, width, c + r * ldc, ldc);
      r += count;
    }
  }
}

// c (count, vectors * lanes) (+)= strip^T panel: strip is (depth, count), panel (depth, vectors * lanes).
template <class T>
inline void strip_product(int count, std::int64_t depth, const T* strip, const T* panel, int vectors, bool add, T* c,
                          std::int64_t ldc) {
  (add ? micro_kernel_for<T, Layout::kTransposed, true>(count, vectors)
       : micro_kernel_for<T, Layout::kTransposed, false>(count, vectors))(depth, &strip, count, panel,
                                                                          vectors * kLanes<T>, c, ldc);
}

}  // namespace
}  // namespace seqkernels

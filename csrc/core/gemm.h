// The register-blocked micro-kernel that recurrence and attention share: C (+)= A B for a few rows of A and a few
// vectors of columns of B. The accumulators stay in registers over the whole depth; B is read once per block of rows.
#pragma once

#include "core/kernels.h"
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

// How A is addressed: row m at depth k is
//   kRows:        a[m][k]           pointers to contiguous rows
//   kTransposed:  a[0][k * step + m]
enum class Layout { kRows, kTransposed };

}  // namespace

// c: (rows, vectors * lanes) with leading dimension ldc; b: (depth, vectors * lanes) with leading dimension ldb.
template <class T>
using MicroKernel = void (*)(std::int64_t depth, const T* const* a, std::int64_t step, const T* b, std::int64_t ldb,
                             T* c, std::int64_t ldc);

// All for one type of operands, made in gemm.cpp for whoever multiplies: [whether the product is added to c]
// [vectors - 1][rows - 1], up to block_rows(vectors) rows.
template <class Kernel>
struct MicroKernels {
  Kernel rows[2][kMaxVectors][kMaxRows], transposed[2][kMaxVectors][kMaxRows];
};

extern const MicroKernels<MicroKernel<float>> SEQKERNELS_ENTRY(micro_kernels_float);
extern const MicroKernels<MicroKernel<double>> SEQKERNELS_ENTRY(micro_kernels_double);

namespace {

template <class Kernel>
inline Kernel one_of(const MicroKernels<Kernel>& all, Layout layout, bool add, int rows, int vectors) {
  return (layout == Layout::kRows ? all.rows : all.transposed)[add][vectors - 1][rows - 1];
}

template <class T>
inline MicroKernel<T> micro_kernel_for(Layout layout, bool add, int rows, int vectors) {
  if constexpr (sizeof(T) == sizeof(float)) {
    return one_of(SEQKERNELS_ENTRY(micro_kernels_float), layout, add, rows, vectors);
  } else {
    return one_of(SEQKERNELS_ENTRY(micro_kernels_double), layout, add, rows, vectors);
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
      const auto kernel = micro_kernel_for<T>(Layout::kRows, add || k > 0, count, vectors);
      kernel(part, at, 1, b + k * width, width, c + r * ldc, ldc);
      r += count;
    }
  }
}

// c (count, vectors * lanes) (+)= strip^T panel: strip is (depth, count), panel (depth, vectors * lanes).
template <class T>
inline void strip_product(int count, std::int64_t depth, const T* strip, const T* panel, int vectors, bool add, T* c,
                          std::int64_t ldc) {
  micro_kernel_for<T>(Layout::kTransposed, add, count, vectors)(depth, &strip, count, panel, vectors * kLanes<T>, c,
                                                                ldc);
}

}  // namespace
}  // namespace seqkernels

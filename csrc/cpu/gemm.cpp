// The micro-kernels of gemm.h and gemm16.h, and the tables of them.
#include "core/gemm.h"

#include <utility>

#include "core/gemm16.h"

namespace seqkernels {
namespace {

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

#if defined(SEQKERNELS_DOT16)
template <int kRows, int kVectors, Layout kLayout, bool kAdd>
__attribute__((target("avx512bf16"))) void micro_kernel16(std::int64_t depth, const BFloat16* const* a,
                                                          std::int64_t step, const BFloat16* b, std::int64_t ldb,
                                                          float* c, std::int64_t ldc) {
  constexpr int n = kLanes<float>;
  constexpr int kTurns = kRows * kVectors <= 4 && !kAdd ? 2 : 1;
  __m512 sum[kTurns][kRows][kVectors];
  const BFloat16* row[kRows];
#pragma GCC unroll 8
  for (int m = 0; m < kRows; ++m) row[m] = kLayout == Layout::kRows ? a[m] : a[0] + 2 * m;
#pragma GCC unroll 8
  for (int m = 0; m < kRows; ++m) {
#pragma GCC unroll 8
    for (int v = 0; v < kVectors; ++v) {
#pragma GCC unroll 8
      for (int u = 0; u < kTurns; ++u) sum[u][m][v] = _mm512_setzero_ps();
    }
  }
  const std::int64_t stride = kLayout == Layout::kRows ? 2 : 2 * step;
  const std::int64_t pairs = kLayout == Layout::kRows ? depth / 2 : (depth + 1) / 2;
  std::int64_t k = 0;
  for (; k + kTurns <= pairs; k += kTurns) {
#pragma GCC unroll 8
    for (int u = 0; u < kTurns; ++u) {
      __m512bh column[kVectors];
#pragma GCC unroll 8
      for (int v = 0; v < kVectors; ++v) {
        column[v] = (__m512bh)_mm512_loadu_si512(b + ((k + u) * ldb + v * n) * 2);
      }
#pragma GCC unroll 8
      for (int m = 0; m < kRows; ++m) {
        const __m512bh x = (__m512bh)_mm512_set1_epi32(static_cast<int>(load_pair(row[m] + (k + u) * stride)));
#pragma GCC unroll 8
        for (int v = 0; v < kVectors; ++v) sum[u][m][v] = _mm512_dpbf16_ps(sum[u][m][v], x, column[v]);
      }
    }
  }
  for (; k < (depth + 1) / 2; ++k) {
#pragma GCC unroll 8
    for (int m = 0; m < kRows; ++m) {
      // A last number without a partner: what lies behind it is none of this row's.
      const std::uint32_t pair = k < pairs ? load_pair(row[m] + k * stride) : row[m][k * stride].bits;
      const __m512bh x = (__m512bh)_mm512_set1_epi32(static_cast<int>(pair));
#pragma GCC unroll 8
      for (int v = 0; v < kVectors; ++v) {
        const __m512bh column = (__m512bh)_mm512_loadu_si512(b + (k * ldb + v * n) * 2);
        sum[0][m][v] = _mm512_dpbf16_ps(sum[0][m][v], x, column);
      }
    }
  }
#pragma GCC unroll 8
  for (int m = 0; m < kRows; ++m) {
#pragma GCC unroll 8
    for (int v = 0; v < kVectors; ++v) {
#pragma GCC unroll 8
      for (int u = 1; u < kTurns; ++u) sum[0][m][v] += sum[u][m][v];
      if constexpr (kAdd) sum[0][m][v] += _mm512_loadu_ps(c + m * ldc + v * n);
      _mm512_storeu_ps(c + m * ldc + v * n, sum[0][m][v]);
    }
  }
}

#endif

// Calls f(Count<1>()) to f(Count<kMost>()).
template <int kMost, class F>
constexpr void for_counts(const F& f) {
  [&]<int... kBefore>(std::integer_sequence<int, kBefore...>) {
    (f(Count<kBefore + 1>()), ...);
  }(std::make_integer_sequence<int, kMost>());
}

template <class Of>
constexpr auto all_of() {
  MicroKernels<typename Of::Kernel> all{};
  for_counts<kMaxVectors>([&](auto vectors) {
    for_counts<block_rows(decltype(vectors)::kValue)>([&](auto rows) {
      constexpr int kVectors = decltype(vectors)::kValue, kRows = decltype(rows)::kValue;
      all.rows[false][kVectors - 1][kRows - 1] = Of::template kKernel<kRows, kVectors, Layout::kRows, false>;
      all.rows[true][kVectors - 1][kRows - 1] = Of::template kKernel<kRows, kVectors, Layout::kRows, true>;
      all.transposed[false][kVectors - 1][kRows - 1] =
          Of::template kKernel<kRows, kVectors, Layout::kTransposed, false>;
      all.transposed[true][kVectors - 1][kRows - 1] = Of::template kKernel<kRows, kVectors, Layout::kTransposed, true>;
    });
  });
  return all;
}

template <class T>
struct Of {
  using Kernel = MicroKernel<T>;
  template <int kRows, int kVectors, Layout kLayout, bool kAdd>
  static constexpr Kernel kKernel = micro_kernel<T, kRows, kVectors, kLayout, kAdd>;
};
#if defined(SEQKERNELS_DOT16)
struct OfPairs {
  using Kernel = MicroKernel16;
  template <int kRows, int kVectors, Layout kLayout, bool kAdd>
  static constexpr Kernel kKernel = micro_kernel16<kRows, kVectors, kLayout, kAdd>;
};
#endif

}  // namespace

constinit const MicroKernels<MicroKernel<float>> SEQKERNELS_ENTRY(micro_kernels_float) = all_of<Of<float>>();
constinit const MicroKernels<MicroKernel<double>> SEQKERNELS_ENTRY(micro_kernels_double) = all_of<Of<double>>();
#if defined(SEQKERNELS_DOT16)
constinit const MicroKernels<MicroKernel16> SEQKERNELS_ENTRY(micro_kernels_pairs) = all_of<OfPairs>();
#endif

}  // namespace seqkernels

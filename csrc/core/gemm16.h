// Products of bfloat16 numbers with float32 sums, by the instruction for them (AVX512_BF16): twice the arithmetic and
// half the memory traffic of float32. Operands are packed in pairs along the depth, (k, k + 1) beside each other, as
// the instruction takes them.
#pragma once

#include "core/gemm.h"
#include "core/recurrence_pack.h"

#if defined(__AVX512F__) && defined(__GNUC__)
#define SEQKERNELS_DOT16 1

namespace seqkernels {
namespace {

// Asked at run time: x86-64-v4 does not promise the instruction.
inline bool has_dot16() { return __builtin_cpu_supports("avx512bf16"); }

inline std::uint32_t load_pair(const BFloat16* p) {
  std::uint32_t pair;
  std::memcpy(&pair, p, sizeof(pair));
  return pair;
}

}  // namespace

// As MicroKernel. Layout::kRows: a[m] points to a row of `depth` numbers; kTransposed: a[0][(k * step + m) * 2] to
// pairs. b: (pairs of the depth, vectors * lanes) pairs.
using MicroKernel16 = void (*)(std::int64_t depth, const BFloat16* const* a, std::int64_t step, const BFloat16* b,
                               std::int64_t ldb, float* c, std::int64_t ldc);

extern const MicroKernels<MicroKernel16> SEQKERNELS_ENTRY(micro_kernels_pairs);

namespace {

inline MicroKernel16 micro_kernel16_for(Layout layout, bool add, int rows, int vectors) {
  return one_of(SEQKERNELS_ENTRY(micro_kernels_pairs), layout, add, rows, vectors);
}

// As product.
inline void product(std::int64_t rows, std::int64_t depth, const BFloat16* const* a, const BFloat16* b, int vectors,
                    bool add, float* c, std::int64_t ldc) {
  if (rows == 0) return;
  const std::int64_t width = vectors * kLanes<float>;
  const std::int64_t blocks = ceil_div(rows, block_rows(vectors));
  const std::int64_t size = rows / blocks, larger = rows % blocks;
  for (std::int64_t k = 0; k == 0 || k < depth; k += 2 * kPanelDepth) {
    const std::int64_t part = min_of(depth - k, 2 * kPanelDepth);
    std::int64_t r = 0;
    for (std::int64_t i = 0; i < blocks; ++i) {
      const int count = static_cast<int>(size + (i < larger));
      const BFloat16* at[kMaxRows];
      for (int m = 0; m < count; ++m) at[m] = a[r + m] + k;
      const auto kernel = micro_kernel16_for(Layout::kRows, add || k > 0, count, vectors);
      kernel(part, at, 1, b + k * width, width, c + r * ldc, ldc);
      r += count;
    }
  }
}

// As strip_product.
inline void strip_product(int count, std::int64_t depth, const BFloat16* strip, const BFloat16* panel, int vectors,
                          bool add, float* c, std::int64_t ldc) {
  micro_kernel16_for(Layout::kTransposed, add, count, vectors)(depth, &strip, count, panel, vectors * kLanes<float>, c,
                                                               ldc);
}

// The first `count` numbers, up to two for each lane; the others are 0.
inline Vec<float> load_pairs(const BFloat16* p, std::int64_t count) {
  const auto lanes = static_cast<__mmask32>(count >= 32 ? ~0u : (1u << count) - 1);
  return bit_cast<Vec<float>>(_mm512_maskz_loadu_epi16(lanes, p));
}

// panel[k / 2][gate][unit][k % 2]; otherwise as in recurrence_pack.h.
inline void pack_group(const BFloat16* weight, std::int64_t row, std::int64_t depth, std::int64_t hidden, int gates,
                       std::int64_t unit, int vectors, BFloat16* panel) {
  constexpr int n = kLanes<float>;
  const std::int64_t width = gates * vectors * n;
  for (int g = 0; g < gates; ++g) {
    for (int u = 0; u < vectors; ++u) {
      const std::int64_t first = unit + u * n;
      BFloat16* column = panel + (g * vectors + u) * n * 2;
      for (std::int64_t k = 0; k < depth; k += 2 * n) {
        Vec<float> block[n];
        for (int i = 0; i < n; ++i) {
          block[i] =
              first + i < hidden ? load_pairs(weight + (g * hidden + first + i) * row + k, depth - k) : Vec<float>{};
        }
        transpose<float>(block);
        for (std::int64_t i = 0; i < n && k + 2 * i < depth; ++i) {
          std::memcpy(column + (k / 2 + i) * width * 2, &block[i], sizeof(block[i]));
        }
      }
    }
  }
}

// panel[k / 2][column][k % 2].
inline void pack_rows(const BFloat16* const* rows, std::int64_t depth, std::int64_t columns, std::int64_t column,
                      int vectors, BFloat16* panel) {
  constexpr int n = kLanes<float>;
  const auto words = [&](std::int64_t k, std::int64_t at) {
    if (k >= depth || rows[k] == nullptr || at >= columns) return WordVec{};
    const std::int64_t left = columns - at;
    const auto lanes = static_cast<__mmask16>(left >= n ? ~0u : (1u << left) - 1);
    return bit_cast<WordVec>(_mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(lanes, rows[k] + at)));
  };
  for (std::int64_t k = 0; k < depth; k += 2) {
    for (int v = 0; v < vectors; ++v, panel += 2 * n) {
      const WordVec pairs = words(k, column + v * n) | (words(k + 1, column + v * n) << 16);
      std::memcpy(panel, &pairs, sizeof(pairs));
    }
  }
}

// strip[k / 2][i][k % 2].
inline void pack_strip(const BFloat16* rows, std::int64_t stride, std::int64_t depth, int count, BFloat16* strip) {
  for (std::int64_t k = 0; k < depth; k += 2, rows += 2 * stride) {
    for (int i = 0; i < count; ++i, strip += 2) {
      strip[0] = rows[i];
      strip[1] = k + 1 < depth ? rows[stride + i] : BFloat16{0};
    }
  }
}

}  // namespace
}  // namespace seqkernels
#endif

// The operands of attention's products by the instruction for bfloat16 (core/gemm16.h), under the names that
// attention_tile.h has for float: numbers in pairs along the depth, sums in float32.
#pragma once

#include "core/attention_tile.h"
#include "core/gemm16.h"

namespace seqkernels {
namespace {

// Numbers of an operand's row of `size`, and of `rows` rows that are the depth.
template <class E>
constexpr std::int64_t padded_depth(std::int64_t size) {
  return sizeof(E) == 2 ? round_up(size, 2) : size;
}

#if defined(SEQKERNELS_DOT16)

// Whether products of bfloat16 numbers are taken as such. A negative factor would make the largest score the smallest
// product.
inline bool multiplies_bfloat16(const AttentionScores& p) {
  return p.dtype == DType::kBFloat16 && p.scale > 0.0 && has_dot16();
}

inline const BFloat16* bfloats(const void* p) { return static_cast<const BFloat16*>(p); }

// to (rows, ld) = from (rows, size), the rest of each row 0; the factor is left to the scores.
inline void read_left(DType, const void* from, std::int64_t stride, std::int64_t rows, std::int64_t size, float,
                      BFloat16* to, std::int64_t ld) {
  for (std::int64_t r = 0; r < rows; ++r) {
    for (std::int64_t i = 0; i < ld; i += 32) {
      const Vec<float> x = size > i ? load_pairs(bfloats(from) + r * stride + i, size - i) : Vec<float>{};
      const std::int64_t left = ld - i;
      const auto lanes = static_cast<__mmask32>(left >= 32 ? ~0u : (1u << left) - 1);
      _mm512_mask_storeu_epi16(to + r * ld + i, lanes, bit_cast<__m512i>(x));
    }
  }
}

// As for float, with panels of [pairs of the depth][vectors][lanes][2].
inline void pack_panels(DType, const void* from, std::int64_t stride, std::int64_t rows, std::int64_t size,
                        BFloat16* to) {
  constexpr int n = kLanes<float>;
  const std::int64_t pairs = ceil_div(size, 2);
  for (std::int64_t first = 0; first < rows; first += kPanel<float>, to += kPanel<float> * pairs * 2) {
    const std::int64_t columns = round_up(min_of<std::int64_t>(kPanel<float>, rows - first), n);
    for (std::int64_t column = 0; column < columns; column += n) {
      const std::int64_t row = first + column;
      for (std::int64_t d = 0; d < pairs; d += n) {
        Vec<float> block[n];
        for (int i = 0; i < n; ++i) {
          block[i] =
              row + i < rows ? load_pairs(bfloats(from) + (row + i) * stride + 2 * d, size - 2 * d) : Vec<float>{};
        }
        transpose<float>(block);
        const std::int64_t deep = min_of<std::int64_t>(n, pairs - d);
        for (std::int64_t i = 0; i < deep; ++i) {
          std::memcpy(to + ((d + i) * columns + column) * 2, &block[i], sizeof(block[i]));
        }
      }
    }
  }
}

// Rows that are the depth of a product, as its right operand: [pairs of rows][ld][2]. Lanes behind `size` are 0. What
// is not finite becomes 0 where `cleaned`.
inline void pack_depth(DType, const void* from, std::int64_t stride, std::int64_t rows, std::int64_t size, BFloat16* to,
                       std::int64_t ld, bool cleaned) {
  constexpr int n = kLanes<float>;
  const auto words = [&](std::int64_t row, std::int64_t i) {
    if (row >= rows || i >= size) return WordVec{};
    const std::int64_t left = size - i;
    const auto lanes = static_cast<__mmask16>(left >= n ? ~0u : (1u << left) - 1);
    const WordVec x =
        bit_cast<WordVec>(_mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(lanes, bfloats(from) + row * stride + i)));
    return cleaned ? ((x & 0x7f80u) == 0x7f80u ? WordVec{} : x) : x;
  };
  for (std::int64_t row = 0; row < rows; row += 2) {
    for (std::int64_t i = 0; i < ld; i += n) {
      const WordVec pairs = words(row, i) | (words(row + 1, i) << 16);
      std::memcpy(to + (row * ld + 2 * i), &pairs, sizeof(pairs));
    }
  }
}

// As for float; `a` is (rows, depth), or [pairs of the depth][rows][2], b [pairs of the depth][vectors * lanes][2].
// Ranges begin at a pair.
template <class T, Layout kLayout, bool kAdd, class RangeOf>
inline void product(std::int64_t rows, std::int64_t vectors, const BFloat16* a, std::int64_t lda, const BFloat16* b,
                    std::int64_t ldb, float* c, std::int64_t ldc, const RangeOf& range_of) {
  constexpr int n = kLanes<float>;
  const std::int64_t blocks = ceil_div(vectors, kPanelVectors);
  for (std::int64_t block = 0; block < blocks; ++block) {
    const std::int64_t begin = vectors * block / blocks, end = vectors * (block + 1) / blocks;
    const int width = static_cast<int>(end - begin), step = block_rows(width);
    for (std::int64_t m = 0; m < rows; m += step) {
      const int count = static_cast<int>(min_of<std::int64_t>(step, rows - m));
      const Range range = range_of(m, count);
      if (range.begin >= range.end) continue;
      float* to = c + m * ldc + begin * n;
      for (std::int64_t first = range.begin; first < range.end; first += 2 * kChain) {
        const BFloat16* pointers[kMaxRows];
        if constexpr (kLayout == Layout::kRows) {
          for (int i = 0; i < count; ++i) pointers[i] = a + (m + i) * lda + first;
        } else {
          pointers[0] = a + first * lda + 2 * m;
        }
        const auto kernel = first == range.begin ? micro_kernel16_for<kLayout, kAdd>(count, width)
                                                 : micro_kernel16_for<kLayout, true>(count, width);
        kernel(min_of(2 * kChain, range.end - first), pointers, lda, b + first * ldb + 2 * begin * n, ldb, to, ldc);
      }
    }
  }
}

// Weights as the left operand of the product with the values. Numbers up to a whole vector are written.
__attribute__((target("avx512bf16"))) inline void narrow_row(const float* from, std::int64_t begin, std::int64_t end,
                                                             BFloat16* to) {
  for (std::int64_t j = begin; j < end; j += 16) {
    const __m256bh x = _mm512_cvtneps_pbh(_mm512_loadu_ps(from + j));
    std::memcpy(to + j, &x, sizeof(x));
  }
}

// [pairs of rows][columns][2] from rows (rows, ld) of float. Columns go from a whole vector on; a row without a partner
// gets 0.
__attribute__((target("avx512bf16"))) inline void pair_rows(const float* from, std::int64_t ld, std::int64_t rows,
                                                            std::int64_t begin, std::int64_t end, BFloat16* to,
                                                            std::int64_t columns) {
  const auto words = [](const float* p) __attribute__((target("avx512bf16"))) {
    const __m256bh x = _mm512_cvtneps_pbh(_mm512_loadu_ps(p));
    return _mm512_cvtepu16_epi32(bit_cast<__m256i>(x));
  };
  for (std::int64_t r = 0; r < rows; r += 2) {
    for (std::int64_t j = begin; j < end; j += 16) {
      __m512i pairs = words(from + r * ld + j);
      if (r + 1 < rows) pairs = _mm512_or_si512(pairs, _mm512_slli_epi32(words(from + (r + 1) * ld + j), 16));
      _mm512_storeu_si512(to + (r * columns + 2 * j), pairs);
    }
  }
}

#endif

}  // namespace
}  // namespace seqkernels

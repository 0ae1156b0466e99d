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
        const auto kernel = micro_kernel16_for(kLayout, kAdd || first > range.begin, count, width);
        kernel(min_of(2 * kChain, range.end - first), pointers, lda, b + first * ldb + 2 * begin * n, ldb, to, ldc);
      }
    }
  }
}

// As for float: s = a (kRows, lda), padded to 32 numbers with 0, times rows as they lie.
template <int kRows>
__attribute__((target("avx512bf16"))) void dot_rows16(const BFloat16* key, std::int64_t stride, std::int64_t keys,
                                                      std::int64_t depth, const BFloat16* a, std::int64_t lda, float* s,
                                                      std::int64_t lds) {
  constexpr int n = kLanes<float>, kKeys = n / kRows;
  const std::int64_t whole = depth / (2 * n) * (2 * n), ahead = fetch_distance<BFloat16>(stride, depth);
  const Side<float, kRows> side(keys);
  for (std::int64_t j = 0; j < side.length; j += side.kEach) {
    const BFloat16* row[kKeys];
    __m512 sum[n];
#pragma GCC unroll 16
    for (int i = 0; i < kKeys; ++i) row[i] = key + min_of(side.key(j, i), keys - 1) * stride;
#pragma GCC unroll 16
    for (int i = 0; i < n; ++i) sum[i] = _mm512_setzero_ps();
    const auto add = [&](std::int64_t d, __mmask32 lanes) __attribute__((target("avx512bf16"), always_inline)) {
      __m512bh x[kKeys];
#pragma GCC unroll 16
      for (int i = 0; i < kKeys; ++i) {
        fetch(row[i] + d + ahead);
        x[i] = (__m512bh)(lanes == ~0u ? _mm512_loadu_si512(row[i] + d) : _mm512_maskz_loadu_epi16(lanes, row[i] + d));
      }
#pragma GCC unroll 16
      for (int r = 0; r < kRows; ++r) {
        const __m512bh y = (__m512bh)_mm512_loadu_si512(a + r * lda + d);
#pragma GCC unroll 16
        for (int i = 0; i < kKeys; ++i) sum[r * kKeys + i] = _mm512_dpbf16_ps(sum[r * kKeys + i], x[i], y);
      }
    };
    for (std::int64_t d = 0; d < whole; d += 2 * n) add(d, ~0u);
    if (whole < depth) add(whole, (1u << (depth - whole)) - 1);
    Vec<float> all[n];
#pragma GCC unroll 16
    for (int i = 0; i < n; ++i) all[i] = bit_cast<Vec<float>>(sum[i]);
    side.write(reduce_each<float>(all), j, s, lds);
  }
}

inline void multiply_rows(DType, const void* from, std::int64_t stride, std::int64_t keys, std::int64_t depth,
                          const BFloat16* a, std::int64_t lda, float* s, std::int64_t lds, std::int64_t rows) {
  with_rows<float>(rows, [&](auto count) {
    constexpr int kRows = decltype(count)::kValue;
    for (std::int64_t r = 0; r < rows; r += kRows) {
      dot_rows16<kRows>(bfloats(from), stride, keys, depth, a + r * lda, lda, s + r * lds, lds);
    }
  });
}

// As add_block, in kChunks times 32 numbers; of one chunk only the first `left` numbers are there. Two keys are a pair.
template <int kRows, int kChunks>
__attribute__((target("avx512bf16"))) void add_block16(const BFloat16* value, std::int64_t stride, Range part,
                                                       std::int64_t length, std::int64_t keys, std::int64_t left,
                                                       const BFloat16* weights, std::int64_t ldw, float* out,
                                                       std::int64_t ldo, std::int64_t ahead) {
  constexpr int n = kLanes<float>;
  const __mmask32 lanes = left >= 2 * n ? ~0u : (1u << left) - 1;
  __m512 low[kRows][kChunks], high[kRows][kChunks];
#pragma GCC unroll 4
  for (int c = 0; c < kChunks; ++c) {
#pragma GCC unroll 2
    for (int r = 0; r < kRows; ++r) low[r][c] = high[r][c] = _mm512_setzero_ps();
  }
  const auto read = [&](const BFloat16* at) __attribute__((target("avx512bf16"))) {
    return kChunks == 1 ? _mm512_maskz_loadu_epi16(lanes, at) : _mm512_loadu_si512(at);
  };
  for_streams(keys, 2, part, length, [&](std::int64_t j) __attribute__((target("avx512bf16"))) {
    const BFloat16* at = value + j * stride;
    const bool pair = j + 1 < keys;
    const BFloat16* next = pair ? at + stride : at;
    __m512bh weight[kRows];
#pragma GCC unroll 2
    for (int r = 0; r < kRows; ++r) {
      weight[r] = (__m512bh)_mm512_set1_epi32(static_cast<int>(load_pair(weights + r * ldw + j)));
    }
#pragma GCC unroll 4
    for (int c = 0; c < kChunks; ++c) {
      if (ahead != 0) {
        fetch(at + 2 * n * c + ahead);
        fetch(next + 2 * n * c + ahead);
      }
      const __m512i x = read(at + 2 * n * c);
      const __m512i y = _mm512_maskz_mov_epi16(pair ? ~0u : 0, read(next + 2 * n * c));
      const __m512bh first = (__m512bh)_mm512_unpacklo_epi16(x, y), second = (__m512bh)_mm512_unpackhi_epi16(x, y);
#pragma GCC unroll 2
      for (int r = 0; r < kRows; ++r) {
        low[r][c] = _mm512_dpbf16_ps(low[r][c], weight[r], first);
        high[r][c] = _mm512_dpbf16_ps(high[r][c], weight[r], second);
      }
    }
  });
  // Numbers 0 to 3 of each 8 are in one sum, 4 to 7 in the other.
  const __m512i front = _mm512_setr_epi32(0, 1, 2, 3, 16, 17, 18, 19, 4, 5, 6, 7, 20, 21, 22, 23);
  const __m512i back = _mm512_setr_epi32(8, 9, 10, 11, 24, 25, 26, 27, 12, 13, 14, 15, 28, 29, 30, 31);
#pragma GCC unroll 2
  for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 4
    for (int c = 0; c < kChunks; ++c) {
      float* to = out + r * ldo + 2 * n * c;
      _mm512_storeu_ps(to, _mm512_loadu_ps(to) + _mm512_permutex2var_ps(low[r][c], front, high[r][c]));
      if (kChunks == 1 && left <= n) continue;
      _mm512_storeu_ps(to + n, _mm512_loadu_ps(to + n) + _mm512_permutex2var_ps(low[r][c], back, high[r][c]));
    }
  }
}

// As for float.
inline void read_finite(DType, const void* from, std::int64_t stride, std::int64_t rows, std::int64_t size,
                        BFloat16* to, std::int64_t ld) {
  for (std::int64_t r = 0; r < rows; ++r) {
    for (std::int64_t i = 0; i < size; ++i) {
      const BFloat16 x = bfloats(from)[r * stride + i];
      to[r * ld + i].bits = (x.bits & 0x7f80) == 0x7f80 ? 0 : x.bits;
    }
  }
}

// As for float; weights are 0 behind the last key of an odd number.
inline void add_rows(const BFloat16* value, std::int64_t stride, std::int64_t keys, std::int64_t size,
                     std::int64_t rows, const BFloat16* weights, std::int64_t ldw, float* out, std::int64_t ldo) {
  constexpr std::int64_t kNear = 16;
  const std::int64_t length = stream_length(keys, 2), ahead = fetch_distance<BFloat16>(stride, size);
  for (std::int64_t first = 0; first < length; first += kNear) {
    const Range part{first, min_of(length, first + kNear)};
    for_columns<2 * kLanes<float>, 4>(size, [&](auto chunks, std::int64_t column) {
      constexpr int kChunks = decltype(chunks)::kValue;
      for (std::int64_t r = 0; r < rows; r += 2) {
        const auto add = r + 1 < rows ? add_block16<2, kChunks> : add_block16<1, kChunks>;
        add(value + column, stride, part, length, keys, size - column, weights + r * ldw, ldw, out + r * ldo + column,
            ldo, r == 0 ? ahead : 0);
      }
    });
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

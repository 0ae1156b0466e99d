// Packed operands of the recurrence's products. A panel holds a few vectors of columns for every depth,
// panel[k][column], so that the micro-kernel reads it from front to back.
//
// The recurrence groups hidden units: the columns of a group are all gates of its units side by side,
// [gate][unit], so that the cell finds them in one tile.
#pragma once

#include "core/simd.h"

namespace seqkernels {
namespace {

// Depth of a packed operand: 16-bit ones come in pairs.
template <class O>
constexpr std::int64_t packed_depth(std::int64_t depth) {
  return sizeof(O) == 2 ? (depth + 1) / 2 * 2 : depth;
}

constexpr int kPackAhead = 2;  // blocks that packing asks for in advance

// panel[k][gate][unit] = weight[gate * H + unit, k] for k below `depth` and the `vectors` vectors of units from `unit`;
// units beyond H as 0.
template <class S, class T = Compute<S>>
inline void pack_group(const S* weight, std::int64_t row, std::int64_t depth, std::int64_t hidden, int gates,
                       std::int64_t unit, int vectors, T* panel) {
  constexpr int n = kLanes<T>;
  const std::int64_t width = gates * vectors * n;
  for (int g = 0; g < gates; ++g) {
    for (int u = 0; u < vectors; ++u) {
      const std::int64_t first = unit + u * n;
      T* column = panel + (g * vectors + u) * n;
      for (std::int64_t k = 0; k < depth; k += n) {
        Vec<T> block[n];
        for (int i = 0; i < n; ++i) {
          const S* at = weight + (g * hidden + first + i) * row + k;
          block[i] = first + i < hidden ? load(at, depth - k) : Vec<T>{};
          __builtin_prefetch(at + kPackAhead * n);  // as many rows as the processor's own prefetching loses sight of
        }
        transpose<T>(block);
        for (std::int64_t i = 0; i < min_of<std::int64_t>(n, depth - k); ++i) {
          store_full(column + (k + i) * width, block[i]);
        }
      }
    }
  }
}

// panel[gate][unit] of a bias, the sum of two where both are given (either may be null).
template <class S, class T = Compute<S>>
inline void pack_bias(const S* first, const S* second, std::int64_t hidden, int gates, int summed, std::int64_t unit,
                      int vectors, T* panel) {
  constexpr int n = kLanes<T>;
  for (int g = 0; g < gates; ++g) {
    for (int u = 0; u < vectors; ++u, panel += n) {
      const std::int64_t at = unit + u * n, left = hidden - at;
      Vec<T> sum{};
      if (left > 0 && first != nullptr) sum += load(first + g * hidden + at, left);
      if (left > 0 && second != nullptr && g < summed) sum += load(second + g * hidden + at, left);
      store_full(panel, sum);
    }
  }
}

// panel[k][column] = rows[k][column] for the `vectors` vectors of columns from `column`; columns beyond `columns`
// as 0. A null row is a row of zeros.
template <class S, class T = Compute<S>>
inline void pack_rows(const S* const* rows, std::int64_t depth, std::int64_t columns, std::int64_t column, int vectors,
                      T* panel) {
  constexpr int n = kLanes<T>;
  for (std::int64_t k = 0; k < depth; ++k) {
    for (int v = 0; v < vectors; ++v, panel += n) {
      const std::int64_t at = column + v * n;
      store_full(panel, rows[k] != nullptr && at < columns ? load(rows[k] + at, columns - at) : Vec<T>{});
    }
  }
}

// strip[k][i] = rows[k][column + i] for i below `count`: A of a product over rows, kTransposed with step kMaxRows.
template <class T>
inline void pack_strip(const T* rows, std::int64_t stride, std::int64_t depth, int count, T* strip) {
  for (std::int64_t k = 0; k < depth; ++k, rows += stride, strip += count) {
    for (int i = 0; i < count; ++i) strip[i] = rows[i];
  }
}

template <class S, class T = Compute<S>>
inline void copy_converted(const S* from, T* to, std::int64_t count) {
  for (std::int64_t i = 0; i < count; i += kLanes<T>) store(to + i, load(from + i, count - i), count - i);
}

}  // namespace
}  // namespace seqkernels

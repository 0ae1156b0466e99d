// What the passes of attention share: exponential and logarithm, rows of any storage type, keys transposed into panels,
// products of tiles.
#pragma once

#include <cmath>

#include "core/attention.h"
#include "core/gemm.h"

namespace seqkernels {
namespace {

constexpr int kPanelVectors = kVectorRegisters >= 32 ? 4 : 2;  // columns of a panel of keys, in vectors
template <class T>
constexpr int kPanel = kPanelVectors * kLanes<T>;

inline std::int64_t round_up(std::int64_t x, std::int64_t to) { return ceil_div(x, to) * to; }

template <class T>
constexpr T kInfinity = T(__builtin_inf());

// 2^f for |f| <= 1/2, by the polynomial of degree 6 with the least relative error that is 1 at 0.
inline Vec<float> exp2_reduced(Vec<float> f) {
  Vec<float> p = f * 1.5353362e-4f + 1.3398875e-3f;
  p = p * f + 9.6184369e-3f;
  p = p * f + 5.5503324e-2f;
  p = p * f + 2.4022648e-1f;
  p = p * f + 6.9314718e-1f;
  return p * f + 1.0f;
}

// e^x for x up to 88 (709), as `exp` but for what weights do not need: results below the smallest normal number are
// exactly 0, so that -inf needs no extra care; NaN for NaN. e^x = 2^n 2^f with n + f = x / ln 2.
template <class T>
inline Vec<T> weight_of(Vec<T> x) {
#if defined(__AVX512F__)
  if constexpr (sizeof(T) == 4) {
    const __m512 v = bit_cast<__m512>(x), log2e = _mm512_set1_ps(ExpConstants<T>::kLog2e);
    const __m512 n = _mm512_roundscale_ps(_mm512_mul_ps(v, log2e), _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
    const Vec<T> p = exp2_reduced(bit_cast<Vec<T>>(_mm512_fmsub_ps(v, log2e, n)));
    const __mmask16 normal = _mm512_cmp_ps_mask(v, _mm512_set1_ps(-87.33f), _CMP_NLT_UQ);
    return bit_cast<Vec<T>>(_mm512_maskz_scalef_ps(normal, bit_cast<__m512>(p), n));
  }
#endif
  constexpr T kZero = sizeof(T) == 8 ? T(-709.1) : T(-88.03);  // here exp_parts has a scale of 0
  x = x < kZero ? splat(kZero) : x;
  Vec<T> scale;
  const Vec<T> p = exp_parts<T>(x, scale);
  return scale * p + scale;
}

template <class T>
struct LogConstants;
template <>
struct LogConstants<float> {
  static constexpr int kTerms = 5;
  static constexpr std::int32_t kHalfRoot = 0x3f3504f3;  // sqrt(1/2)
};
template <>
struct LogConstants<double> {
  static constexpr int kTerms = 11;
  static constexpr std::int64_t kHalfRoot = 0x3fe6a09e667f3bcd;
};

// The natural logarithm of normal numbers, -inf of 0, NaN of NaN, inf of inf; error 1.5 ulp of numbers from 1 on.
// x = 2^e m with m between sqrt(1/2) and sqrt(2), log m = 2 atanh((m - 1) / (m + 1)) by its series.
template <class T>
inline Vec<T> log(Vec<T> x) {
  using C = ExpConstants<T>;
  using L = LogConstants<T>;
  const IntVec<T> plain = (x - x == T(0)) & (x > T(0));
  const IntVec<T> bits = bit_cast<IntVec<T>>(plain ? x : splat(T(1)));
  const IntVec<T> exponent = (bits - L::kHalfRoot) >> C::kMantissa;
  const Vec<T> m = bit_cast<Vec<T>>(bits - (exponent << C::kMantissa));
  const Vec<T> e = __builtin_convertvector(exponent, Vec<T>);
  const Vec<T> s = (m - T(1)) / (m + T(1)), square = s * s;
  Vec<T> p = splat(T(1) / T(2 * L::kTerms + 1));
  for (int i = L::kTerms - 1; i >= 1; --i) p = p * square + T(1) / T(2 * i + 1);
  const Vec<T> y = e * C::kLn2Hi + (e * C::kLn2Lo + (s * square * p * T(2) + s * T(2)));
  return plain ? y : (x == T(0) ? splat(-kInfinity<T>) : x);
}

// A byte for each lane.
template <class T>
struct BytesOf;
template <>
struct BytesOf<float> {
  typedef std::uint8_t Vec __attribute__((vector_size(SEQKERNELS_VECTOR_BYTES / 4)));
};
template <>
struct BytesOf<double> {
  typedef std::uint8_t Vec __attribute__((vector_size(SEQKERNELS_VECTOR_BYTES / 8)));
};

template <class T, int kStep>
inline Vec<T> swap_lanes(Vec<T> x) {
  IntVec<T> index;
  for (int i = 0; i < kLanes<T>; ++i) index[i] = i ^ kStep;
  return __builtin_shuffle(x, index);
}

template <class T, int kStep = kLanes<T> / 2>
inline T reduce_max(Vec<T> x) {
  x = max<T>(x, swap_lanes<T, kStep>(x));
  if constexpr (kStep == 1) {
    return x[0];
  } else {
    return reduce_max<T, kStep / 2>(x);
  }
}

template <class T, int kStep = kLanes<T> / 2>
inline T reduce_add(Vec<T> x) {
  x += swap_lanes<T, kStep>(x);
  if constexpr (kStep == 1) {
    return x[0];
  } else {
    return reduce_add<T, kStep / 2>(x);
  }
}

// The first `count` lanes of x, the others `rest`.
template <class T>
inline Vec<T> first_lanes(Vec<T> x, std::int64_t count, T rest) {
  IntVec<T> lane;
  for (int i = 0; i < kLanes<T>; ++i) lane[i] = i;
  return lane < static_cast<typename Lanes<T>::Int>(count) ? x : splat(rest);
}

// The lanes of x from `count` on, the others `rest`.
template <class T>
inline Vec<T> later_lanes(Vec<T> x, std::int64_t count, T rest) {
  IntVec<T> lane;
  for (int i = 0; i < kLanes<T>; ++i) lane[i] = i;
  return lane >= static_cast<typename Lanes<T>::Int>(count) ? x : splat(rest);
}

inline const void* element(const void* data, std::int64_t at, DType dtype) {
  return static_cast<const char*>(data) + at * bytes_of(dtype);
}
inline void* element(void* data, std::int64_t at, DType dtype) {
  return static_cast<char*>(data) + at * bytes_of(dtype);
}

// Calls f with a number of the storage type, for kernels that compute in T.
template <class T, class F>
inline void with_storage(DType dtype, const F& f) {
  if constexpr (sizeof(T) == 8) {
    f(double());
  } else if (dtype == DType::kFloat32) {
    f(float());
  } else if (dtype == DType::kBFloat16) {
    f(BFloat16());
  } else {
    f(Float16());
  }
}
template <class T>
inline bool is_compute(DType dtype) {
  return dtype == (sizeof(T) == 8 ? DType::kFloat64 : DType::kFloat32);
}

// to (rows, ld) = factor * from (rows, size); the rest of each row's last vector is 0.
template <class T>
void read_rows(DType dtype, const void* from, std::int64_t stride, std::int64_t rows, std::int64_t size, T factor,
               T* to, std::int64_t ld) {
  with_storage<T>(dtype, [&](auto tag) {
    const auto* x = static_cast<const decltype(tag)*>(from);
    for (std::int64_t r = 0; r < rows; ++r) {
      for (std::int64_t i = 0; i < size; i += kLanes<T>) {
        store_full(to + r * ld + i, load(x + r * stride + i, size - i) * factor);
      }
    }
  });
}

// Row r of to = factor[r * step] * row r of from (rows, size), narrowed.
template <class T>
void write_rows(DType dtype, const T* from, std::int64_t ld, std::int64_t rows, std::int64_t size, const T* factor,
                std::int64_t step, void* to, std::int64_t stride) {
  with_storage<T>(dtype, [&](auto tag) {
    auto* x = static_cast<decltype(tag)*>(to);
    for (std::int64_t r = 0; r < rows; ++r) {
      for (std::int64_t i = 0; i < size; i += kLanes<T>) {
        store(x + r * stride + i, load_full(from + r * ld + i) * factor[r * step], size - i);
      }
    }
  });
}

// Rows as the left operand of a product.
template <class T>
void read_left(DType dtype, const void* from, std::int64_t stride, std::int64_t rows, std::int64_t size, T factor,
               T* to, std::int64_t ld) {
  read_rows<T>(dtype, from, stride, rows, size, factor, to, ld);
}

template <class T>
inline bool is_finite(Vec<T> x) {
  return reduce_add<T>(x * T(0)) == T(0);
}

template <class T>
bool rows_are_finite(DType dtype, const void* from, std::int64_t stride, std::int64_t rows, std::int64_t size) {
  Vec<T> sum{};  // of zeros, or NaN
  with_storage<T>(dtype, [&](auto tag) {
    const auto* x = static_cast<const decltype(tag)*>(from);
    for (std::int64_t r = 0; r < rows; ++r) {
      for (std::int64_t i = 0; i < size; i += kLanes<T>) sum += load(x + r * stride + i, size - i) * T(0);
    }
  });
  return is_finite<T>(sum);
}

// The larger of two lengths; NaN if one is.
template <class T>
inline T longer(T a, T b) {
  return a >= b || a != a ? a : b;
}

// The lengths of rows as vectors; returns the largest.
template <class T>
T lengths_of(DType dtype, const void* from, std::int64_t stride, std::int64_t rows, std::int64_t size, T* lengths) {
  T most = T(0);
  with_storage<T>(dtype, [&](auto tag) {
    const auto* x = static_cast<const decltype(tag)*>(from);
    for (std::int64_t r = 0; r < rows; ++r) {
      Vec<T> sum{};
      for (std::int64_t i = 0; i < size; i += kLanes<T>) {
        const Vec<T> part = load(x + r * stride + i, size - i);
        sum += part * part;
      }
      const T length = std::sqrt(reduce_add<T>(sum));
      if (lengths != nullptr) lengths[r] = length;
      most = longer(most, length);
    }
  });
  return most;
}

// NaN and infinities become 0.
template <class T>
void clean(T* x, std::int64_t count) {
  for (std::int64_t i = 0; i < count; i += kLanes<T>) {
    const Vec<T> v = load_full(x + i);
    store_full(x + i, v - v == T(0) ? v : Vec<T>{});
  }
}

// to (rows, ld) = from (rows, size), what is not finite being 0.
template <class T>
void read_finite(DType dtype, const void* from, std::int64_t stride, std::int64_t rows, std::int64_t size, T* to,
                 std::int64_t ld) {
  read_rows<T>(dtype, from, stride, rows, size, T(1), to, ld);
  clean(to, rows * ld);
}

// Rows that are the depth of a product, as its right operand (rows, ld). What is not finite becomes 0 where `cleaned`.
template <class T>
void pack_depth(DType dtype, const void* from, std::int64_t stride, std::int64_t rows, std::int64_t size, T* to,
                std::int64_t ld, bool cleaned) {
  read_rows<T>(dtype, from, stride, rows, size, T(1), to, ld);
  if (cleaned) clean(to, rows * ld);
}

// Rows of `size` numbers, transposed into panels of kPanel rows: panel p at to + p * kPanel * size holds
// [size][vectors of the panel][lanes]. The last panel is as narrow as the rows allow, its last vector padded with 0.
template <class T>
void pack_panels(DType dtype, const void* from, std::int64_t stride, std::int64_t rows, std::int64_t size, T* to) {
  constexpr int n = kLanes<T>;
  with_storage<T>(dtype, [&](auto tag) {
    const auto* x = static_cast<const decltype(tag)*>(from);
    for (std::int64_t first = 0; first < rows; first += kPanel<T>, to += kPanel<T> * size) {
      const std::int64_t columns = round_up(min_of<std::int64_t>(kPanel<T>, rows - first), n);
      for (std::int64_t column = 0; column < columns; column += n) {
        const std::int64_t row = first + column;
        for (std::int64_t d = 0; d < size; d += n) {
          Vec<T> block[n];
          for (int i = 0; i < n; ++i) {
            block[i] = row + i < rows ? load(x + (row + i) * stride + d, size - d) : Vec<T>{};
          }
          transpose<T>(block);
          const std::int64_t deep = min_of<std::int64_t>(n, size - d);
          for (std::int64_t i = 0; i < deep; ++i) store_full(to + (d + i) * columns + column, block[i]);
        }
      }
    }
  });
}

struct Range {
  std::int64_t begin, end;
};

constexpr std::int64_t kChain = 128;  // terms of a dot product added one by one: sums of sums are more exact

// c (rows, vectors * lanes) (+)= a b, with b (depth, vectors * lanes) and a (rows, depth), or its transpose
// (depth, rows) for Layout::kTransposed. range_of(first row, rows) is the part of the depth that some rows need.
template <class T, Layout kLayout, bool kAdd, class RangeOf>
inline void product(std::int64_t rows, std::int64_t vectors, const T* a, std::int64_t lda, const T* b, std::int64_t ldb,
                    T* c, std::int64_t ldc, const RangeOf& range_of) {
  constexpr int n = kLanes<T>;
  const std::int64_t blocks = ceil_div(vectors, kPanelVectors);
  for (std::int64_t block = 0; block < blocks; ++block) {
    const std::int64_t begin = vectors * block / blocks, end = vectors * (block + 1) / blocks;
    const int width = static_cast<int>(end - begin), step = block_rows(width);
    for (std::int64_t m = 0; m < rows; m += step) {
      const int count = static_cast<int>(min_of<std::int64_t>(step, rows - m));
      const Range range = range_of(m, count);
      if (range.begin >= range.end) continue;
      T* to = c + m * ldc + begin * n;
      for (std::int64_t first = range.begin; first < range.end; first += kChain) {
        const T* pointers[kMaxRows];
        if constexpr (kLayout == Layout::kRows) {
          for (int i = 0; i < count; ++i) pointers[i] = a + (m + i) * lda + first;
        } else {
          pointers[0] = a + first * lda + m;
        }
        const auto kernel = micro_kernel_for<T>(kLayout, kAdd || first > range.begin, count, width);
        kernel(min_of(kChain, range.end - first), pointers, lda, b + first * ldb + begin * n, ldb, to, ldc);
      }
    }
  }
}

// Calls f with how many of a few rows go at once.
template <class T, class F>
inline void with_rows(std::int64_t rows, const F& f) {
  constexpr int n = kLanes<T>;
  if (rows == 1) {
    f(Count<1>());
  } else if (rows == 2 || n == 2) {
    f(Count<2>());
  } else if (rows <= 4 || n == 4) {
    f(Count<(n < 4 ? n : 4)>());
  } else {
    f(Count<(n < 8 ? n : 8)>());
  }
}

// A few rows read keys and values from several places at a time, each sequential, and ask for what comes this many
// bytes of rows later: one stream does not keep the memory busy, nor does the processor's own prefetching.
constexpr int kStreams = 4;
constexpr std::int64_t kAhead = 2048;

inline void fetch(const void* p) { __builtin_prefetch(p, 0, 2); }

// How far what is asked for lies from what is read, in numbers.
template <class S>
inline std::int64_t fetch_distance(std::int64_t stride, std::int64_t size) {
  return max_of<std::int64_t>(1, kAhead / max_of<std::int64_t>(1, size * static_cast<std::int64_t>(sizeof(S)))) *
         stride;
}

// The keys of a step of dot products, side by side of all streams: kKeys of them for kRows rows.
template <class T, int kRows>
struct Side {
  static constexpr int kKeys = kLanes<T> / kRows, kEach = kKeys < kStreams ? 1 : kKeys / kStreams;  // of a stream
  std::int64_t length;

  explicit Side(std::int64_t keys) : length(round_up(ceil_div(keys, kKeys / kEach), kEach)) {}
  std::int64_t key(std::int64_t j, int i) const { return i / kEach * length + j + i % kEach; }

  void write(Vec<T> scores, std::int64_t j, T* s, std::int64_t lds) const {
#pragma GCC unroll 16
    for (int i = 0; i < kLanes<T>; i += kEach) {
      std::memcpy(s + i / kKeys * lds + key(j, i % kKeys), reinterpret_cast<const char*>(&scores) + i * sizeof(T),
                  kEach * sizeof(T));
    }
  }
};

// s[r][j] = a[r] . key[j] for kRows rows (kRows, lda), padded to whole vectors with 0, and `keys` rows as they lie,
// each of which is read once. A few scores behind the last are written.
template <class T, int kRows, class S>
void dot_rows(const S* key, std::int64_t stride, std::int64_t keys, std::int64_t depth, const T* a, std::int64_t lda,
              T* s, std::int64_t lds) {
  constexpr int n = kLanes<T>, kKeys = n / kRows;
  const std::int64_t whole = depth / n * n, ahead = fetch_distance<S>(stride, depth);
  const Side<T, kRows> side(keys);
  for (std::int64_t j = 0; j < side.length; j += side.kEach) {
    const S* row[kKeys];
#pragma GCC unroll 16
    for (int i = 0; i < kKeys; ++i) row[i] = key + min_of(side.key(j, i), keys - 1) * stride;
    Vec<T> sum[n];
#pragma GCC unroll 16
    for (int i = 0; i < n; ++i) sum[i] = Vec<T>{};
    const auto add = [&](std::int64_t d, std::int64_t count) {
      Vec<T> x[kKeys];
#pragma GCC unroll 16
      for (int i = 0; i < kKeys; ++i) {
        if (d * static_cast<std::int64_t>(sizeof(S)) % 64 == 0) fetch(row[i] + d + ahead);
        x[i] = count >= n ? load(row[i] + d) : load(row[i] + d, count);
      }
#pragma GCC unroll 16
      for (int r = 0; r < kRows; ++r) {
        const Vec<T> y = load_full(a + r * lda + d);
#pragma GCC unroll 16
        for (int i = 0; i < kKeys; ++i) sum[r * kKeys + i] += x[i] * y;
      }
    };
    for (std::int64_t d = 0; d < whole; d += n) add(d, n);
    if (whole < depth) add(whole, depth - whole);
    side.write(reduce_each<T>(sum), j, s, lds);
  }
}

// How many of `keys` each stream has, in whole groups of `each`; the last ones may have fewer, or none.
inline std::int64_t stream_length(std::int64_t keys, std::int64_t each) {
  return round_up(ceil_div(keys, kStreams), each);
}

// Calls f(first key) for the groups of `each` keys in a part of each stream, by turns.
template <class F>
inline void for_streams(std::int64_t keys, std::int64_t each, Range part, std::int64_t length, const F& f) {
  for (std::int64_t i = part.begin; i < part.end; i += each) {
    for (std::int64_t j = i; j < keys; j += length) f(j);
  }
}

// Calls f(Count, column) for blocks of columns: a power of 2 of kUnit numbers each, up to kMost of them, at the end one
// that may not be whole.
template <int kUnit, int kMost, class F>
inline void for_columns(std::int64_t size, const F& f) {
  for (std::int64_t column = 0; column < size;) {
    const auto run = [&](auto units) {
      f(units, column);
      column += decltype(units)::kValue * kUnit;
    };
    const std::int64_t whole = (size - column) / kUnit;
    if (whole >= kMost) {
      run(Count<kMost>());
    } else if (whole >= 4) {
      run(Count<4>());
    } else if (whole >= 2) {
      run(Count<2>());
    } else {
      run(Count<1>());
    }
  }
}

// s (rows, keys) = a few rows a (rows, depth), padded to a whole vector with 0, times `keys` rows as they lie in
// memory. Up to the next power of 2 there has to be space for rows that are none.
template <class T>
void multiply_rows(DType dtype, const void* from, std::int64_t stride, std::int64_t keys, std::int64_t depth,
                   const T* a, std::int64_t lda, T* s, std::int64_t lds, std::int64_t rows) {
  with_storage<T>(dtype, [&](auto tag) {
    const auto* key = static_cast<const decltype(tag)*>(from);
    with_rows<T>(rows, [&](auto count) {
      constexpr int kRows = decltype(count)::kValue;
      for (std::int64_t r = 0; r < rows; r += kRows) {
        dot_rows<T, kRows>(key, stride, keys, depth, a + r * lda, lda, s + r * lds, lds);
      }
    });
  });
}

}  // namespace
}  // namespace seqkernels

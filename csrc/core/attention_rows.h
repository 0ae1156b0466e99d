// Attention's rows of scores: which keys each may read, masks and biases, and how rows are cut into blocks.
//
// The queries of all heads that share a key head are numbered through: row r of key head h is query r % M of head
// h * group + r / M. A block of rows may span several heads where M is small.
#pragma once

#include "core/attention_tile.h"

namespace seqkernels {
namespace {

// One row of scores.
struct ScoreRow {
  std::int64_t limit;        // it may read the keys before this one
  std::int64_t count;        // and so many keys of the tile at hand
  const std::uint8_t* mask;  // of its first key, or null
  const void* bias;
};

// Sets how many of the `count` keys from `first` each row may read; returns the most.
template <class Row>
inline std::int64_t set_counts(Row* rows, std::int64_t size, std::int64_t first, std::int64_t count) {
  std::int64_t most = 0;
  for (std::int64_t r = 0; r < size; ++r) {
    rows[r].count = max_of<std::int64_t>(0, min_of(count, rows[r].limit - first));
    most = max_of(most, rows[r].count);
  }
  return most;
}
template <class Row>
inline std::int64_t most_of(const Row* rows, int size) {
  std::int64_t most = 0;
  for (int i = 0; i < size; ++i) most = max_of(most, rows[i].count);
  return most;
}

// s (rows, width) = rows a (rows, depth) times packed panels of `keys` keys, of which the first `width` are wanted.
// Nothing is computed for rows that read no key of a panel.
template <class T, class Row>
inline void multiply_panels(std::int64_t keys, std::int64_t width, std::int64_t depth, const T* a, std::int64_t lda,
                            const T* panels, T* s, std::int64_t lds, const Row* rows, std::int64_t size) {
  constexpr int n = kLanes<T>;
  for (std::int64_t column = 0; column < width; column += kPanel<T>) {
    const std::int64_t ld = round_up(min_of<std::int64_t>(kPanel<T>, keys - column), n);
    const std::int64_t vectors = ceil_div(min_of<std::int64_t>(kPanel<T>, width - column), n);
    product<T, Layout::kRows, false>(
        size, vectors, a, lda, panels + column * depth, ld, s + column, lds,
        [&](std::int64_t m, int count) { return Range{0, most_of(rows + m, count) > column ? depth : 0}; });
  }
}

constexpr std::int64_t kFewRows = 8;  // rows of a key head up to which keys are not packed

// How the rows of one key head are cut into blocks of at most `size`.
struct RowBlocks {
  std::int64_t rows, queries, size, count;

  RowBlocks(std::int64_t rows_, std::int64_t queries_, std::int64_t most) : rows(rows_), queries(queries_) {
    if (queries > most) {
      const std::int64_t even = ceil_div(queries, ceil_div(queries, most));
      size = min_of(most, round_up(even, block_rows(kPanelVectors)));
      count = rows / queries * ceil_div(queries, size);
    } else {
      size = queries == 0 ? 0 : min_of(rows, most / queries * queries);
      count = size == 0 ? 0 : ceil_div(rows, size);
    }
  }

  std::int64_t begin(std::int64_t i) const {
    if (queries <= size) return i * size;
    const std::int64_t per_head = ceil_div(queries, size);
    return i / per_head * queries + i % per_head * size;
  }
  std::int64_t length(std::int64_t i) const {
    if (queries <= size) return min_of(size, rows - i * size);
    return min_of(size, queries - i % ceil_div(queries, size) * size);
  }
};

// Calls f(head, query, at, count) for the runs of rows `at`.. of a block that belong to one head.
template <class Params, class F>
inline void for_heads(const Params& p, std::int64_t kv_head, std::int64_t first, std::int64_t rows, const F& f) {
  const std::int64_t group = p.heads / p.kv_heads;
  for (std::int64_t at = 0; at < rows;) {
    const std::int64_t query = (first + at) % p.queries;
    const std::int64_t count = min_of(rows - at, p.queries - query);
    f(kv_head * group + (first + at) / p.queries, query, at, count);
    at += count;
  }
}

// The scores' masks and biases for one call.
template <class T, class Params>
class Masks {
  static constexpr int n = kLanes<T>;

 public:
  explicit Masks(const Params& p)
      : p_(p),
        any_(p.mask.data != nullptr || p.bias.data != nullptr),
        same_for_queries_((p.mask.data == nullptr || p.mask.stride[2] == 0) &&
                          (p.bias.data == nullptr || p.bias.stride[2] == 0)),
        same_for_heads_((p.mask.data == nullptr || p.mask.stride[1] == 0) &&
                        (p.bias.data == nullptr || p.bias.stride[1] == 0)) {}

  bool any() const { return any_; }
  // Whether the rows of a block all have the same.
  bool uniform(std::int64_t rows, std::int64_t first) const {
    return any_ && same_for_queries_ && (same_for_heads_ || first / p_.queries == (first + rows - 1) / p_.queries);
  }

  // Describes the rows of a block; `keys` is the limit of rows that see all. Row is a ScoreRow.
  template <class Row>
  void describe(std::int64_t batch, std::int64_t kv_head, std::int64_t first, std::int64_t rows, std::int64_t keys,
                Row* out) const {
    for_heads(
        p_, kv_head, first, rows, [&](std::int64_t head, std::int64_t query, std::int64_t at, std::int64_t count) {
          for (std::int64_t i = 0; i < count; ++i) {
            ScoreRow& row = out[at + i];
            row.limit = p_.is_causal ? min_of(keys, query + i + 1) : keys;
            row.mask = p_.mask.data == nullptr
                           ? nullptr
                           : static_cast<const std::uint8_t*>(p_.mask.data) + offset(p_.mask, batch, head, query + i);
            row.bias = p_.bias.data == nullptr
                           ? nullptr
                           : element(p_.bias.data, offset(p_.bias, batch, head, query + i), p_.dtype);
          }
        });
  }

  // What is added to the scaled scores of keys `first`.. of a row: the bias, or -inf for a masked key.
  // Returns whether a key is left.
  bool additive(const ScoreRow& row, std::int64_t first, std::int64_t count, T* out) const {
    IntVec<T> left{};
    with_storage<T>(p_.dtype, [&](auto tag) {
      const auto* bias = static_cast<const decltype(tag)*>(row.bias);
      for (std::int64_t j = 0; j < count; j += n) {
        Vec<T> x{};
        if (bias != nullptr) x = strided(bias, p_.bias.stride[3], first + j, count - j);
        if (row.mask != nullptr) x = kept(row.mask, p_.mask.stride[3], first + j, count - j) ? x : splat(-kInfinity<T>);
        left |= first_lanes<T>(x, count - j, -kInfinity<T>) != -kInfinity<T>;
        store_full(out + j, x);
      }
    });
    bool any = false;
    for (int i = 0; i < n; ++i) any |= left[i] != 0;
    return any;
  }

 private:
  static std::int64_t offset(const Strided& x, std::int64_t batch, std::int64_t head, std::int64_t query) {
    return batch * x.stride[0] + head * x.stride[1] + query * x.stride[2];
  }

  template <class S>
  static Vec<T> strided(const S* x, std::int64_t stride, std::int64_t at, std::int64_t count) {
    if (stride == 1) return load(x + at, count);
    if (stride == 0) return splat(load_one(x));
    S part[n] = {};
    for (std::int64_t i = 0; i < min_of<std::int64_t>(n, count); ++i) part[i] = x[(at + i) * stride];
    return load(part);
  }

  static IntVec<T> kept(const std::uint8_t* mask, std::int64_t stride, std::int64_t at, std::int64_t count) {
    typename BytesOf<T>::Vec bytes{};
    if (stride == 1 && count >= n) {
      std::memcpy(&bytes, mask + at, n);
    } else {
      for (std::int64_t i = 0; i < min_of<std::int64_t>(n, count); ++i) bytes[i] = mask[(at + i) * stride];
    }
    return __builtin_convertvector(bytes, IntVec<T>) != 0;
  }

  const Params& p_;
  const bool any_, same_for_queries_, same_for_heads_;
};

// The maximum of `count` scores. The rest of the last vector becomes -inf. NaN do not count.
template <class T>
inline T top_score(T* s, std::int64_t count) {
  constexpr int n = kLanes<T>;
  Vec<T> top = splat(-kInfinity<T>), other = top;
  std::int64_t j = 0;
  for (; j + 2 * n <= count; j += 2 * n) {
    top = max<T>(load_full(s + j), top);
    other = max<T>(load_full(s + j + n), other);
  }
  for (; j < count; j += n) {
    const Vec<T> x = first_lanes<T>(load_full(s + j), count - j, -kInfinity<T>);
    store_full(s + j, x);
    top = max<T>(x, top);
  }
  return reduce_max<T>(max<T>(top, other));
}

// The same after s += add; where `add` is -inf so is the score, whatever it was, NaN included.
template <class T>
inline T top_score(T* s, std::int64_t count, const T* add) {
  constexpr int n = kLanes<T>;
  Vec<T> top = splat(-kInfinity<T>);
  for (std::int64_t j = 0; j < count; j += n) {
    const Vec<T> a = load_full(add + j);
    Vec<T> x = a == -kInfinity<T> ? a : load_full(s + j) + a;
    if (count - j < n) x = first_lanes<T>(x, count - j, -kInfinity<T>);
    store_full(s + j, x);
    top = max<T>(x, top);
  }
  return reduce_max<T>(top);
}

}  // namespace
}  // namespace seqkernels

// The online softmax of a block of rows: what is kept of each while the keys pass by tile after tile.
#pragma once

#include "core/attention_scores.h"

namespace seqkernels {
namespace {

template <class T>
class OnlineSoftmax {
  using V = Vec<T>;
  static constexpr int n = kLanes<T>;

 public:
  struct Row : ScoreRow {
    bool poisoned;  // it reads a value that is not finite
  };
  // A thread's memory.
  struct Work {
    T* s;     // (rows, tile_ld) products, then scores, then weights
    T* out;   // (rows, value_ld) not yet divided by the sum
    T* sum;   // (rows, lanes) of weights
    T* top;   // (rows) maximum of the scores
    T* fade;  // (rows) what a new maximum multiplies out and sum by
    T* add;   // (tile_ld)
    Row* rows;
    std::uint32_t* words;  // (tile_ld) random ones of a row
  };
  enum : std::uint8_t { kDirect, kPacked, kDirty };  // values as they lie, copied, copied and cleaned

  OnlineSoftmax(const AttentionForward& p, const Scores<T>& scores, std::int64_t tile_ld, std::int64_t value_ld,
                std::int64_t row_space)
      : p_(p), scores_(scores), tile_ld_(tile_ld), value_ld_(value_ld), row_space_(row_space) {}

  // Numbers that `carve` takes, words included.
  std::int64_t size() const { return row_space_ * (tile_ld_ + value_ld_ + n + 2) + 2 * tile_ld_; }
  Work carve(T* at, Row* rows) const {
    Work w;
    w.s = at;
    w.out = w.s + row_space_ * tile_ld_;
    w.sum = w.out + row_space_ * value_ld_;
    w.top = w.sum + row_space_ * n;
    w.fade = w.top + row_space_;
    w.add = w.fade + row_space_;
    w.words = reinterpret_cast<std::uint32_t*>(w.add + tile_ld_);
    w.rows = rows;
    return w;
  }

  void start(const Work& w, const Document& document, std::int64_t kv_head, std::int64_t first,
             std::int64_t rows) const {
    describe(p_, document, kv_head, first, rows, w.rows);
    for (std::int64_t r = 0; r < rows; ++r) w.rows[r].poisoned = false;
    for (std::int64_t r = 0; r < row_space_; ++r) w.top[r] = -kInfinity<T>;
    for (std::int64_t i = 0; i < rows * value_ld_; i += n) store_full(w.out + i, V{});
    for (std::int64_t i = 0; i < row_space_ * n; i += n) store_full(w.sum + i, V{});
  }

  // From the products of a tile to its weights, 0 in the vectors of `keys` that a row does not read; out and sum are
  // brought to the new maxima. `values` and `stride`: of the tile's first key, to find those that poison where `dirty`.
  void tile(const Work& w, std::int64_t rows, std::int64_t first, Range keys, Kept kept, bool uniform, bool dirty,
            const void* values, std::int64_t stride) const {
    const bool mask = p_.mask.data != nullptr && !kept.all_mask, plain = scores_.plain(mask);
    const bool shared = uniform && (mask || p_.bias.data != nullptr);
    if (shared) scores_.additive(w.rows[0], first, keys, mask, w.add);
    for (std::int64_t r = 0; r < rows; ++r) {
      T* s = w.s + r * tile_ld_;
      w.fade[r] = plain ? scores_.top_of(w.rows[r], s)
                        : scores_.modify(w.rows[r], first, mask && !shared, shared ? w.add : nullptr, s, nullptr);
    }
    if (dirty) find_poisoned(w, rows, keys, values, stride);
    for (std::int64_t r = 0; r < rows; r += n) {
      const V old = load_full(w.top + r), top = max<T>(load_full(w.fade + r), old);
      const V base = top == -kInfinity<T> ? V{} : top;
      store_full(w.top + r, top);
      store_full(w.fade + r, weight_of<T>(old - base));
    }
    const T factor = plain ? scores_.after() : T(1);
    const std::int64_t begin = keys.begin / n * n, end = round_up(keys.end, n);
    for (std::int64_t r = 0; r < rows; ++r) {
      const Row& row = w.rows[r];
      T* s = w.s + r * tile_ld_;
      const T top = w.top[r] == -kInfinity<T> ? T(0) : w.top[r];
      V sum{};
      std::int64_t j = begin;
      for (; j + n <= row.from; j += n) store_full(s + j, V{});
      const std::int64_t read = j;
      for (; j < row.count; j += n) {
        const V x = weight_of<T>(load_full(s + j) * factor - top);
        store_full(s + j, x);
        sum += x;
      }
      if (scores_.dropout() && read < row.count) {
        scores_.draw(row, first + read, first + round_up(row.count, n), w.words);
        for (std::int64_t i = read; i < row.count; i += n) {
          store_full(s + i, scores_.drop(load_full(s + i), w.words + (i - read)));
        }
      }
      for (; j < end; j += n) store_full(s + j, V{});
      // A sum of sums is more exact than one long sum.
      store_full(w.sum + r * n, load_full(w.sum + r * n) * w.fade[r] + sum);
      if (w.fade[r] != T(1)) {
        T* out = w.out + r * value_ld_;
        for (std::int64_t i = 0; i < value_ld_; i += n) store_full(out + i, load_full(out + i) * w.fade[r]);
      }
    }
  }

  // Divides by the sums and writes what is to be written.
  void finish(const Work& w, const Document& document, std::int64_t kv_head, std::int64_t first,
              std::int64_t rows) const {
    const T* sink = static_cast<const T*>(p_.sink);
    if (sink != nullptr) {
      for_heads(p_.heads / p_.kv_heads, document.queries, kv_head, first, rows,
                [&](std::int64_t head, std::int64_t, std::int64_t at, std::int64_t count) {
                  for (std::int64_t i = at; i < at + count; ++i) add_sink(w, i, sink[head]);
                });
    }
    for (std::int64_t r = 0; r < rows; r += n) {
      V sum[n];
      for (int i = 0; i < n; ++i) sum[i] = load_full(w.sum + (r + i) * n);
      const V total = reduce_each<T>(sum);
      store_full(w.top + r, load_full(w.top + r) + log<T>(total));
      store_full(w.fade + r, total == T(0) ? V{} : T(1) / total);
    }
    for (std::int64_t r = 0; r < rows; ++r) {
      if (w.rows[r].poisoned) w.fade[r] = T(__builtin_nan(""));
    }
    T* lse = static_cast<T*>(p_.lse);
    for_heads(p_.heads / p_.kv_heads, document.queries, kv_head, first, rows,
              [&](std::int64_t head, std::int64_t query, std::int64_t at, std::int64_t count) {
                write_rows<T>(p_.dtype, w.out + at * value_ld_, value_ld_, count, p_.value_size, w.fade + at, 1,
                              element(p_.out.data, document.query_at(p_.out.stride, head, query), p_.dtype),
                              p_.out.stride[2]);
                if (lse == nullptr) return;
                std::memcpy(lse + document.lse_at(p_, head, query), w.top + at,
                            static_cast<std::size_t>(count) * sizeof(T));
              });
  }

  // A part's result: out, maximum and sum of each row (NaN where it is poisoned).
  std::int64_t partial_size() const { return value_ld_ + 2; }
  void save(const Work& w, std::int64_t rows, T* to) const {
    for (std::int64_t r = 0; r < rows; ++r, to += partial_size()) {
      std::memcpy(to, w.out + r * value_ld_, static_cast<std::size_t>(value_ld_) * sizeof(T));
      to[value_ld_] = w.top[r];
      to[value_ld_ + 1] = reduce_add<T>(load_full(w.sum + r * n));
      if (w.rows[r].poisoned) to[0] = T(__builtin_nan(""));
    }
  }
  void merge(const Work& w, std::int64_t rows, const T* from) const {
    for (std::int64_t r = 0; r < rows; ++r, from += partial_size()) {
      const T top = max_of(w.top[r], from[value_ld_]);
      const V base = splat(top == -kInfinity<T> ? T(0) : top);
      const V fade = weight_of<T>(splat(w.top[r]) - base);
      const V share_of_part = weight_of<T>(splat(from[value_ld_]) - base);
      T* out = w.out + r * value_ld_;
      for (std::int64_t i = 0; i < value_ld_; i += n) {
        store_full(out + i, load_full(out + i) * fade + load_full(from + i) * share_of_part);
      }
      w.sum[r * n] = w.sum[r * n] * fade[0] + from[value_ld_ + 1] * share_of_part[0];
      w.top[r] = top;
      if (from[0] != from[0]) w.rows[r].poisoned = true;
    }
  }

 private:
  // One more key, with no value.
  void add_sink(const Work& w, std::int64_t r, T sink) const {
    const T top = max_of(w.top[r], sink);
    const V base = splat(top == -kInfinity<T> ? T(0) : top);
    const V fade = weight_of<T>(splat(w.top[r]) - base);
    store_full(w.sum + r * n, load_full(w.sum + r * n) * fade);
    w.sum[r * n] += weight_of<T>(splat(sink) - base)[0];
    T* out = w.out + r * value_ld_;
    for (std::int64_t i = 0; i < value_ld_; i += n) store_full(out + i, load_full(out + i) * fade);
    w.top[r] = top;
  }

  // Rows that read a value that is not finite become NaN; the value itself has been replaced by 0.
  void find_poisoned(const Work& w, std::int64_t rows, Range keys, const void* values, std::int64_t stride) const {
    for (std::int64_t j = keys.begin; j < keys.end; ++j) {
      if (rows_are_finite<T>(p_.dtype, element(values, j * stride, p_.dtype), 0, 1, p_.value_size)) continue;
      for (std::int64_t r = 0; r < rows; ++r) {
        const Row& row = w.rows[r];
        if (j >= row.from && j < row.count && w.s[r * tile_ld_ + j] != -kInfinity<T>) w.rows[r].poisoned = true;
      }
    }
  }

  const AttentionForward& p_;
  const Scores<T>& scores_;
  const std::int64_t tile_ld_, value_ld_, row_space_;
};

}  // namespace
}  // namespace seqkernels

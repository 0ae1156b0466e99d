// Attention of a handful of rows (decoding): not worth packing anything for. The keys are read once, as they lie, by
// dot products, and the threads share out ranges of keys where the heads are too few.
#pragma once

#include "core/attention_online.h"
#include "core/team.h"

namespace seqkernels {
namespace {

// kRows rows of out (ldo) += s (lds) times rows of values as they lie, in kVectors vectors, of one of which only the
// first `left` numbers are there. Of `keys` values each stream has `length`, of which `part` are added. What lies
// `ahead` numbers later is fetched, unless that is 0.
template <class T, int kRows, int kVectors, class S>
void add_block(const S* value, std::int64_t stride, Range part, std::int64_t length, std::int64_t keys,
               std::int64_t left, const T* s, std::int64_t lds, T* out, std::int64_t ldo, std::int64_t ahead) {
  constexpr int n = kLanes<T>;
  Vec<T> sum[kRows][kVectors];
#pragma GCC unroll 2
  for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 8
    for (int v = 0; v < kVectors; ++v) sum[r][v] = Vec<T>{};
  }
  for_streams(keys, 1, part, length, [&](std::int64_t j) {
    const S* at = value + j * stride;
#pragma GCC unroll 8
    for (int v = 0; v < kVectors; ++v) {
      if (ahead != 0 && v * n * sizeof(S) % 64 == 0) fetch(at + v * n + ahead);
      const Vec<T> x = kVectors == 1 ? load(at, left) : load(at + v * n);
#pragma GCC unroll 2
      for (int r = 0; r < kRows; ++r) sum[r][v] += x * s[r * lds + j];
    }
  });
#pragma GCC unroll 2
  for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 8
    for (int v = 0; v < kVectors; ++v) {
      T* to = out + r * ldo + v * n;
      store_full(to, load_full(to) + sum[r][v]);
    }
  }
}

// out (rows, ldo) += s (rows, keys) times the rows of values as they lie in memory, each of which is read once: a few
// keys for two rows at a time, as wide as the registers allow.
template <class T, class S>
void add_rows(const S* value, std::int64_t stride, std::int64_t keys, std::int64_t size, std::int64_t rows, const T* s,
              std::int64_t lds, T* out, std::int64_t ldo) {
  constexpr int n = kLanes<T>, kMost = kVectorRegisters / 4;
  constexpr std::int64_t kNear = 8;  // keys of a stream whose values stay in the first cache
  const std::int64_t length = stream_length(keys, 1), ahead = fetch_distance<S>(stride, size);
  for (std::int64_t first = 0; first < length; first += kNear) {
    const Range part{first, min_of(length, first + kNear)};
    for_columns<n, kMost>(size, [&](auto vectors, std::int64_t column) {
      constexpr int kVectors = decltype(vectors)::kValue;
      for (std::int64_t r = 0; r < rows; r += 2) {
        const auto add = r + 1 < rows ? add_block<T, 2, kVectors, S> : add_block<T, 1, kVectors, S>;
        add(value + column, stride, part, length, keys, size - column, s + r * lds, lds, out + r * ldo + column, ldo,
            r == 0 ? ahead : 0);
      }
    });
  }
}

// T computes, E is multiplied.
template <class T, class E>
class Decode {
  using Softmax = OnlineSoftmax<T>;
  using Row = typename Softmax::Row;
  static constexpr int n = kLanes<T>;
  static constexpr bool kPairs = sizeof(E) == 2;
  static constexpr std::int64_t kBlock = 256;  // keys of a tile
  static constexpr std::int64_t kShort = 4;    // pages of fewer keys are copied together

 public:
  explicit Decode(const AttentionForward& p)
      : p_(p),
        scores_(p, !kPairs),
        longest_(p),
        group_(p.heads / p.kv_heads),
        kv_total_(p.batch * p.kv_heads),
        size_ld_(round_up(p.head_size, kPairs ? 2 * n : n)),
        value_ld_(round_up(p.value_size, n)),
        clean_(masks_keys(p)),
        key_block_(min_of(kBlock, round_up(max_of<std::int64_t>(longest_.keys, 1), n))),
        tile_ld_(key_block_ + n),
        threads_(team_size(p.threads, 2.0 * static_cast<double>(p.batch * p.heads * p.queries) *
                                          static_cast<double>(keys_read(p)) *
                                          static_cast<double>(p.head_size + p.value_size))),
        parts_(parts()),
        row_space_(round_up(group_ * longest_.queries, n)),
        copied_(p.block_table != nullptr && p.page_size < kShort),
        softmax_(p, scores_, tile_ld_, value_ld_, row_space_),
        work_size_(round_up(softmax_.size(), 64)),
        left_size_(round_up(
            row_space_ * size_ld_ + (kPairs ? row_space_ * tile_ld_ : 0) + (clean_ ? key_block_ * value_ld_ : 0), 64)),
        partial_size_(group_ * longest_.queries * softmax_.partial_size()),
        work_(threads_ * work_size_),
        partial_(parts_ > 1 ? kv_total_ * parts_ * partial_size_ : 0),
        left_(threads_ * left_size_),
        rows_(threads_ * row_space_),
        copy_size_(p.block_table == nullptr ? 0 : key_block_ * max_of(p.head_size, p.value_size) * bytes_of(p.dtype)),
        copies_(threads_ * copy_size_) {}

  void run() {
    run_team(threads_, [this](int thread, int threads) {
      Work w;
      static_cast<typename Softmax::Work&>(w) =
          softmax_.carve(work_.get() + thread * work_size_, rows_.get() + thread * row_space_);
      w.q = left_.get() + thread * left_size_;
      w.weights = w.q + row_space_ * size_ld_;
      w.cleaned = w.weights + (kPairs ? row_space_ * tile_ld_ : 0);
      w.copy = copies_.get() + thread * copy_size_;
      for (std::int64_t task; (task = __atomic_fetch_add(&next_, 1, __ATOMIC_RELAXED)) < kv_total_ * parts_;) {
        run_task(w, task);
      }
      if (parts_ == 1) return;
      barrier_.wait(threads);
      const Share mine = share(kv_total_, thread, threads);
      for (std::int64_t kv = mine.begin; kv < mine.end; ++kv) {
        const Document document(p_, kv / p_.kv_heads);
        const std::int64_t rows = group_ * document.queries;
        if (rows == 0) continue;
        softmax_.start(w, document, kv % p_.kv_heads, 0, rows);
        for (int part = 0; part < parts_; ++part) {
          softmax_.merge(w, rows, partial_.get() + (kv * parts_ + part) * partial_size_);
        }
        softmax_.finish(w, document, kv % p_.kv_heads, 0, rows);
      }
    });
  }

 private:
  struct Work : Softmax::Work {
    E* q;        // (rows, D)
    E* weights;  // (rows, keys of a tile) where they are not multiplied as they are
    E* cleaned;  // (keys of a tile, Dv) values, where some are not finite
    char* copy;  // rows of keys or values that several pages hold
  };

  // Ranges of keys of one key head.
  int parts() const {
    const int most = static_cast<int>(min_of<std::int64_t>(ceil_div(longest_.keys, key_block_), 4 * threads_));
    int parts = 1;
    while (parts < most && kv_total_ * parts % threads_ != 0 && kv_total_ * parts < 4 * threads_) ++parts;
    return parts;
  }

  void run_task(const Work& w, std::int64_t task) {
    const std::int64_t kv = task / parts_, kv_head = kv % p_.kv_heads;
    const Document document(p_, kv / p_.kv_heads);
    const std::int64_t rows = group_ * document.queries;
    if (rows == 0) return;
    softmax_.start(w, document, kv_head, 0, rows);
    for_heads(group_, document.queries, kv_head, 0, rows,
              [&](std::int64_t head, std::int64_t query, std::int64_t at, std::int64_t count) {
                read_left(p_.dtype, element(p_.q.data, document.query_at(p_.q.stride, head, query), p_.dtype),
                          p_.q.stride[2], count, p_.head_size, scores_.of_q(), w.q + at * size_ld_, size_ld_);
              });
    std::memset(w.q + rows * size_ld_, 0, static_cast<std::size_t>((row_space_ - rows) * size_ld_) * sizeof(E));
    const Range read = document.all(p_);
    const std::int64_t first = read.begin / key_block_, blocks = ceil_div(read.end, key_block_) - first;
    const Share mine = share(max_of<std::int64_t>(0, blocks), static_cast<int>(task % parts_), parts_);
    for (std::int64_t block = mine.begin; block < mine.end; ++block) attend(w, document, kv_head, first + block, rows);
    if (parts_ == 1) {
      softmax_.finish(w, document, kv_head, 0, rows);
    } else {
      softmax_.save(w, rows, partial_.get() + task * partial_size_);
    }
  }

  void attend(const Work& w, const Document& document, std::int64_t kv_head, std::int64_t block,
              std::int64_t rows) const {
    const std::int64_t first = block * key_block_;
    const Range given = set_counts(w.rows, rows, first, min_of(key_block_, document.keys - first));
    if (given.begin >= given.end) return;
    const bool uniform = scores_.uniform(document, rows, 0);
    const Kept kept = scores_.look(w.rows, rows, first, given, uniform);
    const Range keys = kept.keys;
    if (keys.begin >= keys.end) return;
    const std::int64_t begin = keys.begin / n * n, width = keys.end - begin;
    const auto read = [&](const Strided& x, std::int64_t size, const auto& f) {
      if (copied_) return f(rows_of(p_, x, document, kv_head, first + begin, width, size, w.copy), 0, width);
      for_pages(p_, x, document, kv_head, first + begin, width, size, f);
    };
    read(p_.k, p_.head_size, [&](Rows key, std::int64_t at, std::int64_t count) {
      multiply_rows(p_.dtype, key.data, key.stride, count, p_.head_size, w.q, size_ld_, w.s + begin + at, tile_ld_,
                    rows);
    });
    bool dirty = false;
    if (clean_ && !all_read(w, rows, keys, kept)) {
      read(p_.v, p_.value_size, [&](Rows value, std::int64_t, std::int64_t count) {
        dirty = dirty || !rows_are_finite<T>(p_.dtype, value.data, value.stride, count, p_.value_size);
      });
    }
    Rows all{};
    if (dirty) all = rows_of(p_, p_.v, document, kv_head, first, keys.end, p_.value_size, w.copy);
    softmax_.tile(w, rows, first, keys, kept, uniform, dirty, all.data, all.stride);
    if constexpr (kPairs) {
      for (std::int64_t r = 0; r < rows; ++r) narrow_row(w.s + r * tile_ld_, begin, keys.end, w.weights + r * tile_ld_);
    }
    read(p_.v, p_.value_size, [&](Rows value, std::int64_t at, std::int64_t count) {
      const auto add = [&](const auto* x, std::int64_t stride, const auto* weights) {
        add_rows(x, stride, count, p_.value_size, rows, weights + begin + at, tile_ld_, w.out, value_ld_);
      };
      if (dirty) read_finite(p_.dtype, value.data, value.stride, count, p_.value_size, w.cleaned, value_ld_);
      if constexpr (kPairs) {
        add(dirty ? w.cleaned : static_cast<const E*>(value.data), dirty ? value_ld_ : value.stride, w.weights);
      } else if (dirty) {
        add(w.cleaned, value_ld_, w.s);
      } else {
        with_storage<T>(p_.dtype,
                        [&](auto tag) { add(static_cast<const decltype(tag)*>(value.data), value.stride, w.s); });
      }
    });
  }

  // Whether all rows read all keys of a tile, and of the vector it begins in.
  bool all_read(const Work& w, std::int64_t rows, Range keys, Kept kept) const {
    if (keys.begin % n != 0 || !kept.all_mask || p_.bias.data != nullptr) return false;
    for (std::int64_t r = 0; r < rows; ++r) {
      if (w.rows[r].from > keys.begin || w.rows[r].count < keys.end) return false;
    }
    return true;
  }

  const AttentionForward& p_;
  const Scores<T> scores_;
  const Longest longest_;
  const std::int64_t group_, kv_total_, size_ld_, value_ld_;
  const bool clean_;
  const std::int64_t key_block_, tile_ld_;
  const int threads_;
  const int parts_;
  const std::int64_t row_space_;
  const bool copied_;  // keys and values of a tile are copied together
  const Softmax softmax_;
  const std::int64_t work_size_, left_size_, partial_size_;
  Scratch<T> work_, partial_;
  Scratch<E> left_;
  Scratch<Row> rows_;
  const std::int64_t copy_size_;
  Scratch<char> copies_;
  Barrier barrier_;
  std::int64_t next_ = 0;
};

}  // namespace
}  // namespace seqkernels

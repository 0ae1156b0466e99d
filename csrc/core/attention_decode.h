// Attention of a handful of rows (decoding): not worth packing anything for. The keys are read once, as they lie, by
// dot products, and the threads share out ranges of keys where the heads are too few.
#pragma once

#include "core/attention_online.h"
#include "core/team.h"

namespace seqkernels {
namespace {

// out[r] (kRows, ldo) += sum over j of s[r][j] value[j], of `keys` rows as they lie, each of which is read once.
template <class T, int kRows, class S>
void add_rows(const S* value, std::int64_t stride, std::int64_t keys, std::int64_t size, const T* s, std::int64_t lds,
              T* out, std::int64_t ldo) {
  constexpr int n = kLanes<T>, kVectors = kVectorRegisters / 2 / kRows < 1   ? 1
                                          : kVectorRegisters / 2 / kRows > 4 ? 4
                                                                             : kVectorRegisters / 2 / kRows;
  constexpr std::int64_t kNear = 32;  // keys whose values stay in the first cache
  for (std::int64_t first = 0; first < keys; first += kNear) {
    const std::int64_t count = min_of(kNear, keys - first);
    for (std::int64_t column = 0; column < size; column += kVectors * n) {
      const std::int64_t left = size - column;
      Vec<T> sum[kRows][kVectors];
      const auto run = [&](auto load_at) {
#pragma GCC unroll 8
        for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 8
          for (int v = 0; v < kVectors; ++v) sum[r][v] = Vec<T>{};
        }
        for (std::int64_t j = first; j < first + count; ++j) {
          const S* at = value + j * stride + column;
          fetch(at, kVectors * n * static_cast<std::int64_t>(sizeof(S)));
          Vec<T> x[kVectors];
#pragma GCC unroll 8
          for (int v = 0; v < kVectors; ++v) x[v] = load_at(at, v);
#pragma GCC unroll 8
          for (int r = 0; r < kRows; ++r) {
            const T weight = s[r * lds + j];
#pragma GCC unroll 8
            for (int v = 0; v < kVectors; ++v) sum[r][v] += x[v] * weight;
          }
        }
      };
      if (left >= kVectors * n) {
        run([](const S* at, int v) { return load(at + v * n); });
      } else {
        run([left](const S* at, int v) { return left > v * n ? load(at + v * n, left - v * n) : Vec<T>{}; });
      }
#pragma GCC unroll 8
      for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 8
        for (int v = 0; v < kVectors; ++v) {
          if (v * n >= left) break;
          T* to = out + r * ldo + column + v * n;
          store_full(to, load_full(to) + sum[r][v]);
        }
      }
    }
  }
}

template <class T>
class Decode {
  using Softmax = OnlineSoftmax<T>;
  using Row = typename Softmax::Row;
  using Work = typename Softmax::Work;
  static constexpr int n = kLanes<T>;
  static constexpr std::int64_t kBlock = 256;  // keys of a tile

 public:
  explicit Decode(const AttentionForward& p)
      : p_(p),
        scores_(p, true),
        longest_(p),
        group_(p.heads / p.kv_heads),
        kv_total_(p.batch * p.kv_heads),
        size_ld_(round_up(p.head_size, n)),
        value_ld_(round_up(p.value_size, n)),
        clean_(masks_keys(p)),
        key_block_(min_of(kBlock, round_up(max_of<std::int64_t>(longest_.keys, 1), n))),
        tile_ld_(key_block_ + n),
        threads_(team_size(p.threads, 2.0 * static_cast<double>(p.batch * p.heads * p.queries) *
                                          static_cast<double>(keys_read(p)) *
                                          static_cast<double>(p.head_size + p.value_size))),
        parts_(parts()),
        row_space_(round_up(group_ * longest_.queries, n)),
        softmax_(p, scores_, tile_ld_, value_ld_, row_space_),
        work_size_(round_up(softmax_.size() + row_space_ * size_ld_ + (clean_ ? key_block_ * value_ld_ : 0), 64)),
        partial_size_(group_ * longest_.queries * softmax_.partial_size()),
        work_(threads_ * work_size_),
        partial_(parts_ > 1 ? kv_total_ * parts_ * partial_size_ : 0),
        rows_(threads_ * row_space_) {}

  void run() {
    run_team(threads_, [this](int thread, int threads) {
      T* at = work_.get() + thread * work_size_;
      const Work w = softmax_.carve(at, rows_.get() + thread * row_space_);
      T* q = at + softmax_.size();
      for (std::int64_t task; (task = __atomic_fetch_add(&next_, 1, __ATOMIC_RELAXED)) < kv_total_ * parts_;) {
        run_task(w, q, task);
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
  // Ranges of keys of one key head.
  int parts() const {
    const int most = static_cast<int>(min_of<std::int64_t>(ceil_div(longest_.keys, key_block_), 4 * threads_));
    int parts = 1;
    while (parts < most && kv_total_ * parts % threads_ != 0 && kv_total_ * parts < 4 * threads_) ++parts;
    return parts;
  }

  void run_task(const Work& w, T* q, std::int64_t task) {
    const std::int64_t kv = task / parts_, kv_head = kv % p_.kv_heads;
    const Document document(p_, kv / p_.kv_heads);
    const std::int64_t rows = group_ * document.queries;
    if (rows == 0) return;
    softmax_.start(w, document, kv_head, 0, rows);
    for_heads(group_, document.queries, kv_head, 0, rows,
              [&](std::int64_t head, std::int64_t query, std::int64_t at, std::int64_t count) {
                read_rows<T>(p_.dtype, element(p_.q.data, document.query_at(p_.q.stride, head, query), p_.dtype),
                             p_.q.stride[2], count, p_.head_size, scores_.of_q(), q + at * size_ld_, size_ld_);
              });
    for (std::int64_t i = rows * size_ld_; i < row_space_ * size_ld_; i += n) store_full(q + i, Vec<T>{});
    const Range read = document.all(p_);
    const std::int64_t first = read.begin / key_block_, blocks = ceil_div(read.end, key_block_) - first;
    const Share mine = share(max_of<std::int64_t>(0, blocks), static_cast<int>(task % parts_), parts_);
    for (std::int64_t block = mine.begin; block < mine.end; ++block)
      attend(w, q, document, kv_head, first + block, rows);
    if (parts_ == 1) {
      softmax_.finish(w, document, kv_head, 0, rows);
    } else {
      softmax_.save(w, rows, partial_.get() + task * partial_size_);
    }
  }

  void attend(const Work& w, T* q, const Document& document, std::int64_t kv_head, std::int64_t block,
              std::int64_t rows) const {
    const std::int64_t first = block * key_block_;
    const Range given = set_counts(w.rows, rows, first, min_of(key_block_, document.keys - first));
    if (given.begin >= given.end) return;
    const bool uniform = scores_.uniform(document, rows, 0);
    const Kept kept = scores_.look(w.rows, rows, first, given, uniform);
    const Range keys = kept.keys;
    if (keys.begin >= keys.end) return;
    const std::int64_t begin = keys.begin / n * n, width = keys.end - begin;
    const void* from = element(p_.k.data, document.key_at(p_.k.stride, kv_head, first + begin), p_.dtype);
    const void* values = element(p_.v.data, document.key_at(p_.v.stride, kv_head, first), p_.dtype);
    const void* read = element(values, begin * p_.v.stride[2], p_.dtype);
    multiply_rows(p_.dtype, from, p_.k.stride[2], width, p_.head_size, q, size_ld_, w.s + begin, tile_ld_, rows);
    const bool dirty = clean_ && !rows_are_finite<T>(p_.dtype, read, p_.v.stride[2], width, p_.value_size);
    softmax_.tile(w, rows, first, keys, kept, uniform, dirty, values, p_.v.stride[2]);
    T* copy = q + row_space_ * size_ld_;
    if (dirty) pack_depth(p_.dtype, read, p_.v.stride[2], width, p_.value_size, copy, value_ld_, true);
    with_rows<T>(rows, [&](auto count) {
      constexpr int kRows = decltype(count)::kValue;
      for (std::int64_t r = 0; r < rows; r += kRows) {
        const T* weights = w.s + r * tile_ld_ + begin;
        T* out = w.out + r * value_ld_;
        if (dirty) {
          add_rows<T, kRows>(copy, value_ld_, width, p_.value_size, weights, tile_ld_, out, value_ld_);
        } else {
          with_storage<T>(p_.dtype, [&](auto tag) {
            add_rows<T, kRows>(static_cast<const decltype(tag)*>(read), p_.v.stride[2], width, p_.value_size, weights,
                               tile_ld_, out, value_ld_);
          });
        }
      }
    });
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
  const Softmax softmax_;
  const std::int64_t work_size_, partial_size_;
  Scratch<T> work_, partial_;
  Scratch<Row> rows_;
  Barrier barrier_;
  std::int64_t next_ = 0;
};

}  // namespace
}  // namespace seqkernels

// Attention's rows of scores: which keys each may read, and how rows are cut into blocks.
//
// The queries of all heads that share a key head are numbered through: row r of key head h is query r % M of head
// h * group + r / M, with M the queries of the document at hand. A block of rows may span several heads where M is
// small.
#pragma once

#include "core/attention_tile.h"

namespace seqkernels {
namespace {

constexpr std::int64_t kFewRows = 8;  // rows of a key head up to which keys are not packed

// One entry of the batch.
struct Document {
  std::int64_t batch, queries, keys;  // without padding
  std::int64_t first_query, first_key;
  std::int64_t diagonal;      // query i is level with key i + diagonal
  const std::int32_t* pages;  // null where all keys are in one place
  std::int64_t page_size;

  Document(const AttentionScores& p, std::int64_t b)
      : batch(b),
        queries(p.queries),
        keys(p.keys),
        first_query(0),
        first_key(0),
        pages(p.block_table == nullptr ? nullptr : p.block_table + b * p.block_stride),
        page_size(p.page_size) {
    if (p.cu_seqlens_q != nullptr) {
      first_query = p.cu_seqlens_q[b];
      first_key = p.cu_seqlens_k[b];
      queries = min_of<std::int64_t>(queries, max_of<std::int64_t>(0, p.cu_seqlens_q[b + 1] - first_query));
      keys = min_of<std::int64_t>(keys, max_of<std::int64_t>(0, p.cu_seqlens_k[b + 1] - first_key));
    }
    if (p.key_lengths != nullptr) {
      keys = min_of<std::int64_t>(keys, max_of<std::int64_t>(0, p.key_lengths[b]));
    }
    diagonal = p.bottom_right ? keys - queries : 0;
  }

  // The keys that some of the queries from `first` to `last` may read.
  Range span(const AttentionScores& p, std::int64_t first, std::int64_t last) const {
    const std::int64_t begin = p.left < 0 ? 0 : max_of<std::int64_t>(0, first + diagonal - p.left);
    const std::int64_t end = p.right < 0 ? keys : min_of(keys, last + diagonal + p.right + 1);
    return begin < end ? Range{begin, end} : Range{0, 0};
  }
  Range all(const AttentionScores& p) const { return queries == 0 ? Range{0, 0} : span(p, 0, queries - 1); }

  std::int64_t query_at(const std::int64_t* stride, std::int64_t head, std::int64_t query) const {
    return batch * stride[0] + head * stride[1] + (first_query + query) * stride[2];
  }
  std::int64_t key_at(const std::int64_t* stride, std::int64_t head, std::int64_t key) const {
    if (pages != nullptr) return pages[key / page_size] * stride[0] + head * stride[1] + key % page_size * stride[2];
    return batch * stride[0] + head * stride[1] + (first_key + key) * stride[2];
  }
  // How many of the `count` keys from `key` on lie one stride behind the other.
  std::int64_t run(std::int64_t key, std::int64_t count) const {
    return pages == nullptr ? count : min_of(count, page_size - key % page_size);
  }
  std::int64_t lse_at(const AttentionScores& p, std::int64_t head, std::int64_t query) const {
    return batch * p.lse_stride[0] + head * p.lse_stride[1] + first_query + query;
  }
};

// Keys or values of a document.
struct Rows {
  const void* data;
  std::int64_t stride;
};

// Calls f(rows, at, count) for those of the `count` rows of k or v from key `first` on that lie in one page, and asks
// for what comes next from another.
template <class F>
inline void for_pages(const AttentionScores& p, const Strided& x, const Document& document, std::int64_t kv_head,
                      std::int64_t first, std::int64_t count, std::int64_t size, const F& f) {
  constexpr std::int64_t kNext = 32;
  const std::int64_t bytes = size * bytes_of(p.dtype), step = x.stride[2] * bytes_of(p.dtype);
  const auto row = [&](std::int64_t at) {
    return static_cast<const char*>(element(x.data, document.key_at(x.stride, kv_head, first + at), p.dtype));
  };
  for (std::int64_t at = 0, asked = 0, run; at < count; at += run) {
    run = document.run(first + at, count - at);
    asked = max_of(asked, at + run);
    for (const std::int64_t end = min_of(count, at + run + kNext); asked < end;) {
      const std::int64_t next = document.run(first + asked, end - asked);
      const char* from = row(asked);
      for (std::int64_t i = 0; i < next; ++i, from += step) {
        for (std::int64_t b = 0; b < bytes; b += 64) __builtin_prefetch(from + b, 0, 2);
      }
      asked += next;
    }
    f(Rows{row(at), x.stride[2]}, at, run);
  }
}

// These rows as they lie, or where several pages have them copied to `space`.
inline Rows rows_of(const AttentionScores& p, const Strided& x, const Document& document, std::int64_t kv_head,
                    std::int64_t first, std::int64_t count, std::int64_t size, void* space) {
  Rows found{space, size};
  const std::int64_t bytes = size * bytes_of(p.dtype), step = x.stride[2] * bytes_of(p.dtype);
  for_pages(p, x, document, kv_head, first, count, size, [&](Rows rows, std::int64_t at, std::int64_t run) {
    if (run == count) {
      found = rows;
      return;
    }
    for (std::int64_t i = 0; i < run; ++i) {
      std::memcpy(static_cast<char*>(space) + (at + i) * bytes, static_cast<const char*>(rows.data) + i * step,
                  static_cast<std::size_t>(bytes));
    }
  });
  return found;
}

// The most queries and keys that an entry has: what memory is taken for. There may be fewer than the call says.
struct Longest {
  std::int64_t queries = 0, keys = 0;

  explicit Longest(const AttentionScores& p) {
    if (p.cu_seqlens_q == nullptr && p.key_lengths == nullptr) {
      queries = p.queries;
      keys = p.keys;
      return;
    }
    for (std::int64_t b = 0; b < p.batch; ++b) {
      const Document document(p, b);
      queries = max_of(queries, document.queries);
      keys = max_of(keys, document.keys);
    }
  }
};

// One row of scores.
struct ScoreRow {
  Range keys;                // it may read
  std::int64_t from, count;  // and which keys of the tile at hand: [from, count)
  const std::uint8_t* mask;  // of its first key, or null
  const void* bias;
  float slope;         // of ALiBi, per key of distance
  std::int64_t level;  // the key at distance 0
  std::int64_t place;  // of its first weight among all, for dropout: its number of the row
};

// Sets which of the `count` keys from `first` each row may read; returns the first and the end of all.
template <class Row>
inline Range set_counts(Row* rows, std::int64_t size, std::int64_t first, std::int64_t count) {
  Range all{count, 0};
  for (std::int64_t r = 0; r < size; ++r) {
    const std::int64_t end = max_of<std::int64_t>(0, min_of(count, rows[r].keys.end - first));
    const std::int64_t begin = min_of(end, max_of<std::int64_t>(0, rows[r].keys.begin - first));
    rows[r].from = begin;
    rows[r].count = begin < end ? end : begin;
    if (begin < end) {
      all.begin = min_of(all.begin, begin);
      all.end = max_of(all.end, end);
    }
  }
  return all.begin < all.end ? all : Range{0, 0};
}

// The keys of the tile that some rows read, from a whole number of `unit` keys on.
template <class Row>
inline Range range_of_rows(const Row* rows, int size, std::int64_t unit) {
  Range all{rows[0].from, rows[0].count};
  for (int i = 1; i < size; ++i) {
    all.begin = min_of(all.begin, rows[i].from);
    all.end = max_of(all.end, rows[i].count);
  }
  all.begin = all.begin / unit * unit;
  return all;
}

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
template <class F>
inline void for_heads(std::int64_t group, std::int64_t queries, std::int64_t kv_head, std::int64_t first,
                      std::int64_t rows, const F& f) {
  for (std::int64_t at = 0; at < rows;) {
    const std::int64_t query = (first + at) % queries;
    const std::int64_t count = min_of(rows - at, queries - query);
    f(kv_head * group + (first + at) / queries, query, at, count);
    at += count;
  }
}

// The keys that some of the rows of a block may read.
inline Range keys_of_block(const AttentionScores& p, const Document& document, std::int64_t first, std::int64_t rows) {
  const std::int64_t query = first % document.queries;
  return query + rows > document.queries ? document.all(p) : document.span(p, query, query + rows - 1);
}

// Whether some rows may not read keys that others read: such keys must not reach them, whatever is in them.
inline bool masks_keys(const AttentionScores& p) {
  return p.mask.data != nullptr || p.bias.data != nullptr || p.left >= 0 || p.right >= 0;
}

// An estimate of how many keys a query reads.
inline std::int64_t keys_read(const AttentionScores& p) {
  const std::int64_t left = p.left < 0 ? p.keys : min_of(p.keys, p.left);
  const std::int64_t right = p.right < 0 ? p.keys : min_of(p.keys, p.right);
  return max_of<std::int64_t>(1, min_of(p.keys, left + right + 1));
}

// Describes the rows of a block. Row is a ScoreRow.
template <class Row>
inline void describe(const AttentionScores& p, const Document& document, std::int64_t kv_head, std::int64_t first,
                     std::int64_t rows, Row* out) {
  for_heads(p.heads / p.kv_heads, document.queries, kv_head, first, rows,
            [&](std::int64_t head, std::int64_t query, std::int64_t at, std::int64_t count) {
              for (std::int64_t i = 0; i < count; ++i) {
                ScoreRow& row = out[at + i];
                const std::int64_t* mask = p.mask.stride;
                const std::int64_t* bias = p.bias.stride;
                row.keys = document.span(p, query + i, query + i);
                row.level = query + i + document.diagonal;
                row.mask = p.mask.data == nullptr
                               ? nullptr
                               : static_cast<const std::uint8_t*>(p.mask.data) + document.batch * mask[0] +
                                     head * mask[1] + (query + i) * mask[2];
                row.bias = p.bias.data == nullptr
                               ? nullptr
                               : element(p.bias.data, document.batch * bias[0] + head * bias[1] + (query + i) * bias[2],
                                         p.bias_dtype);
                row.slope = p.slopes == nullptr
                                ? 0.0f
                                : p.slopes[document.batch * p.slope_stride[0] + head * p.slope_stride[1]];
                row.place = (document.batch * p.heads + head) * p.queries + query + i;
              }
            });
}

}  // namespace
}  // namespace seqkernels

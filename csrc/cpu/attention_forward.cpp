// Attention's forward pass on the CPU: tiles of scores with online softmax.
//
// Keys are transposed into panels, once for all query heads that share them, and a block of rows goes through the
// keys tile by tile: products by the micro-kernel, scores, maximum, weights e^(score - maximum), and the product with
// the values added to the output that is kept in float. With one key head per task the panels are the thread's own and
// stay in its cache; with few key heads they are packed by all threads together, which then share out the blocks of
// rows. Tiles that no row of a block may read are passed over. A handful of rows go to attention_decode.h.
#include "core/attention_decode.h"
#include "core/attention_online.h"
#include "core/kernels.h"
#include "core/team.h"

namespace seqkernels {
namespace {

constexpr std::int64_t kRowBlock = 48;           // rows of a tile: a multiple of the micro-kernel's
constexpr std::int64_t kKeyBlock = 256;          // keys of a tile: a multiple of a panel
constexpr std::int64_t kDepthBlock = 128;        // values whose rows stay in the first cache over all rows of a tile
constexpr std::int64_t kPackedBytes = 64 << 20;  // of keys and values packed at a time

// T computes, E is multiplied.
template <class T, class E>
class Forward {
  using Softmax = OnlineSoftmax<T>;
  using Row = typename Softmax::Row;
  static constexpr int n = kLanes<T>;
  static constexpr bool kPairs = sizeof(E) == 2;

 public:
  explicit Forward(const AttentionForward& p)
      : p_(p),
        scores_(p, !kPairs),
        longest_(p),
        group_(p.heads / p.kv_heads),
        kv_total_(p.batch * p.kv_heads),
        size_ld_(kPairs ? padded_depth<E>(p.head_size) : round_up(p.head_size, n)),
        value_ld_(round_up(p.value_size, n)),
        clean_(masks_keys(p)),
        key_block_(min_of(kKeyBlock, round_up(max_of<std::int64_t>(longest_.keys, 1), n))),
        key_blocks_(ceil_div(longest_.keys, key_block_)),
        tile_ld_(key_block_ + n),
        threads_(team_size(p.threads, 2.0 * static_cast<double>(p.batch * p.heads * p.queries) *
                                          static_cast<double>(keys_read(p)) *
                                          static_cast<double>(p.head_size + p.value_size))),
        direct_(!kPairs && is_compute<T>(p.dtype) && p.value_size % n == 0 && p.v.stride[2] == p.value_size &&
                p.block_table == nullptr),
        own_(threads_ == 1 || kv_total_ >= 8 * threads_),
        row_space_(round_up(min_of(kRowBlock, group_ * longest_.queries), n)),
        softmax_(p, scores_, tile_ld_, value_ld_, row_space_),
        panel_size_(round_up(longest_.keys, n) * padded_depth<E>(p.head_size)),
        values_size_(direct_ && !clean_ ? 0 : round_up(longest_.keys, 2) * value_ld_),
        slots_(own_ ? threads_ : slots()),
        rounds_(own_ ? 1 : ceil_div(kv_total_, slots_)),
        work_size_(softmax_.size()),
        left_size_(round_up(row_space_ * size_ld_ + (kPairs ? row_space_ * tile_ld_ : 0), 64)),
        work_(threads_ * work_size_),
        left_(threads_ * left_size_),
        packed_(slots_ * (panel_size_ + values_size_)),
        rows_(threads_ * row_space_),
        state_(slots_ * key_blocks_),
        lengths_(scores_.fades() ? slots_ * key_blocks_ : 0),
        next_(rounds_),
        copy_size_(p.block_table == nullptr ? 0 : key_block_ * max_of(p.head_size, p.value_size) * bytes_of(p.dtype)),
        copies_(threads_ * copy_size_) {
    for (std::int64_t i = 0; i < rounds_; ++i) next_.get()[i] = 0;
  }

  void run() {
    run_team(threads_, [this](int thread, int threads) {
      Work w;
      static_cast<typename Softmax::Work&>(w) =
          softmax_.carve(work_.get() + thread * work_size_, rows_.get() + thread * row_space_);
      w.q = left_.get() + thread * left_size_;
      w.weights = w.q + row_space_ * size_ld_;
      w.copy = copies_.get() + thread * copy_size_;
      if (own_) {
        for (std::int64_t kv; (kv = take(0)) < kv_total_;) run_own(w, kv, thread);
      } else {
        for (std::int64_t round = 0; round < rounds_; ++round) run_shared(w, round, thread, threads);
      }
    });
  }

 private:
  struct Work : Softmax::Work {
    E* q;        // (rows, D)
    E* weights;  // (rows, keys of a tile) where they are not multiplied as they are
    char* copy;  // rows of keys or values that several pages hold
  };

  std::int64_t slots() const {
    const std::int64_t bytes = (panel_size_ + values_size_) * static_cast<std::int64_t>(sizeof(E));
    return max_of<std::int64_t>(1, min_of(kv_total_, kPackedBytes / max_of<std::int64_t>(1, bytes)));
  }

  std::int64_t width_of(std::int64_t block, const Document& document) const {
    return min_of(key_block_, document.keys - block * key_block_);
  }
  RowBlocks blocks_of(const Document& document) const {
    return RowBlocks(group_ * document.queries, document.queries, kRowBlock);
  }
  // The blocks of keys that some query of the document may read.
  Range blocks_read(const Document& document) const {
    const Range keys = document.all(p_);
    return {keys.begin / key_block_, ceil_div(keys.end, key_block_)};
  }

  void run_own(const Work& w, std::int64_t kv, int slot) {
    const Document document(p_, kv / p_.kv_heads);
    const Range read = blocks_read(document);
    for (std::int64_t block = read.begin; block < read.end; ++block) pack(w, document, kv, slot, block);
    const std::int64_t count = blocks_of(document).count;
    for (std::int64_t i = 0; i < count; ++i) attend(w, document, kv, slot, i);
  }

  void run_shared(const Work& w, std::int64_t round, int thread, int threads) {
    const std::int64_t first = round * slots_, count = min_of(slots_, kv_total_ - first);
    const Share mine = share(count * key_blocks_, thread, threads);
    for (std::int64_t i = mine.begin; i < mine.end; ++i) {
      const std::int64_t kv = first + i / key_blocks_, block = i % key_blocks_;
      const Document document(p_, kv / p_.kv_heads);
      const Range read = blocks_read(document);
      if (block >= read.begin && block < read.end) pack(w, document, kv, kv - first, block);
    }
    barrier_.wait(threads);
    // Last blocks first: under causality they have the most keys.
    const std::int64_t most = RowBlocks(group_ * longest_.queries, longest_.queries, kRowBlock).count;
    for (std::int64_t i; (i = take(round)) < count * most;) {
      const std::int64_t kv = first + i % count, index = most - 1 - i / count;
      const Document document(p_, kv / p_.kv_heads);
      if (index < blocks_of(document).count) attend(w, document, kv, kv - first, index);
    }
    barrier_.wait(threads);
  }

  std::int64_t take(std::int64_t round) { return __atomic_fetch_add(next_.get() + round, 1, __ATOMIC_RELAXED); }

  E* panels(std::int64_t slot) const { return packed_.get() + slot * (panel_size_ + values_size_); }
  E* values(std::int64_t slot, std::int64_t first) const { return panels(slot) + panel_size_ + first * value_ld_; }
  Rows values_at(const Work& w, const Document& document, std::int64_t kv, std::int64_t first,
                 std::int64_t count) const {
    return rows_of(p_, p_.v, document, kv % p_.kv_heads, first, count, p_.value_size, w.copy);
  }

  void pack(const Work& w, const Document& document, std::int64_t kv, std::int64_t slot, std::int64_t block) {
    const std::int64_t first = block * key_block_, count = width_of(block, document);
    const Rows keys = rows_of(p_, p_.k, document, kv % p_.kv_heads, first, count, p_.head_size, w.copy);
    pack_panels(p_.dtype, keys.data, keys.stride, count, p_.head_size,
                panels(slot) + first * padded_depth<E>(p_.head_size));
    // The length of keys is taken before values take the place of their copy.
    const T length =
        scores_.fades() ? lengths_of<T>(p_.dtype, keys.data, keys.stride, count, p_.head_size, nullptr) : T(0);
    // Values are copied where they cannot be read as they lie.
    const Rows from = values_at(w, document, kv, first, count);
    const bool finite =
        !(clean_ || scores_.fades()) || rows_are_finite<T>(p_.dtype, from.data, from.stride, count, p_.value_size);
    const bool dirty = clean_ && !finite;
    state_.get()[slot * key_blocks_ + block] = dirty ? Softmax::kDirty : direct_ ? Softmax::kDirect : Softmax::kPacked;
    if (scores_.fades()) lengths_.get()[slot * key_blocks_ + block] = finite ? length : kInfinity<T>;
    if (dirty || !direct_) {
      pack_depth(p_.dtype, from.data, from.stride, count, p_.value_size, values(slot, first), value_ld_, dirty);
    }
  }

  void attend(const Work& w, const Document& document, std::int64_t kv, std::int64_t slot, std::int64_t index) {
    const RowBlocks blocks = blocks_of(document);
    const std::int64_t first_row = blocks.begin(index), rows = blocks.length(index), kv_head = kv % p_.kv_heads;
    softmax_.start(w, document, kv_head, first_row, rows);
    for_heads(group_, document.queries, kv_head, first_row, rows,
              [&](std::int64_t head, std::int64_t query, std::int64_t at, std::int64_t count) {
                read_left(p_.dtype, element(p_.q.data, document.query_at(p_.q.stride, head, query), p_.dtype),
                          p_.q.stride[2], count, p_.head_size, scores_.of_q(), w.q + at * size_ld_, size_ld_);
              });
    if (scores_.fades()) take_far(w, document, kv, slot, first_row, rows);
    const bool uniform = scores_.uniform(document, rows, first_row);
    const Range read = keys_of_block(p_, document, first_row, rows);
    for (std::int64_t block = read.begin / key_block_; block * key_block_ < read.end; ++block) {
      const std::int64_t first = block * key_block_, width = width_of(block, document);
      const Range given = set_counts(w.rows, rows, first, width);
      if (given.begin >= given.end) continue;
      const Kept kept = scores_.look(w.rows, rows, first, given, uniform);
      const Range keys = kept.keys;
      if (keys.begin >= keys.end) continue;
      multiply_panels(width, keys, p_.head_size, w.q, size_ld_, panels(slot) + first * padded_depth<E>(p_.head_size),
                      w.s, tile_ld_, w.rows, rows);
      const std::uint8_t state = state_.get()[slot * key_blocks_ + block];
      Rows from{};
      if (state != Softmax::kPacked) from = values_at(w, document, kv, first, width);
      softmax_.tile(w, rows, first, keys, kept, uniform, state == Softmax::kDirty, from.data, from.stride);
      if constexpr (kPairs) {
        for (std::int64_t r = 0; r < rows; ++r) {
          narrow_row(w.s + r * tile_ld_, keys.begin / n * n, keys.end, w.weights + r * tile_ld_);
        }
        add_values(w, w.weights, rows, keys, values(slot, first), value_ld_);
      } else if (state == Softmax::kDirect) {
        add_values(w, w.s, rows, keys, static_cast<const T*>(from.data), from.stride);
      } else {
        add_values(w, w.s, rows, keys, values(slot, first), value_ld_);
      }
    }
    softmax_.finish(w, document, kv_head, first_row, rows);
  }

  void take_far(const Work& w, const Document& document, std::int64_t kv, std::int64_t slot, std::int64_t first,
                std::int64_t rows) const {
    const Range read = blocks_read(document);
    T longest = T(0);
    for (std::int64_t block = read.begin; block < read.end; ++block) {
      longest = longer(longest, lengths_.get()[slot * key_blocks_ + block]);
    }
    T lengths[kRowBlock];
    for_heads(group_, document.queries, kv % p_.kv_heads, first, rows,
              [&](std::int64_t head, std::int64_t query, std::int64_t at, std::int64_t count) {
                lengths_of<T>(p_.dtype, element(p_.q.data, document.query_at(p_.q.stride, head, query), p_.dtype),
                              p_.q.stride[2], count, p_.head_size, lengths + at);
              });
    for (std::int64_t r = 0; r < rows; ++r) {
      Row& row = w.rows[r];
      const T largest = scores_.largest(lengths[r], longest);
      const std::int64_t before = row.keys.begin - row.level, behind = row.level - row.keys.end + 1;
      const auto nearest = static_cast<T>(max_of<std::int64_t>(0, max_of(before, behind)));
      scores_.take_far(row, largest, -largest - nearest * static_cast<T>(row.slope));
    }
  }

  void add_values(const Work& w, const E* weights, std::int64_t rows, Range keys, const E* values,
                  std::int64_t stride) const {
    for (std::int64_t first = keys.begin / n * n; first < keys.end; first += kDepthBlock) {
      const std::int64_t last = min_of(keys.end, first + kDepthBlock);
      product<T, Layout::kRows, true>(rows, value_ld_ / n, weights, tile_ld_, values, stride, w.out, value_ld_,
                                      [&](std::int64_t m, int count) {
                                        const Range read = range_of_rows(w.rows + m, count, 2);
                                        return Range{max_of(first, read.begin), min_of(last, read.end)};
                                      });
    }
  }

  const AttentionForward& p_;
  const Scores<T> scores_;
  const Longest longest_;
  const std::int64_t group_, kv_total_, size_ld_, value_ld_;
  const bool clean_;  // values that are not finite must not reach rows that do not read them
  const std::int64_t key_block_, key_blocks_, tile_ld_;
  const int threads_;
  const bool direct_;  // values can be read as they lie
  const bool own_;     // threads pack whole key heads for themselves
  const std::int64_t row_space_;
  const Softmax softmax_;
  const std::int64_t panel_size_, values_size_;
  const std::int64_t slots_, rounds_;  // key heads packed at a time, and how often
  const std::int64_t work_size_, left_size_;
  Scratch<T> work_;
  Scratch<E> left_, packed_;
  Scratch<Row> rows_;
  Scratch<std::uint8_t> state_;
  Scratch<T> lengths_;  // the largest of the keys of a block
  Scratch<std::int64_t> next_;
  const std::int64_t copy_size_;
  Scratch<char> copies_;
  Barrier barrier_;
};

template <class T, class E>
void forward(const AttentionForward& p) {
  if (p.heads / p.kv_heads * Longest(p).queries <= kFewRows) {
    Decode<T, E>(p).run();
  } else {
    Forward<T, E>(p).run();
  }
}

}  // namespace

void SEQKERNELS_ENTRY(attention_forward)(const AttentionForward& p) {
  if (p.batch * p.heads * p.queries == 0) return;
  if (p.dtype == DType::kFloat64) return forward<double, double>(p);
#if defined(SEQKERNELS_DOT16)
  if (multiplies_bfloat16(p)) return forward<float, BFloat16>(p);
#endif
  forward<float, float>(p);
}

}  // namespace seqkernels

// Attention's forward pass on the CPU: tiles of scores with online softmax.
//
// Keys are transposed into panels, once for all query heads that share them, and a block of rows goes through the
// keys tile by tile: scores by the micro-kernel, maximum, weights e^(score - maximum), and the product with the values
// added to the output that is kept in float. With one key head per task the panels are the thread's own and stay in
// its cache; with few key heads they are packed by all threads together, which then share out the blocks of rows.
//
// A handful of rows (decoding) are not worth packing: there the keys are read once, as they lie, by dot products, and
// the threads share out ranges of keys where the heads are too few.
#include "core/attention_rows.h"
#include "core/kernels.h"
#include "core/team.h"

namespace seqkernels {
namespace {

constexpr std::int64_t kRowBlock = 48;           // rows of a tile: a multiple of the micro-kernel's
constexpr std::int64_t kKeyBlock = 256;          // keys of a tile: a multiple of a panel
constexpr std::int64_t kDepthBlock = 128;        // values whose rows stay in the first cache over all rows of a tile
constexpr std::int64_t kPackedBytes = 64 << 20;  // of keys and values packed at a time

template <class T>
class Forward {
  using V = Vec<T>;
  static constexpr int n = kLanes<T>;

 public:
  explicit Forward(const AttentionForward& p)
      : p_(p),
        masks_(p),
        group_(p.heads / p.kv_heads),
        kv_total_(p.batch * p.kv_heads),
        keys_(p.is_causal ? min_of(p.keys, p.queries) : p.keys),
        size_ld_(round_up(p.head_size, n)),
        value_ld_(round_up(p.value_size, n)),
        few_(group_ * p.queries <= kFewRows),
        clean_(masks_.any() || p.is_causal),
        blocks_(group_ * p.queries, p.queries, few_ ? kFewRows : kRowBlock),
        key_block_(min_of(kKeyBlock, round_up(max_of<std::int64_t>(keys_, 1), n))),
        key_blocks_(ceil_div(keys_, key_block_)),
        tile_ld_(key_block_ + n),
        threads_(team_size(p.threads, 2.0 * static_cast<double>(p.batch * p.heads * p.queries * keys_) *
                                          static_cast<double>(p.head_size + p.value_size))),
        direct_(is_compute<T>(p.dtype) && p.value_size % n == 0 && (few_ || p.v.stride[2] == p.value_size)),
        parts_(few_ ? parts() : 1),
        own_(threads_ == 1 || kv_total_ >= 8 * threads_),
        slots_(few_   ? 0
               : own_ ? threads_
                      : slots()),
        rounds_(few_ || own_ ? 1 : ceil_div(kv_total_, slots_)),
        row_space_(round_up(blocks_.size, n)),
        work_size_(row_space_ * (size_ld_ + tile_ld_ + value_ld_ + n + 2) + tile_ld_ +
                   (few_ && (clean_ || !direct_) ? key_block_ * value_ld_ : 0)),
        panel_size_(round_up(keys_, n) * p.head_size),
        values_size_(direct_ && !clean_ ? 0 : keys_ * value_ld_),
        partial_size_(blocks_.size * (value_ld_ + 2)),
        work_(threads_ * work_size_),
        packed_(slots_ * (panel_size_ + values_size_)),
        partial_(parts_ > 1 ? kv_total_ * parts_ * partial_size_ : 0),
        rows_(threads_ * row_space_),
        state_(slots_ * key_blocks_),
        next_(rounds_) {
    for (std::int64_t i = 0; i < rounds_; ++i) next_.get()[i] = 0;
  }

  void run() {
    if (p_.batch * p_.heads * p_.queries == 0) return;
    run_team(threads_, [this](int thread, int threads) {
      T* at = work_.get() + thread * work_size_;
      Work w;
      w.q = at;
      w.s = w.q + row_space_ * size_ld_;
      w.out = w.s + row_space_ * tile_ld_;
      w.sum = w.out + row_space_ * value_ld_;
      w.top = w.sum + row_space_ * n;
      w.fade = w.top + row_space_;
      w.add = w.fade + row_space_;
      w.values = w.add + tile_ld_;
      w.rows = rows_.get() + thread * row_space_;
      if (few_) {
        run_few(w, thread, threads);
      } else if (own_) {
        run_own(w, thread);
      } else {
        for (std::int64_t round = 0; round < rounds_; ++round) run_shared(w, round, thread, threads);
      }
    });
  }

 private:
  struct Row : ScoreRow {
    bool poisoned;  // it reads a value that is not finite
  };

  struct Work {
    T* q;       // (rows, D) scaled
    T* s;       // (rows, keys of a tile) scores, then weights
    T* out;     // (rows, Dv) not yet divided by the sum
    T* sum;     // (rows, lanes) of weights
    T* top;     // (rows) maximum of the scores
    T* fade;    // (rows) what a new maximum multiplies out and sum by
    T* add;     // (keys of a tile)
    T* values;  // (keys of a tile, Dv)
    Row* rows;
  };

  // State of a packed block of keys.
  enum : std::uint8_t { kDirect, kPacked, kDirty };

  int parts() const {
    const int most = static_cast<int>(min_of<std::int64_t>(key_blocks_, 4 * threads_));
    int parts = 1;
    while (parts < most && kv_total_ * parts % threads_ != 0 && kv_total_ * parts < 4 * threads_) ++parts;
    return parts;
  }

  std::int64_t slots() const {
    const std::int64_t bytes = keys_ * (p_.head_size + value_ld_) * static_cast<std::int64_t>(sizeof(T));
    return max_of<std::int64_t>(1, min_of(kv_total_, kPackedBytes / max_of<std::int64_t>(1, bytes)));
  }

  const void* keys_of(std::int64_t kv, std::int64_t first) const {
    return element(p_.k.data,
                   kv / p_.kv_heads * p_.k.stride[0] + kv % p_.kv_heads * p_.k.stride[1] + first * p_.k.stride[2],
                   p_.dtype);
  }
  const void* values_of(std::int64_t kv, std::int64_t first) const {
    return element(p_.v.data,
                   kv / p_.kv_heads * p_.v.stride[0] + kv % p_.kv_heads * p_.v.stride[1] + first * p_.v.stride[2],
                   p_.dtype);
  }
  std::int64_t width_of(std::int64_t block) const { return min_of(key_block_, keys_ - block * key_block_); }

  void run_own(const Work& w, int thread) {
    for (std::int64_t kv; (kv = take(0)) < kv_total_;) {
      for (std::int64_t block = 0; block < key_blocks_; ++block) pack(kv, thread, block);
      for (std::int64_t i = 0; i < blocks_.count; ++i) attend(w, kv, thread, i);
    }
  }

  void run_shared(const Work& w, std::int64_t round, int thread, int threads) {
    const std::int64_t first = round * slots_, count = min_of(slots_, kv_total_ - first);
    const Share mine = share(count * key_blocks_, thread, threads);
    for (std::int64_t i = mine.begin; i < mine.end; ++i)
      pack(first + i / key_blocks_, i / key_blocks_, i % key_blocks_);
    barrier_.wait(threads);
    // Last blocks first: under causality they have the most keys.
    for (std::int64_t i; (i = take(round)) < count * blocks_.count;) {
      attend(w, first + i % count, i % count, blocks_.count - 1 - i / count);
    }
    barrier_.wait(threads);
  }

  std::int64_t take(std::int64_t round) { return __atomic_fetch_add(next_.get() + round, 1, __ATOMIC_RELAXED); }

  T* panels(std::int64_t slot) const { return packed_.get() + slot * (panel_size_ + values_size_); }

  void pack(std::int64_t kv, std::int64_t slot, std::int64_t block) {
    const std::int64_t first = block * key_block_, count = width_of(block);
    pack_panels<T>(p_.dtype, keys_of(kv, first), p_.k.stride[2], count, p_.head_size,
                   panels(slot) + first * p_.head_size);
    state_.get()[slot * key_blocks_ + block] =
        prepare_values(kv, first, count, panels(slot) + panel_size_ + first * value_ld_);
  }

  // Copies the values of some keys where they cannot be read as they lie.
  std::uint8_t prepare_values(std::int64_t kv, std::int64_t first, std::int64_t count, T* to) const {
    const void* from = values_of(kv, first);
    const bool dirty = clean_ && !rows_are_finite<T>(p_.dtype, from, p_.v.stride[2], count, p_.value_size);
    if (direct_ && !dirty) return kDirect;
    read_rows<T>(p_.dtype, from, p_.v.stride[2], count, p_.value_size, T(1), to, value_ld_);
    if (!dirty) return kPacked;
    clean(to, count * value_ld_);
    return kDirty;
  }

  void begin(const Work& w, std::int64_t kv, std::int64_t first, std::int64_t rows) const {
    const std::int64_t batch = kv / p_.kv_heads, kv_head = kv % p_.kv_heads;
    for_heads(p_, kv_head, first, rows,
              [&](std::int64_t head, std::int64_t query, std::int64_t at, std::int64_t count) {
                const std::int64_t offset = batch * p_.q.stride[0] + head * p_.q.stride[1] + query * p_.q.stride[2];
                read_rows<T>(p_.dtype, element(p_.q.data, offset, p_.dtype), p_.q.stride[2], count, p_.head_size,
                             static_cast<T>(p_.scale), w.q + at * size_ld_, size_ld_);
              });
    masks_.describe(batch, kv_head, first, rows, keys_, w.rows);
    for (std::int64_t r = 0; r < rows; ++r) w.rows[r].poisoned = false;
    for (std::int64_t r = 0; r < row_space_; ++r) w.top[r] = -kInfinity<T>;
    for (std::int64_t i = 0; i < rows * value_ld_; i += n) store_full(w.out + i, V{});
    for (std::int64_t i = 0; i < rows * n; i += n) store_full(w.sum + i, V{});
  }

  void attend(const Work& w, std::int64_t kv, std::int64_t slot, std::int64_t index) {
    const std::int64_t first_row = blocks_.begin(index), rows = blocks_.length(index);
    begin(w, kv, first_row, rows);
    const bool uniform = masks_.uniform(rows, first_row);
    for (std::int64_t block = 0; block < key_blocks_; ++block) {
      const std::int64_t first = block * key_block_;
      const std::int64_t width = set_counts(w.rows, rows, first, width_of(block));
      if (width == 0) break;
      if (uniform && !masks_.additive(w.rows[0], first, width, w.add)) continue;
      multiply_panels<T>(width_of(block), width, p_.head_size, w.q, size_ld_, panels(slot) + first * p_.head_size, w.s,
                         tile_ld_, w.rows, rows);
      const std::uint8_t state = state_.get()[slot * key_blocks_ + block];
      if (state == kDirect) {
        softmax_tile(w, kv, rows, first, width, uniform, false, block == 0);
        add_values(w, rows, width, static_cast<const T*>(values_of(kv, first)), p_.v.stride[2]);
      } else {
        softmax_tile(w, kv, rows, first, width, uniform, state == kDirty, block == 0);
        add_values(w, rows, width, panels(slot) + panel_size_ + first * value_ld_, value_ld_);
      }
    }
    finish(w, kv, first_row, rows);
  }

  // From the scores of a tile to its weights; out and sum are brought to the new maxima.
  void softmax_tile(const Work& w, std::int64_t kv, std::int64_t rows, std::int64_t first, std::int64_t width,
                    bool uniform, bool dirty, bool fresh) const {
    for (std::int64_t r = 0; r < rows; ++r) {
      T* s = w.s + r * tile_ld_;
      const std::int64_t count = w.rows[r].count;
      if (masks_.any() && !uniform) masks_.additive(w.rows[r], first, count, w.add);
      w.fade[r] = masks_.any() ? top_score(s, count, w.add) : top_score(s, count);
    }
    if (dirty) find_poisoned(w, kv, rows, first, width);
    for (std::int64_t r = 0; r < rows; r += n) {
      const V old = load_full(w.top + r), top = max<T>(load_full(w.fade + r), old);
      const V base = top == -kInfinity<T> ? V{} : top;
      store_full(w.top + r, top);
      store_full(w.fade + r, weight_of<T>(old - base));
    }
    const std::int64_t end = round_up(width, n);
    for (std::int64_t r = 0; r < rows; ++r) {
      T* s = w.s + r * tile_ld_;
      const T top = w.top[r] == -kInfinity<T> ? T(0) : w.top[r];
      V sum = load_full(w.sum + r * n) * w.fade[r];
      std::int64_t j = 0;
      for (; j < w.rows[r].count; j += n) {
        const V x = weight_of<T>(load_full(s + j) - top);
        store_full(s + j, x);
        sum += x;
      }
      for (; j < end; j += n) store_full(s + j, V{});
      store_full(w.sum + r * n, sum);
      if (!fresh && w.fade[r] != T(1)) {
        T* out = w.out + r * value_ld_;
        for (std::int64_t i = 0; i < value_ld_; i += n) store_full(out + i, load_full(out + i) * w.fade[r]);
      }
    }
  }

  // Rows that read a value that is not finite become NaN; the value itself has been replaced by 0.
  void find_poisoned(const Work& w, std::int64_t kv, std::int64_t rows, std::int64_t first, std::int64_t width) const {
    for (std::int64_t j = 0; j < width; ++j) {
      if (rows_are_finite<T>(p_.dtype, values_of(kv, first + j), 0, 1, p_.value_size)) continue;
      for (std::int64_t r = 0; r < rows; ++r) {
        if (j < w.rows[r].count && w.s[r * tile_ld_ + j] != -kInfinity<T>) w.rows[r].poisoned = true;
      }
    }
  }

  void add_values(const Work& w, std::int64_t rows, std::int64_t width, const T* values, std::int64_t stride) const {
    for (std::int64_t first = 0; first < width; first += kDepthBlock) {
      const std::int64_t depth = min_of(kDepthBlock, width - first);
      product<T, Layout::kRows, true>(
          rows, value_ld_ / n, w.s + first, tile_ld_, values + first * stride, stride, w.out, value_ld_,
          [&](std::int64_t m, int count) { return Range{0, min_of(depth, most_of(w.rows + m, count) - first)}; });
    }
  }

  void finish(const Work& w, std::int64_t kv, std::int64_t first, std::int64_t rows) const {
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
    const std::int64_t batch = kv / p_.kv_heads;
    T* lse = static_cast<T*>(p_.lse);
    for_heads(p_, kv % p_.kv_heads, first, rows,
              [&](std::int64_t head, std::int64_t query, std::int64_t at, std::int64_t count) {
                const std::int64_t* stride = p_.out.stride;
                const std::int64_t offset = batch * stride[0] + head * stride[1] + query * stride[2];
                write_rows<T>(p_.dtype, w.out + at * value_ld_, value_ld_, count, p_.value_size, w.fade + at, 1,
                              element(p_.out.data, offset, p_.dtype), stride[2]);
                std::memcpy(lse + (batch * p_.heads + head) * p_.queries + query, w.top + at, count * sizeof(T));
              });
  }

  // Few rows: tasks are ranges of keys of a key head.
  void run_few(const Work& w, int thread, int threads) {
    const std::int64_t rows = blocks_.size;
    for (std::int64_t task; (task = take(0)) < kv_total_ * parts_;) {
      const std::int64_t kv = task / parts_;
      const int part = static_cast<int>(task % parts_);
      begin(w, kv, 0, rows);
      const Share mine = share(key_blocks_, part, parts_);
      for (std::int64_t block = mine.begin; block < mine.end; ++block) attend_few(w, kv, block, block == mine.begin);
      if (parts_ == 1) {
        finish(w, kv, 0, rows);
      } else {
        save(w, partial_.get() + task * partial_size_);
      }
    }
    if (parts_ == 1) return;
    barrier_.wait(threads);
    const Share mine = share(kv_total_, thread, threads);
    for (std::int64_t kv = mine.begin; kv < mine.end; ++kv) {
      begin(w, kv, 0, rows);
      for (int part = 0; part < parts_; ++part) merge(w, partial_.get() + (kv * parts_ + part) * partial_size_);
      finish(w, kv, 0, rows);
    }
  }

  void attend_few(const Work& w, std::int64_t kv, std::int64_t block, bool is_first) const {
    const std::int64_t rows = blocks_.size, first = block * key_block_;
    const std::int64_t width = set_counts(w.rows, rows, first, width_of(block));
    if (width == 0) return;
    const bool uniform = masks_.uniform(rows, 0);
    if (uniform && !masks_.additive(w.rows[0], first, width, w.add)) return;
    multiply_rows<T>(p_.dtype, keys_of(kv, first), p_.k.stride[2], width, p_.head_size, w.q, size_ld_, w.s, tile_ld_,
                     rows);
    const std::uint8_t state = prepare_values(kv, first, width, w.values);
    softmax_tile(w, kv, rows, first, width, uniform, state == kDirty, is_first);
    const bool direct = state == kDirect;
    add_values(w, rows, width, direct ? static_cast<const T*>(values_of(kv, first)) : w.values,
               direct ? p_.v.stride[2] : value_ld_);
  }

  // A part's result: out, maximum and sum of each row (NaN where it is poisoned).
  void save(const Work& w, T* to) const {
    for (std::int64_t r = 0; r < blocks_.size; ++r, to += value_ld_ + 2) {
      std::memcpy(to, w.out + r * value_ld_, value_ld_ * sizeof(T));
      to[value_ld_] = w.top[r];
      to[value_ld_ + 1] = reduce_add<T>(load_full(w.sum + r * n));
      if (w.rows[r].poisoned) to[0] = T(__builtin_nan(""));
    }
  }

  void merge(const Work& w, const T* from) const {
    for (std::int64_t r = 0; r < blocks_.size; ++r, from += value_ld_ + 2) {
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

  const AttentionForward& p_;
  const Masks<T, AttentionForward> masks_;
  const std::int64_t group_, kv_total_, keys_, size_ld_, value_ld_;
  const bool few_;
  const bool clean_;  // values that are not finite must not reach rows that do not read them
  const RowBlocks blocks_;
  const std::int64_t key_block_, key_blocks_, tile_ld_;
  const int threads_;
  const bool direct_;                  // values can be read as they lie
  const int parts_;                    // ranges of keys of one key head, with few rows
  const bool own_;                     // threads pack whole key heads for themselves
  const std::int64_t slots_, rounds_;  // key heads packed at a time, and how often
  const std::int64_t row_space_, work_size_, panel_size_, values_size_, partial_size_;
  Scratch<T> work_, packed_, partial_;
  Scratch<Row> rows_;
  Scratch<std::uint8_t> state_;
  Scratch<std::int64_t> next_;
  Barrier barrier_;
};

}  // namespace

void SEQKERNELS_ENTRY(attention_forward)(const AttentionForward& p) {
  if (p.dtype == DType::kFloat64) {
    Forward<double>(p).run();
  } else {
    Forward<float>(p).run();
  }
}

}  // namespace seqkernels

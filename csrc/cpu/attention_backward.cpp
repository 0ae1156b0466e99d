// Attention's backward pass on the CPU: scores are computed again, tile by tile, from the saved log-sum-exp.
//
// A task owns the keys of one key head (or a range of them, where the heads are too few for the threads) and writes
// their gradients. For each block of keys it goes through all rows: five products a tile, with the keys and values in
// panels for the scores and the gradient of the weights, and the transposed tile as the left operand for the gradients
// of keys and values. The gradient of the queries gathers in float beside it: per thread, or per task and summed at
// the end where tasks share rows. Nothing is added atomically, so results repeat for a number of threads.
#include "core/attention_operands.h"
#include "core/kernels.h"
#include "core/team.h"

namespace seqkernels {
namespace {

constexpr std::int64_t kRowBlock = 48;    // rows of a tile: a multiple of the micro-kernel's
constexpr std::int64_t kKeyBlock = 256;   // keys of a tile: a multiple of a panel
constexpr std::int64_t kDepthBlock = 64;  // keys whose rows stay in the first cache over all rows of a tile

// T computes, E is multiplied.
template <class T, class E>
class Backward {
  using V = Vec<T>;
  using Block = OperandBlock<T, E>;
  static constexpr int n = kLanes<T>;
  static constexpr bool kPairs = sizeof(E) == 2;

 public:
  explicit Backward(const AttentionBackward& p)
      : p_(p),
        scores_(p, !kPairs),
        longest_(p),
        group_(p.heads / p.kv_heads),
        kv_total_(p.batch * p.kv_heads),
        row_total_(group_ * longest_.queries),
        size_ld_(round_up(p.head_size, n)),
        value_ld_(round_up(p.value_size, n)),
        few_(row_total_ <= kFewRows),
        clean_(masks_keys(p)),
        of_scores_(p.grad_q.data != nullptr || p.grad_k.data != nullptr || p.grad_bias != nullptr),
        threads_(team_size(p.threads, 5.0 * static_cast<double>(p.batch * p.heads * p.queries) *
                                          static_cast<double>(keys_read(p)) *
                                          static_cast<double>(p.head_size + p.value_size))),
        wanted_parts_(wanted_parts()),
        key_block_(key_block()),
        key_blocks_(ceil_div(longest_.keys, key_block_)),
        parts_(static_cast<int>(max_of<std::int64_t>(1, min_of<std::int64_t>(wanted_parts_, key_blocks_)))),
        tile_ld_(key_block_ + n),
        row_space_(round_up(min_of(kRowBlock, row_total_), n)),
        direct_(!kPairs && is_compute<T>(p.dtype) && p.head_size % n == 0 && (few_ || p.k.stride[2] == p.head_size)),
        bias_shared_(p.grad_bias != nullptr &&
                     ((p.batch > 1 && p.grad_bias_stride[0] == 0) || (p.kv_heads > 1 && p.grad_bias_stride[1] == 0) ||
                      (parts_ > 1 && p.grad_bias_stride[3] == 0))),
        given_(p, scores_, of_scores_, row_space_, key_blocks_ > parts_ ? row_blocks() : 0, threads_),
        work_size_(round_up(row_space_ * 2 * tile_ld_ + key_block_ * (size_ld_ + value_ld_) + 3 * tile_ld_, n)),
        operand_size_(round_up(
            (kPairs ? row_space_ * 3 * tile_ld_ : 0) + key_block_ * (given_.ld() + given_.grad_ld() + size_ld_), 64)),
        grad_q_size_(p.grad_q.data == nullptr ? 0 : row_total_ * size_ld_),
        work_(threads_ * work_size_),
        grad_q_((parts_ == 1 ? threads_ : kv_total_ * parts_) * grad_q_size_),
        grad_bias_(bias_shared_ ? (threads_ - 1) * p.grad_bias_size : 0),
        operands_(threads_ * operand_size_),
        rows_(threads_ * row_space_) {}

  void run() {
    run_team(threads_, [this](int thread, int threads) {
      const Work w = carve(thread);
      if (bias_shared_ && thread > 0) {
        for (std::int64_t i = 0; i < p_.grad_bias_size; ++i) w.grad_bias[i] = 0;
      }
      const std::int64_t tasks = kv_total_ * parts_;
      if (bias_shared_) {
        const Share mine = share(tasks, thread, threads);
        for (std::int64_t task = mine.begin; task < mine.end; ++task) run_task(w, thread, task);
      } else {
        for (std::int64_t task; (task = __atomic_fetch_add(&next_, 1, __ATOMIC_RELAXED)) < tasks;) {
          run_task(w, thread, task);
        }
      }
      if (parts_ == 1 && !bias_shared_) return;
      barrier_.wait(threads);
      if (parts_ > 1 && grad_q_size_ > 0) sum_grad_q(share(kv_total_ * row_total_, thread, threads));
      if (bias_shared_) sum_grad_bias(share(p_.grad_bias_size, thread, threads), threads);
    });
  }

 private:
  struct Row : ScoreRow {
    T* grad_bias;  // of its first key
  };

  struct Work {
    T* s;       // (rows, keys of a tile) products, then scores, then weights
    T* grad_s;  // (rows, keys of a tile) gradient of the weights, then of the products
    T* grad_k;  // (keys of a tile, D)
    T* grad_v;  // (keys of a tile, Dv)
    T* add;     // (keys of a tile)
    T* slopes;  // (keys of a tile) of the softcap
    T* grad_bias;
    std::uint32_t* words;
    Row* rows;
    // The tiles that go with rows as the depth; only where they are pairs.
    E* weights;        // [pairs of rows][keys][2]
    E* grad_products;  // likewise
    E* grad_rows;      // (rows, keys of a tile)
    E* key_panels;     // (keys of a tile, D)
    E* value_panels;   // (keys of a tile, Dv)
    E* key_rows;       // (keys of a tile, D), finite where `clean_`
  };

  Work carve(int thread) {
    Work w;
    w.s = work_.get() + thread * work_size_;
    w.grad_s = w.s + row_space_ * tile_ld_;
    w.grad_k = w.grad_s + row_space_ * tile_ld_;
    w.grad_v = w.grad_k + key_block_ * size_ld_;
    w.add = w.grad_v + key_block_ * value_ld_;
    w.slopes = w.add + tile_ld_;
    w.words = reinterpret_cast<std::uint32_t*>(w.slopes + tile_ld_);
    w.rows = rows_.get() + thread * row_space_;
    w.grad_bias = thread > 0 && bias_shared_ ? grad_bias_.get() + (thread - 1) * p_.grad_bias_size
                                             : static_cast<T*>(p_.grad_bias);
    E* at = operands_.get() + thread * operand_size_;
    if constexpr (kPairs) {
      w.weights = at;
      w.grad_products = w.weights + row_space_ * tile_ld_;
      w.grad_rows = w.grad_products + row_space_ * tile_ld_;
      at += 3 * row_space_ * tile_ld_;
    }
    w.key_panels = at;
    w.value_panels = w.key_panels + key_block_ * given_.ld();
    w.key_rows = w.value_panels + key_block_ * given_.grad_ld();
    return w;
  }

  // Blocks of rows of a key head at most, of documents of any length too.
  std::int64_t row_blocks() const {
    if (longest_.queries > kRowBlock) return group_ * ceil_div(longest_.queries, kRowBlock);
    return min_of(group_, ceil_div(row_total_, kRowBlock / 2 + 1));
  }

  std::int64_t wanted_parts() const {
    std::int64_t parts = 1;
    while (kv_total_ * parts % threads_ != 0 && kv_total_ * parts < 4 * threads_) ++parts;
    return parts;
  }

  // Small enough that each range of keys has some, more where they differ in work.
  std::int64_t key_block() const {
    const std::int64_t ranges = wanted_parts_ == 1 ? 1 : wanted_parts_ * (p_.left >= 0 || p_.right >= 0 ? 4 : 1);
    const std::int64_t even = round_up(max_of<std::int64_t>(1, ceil_div(longest_.keys, ranges)), kPanel<T>);
    return min_of(kKeyBlock, min_of(even, round_up(max_of<std::int64_t>(1, longest_.keys), n)));
  }

  // How many queries read the keys of a block, about.
  std::int64_t work_of(const Document& document, std::int64_t block) const {
    const std::int64_t key = block * key_block_, last = min_of(key + key_block_, document.keys) - 1;
    const std::int64_t begin =
        p_.right < 0 ? 0 : max_of<std::int64_t>(0, (key + last) / 2 - document.diagonal - p_.right);
    const std::int64_t end =
        p_.left < 0 ? document.queries : min_of(document.queries, (key + last) / 2 - document.diagonal + p_.left + 1);
    return max_of<std::int64_t>(0, end - begin) * (last - key + 1);
  }

  // The first block of keys of a part.
  std::int64_t first_block(const Document& document, int part) const {
    const std::int64_t blocks = ceil_div(document.keys, key_block_);
    if (part == 0 || parts_ == 1) return part == 0 ? 0 : blocks;
    if (part == parts_) return blocks;
    std::int64_t all = 0, before = 0, block = 0;
    for (std::int64_t i = 0; i < blocks; ++i) all += work_of(document, i);
    for (; block < blocks && before * parts_ < all * part; ++block) before += work_of(document, block);
    return block;
  }

  void run_task(const Work& w, int thread, std::int64_t task) {
    const std::int64_t kv = task / parts_;
    const int part = static_cast<int>(task % parts_);
    const Document document(p_, kv / p_.kv_heads);
    T* grad_q = grad_q_.get() + (parts_ == 1 ? thread : task) * grad_q_size_;
    for (std::int64_t i = 0; i < grad_q_size_; i += n) store_full(grad_q + i, V{});
    given_.forget(thread);
    const std::int64_t end = first_block(document, part + 1);
    for (std::int64_t block = first_block(document, part); block < end; ++block) {
      run_keys(w, thread, document, kv % p_.kv_heads, block, grad_q);
    }
    if (part == parts_ - 1 && p_.cu_seqlens_k == nullptr) clear_padding(document, kv % p_.kv_heads);
    if (parts_ == 1 && grad_q_size_ > 0) {
      write_grad_q(document, kv % p_.kv_heads, 0, group_ * document.queries, grad_q);
    }
  }

  // Gradients of the keys that are none.
  void clear_padding(const Document& document, std::int64_t kv_head) const {
    for (std::int64_t key = document.keys; key < p_.keys; ++key) {
      clear_row(p_.grad_k, document, kv_head, key, p_.head_size);
      clear_row(p_.grad_v, document, kv_head, key, p_.value_size);
    }
  }
  void clear_row(const StridedOut& x, const Document& document, std::int64_t kv_head, std::int64_t key,
                 std::int64_t size) const {
    if (x.data == nullptr) return;
    std::memset(element(x.data, document.key_at(x.stride, kv_head, key), p_.dtype), 0,
                static_cast<std::size_t>(size * bytes_of(p_.dtype)));
  }

  void write_grad_q(const Document& document, std::int64_t kv_head, std::int64_t first, std::int64_t rows,
                    const T* from) const {
    const T factor = static_cast<T>(p_.scale);
    for_heads(group_, document.queries, kv_head, first, rows,
              [&](std::int64_t head, std::int64_t query, std::int64_t at, std::int64_t count) {
                write_rows<T>(p_.dtype, from + at * size_ld_, size_ld_, count, p_.head_size, &factor, 0,
                              element(p_.grad_q.data, document.query_at(p_.grad_q.stride, head, query), p_.dtype),
                              p_.grad_q.stride[2]);
              });
  }

  struct Keys {
    std::int64_t first, count;
    const void* data;
    const void* values;
    T longest;      // of the keys as vectors, where ALiBi fades them; not finite if a value is not
    bool packed;    // whether a tile has needed them yet
    const E* rows;  // (count, D) as the right operand, finite where `clean_`
    std::int64_t rows_ld;
  };

  // One block of keys with all rows of its head.
  void run_keys(const Work& w, int thread, const Document& document, std::int64_t kv_head, std::int64_t block,
                T* grad_q) {
    Keys k{};
    k.first = block * key_block_;
    k.count = min_of(key_block_, document.keys - k.first);
    k.data = element(p_.k.data, document.key_at(p_.k.stride, kv_head, k.first), p_.dtype);
    k.values = element(p_.v.data, document.key_at(p_.v.stride, kv_head, k.first), p_.dtype);
    if (scores_.fades()) {
      k.longest = rows_are_finite<T>(p_.dtype, k.values, p_.v.stride[2], k.count, p_.value_size)
                      ? lengths_of<T>(p_.dtype, k.data, p_.k.stride[2], k.count, p_.head_size, nullptr)
                      : kInfinity<T>;
    }
    for (std::int64_t i = 0; i < k.count * size_ld_; i += n) store_full(w.grad_k + i, V{});
    for (std::int64_t i = 0; i < k.count * value_ld_; i += n) store_full(w.grad_v + i, V{});
    const RowBlocks blocks(group_ * document.queries, document.queries, kRowBlock);
    for (std::int64_t i = 0; i < blocks.count; ++i) {
      const Range read = keys_of_block(p_, document, blocks.begin(i), blocks.length(i));
      if (read.begin >= k.first + k.count || read.end <= k.first) continue;
      const std::int64_t first = blocks.begin(i), rows = blocks.length(i);
      const auto given = [&] { return given_.block(thread, document, kv_head, i, first, rows); };
      run_tile(w, given, document, kv_head, k, first, rows, grad_q);
    }
    write_keys(p_.grad_k, document, kv_head, k, w.grad_k, size_ld_, p_.head_size, scores_.of_grad_k());
    write_keys(p_.grad_v, document, kv_head, k, w.grad_v, value_ld_, p_.value_size, T(1));
  }

  void write_keys(const StridedOut& to, const Document& document, std::int64_t kv_head, const Keys& k, const T* from,
                  std::int64_t ld, std::int64_t size, T factor) const {
    if (to.data == nullptr) return;
    write_rows<T>(p_.dtype, from, ld, k.count, size, &factor, 0,
                  element(to.data, document.key_at(to.stride, kv_head, k.first), p_.dtype), to.stride[2]);
  }

  void pack(const Work& w, Keys& k) const {
    k.packed = true;
    if (!few_) {
      pack_panels(p_.dtype, k.data, p_.k.stride[2], k.count, p_.head_size, w.key_panels);
      if (of_scores_) pack_panels(p_.dtype, k.values, p_.v.stride[2], k.count, p_.value_size, w.value_panels);
    }
    if (p_.grad_q.data == nullptr) return;
    const bool dirty = clean_ && !rows_are_finite<T>(p_.dtype, k.data, p_.k.stride[2], k.count, p_.head_size);
    k.rows = static_cast<const E*>(k.data);
    k.rows_ld = p_.k.stride[2];
    if (!direct_ || dirty) {
      pack_depth(p_.dtype, k.data, p_.k.stride[2], k.count, p_.head_size, w.key_rows, size_ld_, dirty);
      k.rows = w.key_rows;
      k.rows_ld = size_ld_;
    }
  }

  template <class Given>
  void run_tile(const Work& w, const Given& given, const Document& document, std::int64_t kv_head, Keys& k,
                std::int64_t first_row, std::int64_t rows, T* grad_q) {
    describe(p_, document, kv_head, first_row, rows, w.rows);
    if (scores_.fades()) {
      const Block b = given();
      for (std::int64_t r = 0; r < rows; ++r) {
        scores_.take_far(w.rows[r], scores_.largest(b.lengths[r], k.longest), b.lse[r]);
      }
    }
    const Range allowed = set_counts(w.rows, rows, k.first, k.count);
    if (allowed.begin >= allowed.end) return;
    const bool uniform = scores_.uniform(document, rows, first_row);
    const Kept kept = scores_.look(w.rows, rows, k.first, allowed, uniform);
    const Range keys = kept.keys;
    if (keys.begin >= keys.end) return;
    if (!k.packed) pack(w, k);
    const Block b = given();
    if (p_.grad_bias != nullptr) place_grad_bias(w, document, kv_head, first_row, rows);
    if constexpr (!kPairs) {
      if (few_) {
        multiply_rows<T>(p_.dtype, k.data, p_.k.stride[2], keys.end, p_.head_size, b.q, given_.ld(), w.s, tile_ld_,
                         rows);
        multiply_rows<T>(p_.dtype, k.values, p_.v.stride[2], keys.end, p_.value_size, b.grad_out, given_.grad_ld(),
                         w.grad_s, tile_ld_, rows);
      }
    }
    if (!few_) {
      multiply_panels(k.count, keys, p_.head_size, b.q, given_.ld(), w.key_panels, w.s, tile_ld_, w.rows, rows);
      if (of_scores_) {
        multiply_panels(k.count, keys, p_.value_size, b.grad_out, given_.grad_ld(), w.value_panels, w.grad_s, tile_ld_,
                        w.rows, rows);
      }
    }
    differentiate(w, b, rows, k.first, keys, kept, uniform);
    accumulate(w, b, k, keys, rows, grad_q + first_row * size_ld_);
  }

  // The three products with the weights and their gradients.
  void accumulate(const Work& w, const Block& b, const Keys& k, Range keys, std::int64_t rows, T* grad_q) const {
    const std::int64_t begin = keys.begin / n * n, width = keys.end - begin;
    bool full = true;
    for (std::int64_t r = 0; r < rows; ++r) full = full && w.rows[r].from <= keys.begin && w.rows[r].count >= keys.end;
    const auto reading = [&](std::int64_t key, int count) {
      Range range{0, rows};
      if (full) return range;
      const std::int64_t from = begin + key, to = from + count;
      const auto reads = [&](std::int64_t r) { return w.rows[r].from < to && w.rows[r].count > from; };
      while (range.begin < rows && !reads(range.begin)) ++range.begin;
      while (range.end > range.begin && !reads(range.end - 1)) --range.end;
      range.begin = range.begin / 2 * 2;
      return range;
    };
    const E* weights = nullptr;
    const E* grad_products = nullptr;
    const E* grad_rows = nullptr;
    std::int64_t step = 1;
    if constexpr (kPairs) {
      if (p_.grad_v.data != nullptr) pair_rows(w.s, tile_ld_, rows, begin, keys.end, w.weights, tile_ld_);
      if (p_.grad_k.data != nullptr) pair_rows(w.grad_s, tile_ld_, rows, begin, keys.end, w.grad_products, tile_ld_);
      if (p_.grad_q.data != nullptr) {
        for (std::int64_t r = 0; r < rows; ++r) {
          narrow_row(w.grad_s + r * tile_ld_, begin, keys.end, w.grad_rows + r * tile_ld_);
        }
      }
      weights = w.weights;
      grad_products = w.grad_products;
      grad_rows = w.grad_rows;
      step = 2;
    } else {
      weights = w.s;
      grad_products = w.grad_s;
      grad_rows = w.grad_s;
    }
    if (p_.grad_v.data != nullptr) {
      product<T, Layout::kTransposed, true>(width, value_ld_ / n, weights + step * begin, tile_ld_, b.grad_out_depth,
                                            value_ld_, w.grad_v + begin * value_ld_, value_ld_, reading);
    }
    if (p_.grad_k.data != nullptr) {
      product<T, Layout::kTransposed, true>(width, size_ld_ / n, grad_products + step * begin, tile_ld_, b.q_depth,
                                            size_ld_, w.grad_k + begin * size_ld_, size_ld_, reading);
    }
    if (p_.grad_q.data == nullptr) return;
    for (std::int64_t j = begin; j < keys.end; j += kDepthBlock) {
      const std::int64_t last = min_of(keys.end, j + kDepthBlock);
      product<T, Layout::kRows, true>(rows, size_ld_ / n, grad_rows, tile_ld_, k.rows, k.rows_ld, grad_q, size_ld_,
                                      [&](std::int64_t m, int count) {
                                        const Range read = range_of_rows(w.rows + m, count, 2);
                                        return Range{max_of(j, read.begin), min_of(last, read.end)};
                                      });
    }
  }

  void place_grad_bias(const Work& w, const Document& document, std::int64_t kv_head, std::int64_t first,
                       std::int64_t rows) const {
    const std::int64_t* stride = p_.grad_bias_stride;
    for_heads(group_, document.queries, kv_head, first, rows,
              [&](std::int64_t head, std::int64_t query, std::int64_t at, std::int64_t count) {
                for (std::int64_t i = 0; i < count; ++i) {
                  w.rows[at + i].grad_bias =
                      w.grad_bias + document.batch * stride[0] + head * stride[1] + (query + i) * stride[2];
                }
              });
  }

  // From products and gradients of the weights to weights after dropout and gradients of the products.
  void differentiate(const Work& w, const Block& b, std::int64_t rows, std::int64_t first, Range keys, Kept kept,
                     bool uniform) const {
    const bool mask = p_.mask.data != nullptr && !kept.all_mask, plain = scores_.plain(mask);
    const bool shared = uniform && (mask || p_.bias.data != nullptr);
    if (shared) scores_.additive(w.rows[0], first, keys, mask, w.add);
    const T factor = plain ? scores_.after() : T(1);
    const std::int64_t begin = keys.begin / n * n, end = round_up(keys.end, n);
    for (std::int64_t r = 0; r < rows; ++r) {
      const Row& row = w.rows[r];
      T* s = w.s + r * tile_ld_;
      T* grad = w.grad_s + r * tile_ld_;
      if (!plain) {
        scores_.modify(row, first, mask && !shared, shared ? w.add : nullptr, s,
                       scores_.softcap() ? w.slopes : nullptr);
      }
      std::int64_t j = begin;
      for (; j + n <= row.from; j += n) {
        store_full(s + j, V{});
        store_full(grad + j, V{});
      }
      const std::int64_t read = j;
      if (scores_.dropout() && read < row.count) {
        scores_.draw(row, first + read, first + round_up(row.count, n), w.words);
      }
      for (; j < row.count; j += n) {
        // Where a row may not read it gets 0, whatever is there.
        const bool edge = !plain || j < row.from || row.count - j < n;
        V score = load_full(s + j);
        if (edge) score = scores_.inside(score, row, j);
        V x = weight_of<T>(score * factor - b.lse[r]);
        if (scores_.dropout()) {
          store_full(s + j, scores_.drop(x, w.words + (j - read)));
          x *= (scores_.drop(load_full(grad + j), w.words + (j - read)) - b.delta[r]) + b.of_lse[r];
        } else {
          store_full(s + j, x);
          x *= (load_full(grad + j) - b.delta[r]) + b.of_lse[r];
        }
        if (edge) x = score == -kInfinity<T> ? V{} : x;
        store_full(grad + j, x);
      }
      for (; j < end; j += n) {
        store_full(s + j, V{});
        store_full(grad + j, V{});
      }
      if (p_.grad_bias != nullptr) add_grad_bias(row, first, read, grad);
      if (scores_.softcap()) {
        for (j = read; j < row.count; j += n) {
          const V x = load_full(grad + j);
          store_full(grad + j, x == T(0) ? x : x * load_full(w.slopes + j));
        }
      }
    }
  }

  void add_grad_bias(const Row& row, std::int64_t first, std::int64_t from, const T* grad) const {
    if (p_.grad_bias_stride[3] == 0) {
      V sum{};
      for (std::int64_t j = from; j < row.count; j += n) sum += load_full(grad + j);
      row.grad_bias[0] += reduce_add<T>(sum);
      return;
    }
    T* to = row.grad_bias + first;
    for (std::int64_t j = from; j < row.count; j += n) {
      const std::int64_t left = row.count - j;
      store(to + j, load(to + j, left) + load_full(grad + j), left);
    }
  }

  void sum_grad_q(Share mine) const {
    for (std::int64_t i = mine.begin; i < mine.end; ++i) {
      const std::int64_t kv = i / row_total_, row = i % row_total_;
      const Document document(p_, kv / p_.kv_heads);
      if (row >= group_ * document.queries) continue;
      T* sum = grad_q_.get() + kv * parts_ * grad_q_size_ + row * size_ld_;
      for (int part = 1; part < parts_; ++part) {
        const T* from = sum + part * grad_q_size_;
        for (std::int64_t d = 0; d < size_ld_; d += n) store_full(sum + d, load_full(sum + d) + load_full(from + d));
      }
      write_grad_q(document, kv % p_.kv_heads, row, 1, sum);
    }
  }

  void sum_grad_bias(Share mine, int threads) const {
    T* sum = static_cast<T*>(p_.grad_bias);
    for (int thread = 1; thread < threads; ++thread) {
      const T* from = grad_bias_.get() + (thread - 1) * p_.grad_bias_size;
      for (std::int64_t i = mine.begin; i < mine.end; ++i) sum[i] += from[i];
    }
  }

  const AttentionBackward& p_;
  const Scores<T> scores_;
  const Longest longest_;
  const std::int64_t group_, kv_total_, row_total_, size_ld_, value_ld_;
  const bool few_;        // rows, so that packing keys and values does not pay
  const bool clean_;      // keys that are not finite must not reach rows that do not read them
  const bool of_scores_;  // gradients that go through the scores are wanted
  const int threads_;
  const std::int64_t wanted_parts_, key_block_, key_blocks_;
  const int parts_;  // ranges of keys of one key head
  const std::int64_t tile_ld_, row_space_;
  const bool direct_;       // keys can be read as they lie
  const bool bias_shared_;  // tasks add to the same elements of grad_bias
  RowOperands<T, E> given_;
  const std::int64_t work_size_, operand_size_, grad_q_size_;
  Scratch<T> work_, grad_q_, grad_bias_;
  Scratch<E> operands_;
  Scratch<Row> rows_;
  Barrier barrier_;
  std::int64_t next_ = 0;
};

}  // namespace

void SEQKERNELS_ENTRY(attention_backward)(const AttentionBackward& p) {
  if (p.dtype == DType::kFloat64) return Backward<double, double>(p).run();
#if defined(SEQKERNELS_DOT16)
  if (multiplies_bfloat16(p) && p.heads / p.kv_heads * Longest(p).queries > kFewRows)
    return Backward<float, BFloat16>(p).run();
#endif
  Backward<float, float>(p).run();
}

}  // namespace seqkernels

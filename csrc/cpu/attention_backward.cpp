// Attention's backward pass on the CPU: scores are computed again, tile by tile, from the saved log-sum-exp.
//
// A task owns the keys of one key head (or a range of them, where the heads are too few for the threads) and writes
// their gradients. For each block of keys it goes through all rows: five products a tile, with the keys and values in
// panels for the scores and the gradient of the weights, and the transposed tile as the left operand for the gradients
// of keys and values. The gradient of the queries gathers in float beside it: per thread, or per task and summed at
// the end where tasks share rows. Nothing is added atomically, so results repeat for a number of threads.
#include "core/attention_rows.h"
#include "core/kernels.h"
#include "core/team.h"

namespace seqkernels {
namespace {

constexpr std::int64_t kRowBlock = 48;    // rows of a tile: a multiple of the micro-kernel's
constexpr std::int64_t kKeyBlock = 256;   // keys of a tile: a multiple of a panel
constexpr std::int64_t kDepthBlock = 64;  // keys whose rows stay in the first cache over all rows of a tile

template <class T>
class Backward {
  using V = Vec<T>;
  static constexpr int n = kLanes<T>;

 public:
  explicit Backward(const AttentionBackward& p)
      : p_(p),
        masks_(p),
        group_(p.heads / p.kv_heads),
        kv_total_(p.batch * p.kv_heads),
        row_total_(group_ * p.queries),
        size_ld_(round_up(p.head_size, n)),
        value_ld_(round_up(p.value_size, n)),
        few_(row_total_ <= kFewRows),
        clean_(masks_.any() || p.is_causal),
        blocks_(row_total_, p.queries, kRowBlock),
        threads_(team_size(p.threads, 5.0 * static_cast<double>(p.batch * p.heads * p.queries * p.keys) *
                                          static_cast<double>(p.head_size + p.value_size))),
        wanted_parts_(wanted_parts()),
        key_block_(key_block()),
        key_blocks_(ceil_div(p.keys, key_block_)),
        parts_(static_cast<int>(max_of<std::int64_t>(1, min_of<std::int64_t>(wanted_parts_, key_blocks_)))),
        tile_ld_(key_block_ + n),
        row_space_(round_up(blocks_.size, n)),
        direct_(is_compute<T>(p.dtype) && p.head_size % n == 0 && (few_ || p.k.stride[2] == p.head_size)),
        bias_shared_(p.grad_bias != nullptr &&
                     ((p.batch > 1 && p.grad_bias_stride[0] == 0) || (p.kv_heads > 1 && p.grad_bias_stride[1] == 0) ||
                      (parts_ > 1 && p.grad_bias_stride[3] == 0))),
        work_size_(row_space_ * (size_ld_ + value_ld_ + 2 * tile_ld_ + 2) +
                   key_block_ * (3 * size_ld_ + 2 * value_ld_) + tile_ld_),
        grad_q_size_(row_total_ * size_ld_),
        work_(threads_ * work_size_),
        grad_q_((parts_ == 1 ? threads_ : kv_total_ * parts_) * grad_q_size_),
        grad_bias_(bias_shared_ ? (threads_ - 1) * p.grad_bias_size : 0),
        rows_(threads_ * row_space_) {}

  void run() {
    run_team(threads_, [this](int thread, int threads) {
      Work w;
      w.q = work_.get() + thread * work_size_;
      w.grad_out = w.q + row_space_ * size_ld_;
      w.s = w.grad_out + row_space_ * value_ld_;
      w.grad_s = w.s + row_space_ * tile_ld_;
      w.lse = w.grad_s + row_space_ * tile_ld_;
      w.delta = w.lse + row_space_;
      w.key_panels = w.delta + row_space_;
      w.value_panels = w.key_panels + key_block_ * size_ld_;
      w.key_rows = w.value_panels + key_block_ * value_ld_;
      w.grad_k = w.key_rows + key_block_ * size_ld_;
      w.grad_v = w.grad_k + key_block_ * size_ld_;
      w.add = w.grad_v + key_block_ * value_ld_;
      w.rows = rows_.get() + thread * row_space_;
      w.grad_bias = static_cast<T*>(p_.grad_bias);
      if (bias_shared_ && thread > 0) {
        w.grad_bias = grad_bias_.get() + (thread - 1) * p_.grad_bias_size;
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
      if (parts_ > 1) sum_grad_q(share(kv_total_ * row_total_, thread, threads));
      if (bias_shared_) sum_grad_bias(share(p_.grad_bias_size, thread, threads), threads);
    });
  }

 private:
  struct Row : ScoreRow {
    T* grad_bias;  // of its first key
  };

  struct Work {
    T* q;             // (rows, D) scaled
    T* grad_out;      // (rows, Dv)
    T* s;             // (rows, keys of a tile) scores, then weights
    T* grad_s;        // (rows, keys of a tile) gradient of the weights, then of the scores
    T* lse;           // (rows), 0 for -inf
    T* delta;         // (rows)
    T* key_panels;    // (keys of a tile, D)
    T* value_panels;  // (keys of a tile, Dv)
    T* key_rows;      // (keys of a tile, D)
    T* grad_k;        // (keys of a tile, D)
    T* grad_v;        // (keys of a tile, Dv)
    T* add;           // (keys of a tile)
    T* grad_bias;
    Row* rows;
  };

  std::int64_t wanted_parts() const {
    std::int64_t parts = 1;
    while (kv_total_ * parts % threads_ != 0 && kv_total_ * parts < 4 * threads_) ++parts;
    return parts;
  }

  // Small enough that each range of keys has some, more under causality, where they differ in work.
  std::int64_t key_block() const {
    const std::int64_t ranges = wanted_parts_ == 1 ? 1 : wanted_parts_ * (p_.is_causal ? 4 : 1);
    const std::int64_t even = round_up(max_of<std::int64_t>(1, ceil_div(p_.keys, ranges)), kPanel<T>);
    return min_of(kKeyBlock, min_of(even, round_up(max_of<std::int64_t>(1, p_.keys), n)));
  }

  // Work of the keys before `key`, in scores.
  double work_before(std::int64_t key) const {
    const double k = static_cast<double>(key), m = static_cast<double>(p_.queries);
    if (!p_.is_causal) return k * m;
    return k < m ? k * (m - 0.5 * k) : 0.5 * m * m;
  }

  // The first block of keys of a part.
  std::int64_t first_block(int part) const {
    if (part == parts_) return key_blocks_;
    const double goal = work_before(p_.keys) * part / parts_;
    std::int64_t block = 0;
    while (block < key_blocks_ && work_before(block * key_block_) < goal) ++block;
    return block;
  }

  static std::int64_t offset(const std::int64_t* stride, std::int64_t batch, std::int64_t head, std::int64_t row) {
    return batch * stride[0] + head * stride[1] + row * stride[2];
  }

  void run_task(const Work& w, int thread, std::int64_t task) {
    const std::int64_t kv = task / parts_;
    const int part = static_cast<int>(task % parts_);
    T* grad_q = grad_q_.get() + (parts_ == 1 ? thread : task) * grad_q_size_;
    for (std::int64_t i = 0; i < grad_q_size_; i += n) store_full(grad_q + i, V{});
    const std::int64_t end = first_block(part + 1);
    for (std::int64_t block = first_block(part); block < end; ++block) run_keys(w, kv, block, grad_q);
    if (parts_ > 1) return;
    write_grad_q(kv, 0, row_total_, grad_q);
  }

  void write_grad_q(std::int64_t kv, std::int64_t first, std::int64_t rows, const T* from) const {
    const T factor = static_cast<T>(p_.scale);
    for_heads(p_, kv % p_.kv_heads, first, rows,
              [&](std::int64_t head, std::int64_t query, std::int64_t at, std::int64_t count) {
                const std::int64_t to = offset(p_.grad_q.stride, kv / p_.kv_heads, head, query);
                write_rows<T>(p_.dtype, from + at * size_ld_, size_ld_, count, p_.head_size, &factor, 0,
                              element(p_.grad_q.data, to, p_.dtype), p_.grad_q.stride[2]);
              });
  }

  // One block of keys with all rows of its head.
  void run_keys(const Work& w, std::int64_t kv, std::int64_t block, T* grad_q) {
    const std::int64_t batch = kv / p_.kv_heads, kv_head = kv % p_.kv_heads;
    const std::int64_t first = block * key_block_, keys = min_of(key_block_, p_.keys - first);
    for (std::int64_t i = 0; i < keys * size_ld_; i += n) store_full(w.grad_k + i, V{});
    for (std::int64_t i = 0; i < keys * value_ld_; i += n) store_full(w.grad_v + i, V{});
    Keys k{};
    k.first = first;
    k.count = keys;
    k.packed = false;
    k.data = element(p_.k.data, offset(p_.k.stride, batch, kv_head, first), p_.dtype);
    k.values = element(p_.v.data, offset(p_.v.stride, batch, kv_head, first), p_.dtype);
    for (std::int64_t i = 0; i < blocks_.count; ++i) {
      run_tile(w, kv, k, blocks_.begin(i), blocks_.length(i), grad_q);
    }
    const T one = 1;
    write_rows<T>(p_.dtype, w.grad_k, size_ld_, keys, p_.head_size, &one, 0,
                  element(p_.grad_k.data, offset(p_.grad_k.stride, batch, kv_head, first), p_.dtype),
                  p_.grad_k.stride[2]);
    write_rows<T>(p_.dtype, w.grad_v, value_ld_, keys, p_.value_size, &one, 0,
                  element(p_.grad_v.data, offset(p_.grad_v.stride, batch, kv_head, first), p_.dtype),
                  p_.grad_v.stride[2]);
  }

  struct Keys {
    std::int64_t first, count;
    const void* data;
    const void* values;
    bool packed;    // whether a tile has needed them yet
    const T* rows;  // (count, D), finite where `clean_`
    std::int64_t rows_ld;
  };

  void pack(const Work& w, Keys& k) const {
    if (!few_) {
      pack_panels<T>(p_.dtype, k.data, p_.k.stride[2], k.count, p_.head_size, w.key_panels);
      pack_panels<T>(p_.dtype, k.values, p_.v.stride[2], k.count, p_.value_size, w.value_panels);
    }
    const bool dirty = clean_ && !rows_are_finite<T>(p_.dtype, k.data, p_.k.stride[2], k.count, p_.head_size);
    k.rows = static_cast<const T*>(k.data);
    k.rows_ld = p_.k.stride[2];
    if (!direct_ || dirty) {
      read_rows<T>(p_.dtype, k.data, p_.k.stride[2], k.count, p_.head_size, T(1), w.key_rows, size_ld_);
      if (dirty) clean(w.key_rows, k.count * size_ld_);
      k.rows = w.key_rows;
      k.rows_ld = size_ld_;
    }
    k.packed = true;
  }

  void run_tile(const Work& w, std::int64_t kv, Keys& k, std::int64_t first_row, std::int64_t rows, T* grad_q) {
    masks_.describe(kv / p_.kv_heads, kv % p_.kv_heads, first_row, rows, p_.keys, w.rows);
    const std::int64_t width = set_counts(w.rows, rows, k.first, k.count);
    if (width == 0) return;
    const bool uniform = masks_.uniform(rows, first_row);
    if (uniform && !masks_.additive(w.rows[0], k.first, width, w.add)) return;
    if (!k.packed) pack(w, k);
    begin(w, kv, first_row, rows);
    if (few_) {
      multiply_rows<T>(p_.dtype, k.data, p_.k.stride[2], width, p_.head_size, w.q, size_ld_, w.s, tile_ld_, rows);
      multiply_rows<T>(p_.dtype, k.values, p_.v.stride[2], width, p_.value_size, w.grad_out, value_ld_, w.grad_s,
                       tile_ld_, rows);
    } else {
      multiply_panels<T>(k.count, width, p_.head_size, w.q, size_ld_, w.key_panels, w.s, tile_ld_, w.rows, rows);
      multiply_panels<T>(k.count, width, p_.value_size, w.grad_out, value_ld_, w.value_panels, w.grad_s, tile_ld_,
                         w.rows, rows);
    }
    differentiate(w, rows, k.first, width, uniform);
    const auto reading = [&](std::int64_t key, int) {
      std::int64_t r = 0;
      while (w.rows[r].count <= key) ++r;
      return Range{r, rows};
    };
    product<T, Layout::kTransposed, true>(width, value_ld_ / n, w.s, tile_ld_, w.grad_out, value_ld_, w.grad_v,
                                          value_ld_, reading);
    product<T, Layout::kTransposed, true>(width, size_ld_ / n, w.grad_s, tile_ld_, w.q, size_ld_, w.grad_k, size_ld_,
                                          reading);
    for (std::int64_t j = 0; j < width; j += kDepthBlock) {
      const std::int64_t depth = min_of(kDepthBlock, width - j);
      product<T, Layout::kRows, true>(
          rows, size_ld_ / n, w.grad_s + j, tile_ld_, k.rows + j * k.rows_ld, k.rows_ld, grad_q + first_row * size_ld_,
          size_ld_, [&](std::int64_t m, int count) { return Range{0, min_of(depth, most_of(w.rows + m, count) - j)}; });
    }
  }

  void begin(const Work& w, std::int64_t kv, std::int64_t first, std::int64_t rows) const {
    const std::int64_t batch = kv / p_.kv_heads, kv_head = kv % p_.kv_heads;
    for_heads(
        p_, kv_head, first, rows, [&](std::int64_t head, std::int64_t query, std::int64_t at, std::int64_t count) {
          read_rows<T>(p_.dtype, element(p_.q.data, offset(p_.q.stride, batch, head, query), p_.dtype), p_.q.stride[2],
                       count, p_.head_size, static_cast<T>(p_.scale), w.q + at * size_ld_, size_ld_);
          read_rows<T>(p_.dtype, element(p_.grad_out.data, offset(p_.grad_out.stride, batch, head, query), p_.dtype),
                       p_.grad_out.stride[2], count, p_.value_size, T(1), w.grad_out + at * value_ld_, value_ld_);
          if (p_.grad_bias == nullptr) return;
          const std::int64_t* stride = p_.grad_bias_stride;
          for (std::int64_t i = 0; i < count; ++i) {
            w.rows[at + i].grad_bias = w.grad_bias + offset(stride, batch, head, query + i);
          }
        });
    const std::int64_t at = (batch * p_.heads + kv_head * group_) * p_.queries + first;
    const T* lse = static_cast<const T*>(p_.lse) + at;
    const T* delta = static_cast<const T*>(p_.delta) + at;
    for (std::int64_t r = 0; r < rows; ++r) {
      w.lse[r] = lse[r] == -kInfinity<T> ? T(0) : lse[r];
      w.delta[r] = delta[r];
    }
  }

  // From scores and gradients of the weights to weights and gradients of the scores.
  void differentiate(const Work& w, std::int64_t rows, std::int64_t first, std::int64_t width, bool uniform) const {
    const std::int64_t end = round_up(width, n);
    for (std::int64_t r = 0; r < rows; ++r) {
      const std::int64_t count = w.rows[r].count;
      T* s = w.s + r * tile_ld_;
      T* grad = w.grad_s + r * tile_ld_;
      std::int64_t j = 0;
      if (masks_.any()) {
        if (!uniform) masks_.additive(w.rows[r], first, count, w.add);
        for (; j < count; j += n) {
          V add = load_full(w.add + j);
          if (count - j < n) add = first_lanes<T>(add, count - j, -kInfinity<T>);
          const V x = weight_of<T>(load_full(s + j) + add - w.lse[r]);
          store_full(s + j, add == -kInfinity<T> ? V{} : x);
          store_full(grad + j, add == -kInfinity<T> ? V{} : x * (load_full(grad + j) - w.delta[r]));
        }
      } else {
        for (; j + n <= count; j += n) {
          const V x = weight_of<T>(load_full(s + j) - w.lse[r]);
          store_full(s + j, x);
          store_full(grad + j, x * (load_full(grad + j) - w.delta[r]));
        }
        if (j < count) {
          // The lanes beyond are in the tile of rows that read more: 0 even where this row is NaN.
          const std::int64_t left = count - j;
          const V x = weight_of<T>(first_lanes<T>(load_full(s + j), left, -kInfinity<T>) - w.lse[r]);
          store_full(s + j, first_lanes<T>(x, left, T(0)));
          store_full(grad + j, first_lanes<T>(x * (load_full(grad + j) - w.delta[r]), left, T(0)));
          j += n;
        }
      }
      for (; j < end; j += n) {
        store_full(s + j, V{});
        store_full(grad + j, V{});
      }
      if (p_.grad_bias != nullptr) add_grad_bias(w.rows[r], first, grad);
    }
  }

  void add_grad_bias(const Row& row, std::int64_t first, const T* grad) const {
    if (p_.grad_bias_stride[3] == 0) {
      V sum{};
      for (std::int64_t j = 0; j < row.count; j += n) sum += load_full(grad + j);
      row.grad_bias[0] += reduce_add<T>(sum);
      return;
    }
    T* to = row.grad_bias + first;
    for (std::int64_t j = 0; j < row.count; j += n) {
      const std::int64_t left = row.count - j;
      store(to + j, load(to + j, left) + load_full(grad + j), left);
    }
  }

  void sum_grad_q(Share mine) const {
    for (std::int64_t i = mine.begin; i < mine.end; ++i) {
      const std::int64_t kv = i / row_total_, row = i % row_total_;
      T* sum = grad_q_.get() + kv * parts_ * grad_q_size_ + row * size_ld_;
      for (int part = 1; part < parts_; ++part) {
        const T* from = sum + part * grad_q_size_;
        for (std::int64_t d = 0; d < size_ld_; d += n) store_full(sum + d, load_full(sum + d) + load_full(from + d));
      }
      write_grad_q(kv, row, 1, sum);
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
  const Masks<T, AttentionBackward> masks_;
  const std::int64_t group_, kv_total_, row_total_, size_ld_, value_ld_;
  const bool few_;    // rows, so that packing keys and values does not pay
  const bool clean_;  // keys that are not finite must not reach rows that do not read them
  const RowBlocks blocks_;
  const int threads_;
  const std::int64_t wanted_parts_, key_block_, key_blocks_;
  const int parts_;  // ranges of keys of one key head
  const std::int64_t tile_ld_, row_space_;
  const bool direct_;       // keys can be read as they lie
  const bool bias_shared_;  // tasks add to the same elements of grad_bias
  const std::int64_t work_size_, grad_q_size_;
  Scratch<T> work_, grad_q_, grad_bias_;
  Scratch<Row> rows_;
  Barrier barrier_;
  std::int64_t next_ = 0;
};

}  // namespace

void SEQKERNELS_ENTRY(attention_backward)(const AttentionBackward& p) {
  if (p.dtype == DType::kFloat64) {
    Backward<double>(p).run();
  } else {
    Backward<float>(p).run();
  }
}

}  // namespace seqkernels

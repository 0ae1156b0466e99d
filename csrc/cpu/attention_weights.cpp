// Attention's weights themselves, or their mean over the heads, from the saved log-sum-exp: for looking at. The keys of
// all heads are packed once; a task then takes a block of queries through all heads, so that the mean gathers in place
// and the weights of single heads are never stored.
#include "core/attention_scores.h"
#include "core/kernels.h"
#include "core/team.h"

namespace seqkernels {
namespace {

constexpr std::int64_t kRowBlock = 48;
constexpr std::int64_t kKeyBlock = 256;

template <class T, class E>
class Weights {
  using V = Vec<T>;
  static constexpr int n = kLanes<T>;
  static constexpr bool kPairs = sizeof(E) == 2;

 public:
  explicit Weights(const AttentionWeights& p)
      : p_(p),
        scores_(p, !kPairs),
        group_(p.heads / p.kv_heads),
        kv_total_(p.batch * p.kv_heads),
        left_ld_(kPairs ? padded_depth<E>(p.head_size) : round_up(p.head_size, n)),
        key_block_(min_of(kKeyBlock, round_up(max_of<std::int64_t>(p.keys, 1), n))),
        key_blocks_(ceil_div(p.keys, key_block_)),
        row_blocks_(ceil_div(p.queries, kRowBlock)),
        tile_ld_(key_block_ + n),
        threads_(team_size(p.threads, 2.0 * static_cast<double>(p.batch * p.heads * p.queries * p.keys) *
                                          static_cast<double>(p.head_size))),
        panel_size_(round_up(p.keys, n) * padded_depth<E>(p.head_size)),
        work_size_((kRowBlock + 2) * tile_ld_),
        work_(threads_ * work_size_),
        left_(threads_ * kRowBlock * left_ld_),
        packed_(kv_total_ * panel_size_),
        rows_(threads_ * kRowBlock) {}

  void run() {
    run_team(threads_, [this](int thread, int threads) {
      const Share mine = share(kv_total_ * key_blocks_, thread, threads);
      for (std::int64_t i = mine.begin; i < mine.end; ++i) pack(i / key_blocks_, i % key_blocks_);
      barrier_.wait(threads);
      Work w;
      w.s = work_.get() + thread * work_size_;
      w.add = w.s + kRowBlock * tile_ld_;
      w.words = reinterpret_cast<std::uint32_t*>(w.add + tile_ld_);
      w.q = left_.get() + thread * kRowBlock * left_ld_;
      w.rows = rows_.get() + thread * kRowBlock;
      const std::int64_t tasks = p_.batch * row_blocks_;
      for (std::int64_t task; (task = __atomic_fetch_add(&next_, 1, __ATOMIC_RELAXED)) < tasks;) {
        const Document document(p_, task / row_blocks_);
        for (std::int64_t head = 0; head < p_.heads; ++head) run_head(w, document, head, task % row_blocks_);
      }
    });
  }

 private:
  struct Work {
    T* s;    // (rows, keys of a tile)
    T* add;  // (keys of a tile)
    std::uint32_t* words;
    E* q;
    ScoreRow* rows;
  };

  void pack(std::int64_t kv, std::int64_t block) const {
    const Document document(p_, kv / p_.kv_heads);
    const std::int64_t first = block * key_block_, count = min_of(key_block_, document.keys - first);
    if (count <= 0) return;
    pack_panels(p_.dtype, element(p_.k.data, document.key_at(p_.k.stride, kv % p_.kv_heads, first), p_.dtype),
                p_.k.stride[2], count, p_.head_size, panels(kv, first));
  }
  E* panels(std::int64_t kv, std::int64_t first) const {
    return packed_.get() + kv * panel_size_ + first * padded_depth<E>(p_.head_size);
  }

  void run_head(const Work& w, const Document& document, std::int64_t head, std::int64_t block) const {
    const std::int64_t query = block * kRowBlock, all = min_of(kRowBlock, p_.queries - query);
    const std::int64_t batch = document.batch;
    T* out =
        static_cast<T*>(p_.weights) + ((p_.average ? batch : batch * p_.heads + head) * p_.queries + query) * p_.keys;
    if (head == 0 || !p_.average) std::memset(out, 0, static_cast<std::size_t>(all * p_.keys) * sizeof(T));
    const std::int64_t rows = min_of(all, document.queries - query);
    if (rows <= 0) return;
    const std::int64_t kv_head = head / group_, first_row = head % group_ * document.queries + query;
    describe(p_, document, kv_head, first_row, rows, w.rows);
    read_left(p_.dtype, element(p_.q.data, document.query_at(p_.q.stride, head, query), p_.dtype), p_.q.stride[2], rows,
              p_.head_size, scores_.of_q(), w.q, left_ld_);
    const T* lse = static_cast<const T*>(p_.lse) + document.lse_at(p_, head, query);
    const bool uniform = scores_.uniform(document, rows, first_row);
    const Range read = document.span(p_, query, query + rows - 1);
    for (std::int64_t first = read.begin / key_block_ * key_block_; first < read.end; first += key_block_) {
      const std::int64_t width = min_of(key_block_, document.keys - first);
      const Range given = set_counts(w.rows, rows, first, width);
      if (given.begin >= given.end) continue;
      const Kept kept = scores_.look(w.rows, rows, first, given, uniform);
      const Range keys = kept.keys;
      if (keys.begin >= keys.end) continue;
      multiply_panels(width, keys, p_.head_size, w.q, left_ld_, panels(batch * p_.kv_heads + kv_head, first), w.s,
                      tile_ld_, w.rows, rows);
      write(w, rows, first, keys, kept, uniform, lse, out + first);
    }
  }

  void write(const Work& w, std::int64_t rows, std::int64_t first, Range keys, Kept kept, bool uniform, const T* lse,
             T* out) const {
    const bool mask = p_.mask.data != nullptr && !kept.all_mask, plain = scores_.plain(mask);
    const bool shared = uniform && (mask || p_.bias.data != nullptr);
    if (shared) scores_.additive(w.rows[0], first, keys, mask, w.add);
    const T factor = plain ? scores_.after() : T(1), part = p_.average ? T(1) / static_cast<T>(p_.heads) : T(1);
    for (std::int64_t r = 0; r < rows; ++r) {
      const ScoreRow& row = w.rows[r];
      T* s = w.s + r * tile_ld_;
      if (row.from >= row.count || lse[r] == -kInfinity<T>) continue;
      if (!plain) scores_.modify(row, first, mask && !shared, shared ? w.add : nullptr, s, nullptr);
      const std::int64_t begin = row.from / n * n;
      if (scores_.dropout()) scores_.draw(row, first + begin, first + round_up(row.count, n), w.words);
      for (std::int64_t j = begin; j < row.count; j += n) {
        V x = weight_of<T>(scores_.inside(load_full(s + j), row, j) * factor - lse[r]) * part;
        if (scores_.dropout()) x = scores_.drop(x, w.words + (j - begin));
        T* to = out + r * p_.keys + j;
        const std::int64_t left = row.count - j;
        store(to, p_.average ? load(to, left) + x : x, left);
      }
    }
  }

  const AttentionWeights& p_;
  const Scores<T> scores_;
  const std::int64_t group_, kv_total_, left_ld_, key_block_, key_blocks_, row_blocks_, tile_ld_;
  const int threads_;
  const std::int64_t panel_size_, work_size_;
  Scratch<T> work_;
  Scratch<E> left_, packed_;
  Scratch<ScoreRow> rows_;
  Barrier barrier_;
  std::int64_t next_ = 0;
};

}  // namespace

void SEQKERNELS_ENTRY(attention_weights)(const AttentionWeights& p) {
  if (p.batch * p.heads * p.queries * p.keys == 0) return;
  if (p.dtype == DType::kFloat64) return Weights<double, double>(p).run();
#if defined(SEQKERNELS_DOT16)
  if (multiplies_bfloat16(p)) return Weights<float, BFloat16>(p).run();
#endif
  Weights<float, float>(p).run();
}

}  // namespace seqkernels

// From products q k to scores: softcap, bias, masks, ALiBi, and the dropout of weights.
#pragma once

#include "core/attention_pairs.h"
#include "core/attention_rows.h"
#include "core/random.h"

namespace seqkernels {
namespace {

// s (rows, keys of the tile) = rows a (rows, depth) times packed panels of `keys` keys, where some row reads them.
template <class T, class E, class Row>
inline void multiply_panels(std::int64_t keys, Range wanted, std::int64_t depth, const E* a, std::int64_t lda,
                            const E* panels, T* s, std::int64_t lds, const Row* rows, std::int64_t size) {
  constexpr int n = kLanes<T>;
  for (std::int64_t column = wanted.begin / kPanel<T> * kPanel<T>; column < wanted.end; column += kPanel<T>) {
    const std::int64_t ld = round_up(min_of<std::int64_t>(kPanel<T>, keys - column), n);
    const std::int64_t vectors = ceil_div(min_of<std::int64_t>(kPanel<T>, wanted.end - column), n);
    product<T, Layout::kRows, false>(size, vectors, a, lda, panels + column * padded_depth<E>(depth), ld, s + column,
                                     lds, [&](std::int64_t m, int count) {
                                       const Range read = range_of_rows(rows + m, count, 1);
                                       const bool any = read.begin < column + kPanel<T> && read.end > column;
                                       return Range{0, any ? depth : 0};
                                     });
  }
}

// What masks and biases leave of a tile.
struct Kept {
  bool any;       // some row may read some key
  bool all_mask;  // the mask, if there is one, takes nothing away
};

template <class T>
class Scores {
  static constexpr int n = kLanes<T>;
  using V = Vec<T>;

 public:
  // Products are of q times `before`, which is 1 where operands hold q as it is.
  Scores(const AttentionScores& p, bool scaled)
      : p_(p),
        softcap_(p.softcap != 0.0),
        // A window alone needs nothing here: it is in the ranges of the rows.
        plain_(!softcap_ && p.mask.data == nullptr && p.bias.data == nullptr && p.slopes == nullptr),
        same_for_queries_((p.mask.data == nullptr || p.mask.stride[2] == 0) &&
                          (p.bias.data == nullptr || p.bias.stride[2] == 0)),
        same_for_heads_((p.mask.data == nullptr || p.mask.stride[1] == 0) &&
                        (p.bias.data == nullptr || p.bias.stride[1] == 0)),
        masked_(p.mask.data != nullptr || p.bias.data != nullptr),
        of_q_(static_cast<T>(!scaled ? 1.0 : softcap_ ? p.scale / p.softcap : p.scale)),
        before_(static_cast<T>(scaled || !softcap_ ? 1.0 : p.scale / p.softcap)),
        after_(static_cast<T>(softcap_ ? p.softcap : scaled ? 1.0 : p.scale)),
        of_grad_k_(static_cast<T>(!scaled ? p.scale : softcap_ ? p.softcap : 1.0)) {}

  bool plain() const { return plain_; }
  bool softcap() const { return softcap_; }
  T of_q() const { return of_q_; }            // factor of q in the operands
  T after() const { return after_; }          // from a product to a score, where the call is plain
  T of_grad_k() const { return of_grad_k_; }  // from sums with the operands of q to the gradient of k
  bool dropout() const { return p_.threshold != 0; }
  T kept_share() const { return p_.dropout < 1.0 ? static_cast<T>(1.0 / (1.0 - p_.dropout)) : T(0); }

  // Whether the rows of a block all have the same mask and bias.
  bool uniform(const Document& document, std::int64_t rows, std::int64_t first) const {
    return masked_ && same_for_queries_ &&
           (same_for_heads_ || first / document.queries == (first + rows - 1) / document.queries);
  }

  // Looks at the masks of a tile before anything is computed: whole tiles are often masked, or not at all.
  template <class Row>
  Kept look(const Row* rows, std::int64_t size, std::int64_t first, bool uniform) const {
    Kept kept{!masked_, true};
    if (!masked_) return kept;
    bool any_mask = p_.mask.data == nullptr, any_bias = p_.bias.data == nullptr;
    const std::int64_t count = uniform ? 1 : size;
    const Range all = uniform ? range_of_rows(rows, static_cast<int>(size), 1) : Range{0, 0};
    for (std::int64_t r = 0; r < count; ++r) {
      const Range keys = uniform ? all : Range{rows[r].from, rows[r].count};
      if (keys.begin >= keys.end) continue;
      if (p_.mask.data != nullptr) look_at_mask(rows[r].mask, first, keys, any_mask, kept.all_mask);
      if (!any_bias) any_bias = has_finite_bias(rows[r].bias, first, keys);
      if (any_mask && any_bias && !kept.all_mask) break;
    }
    kept.any = any_mask && any_bias;
    return kept;
  }

  // The scores of a row from its products, -inf where it may not read in its vectors, and the largest of them; NaN do
  // not count. `add` has the masks and biases of all rows, or is null. slope_of_cap, unless null: the derivative of the
  // softcap.
  T modify(const ScoreRow& row, std::int64_t first, bool mask, const T* add, T* s, T* slope_of_cap) const {
    V top = splat(-kInfinity<T>);
    const T slope = static_cast<T>(row.slope), level = static_cast<T>(row.level - first);
    with_bias([&](auto tag) {
      const auto* bias = static_cast<const decltype(tag)*>(row.bias);
      for (std::int64_t j = row.from / n * n; j < row.count; j += n) {
        V x = load_full(s + j);
        if (softcap_) {
          const V t = tanh<T>(x * before_);
          if (slope_of_cap != nullptr) store_full(slope_of_cap + j, T(1) - t * t);
          x = t;
        }
        x = x * after_;
        if (add != nullptr) {
          const V a = load_full(add + j);
          x = a == -kInfinity<T> ? a : x + a;
        } else {
          if (bias != nullptr) {
            const V b = strided(bias, p_.bias.stride[3], first + j, row.count - j);
            x = b == -kInfinity<T> ? b : x + b;
          }
          if (mask) x = kept(row.mask, p_.mask.stride[3], first + j, row.count - j) ? x : splat(-kInfinity<T>);
        }
        if (p_.slopes != nullptr) {
          const V distance = lanes() + (static_cast<T>(j) - level);
          x -= slope * (distance < T(0) ? -distance : distance);
        }
        x = inside(x, row, j);
        store_full(s + j, x);
        top = max<T>(x, top);
      }
    });
    return reduce_max<T>(top);
  }

  // The same for a call that is plain: the products stay as they are, but for -inf.
  T top_of(const ScoreRow& row, T* s) const {
    V top = splat(-kInfinity<T>), other = top;
    std::int64_t j = row.from / n * n;
    if (j < row.from && j < row.count) {
      top = inside(load_full(s + j), row, j);
      store_full(s + j, top);
      top = max<T>(top, other);
      j += n;
    }
    for (; j + 2 * n <= row.count; j += 2 * n) {
      top = max<T>(load_full(s + j), top);
      other = max<T>(load_full(s + j + n), other);
    }
    for (; j < row.count; j += n) {
      const V x = inside(load_full(s + j), row, j);
      store_full(s + j, x);
      top = max<T>(x, top);
    }
    return reduce_max<T>(max<T>(top, other)) * after_;
  }

  // Masks and biases of keys that all rows have alike.
  void additive(const ScoreRow& row, std::int64_t first, Range keys, bool mask, T* out) const {
    with_bias([&](auto tag) {
      const auto* bias = static_cast<const decltype(tag)*>(row.bias);
      for (std::int64_t j = keys.begin / n * n; j < keys.end; j += n) {
        V x{};
        if (bias != nullptr) x = strided(bias, p_.bias.stride[3], first + j, keys.end - j);
        if (mask) x = kept(row.mask, p_.mask.stride[3], first + j, keys.end - j) ? x : splat(-kInfinity<T>);
        store_full(out + j, x);
      }
    });
  }

  // x, with -inf in the lanes from j on that the row may not read.
  static V inside(V x, const ScoreRow& row, std::int64_t j) {
    if (row.count - j < n) x = first_lanes<T>(x, row.count - j, -kInfinity<T>);
    if (row.from > j) x = later_lanes<T>(x, row.from - j, -kInfinity<T>);
    return x;
  }

  // The random words of a row's weights from key `first`, a multiple of 16, up to `end` or beyond.
  void draw(const ScoreRow& row, std::int64_t first, std::int64_t end, std::uint32_t* words) const {
    constexpr std::int64_t kBlock = 64;
    const std::int64_t blocks = ceil_div(p_.keys, kBlock);
    std::uint32_t part[kBlock];
    for (std::int64_t key = first; key < end;) {
      const std::int64_t at = key % kBlock, count = min_of(kBlock - at, end - key);
      philox_block(static_cast<std::uint64_t>(row.place * blocks + key / kBlock) * 16, p_.seed, part);
      std::memcpy(words + (key - first), part + at, static_cast<std::size_t>(count) * sizeof(part[0]));
      key += count;
    }
  }
  // x where the words do not drop it, and scaled, else 0.
  V drop(V x, const std::uint32_t* words) const {
    using Word = typename Lanes<T>::Int;
    IntVec<T> dropped;
    if constexpr (sizeof(T) == 4) {
      WordVec w;
      std::memcpy(&w, words, sizeof(w));
      // Unsigned words compared as signed ones; a threshold of 2^32 drops all.
      const auto signs = bit_cast<IntVec<T>>(w ^ 0x80000000u);
      const auto limit = static_cast<Word>(static_cast<std::uint32_t>(p_.threshold) ^ 0x80000000u);
      dropped = p_.threshold >> 32 ? ~IntVec<T>{} : signs < limit;
    } else {
      for (int i = 0; i < n; ++i) dropped[i] = words[i] < p_.threshold ? -1 : 0;
    }
    return dropped ? V{} : x * kept_share();
  }

 private:
  static V lanes() {
    V x;
    for (int i = 0; i < n; ++i) x[i] = static_cast<T>(i);
    return x;
  }

  template <class F>
  void with_bias(const F& f) const {
    if (p_.bias.data == nullptr) {
      f(T());
    } else {
      with_storage<T>(p_.bias_dtype, f);
    }
  }

  void look_at_mask(const std::uint8_t* mask, std::int64_t first, Range keys, bool& any, bool& all) const {
    const std::int64_t stride = p_.mask.stride[3];
    if (stride == 0) {
      const bool one = mask[0] != 0;
      any |= one;
      all &= one;
      return;
    }
    std::int64_t left = 0;
    std::int64_t j = keys.begin;
    if (stride == 1) {
      for (; j + 8 <= keys.end; j += 8) {
        std::uint64_t word;
        std::memcpy(&word, mask + first + j, 8);
        any |= word != 0;
        all &= ((word - 0x0101010101010101u) & ~word & 0x8080808080808080u) == 0;
        if (any && !all) return;
      }
    }
    for (; j < keys.end; ++j) left += mask[(first + j) * stride] != 0;
    const std::int64_t rest = stride == 1 ? (keys.end - keys.begin) % 8 : keys.end - keys.begin;
    any |= left > 0;
    all &= left == rest;
  }

  bool has_finite_bias(const void* bias, std::int64_t first, Range keys) const {
    bool any = false;
    with_storage<T>(p_.bias_dtype, [&](auto tag) {
      const auto* x = static_cast<const decltype(tag)*>(bias);
      const std::int64_t stride = p_.bias.stride[3];
      for (std::int64_t j = keys.begin; j < keys.end && !any; ++j) {
        any = load_one(x + (first + j) * stride) != -kInfinity<T>;
        if (stride == 0) break;
      }
    });
    return any;
  }

  template <class S>
  static V strided(const S* x, std::int64_t stride, std::int64_t at, std::int64_t count) {
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

  const AttentionScores& p_;
  const bool softcap_, plain_, same_for_queries_, same_for_heads_, masked_;
  const T of_q_, before_, after_, of_grad_k_;
};

}  // namespace
}  // namespace seqkernels

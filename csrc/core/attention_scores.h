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
  Range keys;     // that some row may read
  bool all_mask;  // the mask, if there is one, takes nothing away of the keys of each row
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
        same_for_queries_((p.mask.data == nullptr || p.mask.stride[2] == 0) &&
                          (p.bias.data == nullptr || p.bias.stride[2] == 0)),
        same_for_heads_((p.mask.data == nullptr || p.mask.stride[1] == 0) &&
                        (p.bias.data == nullptr || p.bias.stride[1] == 0)),
        masked_(p.mask.data != nullptr || p.bias.data != nullptr),
        of_q_(static_cast<T>(!scaled    ? 1.0
                             : softcap_ ? p.scale / p.softcap
                                        : p.scale)),
        before_(static_cast<T>(scaled || !softcap_ ? 1.0 : p.scale / p.softcap)),
        after_(static_cast<T>(softcap_ ? p.softcap
                              : scaled ? 1.0
                                       : p.scale)),
        of_grad_k_(static_cast<T>(!scaled    ? p.scale
                                  : softcap_ ? p.softcap
                                             : 1.0)) {}

  // Whether scores are products times `after`, with a mask or without. A window alone needs nothing more than the
  // ranges of the rows.
  bool plain(bool mask) const { return !softcap_ && !mask && p_.bias.data == nullptr && p_.slopes == nullptr; }
  bool softcap() const { return softcap_; }
  T of_q() const { return of_q_; }            // factor of q in the operands
  T after() const { return after_; }          // from a product to a score, where it is plain
  T of_grad_k() const { return of_grad_k_; }  // from sums with the operands of q to the gradient of k
  bool dropout() const { return p_.threshold != 0; }
  T kept_share() const { return p_.dropout < 1.0 ? static_cast<T>(1.0 / (1.0 - p_.dropout)) : T(0); }

  // Whether the rows of a block all have the same mask and bias.
  bool uniform(const Document& document, std::int64_t rows, std::int64_t first) const {
    return masked_ && same_for_queries_ &&
           (same_for_heads_ || first / document.queries == (first + rows - 1) / document.queries);
  }

  // Whether ALiBi can leave far keys no weight at all.
  bool fades() const { return p_.slopes != nullptr && !masked_; }
  // The largest score that rows of these lengths may have, ALiBi apart, whatever was rounded.
  T largest(T q, T k) const {
    constexpr T kMore = T(1.00001);
    if (softcap_) return static_cast<T>(p_.softcap) * kMore + T(0) * q * k;
    return q * k * static_cast<T>(p_.scale < 0 ? -p_.scale : p_.scale) * kMore;
  }
  // Takes those keys from a row whose weights are 0 in any case: their scores are at most `largest` - slope * distance,
  // the log-sum-exp is at least `lse`. Not if something is not finite.
  static void take_far(ScoreRow& row, T largest, T lse) {
    constexpr T kNone = sizeof(T) == 8 ? T(712) : T(90);  // e^-kNone is 0 to weight_of, whatever was rounded
    const T reach = (largest - lse + kNone) / static_cast<T>(row.slope);
    if (!(row.slope > 0.0f && reach < T(1 << 30))) return;
    const auto near = static_cast<std::int64_t>(reach) + 1;
    row.keys.begin = max_of(row.keys.begin, row.level - near);
    row.keys.end = min_of(row.keys.end, row.level + near + 1);
  }

  // Looks at the masks of a tile before anything is computed: of a row's keys those that are masked at either end go,
  // which with padding and triangular masks are all of them.
  template <class Row>
  Kept look(Row* rows, std::int64_t size, std::int64_t first, Range keys, bool uniform) const {
    if (!masked_) return {keys, true};
    Kept kept{{keys.end, keys.begin}, true};
    if (uniform) {
      const Range left = trim(rows[0], first, keys);
      if (p_.mask.data != nullptr) kept.all_mask = keeps_all(rows[0].mask, first, left);
      for (std::int64_t r = 0; r < size; ++r) clip(rows[r], left, kept.keys);
      return kept;
    }
    for (std::int64_t r = 0; r < size; ++r) {
      const Range left = trim(rows[r], first, {rows[r].from, rows[r].count});
      clip(rows[r], left, kept.keys);
      if (p_.mask.data != nullptr && kept.all_mask) kept.all_mask = keeps_all(rows[r].mask, first, left);
    }
    return kept;
  }

  // The scores of a row from its products, -inf where it may not read in its vectors, and the largest of them; NaN do
  // not count. `add` has the masks and biases of all rows, or is null. slope_of_cap, unless null: the derivative of the
  // softcap.
  T modify(const ScoreRow& row, std::int64_t first, bool mask, const T* add, T* s, T* slope_of_cap) const {
    const std::int64_t begin = row.from / n * n;
    T factor = after_;  // until the first step has taken it in
    if (softcap_) {
      for (std::int64_t j = begin; j < row.count; j += n) {
        const V t = tanh<T>(load_full(s + j) * before_);
        if (slope_of_cap != nullptr) store_full(slope_of_cap + j, T(1) - t * t);
        store_full(s + j, t * factor);
      }
      factor = T(1);
    }
    if (p_.slopes != nullptr) {
      const T slope = static_cast<T>(row.slope);
      V distance = lanes() + static_cast<T>(begin + first - row.level);
      const auto add_slopes = [&](const auto& of) {
        for (std::int64_t j = begin; j < row.count; j += n, distance += T(n)) {
          store_full(s + j, load_full(s + j) * factor - slope * of(distance));
        }
      };
      if (first + row.count - 1 <= row.level) {  // as under causality
        add_slopes([](V x) { return -x; });
      } else {
        add_slopes([](V x) { return x < T(0) ? -x : x; });
      }
      factor = T(1);
    }
    if (add != nullptr) {
      for (std::int64_t j = begin; j < row.count; j += n) {
        store_full(s + j, plus(load_full(s + j) * factor, load_full(add + j)));
      }
      factor = T(1);
    } else if (row.bias != nullptr) {
      add_bias(row, first, begin, factor, s);
      factor = T(1);
    }
    if (mask) {
      for (std::int64_t j = begin; j < row.count; j += n) {
        const IntVec<T> keep = kept(row.mask, p_.mask.stride[3], first + j, row.count - j);
        store_full(s + j, keep ? load_full(s + j) * factor : splat(-kInfinity<T>));
      }
      factor = T(1);
    }
    return top_of(row, s, T(1));
  }

  // The same for scores that are plain: the products stay as they are, but for -inf.
  T top_of(const ScoreRow& row, T* s) const { return top_of(row, s, after_); }

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

  // The random words of a row's weights from key `first` to `end`.
  void draw(const ScoreRow& row, std::int64_t first, std::int64_t end, std::uint32_t* words) const {
    constexpr std::int64_t kBlock = 64;
    const std::uint64_t blocks = static_cast<std::uint64_t>(ceil_div(p_.keys, kBlock));
    std::uint32_t part[kBlock];
    for (std::int64_t key = first; key < end;) {
      const std::int64_t at = key % kBlock, count = min_of(kBlock - at, end - key);
      const std::uint64_t block =
          static_cast<std::uint64_t>(row.place) * blocks + static_cast<std::uint64_t>(key / kBlock);
      philox_block(block * 16, p_.seed, part);
      std::memcpy(words + (key - first), part + at, static_cast<std::size_t>(count) * sizeof(part[0]));
      key += count;
    }
  }
  // x where the words do not drop it, and scaled, else 0.
  V drop(V x, const std::uint32_t* words) const {
    using Word = typename Lanes<T>::Int;
    IntVec<T> dropped{};
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

  static T top_of(const ScoreRow& row, T* s, T factor) {
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
    return reduce_max<T>(max<T>(top, other)) * factor;
  }

  // A score that is masked is -inf, whatever it was.
  static V plus(V score, V bias) { return bias == -kInfinity<T> ? bias : score + bias; }

  void add_bias(const ScoreRow& row, std::int64_t first, std::int64_t begin, T factor, T* s) const {
    with_bias([&](auto tag) {
      const auto* bias = static_cast<const decltype(tag)*>(row.bias) + first;
      std::int64_t j = begin;
      if (p_.bias.stride[3] == 1) {
        for (; j + n <= row.count; j += n) store_full(s + j, plus(load_full(s + j) * factor, load(bias + j)));
      }
      for (; j < row.count; j += n) {
        store_full(s + j,
                   plus(load_full(s + j) * factor, strided(bias - first, p_.bias.stride[3], first + j, row.count - j)));
      }
    });
  }

  static void clip(ScoreRow& row, Range left, Range& all) {
    row.from = max_of(row.from, left.begin);
    row.count = min_of(row.count, left.end);
    if (row.from >= row.count) {
      row.from = row.count = 0;
      return;
    }
    all.begin = min_of(all.begin, row.from);
    all.end = max_of(all.end, row.count);
  }

  // The keys of the tile without those that the row's mask or bias takes away at either end.
  Range trim(const ScoreRow& row, std::int64_t first, Range keys) const {
    if (p_.mask.data != nullptr) {
      const std::int64_t stride = p_.mask.stride[3];
      const std::uint8_t* mask = row.mask + first * stride;
      if (stride == 1) {
        std::uint64_t word;
        for (; keys.end - keys.begin >= 8; keys.end -= 8) {
          std::memcpy(&word, mask + keys.end - 8, 8);
          if (word != 0) break;
        }
        for (; keys.end - keys.begin >= 8; keys.begin += 8) {
          std::memcpy(&word, mask + keys.begin, 8);
          if (word != 0) break;
        }
      }
      while (keys.end > keys.begin && mask[(keys.end - 1) * stride] == 0) --keys.end;
      while (keys.end > keys.begin && mask[keys.begin * stride] == 0) ++keys.begin;
    }
    if (p_.bias.data != nullptr) {
      with_storage<T>(p_.bias_dtype, [&](auto tag) {
        const std::int64_t stride = p_.bias.stride[3];
        const auto* bias = static_cast<const decltype(tag)*>(row.bias) + first * stride;
        while (keys.end > keys.begin && load_one(bias + (keys.end - 1) * stride) == -kInfinity<T>) --keys.end;
        while (keys.end > keys.begin && load_one(bias + keys.begin * stride) == -kInfinity<T>) ++keys.begin;
      });
    }
    return keys;
  }

  bool keeps_all(const std::uint8_t* mask, std::int64_t first, Range keys) const {
    const std::int64_t stride = p_.mask.stride[3];
    std::int64_t j = keys.begin;
    if (stride == 1) {
      for (; j + 8 <= keys.end; j += 8) {
        std::uint64_t word;
        std::memcpy(&word, mask + first + j, 8);
        // Whether one of the eight bytes is 0.
        if (((word - 0x0101010101010101u) & ~word & 0x8080808080808080u) != 0) return false;
      }
    }
    for (; j < keys.end; ++j) {
      if (mask[(first + j) * stride] == 0) return false;
    }
    return true;
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
  const bool softcap_, same_for_queries_, same_for_heads_, masked_;
  const T of_q_, before_, after_, of_grad_k_;
};

}  // namespace
}  // namespace seqkernels

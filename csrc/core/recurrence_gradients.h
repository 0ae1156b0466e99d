// The gradients of a recurrence that are matrix products: of the input, the weights and the biases. They take the gate
// gradients of one chunk of steps at a time and add to what the chunks before gave, so that neither all gate gradients
// exist at once nor does anybody read them from memory.
//
// A row of the buffer holds the gradients of all gates of one step and batch row: those of the input part from column
// 0, those of the recurrent part from column 0 or, where the last gate (the GRU's n) has a recurrent part apart, from
// column H: [n of the input part, r, z, n of the recurrent part]. With a layer norm of the recurrent product, the
// gradients of that follow; then what the gradients of the options are sums of.
#pragma once

#include "core/gemm16.h"
#include "core/recurrence.h"
#include "core/recurrence_pack.h"
#include "core/team.h"

namespace seqkernels {
namespace {

// The index in time of step i of the backward pass.
inline std::int64_t time_of(const RecurrenceBackward& p, std::int64_t i) { return p.reverse ? i : p.steps - 1 - i; }

inline std::uint8_t control_of(const RecurrenceBackward& p, std::int64_t t, std::int64_t b) {
  return p.control == nullptr ? 0 : p.control[t * p.control_step + b * p.control_row];
}

// State s (H) that row b of step t began with, of `states` (T+1, B, H); null for zero, and where the row is held.
template <class S>
inline const S* state_before(const RecurrenceBackward& p, int s, std::int64_t t, std::int64_t b, const S* states) {
  const std::uint8_t bits = control_of(p, t, b);
  if (bits & kHold) return nullptr;
  if (bits & kReset) {
    return p.reset_state == nullptr ? nullptr : static_cast<const S*>(p.reset_state) + s * p.hidden;
  }
  return states + ((t + p.reverse) * p.batch + b) * p.hidden;
}

// O is the type of the operands of the products: of the buffer, then.
template <class S, class O, int kGates, bool kApartOfCell>
class GateGradients {
  using T = Compute<S>;
  static constexpr int n = kLanes<T>;
  static constexpr int kWidth = kMaxVectors * n;
  static constexpr std::int64_t kRows = 256;  // depth of a product: rows of the buffer taken at a time
  static constexpr int kStrip = block_rows(kMaxVectors);
  static constexpr int kTileRows = 6 * kMaxRows;

 public:
  static constexpr bool kApart = kApartOfCell;
  // Where the input part of a gate lies, in units of H.
  static constexpr int slot(int gate) { return kApart ? (gate + 1) % kGates : gate; }

  GateGradients(const RecurrenceBackward& p, int threads)
      : p_(p),
        depth_(kGates * p.hidden),
        product_at_(p.norm_h == nullptr ? kApart * p.hidden : (kGates + kApart) * p.hidden),
        norm_h_at_((kGates + kApart) * p.hidden + (p.norm_h == nullptr ? 0 : depth_)),
        peephole_at_(norm_h_at_ + (p.norm_h == nullptr ? 0 : depth_)),
        norm_c_at_(peephole_at_ + (p.peephole == nullptr ? 0 : 3 * p.hidden)),
        stride_(norm_c_at_ + (p.norm_c == nullptr ? 0 : 2 * p.hidden)),
        steps_(max_of<std::int64_t>(1, min_of(p.steps, kRows / max_of<std::int64_t>(1, p.batch)))),
        panels_(p.project && p.grad_input != nullptr ? ceil_div(p.inputs, kWidth) : 0),
        gates_(2 * steps_ * p.batch * stride_),
        packed_(panels_ * packed_depth<O>(depth_) * kWidth),
        strips_(threads * strip_size(threads)),
        panel_(threads * kRows * kWidth),
        inputs_(threads * max_of(depth_, kRows)),
        rows_(threads * 2 * kTileRows) {}

  std::int64_t steps() const { return steps_; }  // of a chunk

  // The gate gradients of row b in step i of the order of processing. Two chunks have room.
  O* of(std::int64_t i, std::int64_t b) const {
    return gates_.get() + ((i / steps_ % 2 * steps_ + i % steps_) * p_.batch + b) * stride_;
  }
  O* recurrent(std::int64_t i, std::int64_t b) const { return of(i, b) + kApart * p_.hidden; }
  // Of the recurrent product: the recurrent part itself where there is no layer norm between.
  O* of_product(std::int64_t i, std::int64_t b) const { return of(i, b) + product_at_; }
  // Terms of the gradients of norm_h (G*H), peephole (3*H) and norm_c (2*H).
  O* of_norm_h(std::int64_t i, std::int64_t b) const { return of(i, b) + norm_h_at_; }
  O* of_peephole(std::int64_t i, std::int64_t b) const { return of(i, b) + peephole_at_; }
  O* of_norm_c(std::int64_t i, std::int64_t b) const { return of(i, b) + norm_c_at_; }

  // packed[panel][gate][input]: weight_ih as the gradient of the input needs it. All threads, before the first chunk.
  void pack(int thread, int threads) {
    const Share panels = share(panels_, thread, threads);
    const S* weight = static_cast<const S*>(p_.weight_ih);
    const S** rows = inputs_.get() + thread * max_of(depth_, kRows);
    for (int g = 0; g < kGates; ++g) {
      for (std::int64_t u = 0; u < p_.hidden; ++u) {
        rows[slot(g) * p_.hidden + u] = weight + (g * p_.hidden + u) * p_.weight_ih_row;
      }
    }
    for (std::int64_t k = panels.begin; k < panels.end; ++k) {
      pack_rows(rows, depth_, p_.inputs, k * kWidth, kMaxVectors, packed_.get() + k * packed_depth<O>(depth_) * kWidth);
    }
  }

  // Takes the chunk of steps [begin, end), complete in every thread. A thread makes rows of the input's gradient and
  // rows of the weights' (columns of the buffer).
  void spend(std::int64_t begin, std::int64_t end, int thread, int threads) {
    if (panels_ > 0) to_input(begin, end, thread, threads);
    const std::int64_t rows = (end - begin) * p_.batch;
    for (std::int64_t r = 0; r < rows; r += kRows) {
      const std::int64_t count = min_of(kRows, rows - r);
      to_weights(begin, r, count, thread, threads);
      const O* gates = of(begin, 0) + r * stride_;
      const bool add = begin > 0 || r > 0;
      sum_terms(gates + norm_h_at_, depth_, count, add, thread, threads, p_.grad_norm_h);
      sum_terms(gates + peephole_at_, 3 * p_.hidden, count, add, thread, threads, p_.grad_peephole);
      sum_terms(gates + norm_c_at_, 2 * p_.hidden, count, add, thread, threads, p_.grad_norm_c);
    }
  }

 private:
  // Columns of the buffer with the same destinations: rows of the gradients of weight_ih and weight_hh, and of the two
  // biases; -1 for none.
  struct Segment {
    std::int64_t column, count, row_ih, row_hh, bias_ih, bias_hh;
  };
  static constexpr int kPlainSegments = kApart ? 3 : 1, kMaxSegments = kPlainSegments + 1;

  int segments() const { return kPlainSegments + (p_.norm_h != nullptr); }

  Segment segment(int k) const {
    const std::int64_t H = p_.hidden;
    if (k == kPlainSegments) return {product_at_, depth_, -1, 0, -1, -1};
    Segment s{0, depth_, 0, 0, 0, 0};
    if constexpr (kApart) {
      if (k == 0) s = {0, H, (kGates - 1) * H, -1, (kGates - 1) * H, -1};
      if (k == 1) s = {H, (kGates - 1) * H, 0, 0, 0, 0};
      if (k == 2) s = {kGates * H, H, -1, (kGates - 1) * H, -1, (kGates - 1) * H};
    }
    if (p_.norm_h != nullptr) s.row_hh = -1;
    return s;
  }

  std::int64_t strip_size(int threads) const {
    std::int64_t size = 0;
    for (int k = 0; k < segments(); ++k) size += (ceil_div(segment(k).count, threads) + 1) * kRows;
    return size;
  }

  std::int64_t time(std::int64_t i) const { return time_of(p_, i); }

  void to_input(std::int64_t begin, std::int64_t end, int thread, int threads) {
    const Share rows = share((end - begin) * p_.batch, thread, threads);
    const O** pointers = rows_.get() + thread * 2 * kTileRows;
    const O* gates = of(begin, 0);
    alignas(64) T tile[kTileRows * kWidth];
    for (std::int64_t r = rows.begin; r < rows.end; r += kTileRows) {
      const std::int64_t count = min_of<std::int64_t>(kTileRows, rows.end - r);
      for (std::int64_t m = 0; m < count; ++m) {
        pointers[m] = gates + (r + m) * stride_;
        pointers[kTileRows + m] = pointers[m] + p_.hidden;
      }
      for (std::int64_t k = 0; k < panels_; ++k) {
        const std::int64_t column = k * kWidth;
        const std::int64_t left = min_of<std::int64_t>(kWidth, p_.inputs - column);
        const O* packed = packed_.get() + k * packed_depth<O>(depth_) * kWidth;
        // Pairs do not end at an odd H.
        if (kApart && (sizeof(O) == sizeof(T) || p_.hidden % 2 == 0)) {
          // The gradients of n are by far the largest: a sum that begins with them would round all others to their
          // size.
          product(count, depth_ - p_.hidden, pointers + kTileRows, packed + p_.hidden * kWidth, kMaxVectors, false,
                  tile, kWidth);
          product(count, p_.hidden, pointers, packed, kMaxVectors, true, tile, kWidth);
        } else {
          product(count, depth_, pointers, packed, kMaxVectors, false, tile, kWidth);
        }
        for (std::int64_t m = 0; m < count; ++m) {
          const std::int64_t t = time(begin + (r + m) / p_.batch), b = (r + m) % p_.batch;
          S* to = static_cast<S*>(p_.grad_input) + (t * p_.batch + b) * p_.inputs + column;
          for (std::int64_t v = 0; v < left; v += n) store(to + v, load_full(tile + m * kWidth + v), left - v);
        }
      }
    }
  }

  void to_weights(std::int64_t begin, std::int64_t first, std::int64_t rows, int thread, int threads) {
    if (p_.grad_weight_ih == nullptr && p_.grad_weight_hh == nullptr && p_.grad_bias_ih == nullptr &&
        p_.grad_bias_hh == nullptr) {
      return;
    }
    const bool add = begin > 0 || first > 0;
    const O* gates = of(begin, 0) + first * stride_;
    O* strips = strips_.get() + thread * strip_size(threads);
    Share columns[kMaxSegments];
    O* at[kMaxSegments];
    for (int k = 0; k < segments(); ++k) {
      const Segment s = segment(k);
      columns[k] = share(s.count, thread, threads);
      at[k] = strips;
      for (std::int64_t c = columns[k].begin; c < columns[k].end; c += kStrip) {
        const int count = static_cast<int>(min_of<std::int64_t>(kStrip, columns[k].end - c));
        pack_strip(gates + s.column + c, stride_, rows, count, strips);
        strips += packed_depth<O>(rows) * count;
      }
      to_biases(s, columns[k], gates, rows, add);
    }
    const S** pointers = inputs_.get() + thread * max_of(depth_, kRows);
    O* panel = panel_.get() + thread * kRows * kWidth;
    if (p_.grad_weight_ih != nullptr) {
      for (std::int64_t r = 0; r < rows; ++r) {
        const std::int64_t t = time(begin + (first + r) / p_.batch), b = (first + r) % p_.batch;
        // The gradient of a held step is 0, but its input may be NaN.
        pointers[r] = (control_of(p_, t, b) & kHold)
                          ? nullptr
                          : static_cast<const S*>(p_.input) + t * p_.input_step + b * p_.input_row;
      }
      multiply(pointers, rows, p_.inputs, columns, at, false, add, panel, static_cast<T*>(p_.grad_weight_ih), first);
    }
    if (p_.grad_weight_hh != nullptr) {
      for (std::int64_t r = 0; r < rows; ++r) {
        const std::int64_t t = time(begin + (first + r) / p_.batch), b = (first + r) % p_.batch;
        pointers[r] = state_before(p_, 0, t, b, static_cast<const S*>(p_.states));
      }
      multiply(pointers, rows, p_.hidden, columns, at, true, add, panel, static_cast<T*>(p_.grad_weight_hh), first);
    }
  }

  // to (gates, size) (+)= strips^T x, with x (rows, size) given by its rows, the first one `first` of the chunk.
  void multiply(const S* const* x, std::int64_t rows, std::int64_t size, const Share* columns, O* const* strips,
                bool recurrent, bool add, O* panel, T* to, std::int64_t first) {
    alignas(64) T tile[kStrip * kWidth];
    for (std::int64_t column = 0; column < size; column += kWidth) {
      const std::int64_t left = min_of<std::int64_t>(kWidth, size - column);
      const int vectors = static_cast<int>(ceil_div(left, n));
      const std::int64_t width = vectors * n;
      pack_rows(x, rows, size, column, vectors, panel);
      if constexpr (sizeof(O) == sizeof(T)) {
        if (recurrent && p_.recurrent_mask != nullptr) mask_panel(first, rows, column, vectors, panel);
      }
      for (int k = 0; k < segments(); ++k) {
        const Segment s = segment(k);
        const std::int64_t row = recurrent ? s.row_hh : s.row_ih;
        if (row < 0) continue;
        const O* strip = strips[k];
        for (std::int64_t c = columns[k].begin; c < columns[k].end; c += kStrip) {
          const int count = static_cast<int>(min_of<std::int64_t>(kStrip, columns[k].end - c));
          T* out = to + (row + c) * size + column;
          if (left == width) {
            strip_product(count, rows, strip, panel, vectors, add, out, size);
          } else {
            strip_product(count, rows, strip, panel, vectors, false, tile, width);
            for (int m = 0; m < count; ++m) {
              for (std::int64_t v = 0; v < left; v += n) {
                Vec<T> sum = load_full(tile + m * width + v);
                if (add) sum += load(out + m * size + v, left - v);
                store(out + m * size + v, sum, left - v);
              }
            }
          }
          strip += packed_depth<O>(rows) * count;
        }
      }
    }
  }

  // panel (rows, vectors * lanes) times the recurrent mask from `column`.
  void mask_panel(std::int64_t first, std::int64_t rows, std::int64_t column, int vectors, T* panel) {
    const S* mask = static_cast<const S*>(p_.recurrent_mask);
    for (std::int64_t r = 0; r < rows; ++r) {
      const S* of_row = mask + (first + r) % p_.batch * p_.hidden;
      for (int v = 0; v < vectors; ++v, panel += n) {
        const std::int64_t at = column + v * n;
        if (at < p_.hidden) store_full(panel, load_full(panel) * load(of_row + at, p_.hidden - at));
      }
    }
  }

  void to_biases(const Segment& s, Share columns, const O* gates, std::int64_t rows, bool add) {
    T* const bias_ih = s.bias_ih < 0 ? nullptr : static_cast<T*>(p_.grad_bias_ih);
    T* const bias_hh = s.bias_hh < 0 ? nullptr : static_cast<T*>(p_.grad_bias_hh);
    if (bias_ih == nullptr && bias_hh == nullptr) return;
    for (std::int64_t c = columns.begin; c < columns.end; c += n) {
      const std::int64_t left = columns.end - c;
      const Vec<T> sum = sum_of_rows(gates + s.column + c, rows, left);
      if (bias_ih != nullptr) put_sum(bias_ih + s.bias_ih + c, sum, left, add);
      if (bias_hh != nullptr) put_sum(bias_hh + s.bias_hh + c, sum, left, add);
    }
  }

  // to (count) (+)= the sum over the rows of `terms`.
  void sum_terms(const O* terms, std::int64_t count, std::int64_t rows, bool add, int thread, int threads, void* to) {
    if (to == nullptr) return;
    const Share columns = share(count, thread, threads);
    for (std::int64_t c = columns.begin; c < columns.end; c += n) {
      const std::int64_t left = columns.end - c;
      put_sum(static_cast<T*>(to) + c, sum_of_rows(terms + c, rows, left), left, add);
    }
  }

  Vec<T> sum_of_rows(const O* from, std::int64_t rows, std::int64_t left) const {
    // Sums of sums are more exact than one long sum.
    constexpr int kParts = 8;
    Vec<T> part[kParts] = {};
    for (std::int64_t r = 0; r < rows; ++r) part[r % kParts] += load(from + r * stride_, left);
    for (int step = kParts / 2; step > 0; step /= 2) {
      for (int k = 0; k < step; ++k) part[k] += part[k + step];
    }
    return part[0];
  }

  static void put_sum(T* to, Vec<T> sum, std::int64_t left, bool add) {
    store(to, add ? sum + load(to, left) : sum, left);
  }

  const RecurrenceBackward& p_;
  const std::int64_t depth_, product_at_, norm_h_at_, peephole_at_, norm_c_at_, stride_, steps_, panels_;
  Scratch<O> gates_, packed_, strips_, panel_;
  Scratch<const S*> inputs_;
  Scratch<const O*> rows_;
};

}  // namespace
}  // namespace seqkernels

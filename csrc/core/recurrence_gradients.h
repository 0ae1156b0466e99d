// The gradients of a recurrence that are matrix products: of the input, the weights and the biases. They take the gate
// gradients of one chunk of steps at a time and add to what the chunks before gave, so that neither all gate gradients
// exist at once nor does anybody read them from memory.
//
// A row of the buffer holds the gradients of all gates of one step and batch row: those of the input part from column
// 0, those of the recurrent part from column 0 or, where the last gate (the GRU's n) has a recurrent part apart, from
// column H: [n of the input part, r, z, n of the recurrent part].
#pragma once

#include "core/gemm.h"
#include "core/recurrence.h"
#include "core/recurrence_pack.h"
#include "core/team.h"

namespace seqkernels {
namespace {

template <class S, int kGates, bool kApartOfCell>
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
        stride_((kGates + kApart) * p.hidden),
        depth_(kGates * p.hidden),
        steps_(max_of<std::int64_t>(1, min_of(p.steps, kRows / max_of<std::int64_t>(1, p.batch)))),
        panels_(p.project && p.grad_input != nullptr ? ceil_div(p.inputs, kWidth) : 0),
        gates_(2 * steps_ * p.batch * stride_),
        packed_(panels_ * depth_ * kWidth),
        strips_(threads * strip_size(threads)),
        panel_(threads * kRows * kWidth),
        inputs_(threads * max_of(depth_, kRows)),
        rows_(threads * kTileRows) {}

  std::int64_t steps() const { return steps_; }  // of a chunk

  // The gate gradients of row b in step i of the order of processing. Two chunks have room.
  T* of(std::int64_t i, std::int64_t b) const {
    return gates_.get() + ((i / steps_ % 2 * steps_ + i % steps_) * p_.batch + b) * stride_;
  }
  const T* recurrent(std::int64_t i, std::int64_t b) const { return of(i, b) + (kApart ? p_.hidden : 0); }

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
      pack_rows(rows, depth_, p_.inputs, k * kWidth, kMaxVectors, packed_.get() + k * depth_ * kWidth);
    }
  }

  // Takes the chunk of steps [begin, end), complete in every thread. A thread makes rows of the input's gradient and
  // rows of the weights' (columns of the buffer).
  void spend(std::int64_t begin, std::int64_t end, int thread, int threads) {
    if (panels_ > 0) to_input(begin, end, thread, threads);
    const std::int64_t rows = (end - begin) * p_.batch;
    for (std::int64_t r = 0; r < rows; r += kRows) {
      to_weights(begin, r, min_of(kRows, rows - r), thread, threads);
    }
  }

 private:
  // Columns of the buffer with the same destinations: rows of the gradients of weight_ih and weight_hh, or -1.
  struct Segment {
    std::int64_t column, count, row_ih, row_hh;
  };
  static constexpr int kSegments = kApart ? 3 : 1;

  Segment segment(int k) const {
    const std::int64_t H = p_.hidden;
    if constexpr (kApart) {
      if (k == 0) return {0, H, (kGates - 1) * H, -1};
      if (k == 1) return {H, (kGates - 1) * H, 0, 0};
      return {kGates * H, H, -1, (kGates - 1) * H};
    } else {
      return {0, depth_, 0, 0};
    }
  }

  std::int64_t strip_size(int threads) const {
    std::int64_t size = 0;
    for (int k = 0; k < kSegments; ++k) size += (ceil_div(segment(k).count, threads) + 1) * kRows;
    return size;
  }

  std::int64_t time(std::int64_t i) const { return p_.reverse ? i : p_.steps - 1 - i; }
  std::uint8_t control(std::int64_t t, std::int64_t b) const {
    return p_.control == nullptr ? 0 : p_.control[t * p_.control_step + b * p_.control_row];
  }

  void to_input(std::int64_t begin, std::int64_t end, int thread, int threads) {
    const Share rows = share((end - begin) * p_.batch, thread, threads);
    const T** pointers = rows_.get() + thread * kTileRows;
    const T* gates = of(begin, 0);
    alignas(64) T tile[kTileRows * kWidth];
    for (std::int64_t r = rows.begin; r < rows.end; r += kTileRows) {
      const std::int64_t count = min_of<std::int64_t>(kTileRows, rows.end - r);
      for (std::int64_t m = 0; m < count; ++m) pointers[m] = gates + (r + m) * stride_;
      for (std::int64_t k = 0; k < panels_; ++k) {
        const std::int64_t column = k * kWidth;
        const std::int64_t left = min_of<std::int64_t>(kWidth, p_.inputs - column);
        product(count, depth_, pointers, packed_.get() + k * depth_ * kWidth, kMaxVectors, false, tile, kWidth);
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
    const T* gates = of(begin, 0) + first * stride_;
    T* strips = strips_.get() + thread * strip_size(threads);
    Share columns[kSegments];
    T* at[kSegments];
    for (int k = 0; k < kSegments; ++k) {
      const Segment s = segment(k);
      columns[k] = share(s.count, thread, threads);
      at[k] = strips;
      for (std::int64_t c = columns[k].begin; c < columns[k].end; c += kStrip) {
        const int count = static_cast<int>(min_of<std::int64_t>(kStrip, columns[k].end - c));
        pack_strip(gates + s.column + c, stride_, rows, count, strips);
        strips += rows * count;
      }
      to_biases(s, columns[k], gates, rows, add);
    }
    const S** pointers = inputs_.get() + thread * max_of(depth_, kRows);
    T* panel = panel_.get() + thread * kRows * kWidth;
    if (p_.grad_weight_ih != nullptr) {
      for (std::int64_t r = 0; r < rows; ++r) {
        const std::int64_t t = time(begin + (first + r) / p_.batch), b = (first + r) % p_.batch;
        // The gradient of a held step is 0, but its input may be NaN.
        pointers[r] = (control(t, b) & kHold)
                          ? nullptr
                          : static_cast<const S*>(p_.input) + t * p_.input_step + b * p_.input_row;
      }
      multiply(pointers, rows, p_.inputs, columns, at, false, add, panel, static_cast<T*>(p_.grad_weight_ih));
    }
    if (p_.grad_weight_hh != nullptr) {
      const S* states = static_cast<const S*>(p_.states);
      for (std::int64_t r = 0; r < rows; ++r) {
        const std::int64_t t = time(begin + (first + r) / p_.batch), b = (first + r) % p_.batch;
        const std::uint8_t bits = control(t, b);
        pointers[r] = (bits & kHold)    ? nullptr
                      : (bits & kReset) ? static_cast<const S*>(p_.reset_state)
                                        : states + ((p_.reverse ? t + 1 : t) * p_.batch + b) * p_.hidden;
      }
      multiply(pointers, rows, p_.hidden, columns, at, true, add, panel, static_cast<T*>(p_.grad_weight_hh));
    }
  }

  // to (gates, size) (+)= strips^T x, with x (rows, size) given by its rows.
  void multiply(const S* const* x, std::int64_t rows, std::int64_t size, const Share* columns, T* const* strips,
                bool recurrent, bool add, T* panel, T* to) {
    alignas(64) T tile[kStrip * kWidth];
    for (std::int64_t column = 0; column < size; column += kWidth) {
      const std::int64_t left = min_of<std::int64_t>(kWidth, size - column);
      const int vectors = static_cast<int>(ceil_div(left, n));
      const std::int64_t width = vectors * n;
      pack_rows(x, rows, size, column, vectors, panel);
      for (int k = 0; k < kSegments; ++k) {
        const Segment s = segment(k);
        const std::int64_t row = recurrent ? s.row_hh : s.row_ih;
        if (row < 0) continue;
        const T* strip = strips[k];
        for (std::int64_t c = columns[k].begin; c < columns[k].end; c += kStrip) {
          const int count = static_cast<int>(min_of<std::int64_t>(kStrip, columns[k].end - c));
          T* out = to + (row + c) * size + column;
          if (left == width) {
            (add ? micro_kernel_for<T, Layout::kTransposed, true>(count, vectors)
                 : micro_kernel_for<T, Layout::kTransposed, false>(count, vectors))(rows, &strip, count, panel, width,
                                                                                    out, size);
          } else {
            micro_kernel_for<T, Layout::kTransposed, false>(count, vectors)(rows, &strip, count, panel, width, tile,
                                                                            width);
            for (int m = 0; m < count; ++m) {
              for (std::int64_t v = 0; v < left; v += n) {
                Vec<T> sum = load_full(tile + m * width + v);
                if (add) sum += load(out + m * size + v, left - v);
                store(out + m * size + v, sum, left - v);
              }
            }
          }
          strip += rows * count;
        }
      }
    }
  }

  void to_biases(const Segment& s, Share columns, const T* gates, std::int64_t rows, bool add) {
    T* const biases[] = {s.row_ih < 0 ? nullptr : static_cast<T*>(p_.grad_bias_ih),
                         s.row_hh < 0 ? nullptr : static_cast<T*>(p_.grad_bias_hh)};
    const std::int64_t row[] = {s.row_ih, s.row_hh};
    if (biases[0] == nullptr && biases[1] == nullptr) return;
    for (std::int64_t c = columns.begin; c < columns.end; c += n) {
      const std::int64_t left = columns.end - c;
      // Sums of sums are more exact than one long sum.
      constexpr int kParts = 8;
      Vec<T> part[kParts] = {};
      for (std::int64_t r = 0; r < rows; ++r) part[r % kParts] += load(gates + r * stride_ + s.column + c, left);
      for (int step = kParts / 2; step > 0; step /= 2) {
        for (int k = 0; k < step; ++k) part[k] += part[k + step];
      }
      const Vec<T> sum = part[0];
      for (int k = 0; k < 2; ++k) {
        if (biases[k] == nullptr) continue;
        T* to = biases[k] + row[k] + c;
        store(to, add ? sum + load(to, left) : sum, left);
      }
    }
  }

  const RecurrenceBackward& p_;
  const std::int64_t stride_, depth_, steps_, panels_;
  Scratch<T> gates_, packed_, strips_, panel_;
  Scratch<const S*> inputs_;
  Scratch<const T*> rows_;
};

}  // namespace
}  // namespace seqkernels

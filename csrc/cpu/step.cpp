// One step of a cell for a few rows. Forward, a vector of units takes the dot products of its rows of the weights with
// input and state, which a transposition turns into a vector. Backward, rows of the weights are added up, and outer
// products written.
#include "core/step.h"

#include "core/kernels.h"
#include "core/recurrence_pack.h"
#include "core/recurrence_team.h"

namespace seqkernels {
namespace {

constexpr int kRowsAtOnce = 4;

// sums[i] += weight[i] x, unfinished over the lanes, for the kLanes rows of `weight` from its first; rows from `count`
// on repeat the last one. Few rows at a time: memory is read more quickly in few streams.
template <class S, class T = Compute<S>>
inline void dot_rows(const S* weight, std::int64_t stride, std::int64_t count, const T* x, std::int64_t depth,
                     Vec<T>* sums) {
  constexpr int n = kLanes<T>, r = n < kRowsAtOnce ? n : kRowsAtOnce;
  for (int first = 0; first < n; first += r) {
    const S* rows[r];
    for (int i = 0; i < r; ++i) rows[i] = weight + min_of<std::int64_t>(first + i, count - 1) * stride;
    Vec<T> even[r], odd[r] = {};
    for (int i = 0; i < r; ++i) even[i] = sums[first + i];
    std::int64_t k = 0;
    for (; k + 2 * n <= depth; k += 2 * n) {
      const Vec<T> x0 = load_full(x + k), x1 = load_full(x + k + n);
#pragma GCC unroll 16
      for (int i = 0; i < r; ++i) {
        even[i] += load(rows[i] + k) * x0;
        odd[i] += load(rows[i] + k + n) * x1;
      }
    }
    for (; k < depth; k += n) {
      const Vec<T> tail = load(x + k, depth - k);
#pragma GCC unroll 16
      for (int i = 0; i < r; ++i) even[i] += load(rows[i] + k, depth - k) * tail;
    }
#pragma GCC unroll 16
    for (int i = 0; i < r; ++i) sums[first + i] = even[i] + odd[i];
  }
}

// Lane i of the result is the sum of the lanes of sums[i].
template <class T>
inline Vec<T> sum_lanes(Vec<T>* sums) {
  constexpr int n = kLanes<T>;
  transpose<T>(sums);
#pragma GCC unroll 16
  for (int step = n / 2; step > 0; step /= 2) {
#pragma GCC unroll 16
    for (int i = 0; i < step; ++i) sums[i] += sums[i + step];
  }
  return sums[0];
}

// What both passes share: rows in compute dtype, and threads that own blocks of units.
template <template <class> class CellOf, class S, class Params>
class Step {
 protected:
  using T = Compute<S>;
  using V = Vec<T>;
  using Cell = CellOf<T>;
  static constexpr int n = kLanes<T>;
  static constexpr bool kConvert = sizeof(S) != sizeof(T);

  explicit Step(const Params& p)
      : p_(p),
        threads_(
            team_size(p.threads, 2.0 * static_cast<double>(p.batch * p.hidden * (p.inputs + p.hidden)) * Cell::kGates)),
        rows_(kConvert || p.states[0] == nullptr ? p.batch * (p.inputs + p.hidden) : 0) {
    if (kConvert) {
      for (std::int64_t b = 0; b < p.batch; ++b) {
        copy_converted(static_cast<const S*>(p.input) + b * p.input_row, rows_.get() + b * p.inputs, p.inputs);
      }
    }
    T* hidden = rows_.get() + p.batch * p.inputs;
    for (std::int64_t b = 0; b < p.batch && (kConvert || p.states[0] == nullptr); ++b) {
      for (std::int64_t u = 0; u < p.hidden; u += n) {
        store(hidden + b * p.hidden + u, state<false>(0, b, u, p.hidden - u), p.hidden - u);
      }
    }
  }

  const T* input(std::int64_t b) const {
    if constexpr (kConvert)
      return rows_.get() + b * p_.inputs;
    else
      return static_cast<const T*>(p_.input) + b * p_.input_row;
  }
  const T* hidden(std::int64_t b) const {
    if (kConvert || p_.states[0] == nullptr) return rows_.get() + p_.batch * p_.inputs + b * p_.hidden;
    return static_cast<const T*>(p_.states[0]) + b * p_.state_rows[0];
  }

  template <bool kFull>
  V state(int s, std::int64_t b, std::int64_t unit, std::int64_t left) const {
    if (p_.states[s] == nullptr) return V{};
    return get<kFull>(static_cast<const S*>(p_.states[s]) + b * p_.state_rows[s] + unit, left);
  }

  const Params& p_;
  const int threads_;

 private:
  Scratch<T> rows_;
};

template <template <class> class CellOf, class S, bool, class>
class StepForward : Step<CellOf, S, CellStepForward> {
  using Base = Step<CellOf, S, CellStepForward>;
  using Base::n, Base::p_;
  using typename Base::Cell, typename Base::T, typename Base::V;

 public:
  explicit StepForward(const CellStepForward& p) : Base(p) {}

  void run() {
    run_team(Base::threads_, [this](int thread, int threads) {
      const Share blocks = share(ceil_div(p_.hidden, n), thread, threads);
      for (std::int64_t k = blocks.begin; k < blocks.end; ++k) {
        const std::int64_t unit = k * n, left = min_of<std::int64_t>(n, p_.hidden - unit);
        for (std::int64_t b = 0; b < p_.batch; ++b) left == n ? cell<true>(unit, left, b) : cell<false>(unit, left, b);
      }
    });
  }

 private:
  template <bool kFull>
  void cell(std::int64_t unit, std::int64_t left, std::int64_t b) {
    V x[Cell::kGates], h[Cell::kGates], prev[Cell::kStates], next[Cell::kStates];
    V saved[Cell::kReserve > 0 ? Cell::kReserve : 1];
    for (int g = 0; g < Cell::kGates; ++g) {
      const std::int64_t row = g * p_.hidden + unit;
      const S* weight_ih = static_cast<const S*>(p_.weight_ih) + row * p_.weight_ih_row;
      const S* weight_hh = static_cast<const S*>(p_.weight_hh) + row * p_.weight_hh_row;
      V sums[n] = {};
      dot_rows(weight_ih, p_.weight_ih_row, left, Base::input(b), p_.inputs, sums);
      if (g < Cell::kSummedGates) {
        dot_rows(weight_hh, p_.weight_hh_row, left, Base::hidden(b), p_.hidden, sums);
        x[g] = sum_lanes<T>(sums) + bias<kFull>(p_.bias_ih, row, left);
        h[g] = bias<kFull>(p_.bias_hh, row, left);
      } else {
        x[g] = sum_lanes<T>(sums) + bias<kFull>(p_.bias_ih, row, left);
        V recurrent[n] = {};
        dot_rows(weight_hh, p_.weight_hh_row, left, Base::hidden(b), p_.hidden, recurrent);
        h[g] = sum_lanes<T>(recurrent) + bias<kFull>(p_.bias_hh, row, left);
      }
    }
    for (int s = 0; s < Cell::kStates; ++s) prev[s] = Base::template state<kFull>(s, b, unit, left);
    Cell::forward(x, h, prev, next, saved);
    for (int s = 0; s < Cell::kStates; ++s) {
      put<kFull>(static_cast<S*>(p_.next[s]) + b * p_.hidden + unit, next[s], left);
    }
    if (p_.reserve == nullptr) return;
    T* reserve = static_cast<T*>(p_.reserve) + b * Cell::kReserve * p_.hidden + unit;
    for (int r = 0; r < Cell::kReserve; ++r) put<kFull>(reserve + r * p_.hidden, saved[r], left);
  }

  template <bool kFull>
  static V bias(const void* bias, std::int64_t at, std::int64_t left) {
    return bias == nullptr ? V{} : get<kFull>(static_cast<const S*>(bias) + at, left);
  }
};

template <template <class> class CellOf, class S, bool, class>
class StepBackward : Step<CellOf, S, CellStepBackward> {
  using Base = Step<CellOf, S, CellStepBackward>;
  using Base::n, Base::p_;
  using typename Base::Cell, typename Base::T, typename Base::V;
  static constexpr bool kApart = Cell::kSummedGates < Cell::kGates;
  static constexpr int kColumns = 8;  // vectors of columns that stay in registers

 public:
  explicit StepBackward(const CellStepBackward& p)
      : Base(p),
        depth_(Cell::kGates * p.hidden),
        gates_x_(p.batch * depth_),
        gates_h_(kApart ? p.batch * depth_ : 0),
        direct_(p.batch * p.hidden) {}

  void run() {
    run_team(Base::threads_, [this](int thread, int threads) {
      const Share blocks = share(ceil_div(p_.hidden, n), thread, threads);
      for (std::int64_t k = blocks.begin; k < blocks.end; ++k) {
        const std::int64_t unit = k * n, left = min_of<std::int64_t>(n, p_.hidden - unit);
        for (std::int64_t b = 0; b < p_.batch; ++b) left == n ? cell<true>(unit, left, b) : cell<false>(unit, left, b);
      }
      barrier_.wait(threads);
      if (p_.grad_input != nullptr) {
        to_vector(p_.grad_input, gates_x_.get(), p_.weight_ih, p_.weight_ih_row, p_.inputs, false, thread, threads);
      }
      if (p_.grad_states[0] != nullptr) {
        to_vector(p_.grad_states[0], gates_h(), p_.weight_hh, p_.weight_hh_row, p_.hidden, true, thread, threads);
      }
      to_weight(p_.grad_weight_ih, p_.grad_bias_ih, gates_x_.get(), p_.inputs, false, thread, threads);
      to_weight(p_.grad_weight_hh, p_.grad_bias_hh, gates_h(), p_.hidden, true, thread, threads);
    });
  }

 private:
  T* gates_h() const { return kApart ? gates_h_.get() : gates_x_.get(); }

  template <bool kFull>
  void cell(std::int64_t unit, std::int64_t left, std::int64_t b) {
    V grad[Cell::kStates], prev[Cell::kStates], next[Cell::kStates], direct[Cell::kStates];
    V saved[Cell::kReserve > 0 ? Cell::kReserve : 1], x[Cell::kGates], h[Cell::kGates];
    for (int s = 0; s < Cell::kStates; ++s) {
      const S* of_state = static_cast<const S*>(p_.grads[s]);
      grad[s] = of_state == nullptr ? V{} : get<kFull>(of_state + b * p_.grad_rows[s] + unit, left);
      prev[s] = Base::template state<kFull>(s, b, unit, left);
      next[s] = get<kFull>(static_cast<const S*>(p_.next[s]) + b * p_.hidden + unit, left);
    }
    const T* reserve = static_cast<const T*>(p_.reserve) + b * Cell::kReserve * p_.hidden + unit;
    for (int r = 0; r < Cell::kReserve; ++r) saved[r] = get<kFull>(reserve + r * p_.hidden, left);
    Cell::backward(grad, prev, next, saved, direct, x, h);
    put<kFull>(direct_.get() + b * p_.hidden + unit, direct[0], left);
    if constexpr (Cell::kStates == 2) {
      if (p_.grad_states[1] != nullptr) {
        put<kFull>(static_cast<S*>(p_.grad_states[1]) + b * p_.hidden + unit, direct[1], left);
      }
    }
    for (int g = 0; g < Cell::kGates; ++g) {
      put<kFull>(gates_x_.get() + b * depth_ + g * p_.hidden + unit, x[g], left);
      if constexpr (kApart) put<kFull>(gates_h_.get() + b * depth_ + g * p_.hidden + unit, h[g], left);
    }
  }

  // to (B, size) = gates weight, for a share of the columns.
  void to_vector(void* to, const T* gates, const void* weight, std::int64_t stride, std::int64_t size, bool direct,
                 int thread, int threads) {
    const Share blocks = share(ceil_div(size, n), thread, threads);
    for (std::int64_t k = blocks.begin; k < blocks.end; k += kColumns) {
      const std::int64_t column = k * n, left = min_of(size, min_of(k + kColumns, blocks.end) * n) - column;
      for (std::int64_t b = 0; b < p_.batch; ++b) {
        V sums[kColumns] = {};
        const S* row = static_cast<const S*>(weight) + column;
        const T* factors = gates + b * depth_;
        if (left == kColumns * n) {
          for (std::int64_t i = 0; i < depth_; ++i, row += stride) {
#pragma GCC unroll 8
            for (int v = 0; v < kColumns; ++v) sums[v] += load(row + v * n) * factors[i];
          }
        } else {
          for (std::int64_t i = 0; i < depth_; ++i, row += stride) {
            for (std::int64_t v = 0; v * n < left; ++v) sums[v] += load(row + v * n, left - v * n) * factors[i];
          }
        }
        S* out = static_cast<S*>(to) + b * size + column;
        for (std::int64_t v = 0; v * n < left; ++v) {
          if (direct) sums[v] += load(direct_.get() + b * size + column + v * n, left - v * n);
          store(out + v * n, sums[v], left - v * n);
        }
      }
    }
  }

  // weight (G*H, size) = gates^T x and bias = the sum of the gates, for a share of the rows.
  void to_weight(void* weight, void* bias, const T* gates, std::int64_t size, bool recurrent, int thread, int threads) {
    const Share rows = share(depth_, thread, threads);
    if (bias != nullptr) {
      for (std::int64_t k = rows.begin; k < rows.end; k += n) {
        V sum{};
        for (std::int64_t b = 0; b < p_.batch; ++b) sum += load(gates + b * depth_ + k, rows.end - k);
        store(static_cast<S*>(bias) + k, sum, rows.end - k);
      }
    }
    if (weight == nullptr) return;
    for (std::int64_t k = rows.begin; k < rows.end; ++k) {
      S* out = static_cast<S*>(weight) + k * size;
      for (std::int64_t i = 0; i < size; i += n) {
        V sum{};
        for (std::int64_t b = 0; b < p_.batch; ++b) {
          sum += load((recurrent ? Base::hidden(b) : Base::input(b)) + i, size - i) * gates[b * depth_ + k];
        }
        store(out + i, sum, size - i);
      }
    }
  }

  const std::int64_t depth_;
  Scratch<T> gates_x_, gates_h_, direct_;
  Barrier barrier_;
};

}  // namespace

void SEQKERNELS_ENTRY(step_forward)(const CellStepForward& p) { run_dtype<StepForward, false>(p, false); }
void SEQKERNELS_ENTRY(step_backward)(const CellStepBackward& p) { run_dtype<StepBackward, false>(p, false); }

}  // namespace seqkernels

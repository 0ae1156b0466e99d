// The backward pass of the recurrence on the CPU: packing, groups and threads are those of recurrence_forward.cpp.
//
// The product comes first here: the gate gradients of the step just done times the weight give the hidden gradient in a
// tile, and the cell's backward makes the next gate gradients of it. They go into a buffer of one chunk of steps; when
// it is full, the gradients of input and weights take their part of it while it is in the cache (recurrence_gradients.h).
#include "core/gemm.h"
#include "core/kernels.h"
#include "core/recurrence_gradients.h"
#include "core/recurrence_pack.h"
#include "core/recurrence_team.h"

namespace seqkernels {
namespace {

// The backward pass for a cell and a storage type.
template <template <class> class CellOf, class S>
class Backward {
  using T = Compute<S>;
  using V = Vec<T>;
  using Cell = CellOf<T>;
  static constexpr int n = kLanes<T>;
  static constexpr int kTileRows = 6 * kMaxRows;
  using Chunks = GateGradients<S, Cell::kGates, Cell::kSummedGates < Cell::kGates>;

 public:
  explicit Backward(const RecurrenceBackward& p)
      : p_(p),
        depth_(Cell::kGates * p.hidden),
        units_(units_of(p)),
        groups_(ceil_div(p.hidden, units_ * n)),
        width_(units_ * n),
        split_(split_of(p, 2 * Cell::kGates, groups_, groups_ * depth_ * width_ * std::int64_t{sizeof(T)})),
        plane_(p.batch * p.hidden),
        packed_(groups_ * depth_ * width_),
        direct_(Cell::kStates * plane_),
        to_reset_(p.grad_reset_state == nullptr ? 0 : split_.threads * Cell::kStates * p.hidden),
        rows_(p.batch * split_.threads),
        pointers_(max_of(p.batch, depth_) * split_.threads),
        chunks_(p, split_.threads) {}

  void run() {
    if (plane_ == 0) return;
    run_team(split_.threads, [this](int thread, int threads) {
      const Share groups = share(groups_, thread, threads);
      pack(groups, pointers_.get() + thread * max_of(p_.batch, depth_));
      chunks_.pack(thread, threads);
      barrier_.wait(threads);
      if (split_.rows) {
        loop(share(p_.batch, thread, threads), {0, groups_}, thread, threads);
      } else {
        loop({0, p_.batch}, groups, thread, threads);
      }
    });
  }

 private:
  static int units_of(const RecurrenceBackward& p) {
    const std::int64_t blocks = ceil_div(p.hidden, n);
    return static_cast<int>(max_of<std::int64_t>(1, min_of<std::int64_t>(kMaxVectors, blocks / max_of(1, p.threads))));
  }

  // packed[group][row of weight_hh][unit], units beyond H as 0.
  void pack(Share groups, const T** scratch) {
    const S* weight = static_cast<const S*>(p_.weight_hh);
    const S** rows = reinterpret_cast<const S**>(scratch);
    for (std::int64_t k = 0; k < depth_; ++k) rows[k] = weight + k * p_.weight_hh_row;
    for (std::int64_t group = groups.begin; group < groups.end; ++group) {
      pack_rows(rows, depth_, p_.hidden, group * width_, units_, packed_.get() + group * depth_ * width_);
    }
  }

  struct Step {
    std::int64_t i, t;  // in the order of processing; in time
    std::int64_t active;
    const std::uint8_t *control, *done;  // of this step and of the one processed before
    bool last;                           // beyond the first step in time: only the gradient of the initial state is left
  };

  void loop(Share rows, Share groups, int thread, int threads) {
    const std::int64_t T_ = p_.steps;
    const S* grad_state_n = static_cast<const S*>(p_.grad_state_n);
    const std::int64_t unit_begin = groups.begin * width_;
    const std::int64_t units = min_of(p_.hidden, groups.end * width_) - unit_begin;
    for (int s = 0; s < Cell::kStates; ++s) {
      for (std::int64_t b = rows.begin; b < rows.end; ++b) {
        const std::int64_t at = s * plane_ + b * p_.hidden + unit_begin;
        for (std::int64_t u = 0; u < units; u += n) {
          store(direct_.get() + at + u, grad_state_n == nullptr ? V{} : load(grad_state_n + at + u, units - u),
                units - u);
        }
      }
    }
    T* to_reset = to_reset_.get() + thread * Cell::kStates * p_.hidden;
    if (p_.grad_reset_state != nullptr) {
      for (std::int64_t u = 0; u < Cell::kStates * p_.hidden; ++u) to_reset[u] = T(0);
    }
    std::int64_t* index = rows_.get() + thread * p_.batch;
    const T** pointers = pointers_.get() + thread * max_of(p_.batch, depth_);
    // Held rows have no gate gradients; those of detached rows, and of reset ones, stop here.
    const std::uint8_t idle = kHold | kDetach | (p_.grad_reset_state == nullptr ? kReset : 0);
    for (std::int64_t i = 0; i <= T_; ++i) {
      Step step;
      step.i = i;
      step.last = i == T_;
      step.t = p_.reverse ? i : T_ - 1 - i;
      step.control = step.last ? nullptr : control_of_step(p_.control, step.t, p_.control_step);
      step.done = i == 0 ? nullptr : control_of_step(p_.control, p_.reverse ? step.t - 1 : step.t + 1, p_.control_step);
      step.active = partition_rows(step.done, p_.control_row, idle, rows, index);
      if (i == 0) {
        step.active = 0;
      } else {
        for (std::int64_t r = 0; r < step.active; ++r) pointers[r] = chunks_.recurrent(i - 1, index[r]);
      }
      // There and back: the weights used last are still in the cache when the next step begins with them.
      for (std::int64_t k = groups.begin; k < groups.end; ++k) {
        const std::int64_t group = i % 2 == 0 ? k : groups.begin + groups.end - 1 - k;
        run_group(step, group, index, pointers, rows.end - rows.begin, to_reset);
      }
      const bool full = i + 1 < T_ ? (i + 1) % chunks_.steps() == 0 : i + 1 == T_;
      if (!split_.rows || full) barrier_.wait(threads);
      if (full) chunks_.spend(i - i % chunks_.steps(), i + 1, thread, threads);
    }
    if (p_.grad_reset_state == nullptr) return;
    barrier_.wait(threads);
    const Share of_reset = share(Cell::kStates * p_.hidden, thread, threads);
    for (std::int64_t u = of_reset.begin; u < of_reset.end; ++u) {
      T sum = 0;
      for (int k = 0; k < threads; ++k) sum += to_reset_.get()[k * Cell::kStates * p_.hidden + u];
      static_cast<T*>(p_.grad_reset_state)[u] = sum;
    }
  }

  void run_group(const Step& step, std::int64_t group, const std::int64_t* index, const T* const* pointers,
                 std::int64_t rows, T* to_reset) {
    const T* weight = packed_.get() + group * depth_ * width_;
    alignas(64) T tile[kTileRows * kMaxVectors * n];
    for (std::int64_t r = 0; r < rows; r += kTileRows) {
      const std::int64_t count = min_of<std::int64_t>(kTileRows, rows - r);
      const std::int64_t active = min_of(count, step.active - r);
      if (!step.last) prefetch(step, group, index + r, count);
      if (active > 0) product(active, depth_, pointers + r, weight, units_, false, tile, width_);
      for (std::int64_t m = 0; m < count; ++m) {
        for (int u = 0; u < units_; ++u) {
          const std::int64_t unit = group * width_ + u * n, left = p_.hidden - unit;
          const V product = m < active ? load_full(tile + m * width_ + u * n) : V{};
          if (left >= n) {
            cell<true>(step, unit, index[r + m], product, n, to_reset);
          } else if (left > 0) {
            cell<false>(step, unit, index[r + m], product, left, to_reset);
          }
        }
      }
    }
  }

  // Asks for what the cells of a block will read before its product, which is long enough for it to arrive: pieces of
  // 64 bytes that lie too far apart for the processor to guess.
  void prefetch(const Step& step, std::int64_t group, const std::int64_t* index, std::int64_t count) {
    const std::int64_t H = p_.hidden;
    const S* states = static_cast<const S*>(p_.states) + step.t * plane_;
    const T* reserve = static_cast<const T*>(p_.reserve) + step.t * p_.batch * Cell::kReserve * H;
    const S* grad = static_cast<const S*>(p_.grad_hidden) + step.t * p_.grad_hidden_step;
    for (std::int64_t m = 0; m < count; ++m) {
      for (int u = 0; u < units_; ++u) {
        const std::int64_t unit = group * width_ + u * n;
        for (int r = 0; r < Cell::kReserve; ++r) {
          __builtin_prefetch(reserve + (index[m] * Cell::kReserve + r) * H + unit);
        }
        for (int s = 0; s < Cell::kStates; ++s) {
          __builtin_prefetch(states + s * (p_.steps + 1) * plane_ + index[m] * H + unit);
        }
        if (p_.grad_hidden != nullptr) __builtin_prefetch(grad + index[m] * p_.grad_hidden_row + unit);
      }
    }
  }

  // The pointwise part for one row and one vector of units from `unit`.
  template <bool kFull>
  void cell(const Step& step, std::int64_t unit, std::int64_t b, V product, std::int64_t left, T* to_reset) {
    const std::int64_t H = p_.hidden, at = b * H + unit;
    T* direct = direct_.get() + at;
    V grad[Cell::kStates];
    grad[0] = get<kFull>(direct, left) + product;
    if constexpr (Cell::kStates == 2) grad[1] = get<kFull>(direct + plane_, left);
    const std::uint8_t done = step.done == nullptr ? 0 : step.done[b * p_.control_row];
    if (done & (kReset | kDetach)) {
      for (int s = 0; s < Cell::kStates; ++s) {
        if ((done & kReset) && p_.grad_reset_state != nullptr) {
          T* sum = to_reset + s * H + unit;
          put<kFull>(sum, get<kFull>(sum, left) + grad[s], left);
        }
        grad[s] = V{};
      }
    }
    if (step.last) {
      T* grad_state0 = static_cast<T*>(p_.grad_state0) + at;
      for (int s = 0; s < Cell::kStates; ++s) put<kFull>(grad_state0 + s * plane_, grad[s], left);
      return;
    }
    const std::int64_t t = step.t;
    if (p_.grad_hidden != nullptr) {
      const S* of_step = static_cast<const S*>(p_.grad_hidden) + t * p_.grad_hidden_step + b * p_.grad_hidden_row;
      grad[0] += get<kFull>(of_step + unit, left);
    }
    if constexpr (Cell::kStates == 2) {
      if (p_.grad_cells != nullptr) {
        const S* of_step = static_cast<const S*>(p_.grad_cells) + t * p_.grad_cells_step + b * p_.grad_cells_row;
        grad[1] += get<kFull>(of_step + unit, left);
      }
    }
    const std::uint8_t control = step.control == nullptr ? 0 : step.control[b * p_.control_row];
    V gates_x[Cell::kGates] = {}, gates_h[Cell::kGates] = {}, next_direct[Cell::kStates];
    if (control & kHold) {
      for (int s = 0; s < Cell::kStates; ++s) next_direct[s] = grad[s];
    } else {
      const S* before = static_cast<const S*>(p_.states) + (p_.reverse ? t + 1 : t) * plane_ + at;
      const S* after = static_cast<const S*>(p_.states) + (p_.reverse ? t : t + 1) * plane_ + at;
      const S* fresh = static_cast<const S*>(p_.reset_state) + unit;
      const T* reserve = static_cast<const T*>(p_.reserve) + (t * p_.batch + b) * Cell::kReserve * H + unit;
      V prev[Cell::kStates], next[Cell::kStates], saved[Cell::kReserve > 0 ? Cell::kReserve : 1];
      for (int s = 0; s < Cell::kStates; ++s) {
        if (control & kReset) {
          prev[s] = p_.reset_state == nullptr ? V{} : get<kFull>(fresh + s * H, left);
        } else {
          prev[s] = get<kFull>(before + s * (p_.steps + 1) * plane_, left);
        }
        next[s] = get<kFull>(after + s * (p_.steps + 1) * plane_, left);
      }
      for (int r = 0; r < Cell::kReserve; ++r) saved[r] = get<kFull>(reserve + r * H, left);
      Cell::backward(grad, prev, next, saved, next_direct, gates_x, gates_h);
    }
    for (int s = 0; s < Cell::kStates; ++s) put<kFull>(direct + s * plane_, next_direct[s], left);
    T* gates = chunks_.of(step.i, b) + unit;
    for (int g = 0; g < Cell::kGates; ++g) put<kFull>(gates + Chunks::slot(g) * H, gates_x[g], left);
    if constexpr (Chunks::kApart) put<kFull>(gates + Cell::kGates * H, gates_h[Cell::kGates - 1], left);
    if (!p_.project && p_.grad_input != nullptr) {
      S* grad_input = static_cast<S*>(p_.grad_input) + (t * p_.batch + b) * depth_ + unit;
      for (int g = 0; g < Cell::kGates; ++g) put<kFull>(grad_input + g * H, gates_x[g], left);
    }
  }

  const RecurrenceBackward& p_;
  const std::int64_t depth_;
  const int units_;
  const std::int64_t groups_, width_;
  const Split split_;
  const std::int64_t plane_;
  Scratch<T> packed_, direct_, to_reset_;
  Scratch<std::int64_t> rows_;
  Scratch<const T*> pointers_;
  Chunks chunks_;
  Barrier barrier_;
};

}  // namespace

void SEQKERNELS_ENTRY(recurrence_backward)(const RecurrenceBackward& p) { run_dtype<Backward>(p); }

}  // namespace seqkernels

// The backward pass of the recurrence on the CPU: packing, groups and threads are those of recurrence_forward.cpp.
//
// The product comes first here: the gate gradients of the step just done times the weight give the hidden gradient in a
// tile, and the cell's backward makes the next gate gradients of it.
#include "core/gemm.h"
#include "core/kernels.h"
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

 public:
  explicit Backward(const RecurrenceBackward& p)
      : p_(p),
        depth_(Cell::kGates * p.hidden),
        units_(units_of(p)),
        groups_(ceil_div(p.hidden, units_ * n)),
        group_size_(depth_ * units_ * n),
        split_(split_of(p.threads, p.batch, groups_, 2.0 * p.batch * Cell::kGates * p.hidden * p.hidden, p.steps,
                        groups_ * group_size_ * static_cast<std::int64_t>(sizeof(T)))),
        plane_(p.batch * p.hidden),
        packed_(groups_ * group_size_),
        direct_(Cell::kStates * plane_),
        rows_(p.batch * split_.threads),
        pointers_(p.batch * split_.threads) {}

  void run() {
    if (plane_ == 0) return;
    run_team(split_.threads, [this](int thread, int threads) {
      const Share groups = share(groups_, thread, threads);
      pack(groups);
      if (split_.rows) {
        barrier_.wait(threads);
        loop(share(p_.batch, thread, threads), {0, groups_}, thread, 1);
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
  void pack(Share groups) {
    const S* weight = static_cast<const S*>(p_.weight_hh);
    for (std::int64_t group = groups.begin; group < groups.end; ++group) {
      T* out = packed_.get() + group * group_size_;
      for (std::int64_t k = 0; k < depth_; ++k) {
        for (int u = 0; u < units_; ++u, out += n) {
          const std::int64_t unit = (group * units_ + u) * n;
          store_full(out, unit < p_.hidden ? load(weight + k * p_.weight_row + unit, p_.hidden - unit) : V{});
        }
      }
    }
  }

  struct Step {
    std::int64_t t, active;
    const std::uint8_t* control;
    bool last;  // beyond the first step in time: only the gradient of the initial state is left
  };

  void loop(Share rows, Share groups, int thread, int threads) {
    const std::int64_t T_ = p_.steps, count = rows.end - rows.begin;
    const S* grad_state_n = static_cast<const S*>(p_.grad_state_n);
    const std::int64_t unit_begin = groups.begin * units_ * n;
    const std::int64_t units = min_of(p_.hidden, groups.end * units_ * n) - unit_begin;
    for (int s = 0; s < Cell::kStates; ++s) {
      for (std::int64_t b = rows.begin; b < rows.end; ++b) {
        const std::int64_t at = s * plane_ + b * p_.hidden + unit_begin;
        for (std::int64_t u = 0; u < units; u += n) {
          store(direct_.get() + at + u, grad_state_n == nullptr ? V{} : load(grad_state_n + at + u, units - u),
                units - u);
        }
      }
    }
    std::int64_t* index = rows_.get() + thread * p_.batch;
    const T** pointers = pointers_.get() + thread * p_.batch;
    const T* gates_h = static_cast<const T*>(p_.grad_gates_h);
    for (std::int64_t i = 0; i <= T_; ++i) {
      Step step;
      step.last = i == T_;
      step.t = p_.reverse ? i : T_ - 1 - i;
      step.control = step.last ? nullptr : control_of_step(p_.control, step.t, p_.control_step);
      // The product runs over the gates of the step done before; held and reset rows have none in it.
      const std::int64_t done = p_.reverse ? step.t - 1 : step.t + 1;
      step.active = count;
      if (i == 0 || p_.control != nullptr) {
        const std::uint8_t* control = i == 0 ? nullptr : control_of_step(p_.control, done, p_.control_step);
        step.active = partition_rows(control, p_.control_row, kReset | kHold, rows, index);
      }
      if (i == 0) {
        step.active = 0;
      } else {
        for (std::int64_t r = 0; r < step.active; ++r) pointers[r] = gates_h + (done * p_.batch + index[r]) * depth_;
      }
      for (std::int64_t group = groups.begin; group < groups.end; ++group) {
        run_group(step, group, index, pointers, count);
      }
      barrier_.wait(threads);
    }
  }

  void run_group(const Step& step, std::int64_t group, const std::int64_t* index, const T* const* pointers,
                 std::int64_t rows) {
    const int block = block_rows(units_);
    const std::int64_t width = units_ * n;
    const T* weight = packed_.get() + group * group_size_;
    alignas(64) T tile[kMaxRows * kMaxVectors * n];
    for (std::int64_t r = 0; r < rows; r += block) {
      const int count = static_cast<int>(min_of<std::int64_t>(block, rows - r));
      const int active = static_cast<int>(max_of<std::int64_t>(0, min_of<std::int64_t>(count, step.active - r)));
      if (!step.last) prefetch(step, group, index + r, count);
      if (active > 0) {
        micro_kernel_for<T, Layout::kRows, false>(active, units_)(depth_, pointers + r, 1, weight, width, tile, width);
      }
      for (int m = 0; m < count; ++m) {
        for (int u = 0; u < units_; ++u) {
          const std::int64_t unit = (group * units_ + u) * n, left = p_.hidden - unit;
          const V product = m < active ? load_full(tile + m * width + u * n) : V{};
          if (left >= n) {
            cell<true>(step, unit, index[r + m], product, n);
          } else if (left > 0) {
            cell<false>(step, unit, index[r + m], product, left);
          }
        }
      }
    }
  }

  // As in the forward pass: what the cells of a block will read, a line for each vector of units.
  void prefetch(const Step& step, std::int64_t group, const std::int64_t* index, int count) {
    const std::int64_t H = p_.hidden;
    const S* states = static_cast<const S*>(p_.states) + step.t * plane_;
    const T* reserve = static_cast<const T*>(p_.reserve) + step.t * p_.batch * Cell::kReserve * H;
    const S* grad = static_cast<const S*>(p_.grad_hidden) + step.t * p_.grad_hidden_step;
    for (int m = 0; m < count; ++m) {
      for (int u = 0; u < units_; ++u) {
        const std::int64_t unit = (group * units_ + u) * n;
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
  void cell(const Step& step, std::int64_t unit, std::int64_t b, V product, std::int64_t left) {
    const std::int64_t H = p_.hidden, at = b * H + unit;
    T* direct = direct_.get() + at;
    V grad[Cell::kStates];
    grad[0] = get<kFull>(direct, left) + product;
    if constexpr (Cell::kStates == 2) grad[1] = get<kFull>(direct + plane_, left);
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
      const T* reserve = static_cast<const T*>(p_.reserve) + (t * p_.batch + b) * Cell::kReserve * H + unit;
      V prev[Cell::kStates], next[Cell::kStates], saved[Cell::kReserve > 0 ? Cell::kReserve : 1];
      for (int s = 0; s < Cell::kStates; ++s) {
        prev[s] = (control & kReset) ? V{} : get<kFull>(before + s * (p_.steps + 1) * plane_, left);
        next[s] = get<kFull>(after + s * (p_.steps + 1) * plane_, left);
      }
      for (int r = 0; r < Cell::kReserve; ++r) saved[r] = get<kFull>(reserve + r * H, left);
      Cell::backward(grad, prev, next, saved, next_direct, gates_x, gates_h);
    }
    for (int s = 0; s < Cell::kStates; ++s)
      put<kFull>(direct + s * plane_, (control & kReset) ? V{} : next_direct[s], left);
    const std::int64_t gates = (t * p_.batch + b) * depth_ + unit;
    T* grad_gates_x = static_cast<T*>(p_.grad_gates_x) + gates;
    for (int g = 0; g < Cell::kGates; ++g) put<kFull>(grad_gates_x + g * H, gates_x[g], left);
    if constexpr (!Cell::kSameGates) {
      T* grad_gates_h = static_cast<T*>(p_.grad_gates_h) + gates;
      for (int g = 0; g < Cell::kGates; ++g) put<kFull>(grad_gates_h + g * H, gates_h[g], left);
    }
  }

  template <bool kFull, class E>
  static V get(const E* from, std::int64_t left) {
    return kFull ? load(from) : load(from, left);
  }
  template <bool kFull>
  static void put(T* to, V x, std::int64_t left) {
    kFull ? store(to, x) : store(to, x, left);
  }

  const RecurrenceBackward& p_;
  const std::int64_t depth_;
  const int units_;
  const std::int64_t groups_, group_size_;
  const Split split_;
  const std::int64_t plane_;
  Scratch<T> packed_, direct_;
  Scratch<std::int64_t> rows_;
  Scratch<const T*> pointers_;
  Barrier barrier_;
};

}  // namespace

void SEQKERNELS_ENTRY(recurrence_backward)(const RecurrenceBackward& p) { run_dtype<Backward>(p); }

}  // namespace seqkernels

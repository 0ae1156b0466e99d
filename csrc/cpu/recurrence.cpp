// The recurrence on the CPU: the whole sequence in one call.
//
// Hidden units are cut into groups of a few vectors. The recurrent weight of a group, all gates of its units side by
// side, is packed once per call, and the group stays with one thread for all steps, so the weights stay in that
// core's cache. Per step and group the micro-kernel multiplies a block of batch rows into a tile of pre-activations
// and the cell works on the tile at once. Threads own either rows (small weights: no synchronisation at all) or
// groups (one barrier a step).
//
// The backward pass is the same with the product first: the gate gradients of the step just done times the weight
// give the hidden gradient in a tile, and the cell's backward makes the next gate gradients of it.
#include "core/recurrence.h"

#include "core/cells.h"
#include "core/gemm.h"
#include "core/kernels.h"
#include "core/team.h"

namespace seqkernels {
namespace {

// Weights above this do not stay in the cache beside each other: threads then share them out by columns.
constexpr std::int64_t kResidentBytes = 768 << 10;

struct Split {
  bool rows;  // threads own batch rows, else groups of hidden units
  int threads;
};

inline Split split_of(int threads, std::int64_t batch, std::int64_t groups, double work_per_step, std::int64_t steps,
                      std::int64_t weight_bytes) {
  const int most = team_size(threads, work_per_step * static_cast<double>(steps));
  if (most == 1) return {true, 1};
  if (weight_bytes <= kResidentBytes && batch >= 4 * most) return {true, most};
  const double worth = work_per_step / kWorkPerTurn;
  const int columns = static_cast<int>(min_of<double>(min_of<std::int64_t>(most, groups), worth));
  const int rows = static_cast<int>(min_of<std::int64_t>(most, batch));
  if (columns >= rows && columns > 1) return {false, columns};
  return {true, rows};
}

inline const std::uint8_t* control_of_step(const std::uint8_t* control, std::int64_t t, std::int64_t stride) {
  return control == nullptr ? nullptr : control + t * stride;
}

// Rows whose control byte has none of `bits` come first.
inline std::int64_t partition_rows(const std::uint8_t* control, std::int64_t stride, std::uint8_t bits, Share rows,
                                   std::int64_t* index) {
  std::int64_t active = 0, others = rows.end - rows.begin;
  for (std::int64_t b = rows.begin; b < rows.end; ++b) {
    if (control != nullptr && (control[b * stride] & bits)) {
      index[--others] = b;
    } else {
      index[active++] = b;
    }
  }
  return active;
}

template <class S>
inline void copy_converted(const S* from, Compute<S>* to, std::int64_t count) {
  for (std::int64_t i = 0; i < count; i += kLanes<Compute<S>>) store(to + i, load(from + i, count - i), count - i);
}

// The forward pass for a cell and a storage type.
template <template <class> class CellOf, class S>
class Forward {
  using T = Compute<S>;
  using V = Vec<T>;
  using Cell = CellOf<T>;
  static constexpr int n = kLanes<T>;
  static constexpr bool kConvert = sizeof(S) != sizeof(T);
  // Units of a group, in vectors: as many as fill a block of the micro-kernel.
  static constexpr int kUnits = kMaxVectors / Cell::kGates;
  static constexpr int kWidth = kUnits * Cell::kGates;  // vectors of a full group

 public:
  explicit Forward(const RecurrenceForward& p)
      : p_(p),
        units_(units_of(p)),
        groups_(ceil_div(p.hidden, units_ * n)),
        group_size_(p.hidden * units_ * Cell::kGates * n),
        split_(split_of(p.threads, p.batch, groups_, 2.0 * p.batch * Cell::kGates * p.hidden * p.hidden, p.steps,
                        groups_ * group_size_ * static_cast<std::int64_t>(sizeof(T)))),
        plane_(p.batch * p.hidden),
        packed_(groups_ * group_size_),
        zeros_(p.hidden),
        hidden_(kConvert ? 2 * plane_ : 0),
        cells_(Cell::kStates == 2 ? plane_ : 0),
        rows_(p.batch * split_.threads),
        pointers_(p.batch * split_.threads) {
    for (std::int64_t i = 0; i < p.hidden; ++i) zeros_.get()[i] = 0;
  }

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
  // Enough groups for every thread, else as wide as possible.
  static int units_of(const RecurrenceForward& p) {
    const std::int64_t blocks = ceil_div(p.hidden, n);
    return static_cast<int>(max_of<std::int64_t>(1, min_of<std::int64_t>(kUnits, blocks / max_of(1, p.threads))));
  }

  // packed[group][k][gate][unit] = weight_hh[gate * H + unit, k], units beyond H as 0.
  void pack(Share groups) {
    const std::int64_t H = p_.hidden;
    const S* weight = static_cast<const S*>(p_.weight_hh);
    const std::int64_t width = units_ * Cell::kGates * n;
    for (std::int64_t group = groups.begin; group < groups.end; ++group) {
      T* out = packed_.get() + group * group_size_;
      for (int g = 0; g < Cell::kGates; ++g) {
        for (int u = 0; u < units_; ++u) {
          const std::int64_t unit = (group * units_ + u) * n;
          T* column = out + (g * units_ + u) * n;
          for (std::int64_t k = 0; k < H; k += n) {
            V block[n];
            for (int i = 0; i < n; ++i) {
              block[i] = unit + i < H ? load(weight + (g * H + unit + i) * p_.weight_row + k, H - k) : V{};
            }
            transpose<T>(block);
            for (std::int64_t i = 0; i < min_of<std::int64_t>(n, H - k); ++i) {
              store_full(column + (k + i) * width, block[i]);
            }
          }
        }
      }
    }
  }

  // All steps for the rows and groups of one thread, which meets `threads` others after each step.
  void loop(Share rows, Share groups, int thread, int threads) {
    const std::int64_t H = p_.hidden, T_ = p_.steps;
    S* states = static_cast<S*>(p_.states);
    const S* state0 = static_cast<const S*>(p_.state0);
    const bool save = p_.save;
    const std::int64_t first = p_.reverse ? T_ : 0, last = p_.reverse ? 0 : T_;
    const std::int64_t unit_begin = groups.begin * units_ * n;
    const std::int64_t unit_end = min_of(H, groups.end * units_ * n);
    const std::int64_t units = unit_end - unit_begin;

    for (std::int64_t b = rows.begin; b < rows.end; ++b) {
      for (int s = 0; s < (save ? Cell::kStates : 1); ++s) {
        std::memcpy(states + (s * (T_ + 1) + first) * plane_ + b * H + unit_begin,
                    state0 + s * plane_ + b * H + unit_begin, units * sizeof(S));
      }
      if constexpr (kConvert) {
        copy_converted(state0 + b * H + unit_begin, hidden_.get() + b * H + unit_begin, units);
      }
      if constexpr (Cell::kStates == 2) {
        copy_converted(state0 + plane_ + b * H + unit_begin, cells_.get() + b * H + unit_begin, units);
      }
    }
    barrier_.wait(threads);

    const std::int64_t count = rows.end - rows.begin;
    std::int64_t* index = rows_.get() + thread * p_.batch;
    const T** pointers = pointers_.get() + thread * p_.batch;
    for (std::int64_t i = 0; i < T_; ++i) {
      const std::int64_t t = p_.reverse ? T_ - 1 - i : i;
      Step step;
      step.t = t;
      step.control = control_of_step(p_.control, t, p_.control_step);
      step.states = states + (p_.reverse ? t : t + 1) * plane_;
      if constexpr (kConvert) {
        step.hidden = hidden_.get() + (i % 2) * plane_;
        step.next = hidden_.get() + ((i + 1) % 2) * plane_;
      } else {
        step.hidden = states + (p_.reverse ? t + 1 : t) * plane_;
        step.next = step.states;
      }
      step.active = count;
      if (i == 0 || step.control != nullptr) {
        step.active = partition_rows(step.control, p_.control_row, kHold, rows, index);
      }
      for (std::int64_t r = 0; r < count; ++r) {
        const bool reset = step.control != nullptr && (step.control[index[r] * p_.control_row] & kReset);
        pointers[r] = reset ? zeros_.get() : step.hidden + index[r] * H;
      }
      for (std::int64_t group = groups.begin; group < groups.end; ++group) {
        run_group(step, group, index, pointers, count);
      }
      barrier_.wait(threads);
    }

    S* state_n = static_cast<S*>(p_.state_n);
    for (std::int64_t b = rows.begin; b < rows.end; ++b) {
      std::memcpy(state_n + b * H + unit_begin, states + last * plane_ + b * H + unit_begin, units * sizeof(S));
      if constexpr (Cell::kStates == 2) {
        for (std::int64_t u = 0; u < units; u += n) {
          const std::int64_t at = b * H + unit_begin + u;
          store(state_n + plane_ + at, load(cells_.get() + at, units - u), units - u);
        }
      }
    }
  }

  struct Step {
    std::int64_t t, active;
    const std::uint8_t* control;
    const T* hidden;  // (B, H) before the step
    T* next;          // (B, H) after it
    S* states;        // (B, H) after it, as stored
  };

  void run_group(const Step& step, std::int64_t group, const std::int64_t* index, const T* const* pointers,
                 std::int64_t rows) {
    const int vectors = units_ * Cell::kGates;
    const int block = block_rows(vectors);
    const std::int64_t width = vectors * n;
    const T* weight = packed_.get() + group * group_size_;
    alignas(64) T tile[kMaxRows * kWidth * n];
    for (std::int64_t r = 0; r < step.active; r += block) {
      const int count = static_cast<int>(min_of<std::int64_t>(block, step.active - r));
      prefetch(step, group, index + r, count);
      micro_kernel_for<T, Layout::kRows, false>(count, vectors)(p_.hidden, pointers + r, 1, weight, width, tile, width);
      for (int m = 0; m < count; ++m) {
        const bool reset = pointers[r + m] == zeros_.get();
        for (int u = 0; u < units_; ++u) cell(step, (group * units_ + u) * n, u, index[r + m], reset, tile + m * width);
      }
    }
    for (std::int64_t r = step.active; r < rows; ++r) hold(step, group, index[r]);
  }

  // Asks for the input gates of a block before its product, which is long enough for them to arrive: the pieces of
  // 64 bytes that a group reads are too far apart for the processor to guess.
  void prefetch(const Step& step, std::int64_t group, const std::int64_t* index, int count) {
    const S* gates_x = static_cast<const S*>(p_.gates_x) + step.t * p_.gates_x_step + group * units_ * n;
    for (int m = 0; m < count; ++m) {
      for (int g = 0; g < Cell::kGates; ++g) __builtin_prefetch(gates_x + index[m] * p_.gates_x_row + g * p_.hidden);
    }
  }

  // The pointwise part for one row and one vector of units from `unit`.
  void cell(const Step& step, std::int64_t unit, int u, std::int64_t b, bool reset, const T* tile) {
    const std::int64_t left = p_.hidden - unit;
    if (left >= n) {
      cell_of<true>(step, unit, u, b, reset, tile, n);
    } else if (left > 0) {
      cell_of<false>(step, unit, u, b, reset, tile, left);
    }
  }

  template <bool kFull>
  void cell_of(const Step& step, std::int64_t unit, int u, std::int64_t b, bool reset, const T* tile,
               std::int64_t left) {
    const std::int64_t H = p_.hidden;
    const S* gates_x = static_cast<const S*>(p_.gates_x) + step.t * p_.gates_x_step + b * p_.gates_x_row + unit;
    const S* bias = static_cast<const S*>(p_.bias_hh);
    V x[Cell::kGates], h[Cell::kGates], prev[Cell::kStates], next[Cell::kStates];
    V saved[Cell::kReserve > 0 ? Cell::kReserve : 1];
    for (int g = 0; g < Cell::kGates; ++g) {
      x[g] = get<kFull>(gates_x + g * H, left);
      h[g] = load_full(tile + (g * units_ + u) * n);
      if (bias != nullptr) h[g] += get<kFull>(bias + g * H + unit, left);
    }
    const std::int64_t at = b * H + unit;
    prev[0] = reset ? V{} : get<kFull>(step.hidden + at, left);
    if constexpr (Cell::kStates == 2) prev[1] = reset ? V{} : get<kFull>(cells_.get() + at, left);
    Cell::forward(x, h, prev, next, saved);
    put_states<kFull>(step, at, next, left);
    if constexpr (Cell::kReserve > 0) {
      if (p_.save) {
        T* reserve = static_cast<T*>(p_.reserve) + (step.t * p_.batch + b) * Cell::kReserve * H + unit;
        for (int r = 0; r < Cell::kReserve; ++r) put<kFull>(reserve + r * H, saved[r], left);
      }
    }
  }

  // Padding: the state is carried on (after a reset, as zero).
  void hold(const Step& step, std::int64_t group, std::int64_t b) {
    const bool reset = step.control[b * p_.control_row] & kReset;
    for (int u = 0; u < units_; ++u) {
      const std::int64_t unit = (group * units_ + u) * n, left = p_.hidden - unit;
      if (left <= 0) return;
      const std::int64_t at = b * p_.hidden + unit;
      V state[Cell::kStates];
      state[0] = reset ? V{} : load(step.hidden + at, left);
      if constexpr (Cell::kStates == 2) state[1] = reset ? V{} : load(cells_.get() + at, left);
      put_states<false>(step, at, state, left);
      if constexpr (Cell::kReserve > 0) {
        if (p_.save) {
          T* reserve = static_cast<T*>(p_.reserve) + (step.t * p_.batch + b) * Cell::kReserve * p_.hidden + unit;
          for (int r = 0; r < Cell::kReserve; ++r) store(reserve + r * p_.hidden, V{}, left);
        }
      }
    }
  }

  template <bool kFull>
  void put_states(const Step& step, std::int64_t at, const V* next, std::int64_t left) {
    put<kFull>(step.next + at, next[0], left);
    if constexpr (kConvert) put<kFull>(step.states + at, next[0], left);
    if constexpr (Cell::kStates == 2) {
      put<kFull>(cells_.get() + at, next[1], left);
      if (p_.save) put<kFull>(step.states + (p_.steps + 1) * plane_ + at, next[1], left);
    }
  }

  template <bool kFull, class E>
  static V get(const E* from, std::int64_t left) {
    return kFull ? load(from) : load(from, left);
  }
  template <bool kFull, class E>
  static void put(E* to, V x, std::int64_t left) {
    kFull ? store(to, x) : store(to, x, left);
  }

  const RecurrenceForward& p_;
  const int units_;
  const std::int64_t groups_, group_size_;
  const Split split_;
  const std::int64_t plane_;
  Scratch<T> packed_, zeros_, hidden_, cells_;
  Scratch<std::int64_t> rows_;
  Scratch<const T*> pointers_;
  Barrier barrier_;
};

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

template <template <template <class> class, class> class Pass, class S, class Params>
void run_cell(const Params& p) {
  switch (p.cell) {
    case CellKind::kRnnTanh:
      return Pass<RnnTanh, S>(p).run();
    case CellKind::kRnnRelu:
      return Pass<RnnRelu, S>(p).run();
    case CellKind::kLstm:
      return Pass<Lstm, S>(p).run();
    case CellKind::kGru:
      return Pass<Gru, S>(p).run();
  }
}

template <template <template <class> class, class> class Pass, class Params>
void run_dtype(const Params& p) {
  switch (p.dtype) {
    case DType::kFloat32:
      return run_cell<Pass, float>(p);
    case DType::kFloat64:
      return run_cell<Pass, double>(p);
    case DType::kBFloat16:
      return run_cell<Pass, BFloat16>(p);
    case DType::kFloat16:
      return run_cell<Pass, Float16>(p);
  }
}

template <class T>
void activation(const char* name, std::int64_t count, const T* x, T* y) {
  for (std::int64_t i = 0; i < count; i += kLanes<T>) {
    const Vec<T> v = load(x + i, count - i);
    const Vec<T> result = name[0] == 'e' ? exp<T>(v) : name[0] == 's' ? sigmoid<T>(v) : tanh<T>(v);
    store(y + i, result, count - i);
  }
}

}  // namespace

void SEQKERNELS_ENTRY(recurrence_forward)(const RecurrenceForward& p) { run_dtype<Forward>(p); }
void SEQKERNELS_ENTRY(recurrence_backward)(const RecurrenceBackward& p) { run_dtype<Backward>(p); }

// exp, sigmoid or tanh of `count` numbers, for the tests of their error.
void SEQKERNELS_ENTRY(activation)(const char* name, std::int64_t count, const void* x, void* y, DType dtype) {
  if (dtype == DType::kFloat64) {
    activation(name, count, static_cast<const double*>(x), static_cast<double*>(y));
  } else {
    activation(name, count, static_cast<const float*>(x), static_cast<float*>(y));
  }
}

}  // namespace seqkernels

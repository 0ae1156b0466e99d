// The recurrence on the CPU: the whole sequence in one call.
//
// Hidden units are cut into groups of a few vectors. The recurrent weight of a group, all gates of its units side by
// side, is packed once per call, and the group stays with one thread for all steps, so the weights stay in that
// core's cache. Per step and group the micro-kernel multiplies a block of batch rows into a tile of pre-activations
// and the cell works on the tile at once. Threads own either rows (small weights: no synchronisation at all) or
// groups (one barrier a step).
#include "core/gemm.h"
#include "core/kernels.h"
#include "core/recurrence_team.h"

namespace seqkernels {
namespace {

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

// exp, sigmoid or tanh of `count` numbers, for the tests of their error.
void SEQKERNELS_ENTRY(activation)(const char* name, std::int64_t count, const void* x, void* y, DType dtype) {
  if (dtype == DType::kFloat64) {
    activation(name, count, static_cast<const double*>(x), static_cast<double*>(y));
  } else {
    activation(name, count, static_cast<const float*>(x), static_cast<float*>(y));
  }
}

}  // namespace seqkernels

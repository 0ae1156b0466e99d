// The recurrence on the CPU: the whole sequence of a layer in one direction, in one call.
//
// Hidden units are cut into groups of a few vectors. The weights of a group, all gates of its units side by side, are
// packed once per call, and the group stays with one thread for all steps, so the weights stay in that core's cache.
// A chunk of steps at a time, the input part of the gates of a group is made by the same micro-kernel as the
// recurrent part, into memory that the thread alone reads. Then, per step and group, the micro-kernel multiplies a
// block of batch rows into a tile of pre-activations, and the cell works on the tile at once. Threads own either rows
// (small weights: no synchronisation at all) or groups (one barrier a step).
//
// A layer norm needs a whole row at a time: then a step goes in two or three parts, each over all groups, with a
// barrier between where threads own groups.
#include "core/gemm16.h"
#include "core/kernels.h"
#include "core/recurrence_options.h"
#include "core/recurrence_pack.h"
#include "core/recurrence_team.h"
#include "core/recurrence_thin.h"

namespace seqkernels {
namespace {

// The forward pass for a cell, a storage type and the type O of the operands of the products.
template <template <class> class CellOf, class S, bool kOptions, class O>
class Forward {
  using T = Compute<S>;
  using V = Vec<T>;
  using Cell = CellOf<T>;
  static constexpr int n = kLanes<T>;
  static constexpr bool kConvert = sizeof(S) != sizeof(T);
  static constexpr bool kWide = sizeof(O) == sizeof(T);  // products in compute dtype
  // Units of a group, in vectors: as many as fill a block of the micro-kernel.
  static constexpr int kUnits = kMaxVectors / Cell::kGates;
  static constexpr int kWidth = kUnits * Cell::kGates;  // vectors of a full group
  static constexpr int kTileRows = 6 * kMaxRows;

 public:
  explicit Forward(const RecurrenceForward& p)
      : p_(p),
        units_(units_of(p)),
        groups_(ceil_div(p.hidden, units_ * n)),
        width_(units_ * Cell::kGates * n),
        split_(split_of(p, Cell::kGates, groups_,
                        groups_ * width_ * (p.hidden + (p.project ? p.inputs : 0)) * std::int64_t{sizeof(O)})),
        plane_(p.batch * p.hidden),
        chunk_(chunk_of(p, split_)),
        thin_(!kConvert && is_thin(p, Cell::kGates, sizeof(T))),
        packed_(groups_ * width_ * packed_depth<O>(p.hidden)),
        packed_ih_(thin_       ? ThinInput<T>::size(p)
                   : p.project ? groups_ * width_ * packed_depth<O>(p.inputs)
                               : 0),
        bias_(groups_ * (width_ + units_ * n)),
        gates_(chunk_ * p.batch * groups_ * width_),
        input_(kConvert && kWide && p.project ? split_.threads * chunk_rows() * p.inputs : 0),
        hidden_(kConvert ? 2 * plane_ : 0),
        cells_(Cell::kStates == 2 ? plane_ : 0),
        fresh_(Cell::kStates * p.hidden),
        fresh16_(kWide ? 0 : p.hidden),
        rows_(p.batch * split_.threads),
        pointers_(max_of(p.batch, chunk_rows()) * split_.threads),
        options_(p),
        buffers_(p, Cell::kGates, split_.threads) {
    const S* reset_state = static_cast<const S*>(p.reset_state);
    for (std::int64_t i = 0; i < Cell::kStates * p.hidden; ++i) {
      fresh_.get()[i] = reset_state == nullptr ? T(0) : load_one(reset_state + i);
    }
    if constexpr (!kWide) {
      for (std::int64_t i = 0; i < p.hidden; ++i) fresh16_.get()[i] = reset_state == nullptr ? O{0} : reset_state[i];
    }
  }

  void run() {
    if (plane_ == 0) return;
    run_team(split_.threads, [this](int thread, int threads) {
      const Share groups = share(groups_, thread, threads);
      pack(groups);
      if (thin_) thin_input().pack(thread, threads);
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

  // Rows of a chunk that one thread works on, at most.
  std::int64_t chunk_rows() const { return chunk_ * rows_of_thread(p_, split_); }

  void pack(Share groups) {
    const S* bias_ih = static_cast<const S*>(p_.bias_ih);
    const S* bias_hh = static_cast<const S*>(p_.bias_hh);
    for (std::int64_t group = groups.begin; group < groups.end; ++group) {
      const std::int64_t unit = group * units_ * n;
      pack_group(static_cast<const S*>(p_.weight_hh), p_.weight_hh_row, p_.hidden, p_.hidden, Cell::kGates, unit,
                 units_, packed_.get() + group * width_ * packed_depth<O>(p_.hidden));
      if (p_.project && !thin_) {
        pack_group(static_cast<const S*>(p_.weight_ih), p_.weight_ih_row, p_.inputs, p_.hidden, Cell::kGates, unit,
                   units_, packed_ih_.get() + group * width_ * packed_depth<O>(p_.inputs));
      }
      T* bias = bias_of(group);
      pack_bias(bias_ih, bias_hh, p_.hidden, Cell::kGates, Cell::kSummedGates, unit, units_, bias);
      if constexpr (Cell::kSummedGates < Cell::kGates) {
        const S* last = bias_hh == nullptr ? nullptr : bias_hh + Cell::kSummedGates * p_.hidden;
        pack_bias<S>(last, nullptr, p_.hidden, 1, 0, unit, units_, bias + width_);
      }
    }
  }

  // The biases that go to the input part, then that of the gate whose recurrent part stays apart.
  T* bias_of(std::int64_t group) const { return bias_.get() + group * (width_ + units_ * n); }

  // What a thread works on.
  struct Part {
    Share rows, groups;
    std::int64_t first, steps;  // of the chunk, in the order of processing
    T* gates;                   // [group][step][row][width]
    std::int64_t* index;        // rows of a step, held ones last
    const O** pointers;
    int thread, threads;  // those that meet after each step
  };

  bool norms_product() const { return kOptions && options_.norms_product(); }
  bool norms_cell() const { return kOptions && options_.norms_cell(); }

  T* gates_of(const Part& part, std::int64_t group, std::int64_t step) const {
    const std::int64_t count = part.rows.end - part.rows.begin;
    return part.gates + ((group - part.groups.begin) * chunk_ + step) * count * width_;
  }

  std::int64_t time(std::int64_t i) const { return p_.reverse ? p_.steps - 1 - i : i; }

  // The input part of the gates of a chunk, biases included.
  void enter(const Part& part, T* scratch) {
    if (thin_) return enter_thin(part);
    const std::int64_t count = part.rows.end - part.rows.begin, rows = part.steps * count;
    const S* input = static_cast<const S*>(p_.input);
    const auto row_of = [&](std::int64_t i, std::int64_t b) {
      return input + time(part.first + i) * p_.input_step + (part.rows.begin + b) * p_.input_row;
    };
    if (p_.project) {
      for (std::int64_t i = 0, r = 0; i < part.steps; ++i) {
        for (std::int64_t b = 0; b < count; ++b, ++r) {
          if constexpr (kConvert && kWide) {
            copy_converted(row_of(i, b), scratch + r * p_.inputs, p_.inputs);
            part.pointers[r] = scratch + r * p_.inputs;
          } else {
            part.pointers[r] = row_of(i, b);
          }
        }
      }
    }
    for (std::int64_t group = part.groups.begin; group < part.groups.end; ++group) {
      T* gates = gates_of(part, group, 0);
      const T* bias = bias_of(group);
      for (std::int64_t i = 0, r = 0; i < part.steps; ++i) {
        for (std::int64_t b = 0; b < count; ++b, ++r) {
          T* to = gates + r * width_;
          for (std::int64_t v = 0; v < width_; v += n) store_full(to + v, load_full(bias + v));
          if (p_.project) continue;
          for (int g = 0; g < Cell::kGates; ++g) {
            for (int u = 0; u < units_; ++u) {
              const std::int64_t unit = (group * units_ + u) * n, at = (g * units_ + u) * n;
              if (unit >= p_.hidden) continue;
              const V x = load(row_of(i, b) + g * p_.hidden + unit, p_.hidden - unit);
              store_full(to + at, load_full(to + at) + x);
            }
          }
        }
      }
      if (p_.project) {
        product(rows, p_.inputs, part.pointers, packed_ih_.get() + group * width_ * packed_depth<O>(p_.inputs),
                units_ * Cell::kGates, true, gates, width_);
      }
    }
  }

  ThinInput<T> thin_input() const { return {p_, reinterpret_cast<T*>(packed_ih_.get())}; }

  void enter_thin(const Part& part) {
    for (std::int64_t group = part.groups.begin; group < part.groups.end; ++group) {
      for (int k = 0; k < Cell::kGates * units_; ++k) {
        const std::int64_t unit = (group * units_ + k % units_) * n;
        if (unit >= p_.hidden) continue;
        thin_input().multiply(k / units_, unit, bias_of(group) + k * n, gates_of(part, group, 0) + k * n, width_);
      }
    }
  }

  V initial(int s, std::int64_t at, std::int64_t left) const {
    if (p_.carried != nullptr) return load(static_cast<const T*>(p_.carried) + s * plane_ + at, left);
    return p_.state0[s] == nullptr ? V{} : load(static_cast<const S*>(p_.state0[s]) + at, left);
  }

  // All steps for the rows and groups of one thread, which meets `threads` others after each step.
  void loop(Share rows, Share groups, int thread, int threads) {
    const std::int64_t H = p_.hidden, T_ = p_.steps;
    S* states = static_cast<S*>(p_.states);
    const std::int64_t first = p_.reverse ? T_ : 0, last = p_.reverse ? 0 : T_;
    const std::int64_t unit_begin = groups.begin * units_ * n;
    const std::int64_t units = min_of(H, groups.end * units_ * n) - unit_begin;

    for (std::int64_t b = rows.begin; b < rows.end; ++b) {
      for (std::int64_t u = 0; u < units; u += n) {
        const std::int64_t at = b * H + unit_begin + u, left = units - u;
        for (int s = 0; s < Cell::kStates; ++s) {
          const V state = initial(s, at, left);
          if (s == 0 || p_.save) store(states + (s * (T_ + 1) + first) * plane_ + at, state, left);
          if (kConvert && s == 0) store(hidden_.get() + at, state, left);
          if (s == 1) store(cells_.get() + at, state, left);
        }
      }
      if constexpr (kOptions) {
        for (std::int64_t u = 0; options_.masks() && u < units; u += n) {
          const std::int64_t at = b * H + unit_begin + u, left = units - u;
          const V mask = options_.template mask<false>(at, left);
          put<false>(buffers_.operand.get() + at, initial(0, at, left) * mask, left);
          put<false>(buffers_.fresh_operand.get() + at, get<false>(fresh_.get() + unit_begin + u, left) * mask, left);
        }
      }
    }
    barrier_.wait(threads);

    Part part;
    part.rows = rows;
    part.groups = groups;
    part.gates = gates_.get() + (split_.rows ? rows.begin * groups_ : p_.batch * groups.begin) * chunk_ * width_;
    part.index = rows_.get() + thread * p_.batch;
    part.pointers = pointers_.get() + thread * max_of(p_.batch, chunk_rows());
    part.thread = thread;
    part.threads = threads;
    for (part.first = 0; part.first < T_; part.first += chunk_) {
      part.steps = min_of(chunk_, T_ - part.first);
      enter(part, input_.get() + thread * chunk_rows() * p_.inputs);
      for (std::int64_t i = 0; i < part.steps; ++i) {
        if (p_.checkpoints != nullptr && (part.first + i) % p_.every == 0) {
          put_checkpoint(part, part.first + i, unit_begin, units);
        }
        run_step(part, i);
        barrier_.wait(threads);
      }
    }

    for (std::int64_t b = rows.begin; b < rows.end; ++b) {
      const std::int64_t from = b * H + unit_begin;
      std::memcpy(static_cast<S*>(p_.state_n[0]) + from, states + last * plane_ + from, units * sizeof(S));
      if constexpr (Cell::kStates == 2) {
        for (std::int64_t u = 0; u < units; u += n) {
          store(static_cast<S*>(p_.state_n[1]) + from + u, load(cells_.get() + from + u, units - u), units - u);
        }
      }
    }
  }

  // The states before step i, as the loop carries them.
  void put_checkpoint(const Part& part, std::int64_t i, std::int64_t unit, std::int64_t units) {
    const std::int64_t t = time(i), H = p_.hidden;
    const T* hidden = kConvert ? hidden_.get() + i % 2 * plane_
                               : static_cast<const T*>(p_.states) + (p_.reverse ? t + 1 : t) * plane_;
    const T* of_states[] = {hidden, cells_.get()};
    T* to = static_cast<T*>(p_.checkpoints) + i / p_.every * Cell::kStates * plane_;
    for (int s = 0; s < Cell::kStates; ++s) {
      for (std::int64_t b = part.rows.begin; b < part.rows.end; ++b) {
        const std::int64_t at = b * H + unit;
        std::memcpy(to + s * plane_ + at, of_states[s] + at, units * sizeof(T));
      }
    }
  }

  struct Step {
    std::int64_t t, active;
    const std::uint8_t* control;
    const T* hidden;  // (B, H) before the step
    T* next;          // (B, H) after it
    T* operand;       // (B, H) after it, masked
    S* states;        // (B, H) after it, as stored
  };

  void run_step(const Part& part, std::int64_t i) {
    const std::int64_t H = p_.hidden, count = part.rows.end - part.rows.begin, done = part.first + i;
    Step step;
    step.t = time(done);
    step.control = control_of_step(p_.control, step.t, p_.control_step);
    step.states = static_cast<S*>(p_.states) + (p_.reverse ? step.t : step.t + 1) * plane_;
    if constexpr (kConvert) {
      step.hidden = hidden_.get() + (done % 2) * plane_;
      step.next = hidden_.get() + ((done + 1) % 2) * plane_;
    } else {
      step.hidden = static_cast<const T*>(p_.states) + (p_.reverse ? step.t + 1 : step.t) * plane_;
      step.next = step.states;
    }
    step.active = partition_rows(step.control, p_.control_row, kHold, part.rows, part.index);
    for (std::int64_t r = 0; r < count; ++r) {
      if constexpr (kWide) {
        part.pointers[r] = resets(step, part.index[r]) ? fresh_.get() : step.hidden + part.index[r] * H;
      } else {
        const O* states = static_cast<const O*>(p_.states) + (p_.reverse ? step.t + 1 : step.t) * plane_;
        part.pointers[r] = resets(step, part.index[r]) ? fresh16_.get() : states + part.index[r] * H;
      }
    }
    if constexpr (kOptions) {
      step.operand = buffers_.operand.get() + (done + 1) % 2 * plane_;
      const T* operand = buffers_.operand.get() + done % 2 * plane_;
      for (std::int64_t r = 0; options_.masks() && r < count; ++r) {
        part.pointers[r] = (resets(step, part.index[r]) ? buffers_.fresh_operand.get() : operand) + part.index[r] * H;
      }
    }
    // There and back: the weights used last are still in the cache when the next step begins with them.
    for (std::int64_t k = part.groups.begin; k < part.groups.end; ++k) {
      const std::int64_t group = done % 2 == 0 ? k : part.groups.begin + part.groups.end - 1 - k;
      run_group(part, step, group, gates_of(part, group, i));
    }
    if constexpr (kOptions) {
      Moments<T>* of_rows = buffers_.moments.get() + part.thread * p_.batch;
      if (options_.norms_product()) {
        barrier_.wait(part.threads);
        const std::int64_t size = Cell::kGates * H;
        for (std::int64_t r = 0; r < step.active; ++r) {
          of_rows[r] = moments(buffers_.products.get() + part.index[r] * size, size);
        }
        for (std::int64_t group = part.groups.begin; group < part.groups.end; ++group) {
          cells(part, step, group, gates_of(part, group, i), 0, step.active, nullptr);
        }
      }
      if constexpr (Cell::kStates == 2) {
        if (options_.norms_cell()) {
          barrier_.wait(part.threads);
          for (std::int64_t r = 0; r < step.active; ++r) {
            of_rows[r] = moments(buffers_.seen.get() + part.index[r] * H, H);
          }
          normed_hidden(part, step, of_rows);
        }
      }
    }
  }

  bool resets(const Step& step, std::int64_t b) const {
    return step.control != nullptr && (step.control[b * p_.control_row] & kReset);
  }

  // gates: (rows, width), the input part.
  void run_group(const Part& part, const Step& step, std::int64_t group, const T* gates) {
    const O* weight = packed_.get() + group * width_ * packed_depth<O>(p_.hidden);
    alignas(64) T tile[kTileRows * kWidth * n];
    for (std::int64_t r = 0; r < step.active; r += kTileRows) {
      const std::int64_t count = min_of<std::int64_t>(kTileRows, step.active - r);
      if constexpr (kOptions) {
        if (options_.norms_product()) {
          product_to_norm(count, p_.hidden, part.pointers + r, weight, units_ * Cell::kGates, tile, width_);
          put_products(part, group, r, count, tile);
          continue;
        }
      }
      product(count, p_.hidden, part.pointers + r, weight, units_ * Cell::kGates, false, tile, width_);
      cells(part, step, group, gates, r, count, tile);
    }
    const std::int64_t rows = part.rows.end - part.rows.begin;
    for (std::int64_t r = step.active; r < rows; ++r) hold(step, group, part.index[r]);
  }

  // The pointwise part for rows [first, first + count) of the index, whose recurrent products are in `tile`, or, null,
  // in products.
  void cells(const Part& part, const Step& step, std::int64_t group, const T* gates, std::int64_t first,
             std::int64_t count, const T* tile) {
    const T* bias = bias_of(group) + width_;
    for (std::int64_t m = 0; m < count; ++m) {
      const std::int64_t b = part.index[first + m];
      const T* x = gates + (b - part.rows.begin) * width_;
      const T* h = norms_product() ? x : tile + m * width_;  // in the first case not looked at
      const bool reset = resets(step, b);
      const Moments<T>* of_row = nullptr;
      if constexpr (kOptions) of_row = buffers_.moments.get() + part.thread * p_.batch + first + m;
      for (int u = 0; u < units_; ++u) {
        const std::int64_t unit = (group * units_ + u) * n, left = p_.hidden - unit;
        if (!kOptions && left >= n) {
          cell<!kOptions>(step, unit, b, reset, x + u * n, h + u * n, bias + u * n, n, of_row);
        } else if (left > 0) {
          cell<false>(step, unit, b, reset, x + u * n, h + u * n, bias + u * n, left, of_row);
        }
      }
    }
  }

  // The pointwise part for one row and one vector of units from `unit`.
  template <bool kFull>
  void cell(const Step& step, std::int64_t unit, std::int64_t b, bool reset, const T* gates_x, const T* gates_h,
            const T* bias, std::int64_t left, const Moments<T>* of_row) {
    V x[Cell::kGates], h[Cell::kGates], prev[Cell::kStates], next[Cell::kStates];
    V saved[Cell::kReserve > 0 ? Cell::kReserve : 1];
    for (int g = 0; g < Cell::kGates; ++g) {
      x[g] = load_full(gates_x + g * units_ * n);
      if (norms_product()) {
        h[g] = normed_product<kFull>(unit, b, g, left, *of_row);
      } else {
        h[g] = load_full(gates_h + g * units_ * n);
      }
    }
    if constexpr (Cell::kSummedGates < Cell::kGates) h[Cell::kSummedGates] += load_full(bias);
    const std::int64_t at = b * p_.hidden + unit;
    previous<kFull>(step, at, unit, reset, prev, left);
    if constexpr (kOptions) {
      V peephole[3];
      Cell::forward(x, h, prev, next, saved, options_.template peephole<kFull>(unit, left, peephole));
      if constexpr (Cell::kStates == 2) {
        if (options_.norms_cell()) {
          put<kFull>(buffers_.seen.get() + at, next[1], left);
          put<kFull>(buffers_.seen.get() + plane_ + at, saved[3], left);
        }
      }
      for (int s = norms_cell() ? 1 : 0; s < Cell::kStates; ++s) {
        next[s] = options_.zone_out(s, p_.offset + step.t, b, unit, prev[s], next[s]);
      }
    } else {
      Cell::forward(x, h, prev, next, saved);
    }
    if (!norms_cell()) put_hidden<kFull>(step, at, next[0], left);
    put_cell<kFull>(step, at, next, left);
    if constexpr (Cell::kReserve > 0) {
      if (p_.save) put_reserve<kFull>(step, b, unit, saved, left);
    }
  }

  // products (B, G*H): the rows of a tile.
  void put_products(const Part& part, std::int64_t group, std::int64_t first, std::int64_t count, const T* tile) {
    if constexpr (kOptions) {
      for (std::int64_t m = 0; m < count; ++m) {
        T* row = buffers_.products.get() + part.index[first + m] * Cell::kGates * p_.hidden;
        for (int g = 0; g < Cell::kGates; ++g) {
          for (int u = 0; u < units_; ++u) {
            const std::int64_t unit = (group * units_ + u) * n, left = p_.hidden - unit;
            if (left <= 0) continue;
            put<false>(row + g * p_.hidden + unit, load_full(tile + m * width_ + (g * units_ + u) * n), left);
          }
        }
      }
    }
  }

  template <bool kFull>
  V normed_product(std::int64_t unit, std::int64_t b, int gate, std::int64_t left, const Moments<T>& of_row) const {
    if constexpr (kOptions) {
      const std::int64_t at = gate * p_.hidden + unit;
      const V x = get<kFull>(buffers_.products.get() + b * Cell::kGates * p_.hidden + at, left);
      return of_row.normal(x) * get<kFull>(static_cast<const S*>(p_.norm_h) + at, left);
    } else {
      return V{};
    }
  }

  // h = o * tanh(LN(c) * gain + bias), for all rows and groups of a thread.
  void normed_hidden(const Part& part, const Step& step, const Moments<T>* of_rows) {
    const S* norm_c = static_cast<const S*>(p_.norm_c);
    const std::int64_t H = p_.hidden, end = min_of(H, part.groups.end * units_ * n);
    for (std::int64_t r = 0; r < step.active; ++r) {
      const std::int64_t b = part.index[r];
      for (std::int64_t unit = part.groups.begin * units_ * n; unit < end; unit += n) {
        const std::int64_t at = b * H + unit, left = H - unit;
        const V normal = of_rows[r].normal(get<false>(buffers_.seen.get() + at, left));
        const V seen = normal * get<false>(norm_c + unit, left) + get<false>(norm_c + H + unit, left);
        const V made = get<false>(buffers_.seen.get() + plane_ + at, left) * tanh<T>(seen);
        const V old = get<false>(resets(step, b) ? fresh_.get() + unit : step.hidden + at, left);
        put_hidden<false>(step, at, options_.zone_out(0, p_.offset + step.t, b, unit, old, made), left);
      }
    }
  }

  // Padding: the state is carried on (after a reset, the one that a reset gives).
  void hold(const Step& step, std::int64_t group, std::int64_t b) {
    for (int u = 0; u < units_; ++u) {
      const std::int64_t unit = (group * units_ + u) * n, left = p_.hidden - unit;
      if (left <= 0) return;
      const std::int64_t at = b * p_.hidden + unit;
      V state[Cell::kStates];
      previous<false>(step, at, unit, resets(step, b), state, left);
      put_hidden<false>(step, at, state[0], left);
      put_cell<false>(step, at, state, left);
      if constexpr (Cell::kReserve > 0) {
        const V none[Cell::kReserve] = {};
        if (p_.save) put_reserve<false>(step, b, unit, none, left);
      }
    }
  }

  template <bool kFull>
  void previous(const Step& step, std::int64_t at, std::int64_t unit, bool reset, V* prev, std::int64_t left) const {
    const T* of_states[] = {reset ? fresh_.get() + unit : step.hidden + at,
                            reset ? fresh_.get() + p_.hidden + unit : cells_.get() + at};
    for (int s = 0; s < Cell::kStates; ++s) prev[s] = get<kFull>(of_states[s], left);
  }

  template <bool kFull>
  void put_hidden(const Step& step, std::int64_t at, V hidden, std::int64_t left) {
    put<kFull>(step.next + at, hidden, left);
    if constexpr (kConvert) put<kFull>(step.states + at, hidden, left);
    if constexpr (kOptions) {
      if (options_.masks()) put<kFull>(step.operand + at, hidden * options_.template mask<kFull>(at, left), left);
    }
  }

  template <bool kFull>
  void put_cell(const Step& step, std::int64_t at, const V* next, std::int64_t left) {
    if constexpr (Cell::kStates == 2) {
      put<kFull>(cells_.get() + at, next[1], left);
      if (p_.save) put<kFull>(step.states + (p_.steps + 1) * plane_ + at, next[1], left);
    }
  }

  template <bool kFull>
  void put_reserve(const Step& step, std::int64_t b, std::int64_t unit, const V* saved, std::int64_t left) {
    T* reserve = static_cast<T*>(p_.reserve) + (step.t * p_.batch + b) * Cell::kReserve * p_.hidden + unit;
    for (int r = 0; r < Cell::kReserve; ++r) put<kFull>(reserve + r * p_.hidden, saved[r], left);
  }

  const RecurrenceForward& p_;
  const int units_;
  const std::int64_t groups_, width_;
  const Split split_;
  const std::int64_t plane_, chunk_;
  const bool thin_;
  Scratch<O> packed_, packed_ih_;
  Scratch<T> bias_, gates_, input_, hidden_, cells_, fresh_;
  Scratch<O> fresh16_;
  Scratch<std::int64_t> rows_;
  Scratch<const O*> pointers_;
  const Options<S, Cell::kStates> options_;
  const Choose<kOptions, ForwardBuffers<T>, Nothing> buffers_;
  Barrier barrier_;
};

}  // namespace

void SEQKERNELS_ENTRY(recurrence_forward)(const RecurrenceForward& p) {
  const bool options = has_options(p);
#if defined(SEQKERNELS_DOT16)
  // The RNN keeps float32 products: where a sum is near 0, its rounding decides what a relu lets through.
  if (!options && p.dtype == DType::kBFloat16 && has_dot16()) {
    if (p.cell == CellKind::kLstm) return Forward<Lstm, BFloat16, false, BFloat16>(p).run();
    if (p.cell == CellKind::kGru) return Forward<Gru, BFloat16, false, BFloat16>(p).run();
  }
#endif
  run_dtype<Forward, true>(p, options);
}

}  // namespace seqkernels

// The backward pass of the recurrence on the CPU: packing, groups and threads are those of recurrence_forward.cpp.
//
// The product comes first here: the gate gradients of the step just done times the weight give the hidden gradient in a
// tile, and the cell's backward makes the next gate gradients of it. They go into a buffer of one chunk of steps; when
// it is full, the gradients of input and weights take their part of it while it is in the cache
// (recurrence_gradients.h). As in the forward pass, layer norms cut a step into parts.
#include "core/gemm16.h"
#include "core/kernels.h"
#include "core/recurrence_gradients.h"
#include "core/recurrence_norm.h"
#include "core/recurrence_options.h"
#include "core/recurrence_pack.h"
#include "core/recurrence_team.h"

namespace seqkernels {

void SEQKERNELS_ENTRY(recurrence_forward)(const RecurrenceForward& p);

namespace {

// The backward pass for a cell, a storage type and the type O of the operands of the products.
template <template <class> class CellOf, class S, bool kOptions, class O>
class Backward {
  using T = Compute<S>;
  using V = Vec<T>;
  using Cell = CellOf<T>;
  static constexpr int n = kLanes<T>;
  static constexpr int kTileRows = 6 * kMaxRows;
  using Chunks = GateGradients < S, O, Cell::kGates, Cell::kSummedGates<Cell::kGates>;

 public:
  explicit Backward(const RecurrenceBackward& p)
      : p_(p),
        depth_(Cell::kGates * p.hidden),
        units_(units_of(p)),
        groups_(ceil_div(p.hidden, units_ * n)),
        width_(units_ * n),
        split_(split_of(p, 2 * Cell::kGates, groups_, groups_ * depth_ * width_ * std::int64_t{sizeof(O)})),
        plane_(p.batch * p.hidden),
        packed_(groups_ * packed_depth<O>(depth_) * width_),
        direct_(Cell::kStates * plane_),
        to_reset_(p.grad_reset_state == nullptr ? 0 : split_.threads * 2 * Cell::kStates * p.hidden),
        rows_(p.batch * split_.threads),
        pointers_(max_of(p.batch, depth_) * split_.threads),
        chunks_(p, split_.threads),
        options_(p),
        norms_(p, chunks_.steps(), split_.threads),
        segment_(p.every == 0 ? 0 : (Cell::kStates * (p.every + 2) + 1) * plane_),
        segment_reserve_(p.every * Cell::kReserve * plane_),
        cells_(static_cast<const S*>(p.states) + (p.steps + 1) * plane_),
        reserve_(static_cast<const T*>(p.reserve)) {}

  void run() {
    if (plane_ == 0) return;
    if (p_.every == 0 || p_.steps == 0) return run(0, p_.steps);
    const std::int64_t segments = ceil_div(p_.steps, p_.every);
    for (std::int64_t k = segments - 1; k >= 0; --k) {
      const std::int64_t end = min_of(p_.steps, (k + 1) * p_.every);
      recompute(k, end - k * p_.every);
      run(p_.steps - end, p_.steps - k * p_.every);
    }
  }

 private:
  // Steps [begin, end) in the order of this pass, which goes on where the last call ended.
  void run(std::int64_t begin, std::int64_t end) {
    const std::int64_t to_reset = p_.grad_reset_state == nullptr ? 0 : split_.threads * 2 * Cell::kStates * p_.hidden;
    for (std::int64_t u = 0; begin == 0 && u < to_reset; ++u) to_reset_.get()[u] = T(0);
    run_team(split_.threads, [this, begin, end](int thread, int threads) {
      const Share groups = share(groups_, thread, threads);
      if (begin > 0) {
        split_.rows ? loop(begin, end, share(p_.batch, thread, threads), {0, groups_}, thread, threads)
                    : loop(begin, end, {0, p_.batch}, groups, thread, threads);
        return;
      }
      pack(groups, pointers_.get() + thread * max_of(p_.batch, depth_));
      chunks_.pack(thread, threads);
      if constexpr (kOptions) norms_.pack(thread, threads);
      barrier_.wait(threads);
      if (split_.rows) {
        loop(begin, end, share(p_.batch, thread, threads), {0, groups_}, thread, threads);
      } else {
        loop(begin, end, {0, p_.batch}, groups, thread, threads);
      }
    });
  }

  // The states and the reserve of segment k of the forward pass, from its checkpoint.
  void recompute(std::int64_t k, std::int64_t steps) {
    RecurrenceForward f{};
    static_cast<Recurrence&>(f) = p_;
    const std::int64_t first = p_.reverse ? p_.steps - k * p_.every - steps : k * p_.every;
    f.steps = steps;
    f.offset = first;
    f.every = 0;
    f.input = static_cast<const S*>(p_.input) + first * p_.input_step;
    if (p_.control != nullptr) f.control = p_.control + first * p_.control_step;
    f.save = true;
    f.bias_ih = p_.bias_ih;
    f.bias_hh = p_.bias_hh;
    f.carried = static_cast<const T*>(p_.checkpoints) + k * Cell::kStates * plane_;
    f.states = segment_.get();
    for (int s = 0; s < Cell::kStates; ++s)
      f.state_n[s] = segment_.get() + (Cell::kStates * (p_.every + 1) + s) * plane_;
    f.reserve = segment_reserve_.get();
    SEQKERNELS_ENTRY(recurrence_forward)(f);
    cells_ = segment_.get() + (steps + 1 - first) * plane_;
    reserve_ = segment_reserve_.get() - first * Cell::kReserve * plane_;
  }

  static int units_of(const RecurrenceBackward& p) {
    const std::int64_t blocks = ceil_div(p.hidden, n);
    return static_cast<int>(max_of<std::int64_t>(1, min_of<std::int64_t>(kMaxVectors, blocks / max_of(1, p.threads))));
  }

  // packed[group][row of weight_hh][unit], units beyond H as 0.
  void pack(Share groups, const O** scratch) {
    const S* weight = static_cast<const S*>(p_.weight_hh);
    const S** rows = reinterpret_cast<const S**>(scratch);
    for (std::int64_t k = 0; k < depth_; ++k) rows[k] = weight + k * p_.weight_hh_row;
    for (std::int64_t group = groups.begin; group < groups.end; ++group) {
      pack_rows(rows, depth_, p_.hidden, group * width_, units_,
                packed_.get() + group * packed_depth<O>(depth_) * width_);
    }
  }

  struct Step {
    std::int64_t i, t;  // in the order of processing; in time
    std::int64_t active;
    const std::uint8_t *control, *done;  // of this step and of the one processed before
    bool last;  // beyond the first step in time: only the gradient of the initial state is left
  };

  void loop(std::int64_t begin, std::int64_t end, Share rows, Share groups, int thread, int threads) {
    const std::int64_t T_ = p_.steps;
    const S* grad_state_n = static_cast<const S*>(p_.grad_state_n);
    const std::int64_t unit_begin = groups.begin * width_;
    const std::int64_t units = min_of(p_.hidden, groups.end * width_) - unit_begin;
    for (int s = 0; begin == 0 && s < Cell::kStates; ++s) {
      for (std::int64_t b = rows.begin; b < rows.end; ++b) {
        const std::int64_t at = s * plane_ + b * p_.hidden + unit_begin;
        for (std::int64_t u = 0; u < units; u += n) {
          store(direct_.get() + at + u, grad_state_n == nullptr ? V{} : load(grad_state_n + at + u, units - u),
                units - u);
        }
      }
    }
    T* to_reset = to_reset_.get() + thread * 2 * Cell::kStates * p_.hidden;
    std::int64_t* index = rows_.get() + thread * p_.batch;
    const O** pointers = pointers_.get() + thread * max_of(p_.batch, depth_);
    // Held rows have no gate gradients; those of detached rows, and of reset ones, stop here, or in reset_state.
    const std::uint8_t idle = kHold | (p_.grad_reset_state == nullptr ? kReset | kDetach : 0);
    for (std::int64_t i = begin; i < end + (end == T_); ++i) {
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
        for (std::int64_t r = 0; r < step.active; ++r) pointers[r] = chunks_.of_product(i - 1, index[r]);
      }
      if constexpr (kOptions) {
        const std::int64_t in_chunk = i % chunks_.steps(), chunk_end = i - in_chunk + chunks_.steps();
        if (options_.norms_product() && !step.last && in_chunk == 0) {
          norms_.make_products(i, min_of(T_, chunk_end), thread, threads, barrier_);
        }
        if (options_.norms_cell() && !step.last && (in_chunk == 0 || i == begin)) {
          norms_.make_cells(i, min_of(end, chunk_end), cells_, reserve_, thread, threads, barrier_);
        }
      }
      // There and back: the weights used last are still in the cache when the next step begins with them.
      for (std::int64_t k = groups.begin; k < groups.end; ++k) {
        const std::int64_t group = i % 2 == 0 ? k : groups.begin + groups.end - 1 - k;
        run_group(step, group, index, pointers, rows.end - rows.begin, to_reset);
      }
      if constexpr (kOptions) {
        if (!step.last) run_norms(step, rows, groups, thread, split_.rows ? 1 : threads);
      }
      const bool full = i + 1 < T_ ? (i + 1) % chunks_.steps() == 0 : i + 1 == T_;
      if (!split_.rows || full) barrier_.wait(threads);
      if (full) chunks_.spend(i - i % chunks_.steps(), i + 1, thread, threads);
    }
    if (p_.grad_reset_state == nullptr || end < T_) return;
    barrier_.wait(threads);
    const Share of_reset = share(Cell::kStates * p_.hidden, thread, threads);
    for (std::int64_t u = of_reset.begin; u < of_reset.end; ++u) {
      T sum = 0;
      for (int k = 0; k < 2 * split_.threads; ++k) sum += to_reset_.get()[k * Cell::kStates * p_.hidden + u];
      static_cast<T*>(p_.grad_reset_state)[u] = sum;
    }
  }

  void run_group(const Step& step, std::int64_t group, const std::int64_t* index, const O* const* pointers,
                 std::int64_t rows, T* to_reset) {
    const O* weight = packed_.get() + group * packed_depth<O>(depth_) * width_;
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
          if (!kOptions && left >= n) {
            cell<!kOptions>(step, unit, index[r + m], product, n, to_reset);
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
    const S* cells = cells_ + step.t * plane_;
    const T* reserve = reserve_ + step.t * p_.batch * Cell::kReserve * H;
    const S* grad = static_cast<const S*>(p_.grad_hidden) + step.t * p_.grad_hidden_step;
    for (std::int64_t m = 0; m < count; ++m) {
      for (int u = 0; u < units_; ++u) {
        const std::int64_t unit = group * width_ + u * n;
        for (int r = 0; r < Cell::kReserve; ++r) {
          __builtin_prefetch(reserve + (index[m] * Cell::kReserve + r) * H + unit);
        }
        __builtin_prefetch(states + index[m] * H + unit);
        if (Cell::kStates == 2) __builtin_prefetch(cells + index[m] * H + unit);
        if (p_.grad_hidden != nullptr) __builtin_prefetch(grad + index[m] * p_.grad_hidden_row + unit);
      }
    }
  }

  // The pointwise part for one row and one vector of units from `unit`.
  template <bool kFull>
  void cell(const Step& step, std::int64_t unit, std::int64_t b, V product, std::int64_t left, T* to_reset) {
    V grad[Cell::kStates];
    arrive<kFull>(step, unit, b, product, left, to_reset, grad);
    if (step.last) return;
    if constexpr (kOptions && Cell::kStates == 2) {
      if (options_.norms_cell()) return begin_norm_c<kFull>(step, unit, b, grad, left);
    }
    leave<kFull>(step, unit, b, grad, left, nullptr);
  }

  // The gradients of the states after this step, from all that saw them; beyond the first step those of state0.
  template <bool kFull>
  void arrive(const Step& step, std::int64_t unit, std::int64_t b, V product, std::int64_t left, T* to_reset, V* grad) {
    const std::int64_t H = p_.hidden, at = b * H + unit, t = step.t;
    const T* direct = direct_.get() + at;
    if constexpr (kOptions) {
      if (options_.masks()) product *= options_.template mask<kFull>(at, left);
    }
    grad[0] = get<kFull>(direct, left) + product;
    if constexpr (Cell::kStates == 2) grad[1] = get<kFull>(direct + plane_, left);
    const std::uint8_t done = step.done == nullptr ? 0 : step.done[b * p_.control_row];
    if (done & (kReset | kDetach)) {
      for (int s = 0; s < Cell::kStates; ++s) {
        if ((done & kReset) && p_.grad_reset_state != nullptr)
          add_to_reset<kFull>(grad[s], to_reset + s * H + unit, left);
        grad[s] = V{};
      }
    }
    if (step.last) {
      T* grad_state0 = static_cast<T*>(p_.grad_state0) + at;
      for (int s = 0; s < Cell::kStates; ++s) put<kFull>(grad_state0 + s * plane_, grad[s], left);
      return;
    }
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
    if constexpr (kOptions && Cell::kReserve == 0) {
      // An RNN's one gate is the hidden state itself.
      if (p_.grad_gates != nullptr) grad[0] += get<kFull>(grad_gate(t, b, 0) + unit, left);
    }
  }

  // Rows and steps go into one long sum, so what each addition rounds away is summed too (Knuth's TwoSum).
  template <bool kFull>
  void add_to_reset(V x, T* sum, std::int64_t left) const {
    T* lost = sum + Cell::kStates * p_.hidden;
    const V before = get<kFull>(sum, left), after = before + x, added = after - before;
    put<kFull>(sum, after, left);
    put<kFull>(lost, get<kFull>(lost, left) + ((before - (after - added)) + (x - added)), left);
  }

  const S* grad_gate(std::int64_t t, std::int64_t b, int gate) const {
    return static_cast<const S*>(p_.grad_gates) + t * p_.grad_gates_step + b * p_.grad_gates_row +
           gate * p_.grad_gates_gate;
  }

  // What one step of one row was, for the units of a vector.
  struct Seen {
    V prev[Cell::kStates], next[Cell::kStates], saved[Cell::kReserve > 0 ? Cell::kReserve : 1];
  };

  template <bool kFull>
  Seen look(const Step& step, std::int64_t unit, std::int64_t b, std::uint8_t control, std::int64_t left) const {
    const std::int64_t H = p_.hidden, at = b * H + unit, t = step.t;
    const std::int64_t before = (t + p_.reverse) * plane_ + at, after = (t + !p_.reverse) * plane_ + at;
    const S* of_states[] = {static_cast<const S*>(p_.states), cells_};
    const S* fresh = static_cast<const S*>(p_.reset_state) + unit;
    const T* reserve = reserve_ + (t * p_.batch + b) * Cell::kReserve * H + unit;
    Seen x;
    for (int s = 0; s < Cell::kStates; ++s) {
      if (control & kReset) {
        x.prev[s] = p_.reset_state == nullptr ? V{} : get<kFull>(fresh + s * H, left);
      } else {
        x.prev[s] = get<kFull>(of_states[s] + before, left);
      }
      x.next[s] = get<kFull>(of_states[s] + after, left);
    }
    for (int r = 0; r < Cell::kReserve; ++r) x.saved[r] = get<kFull>(reserve + r * H, left);
    if constexpr (kOptions) {
      // What the cell made, before zoneout.
      if constexpr (Cell::kStates == 2) {
        x.next[1] = Cell::cell_state(x.saved[0], x.saved[1], x.saved[2], x.prev[1]);
      } else if (p_.made != nullptr) {
        x.next[0] = get<kFull>(static_cast<const S*>(p_.made) + t * plane_ + at, left);
      }
    }
    return x;
  }

  std::uint8_t control_of_row(const Step& step, std::int64_t b) const {
    return step.control == nullptr ? 0 : step.control[b * p_.control_row];
  }

  // From the gradients of the states after this step to those of the states before it and of the gates. `means` are
  // those of norm_c.
  template <bool kFull>
  void leave(const Step& step, std::int64_t unit, std::int64_t b, const V* grad, std::int64_t left,
             const NormMeans<T>* means) {
    const std::int64_t H = p_.hidden, t = step.t;
    const std::uint8_t control = control_of_row(step, b);
    V gates_x[Cell::kGates] = {}, gates_h[Cell::kGates] = {}, next_direct[Cell::kStates];
    V terms[3] = {};  // of the gradient of peephole
    if (control & kHold) {
      for (int s = 0; s < Cell::kStates; ++s) next_direct[s] = grad[s];
    } else {
      const Seen x = look<kFull>(step, unit, b, control, left);
      if constexpr (kOptions) {
        V made[Cell::kStates], kept[Cell::kStates], of_gates[Cell::kGates], weights[3];
        for (int s = 0; s < Cell::kStates; ++s) {
          kept[s] = options_.zones() ? options_.kept(s, t, b, unit) : V{};
          made[s] = (T(1) - kept[s]) * grad[s];
        }
        const bool with_gates = Cell::kReserve > 0 && p_.grad_gates != nullptr;
        for (int g = 0; with_gates && g < Cell::kGates; ++g) of_gates[g] = get<kFull>(grad_gate(t, b, g) + unit, left);
        const V* grad_gates = with_gates ? of_gates : nullptr;
        const V* peephole = options_.template peephole<kFull>(unit, left, weights);
        if constexpr (Cell::kStates == 2) {
          if (means != nullptr) {
            V tanh_c, normal;
            const Moments<T>& of_cell = norms_.of_cell(step.i, b);
            const V of_seen = get<kFull>(chunks_.of_norm_c(step.i, b) + H + unit, left);
            const V gain = see<kFull>(x, of_cell, unit, left, normal, tanh_c);
            const V grad_c = made[1] + norm_backward<T>(of_seen * gain, normal, of_cell.scale, *means);
            Cell::backward_of_state(made[0] * tanh_c, grad_c, x.prev, x.saved, next_direct, gates_x, grad_gates,
                                    peephole);
          } else {
            Cell::backward(made, x.prev, x.next, x.saved, next_direct, gates_x, gates_h, grad_gates, peephole);
          }
          terms[0] = gates_x[0] * x.prev[1];
          terms[1] = gates_x[1] * x.prev[1];
          terms[2] = gates_x[3] * x.next[1];
        } else {
          Cell::backward(made, x.prev, x.next, x.saved, next_direct, gates_x, gates_h, grad_gates, peephole);
        }
        for (int s = 0; s < Cell::kStates; ++s) next_direct[s] += kept[s] * grad[s];
      } else {
        Cell::backward(grad, x.prev, x.next, x.saved, next_direct, gates_x, gates_h);
      }
    }
    T* direct = direct_.get() + b * H + unit;
    for (int s = 0; s < Cell::kStates; ++s) put<kFull>(direct + s * plane_, next_direct[s], left);
    O* gates = chunks_.of(step.i, b) + unit;
    for (int g = 0; g < Cell::kGates; ++g) put<kFull>(gates + Chunks::slot(g) * H, gates_x[g], left);
    if constexpr (Chunks::kApart) put<kFull>(gates + Cell::kGates * H, gates_h[Cell::kGates - 1], left);
    if (!p_.project && p_.grad_input != nullptr) {
      S* grad_input = static_cast<S*>(p_.grad_input) + (t * p_.batch + b) * depth_ + unit;
      for (int g = 0; g < Cell::kGates; ++g) put<kFull>(grad_input + g * H, gates_x[g], left);
    }
    if constexpr (kOptions) {
      if (options_.norms_product()) {
        T* to = chunks_.of_norm_h(step.i, b) + unit;
        const T* normal = norms_.normal(step.i, b) + unit;
        const V* of_h = Chunks::kApart ? gates_h : gates_x;
        for (int g = 0; g < Cell::kGates; ++g) put<kFull>(to + g * H, of_h[g] * get<kFull>(normal + g * H, left), left);
      }
      if (Cell::kStates == 2 && p_.peephole != nullptr) {
        for (int k = 0; k < 3; ++k) put<kFull>(chunks_.of_peephole(step.i, b) + k * H + unit, terms[k], left);
      }
    }
  }

  // The gain of norm_c, c normalised, and tanh of what it makes of c.
  template <bool kFull>
  V see(const Seen& x, const Moments<T>& of_cell, std::int64_t unit, std::int64_t left, V& normal, V& tanh_c) const {
    const S* norm_c = static_cast<const S*>(p_.norm_c) + unit;
    const V gain = get<kFull>(norm_c, left);
    normal = of_cell.normal(x.next[Cell::kStates - 1]);
    tanh_c = tanh<T>(normal * gain + get<kFull>(norm_c + p_.hidden, left));
    return gain;
  }

  // Keeps the gradients of the states and puts the terms of norm_c's gradients into the chunk, of which the second is
  // the gradient of what tanh saw.
  template <bool kFull>
  void begin_norm_c(const Step& step, std::int64_t unit, std::int64_t b, const V* grad, std::int64_t left) {
    const std::int64_t H = p_.hidden;
    const std::uint8_t control = control_of_row(step, b);
    V terms[2] = {};
    if (!(control & kHold)) {
      const Seen x = look<kFull>(step, unit, b, control, left);
      V tanh_c, normal, made = grad[0];
      see<kFull>(x, norms_.of_cell(step.i, b), unit, left, normal, tanh_c);
      if (options_.zones()) made *= T(1) - options_.kept(0, step.t, b, unit);
      terms[1] = made * x.saved[Cell::kReserve - 1] * (T(1) - tanh_c * tanh_c);
      terms[0] = terms[1] * normal;
    }
    T* direct = direct_.get() + b * H + unit;
    for (int s = 0; s < Cell::kStates; ++s) put<kFull>(direct + s * plane_, grad[s], left);
    T* to = chunks_.of_norm_c(step.i, b) + unit;
    for (int k = 0; k < 2; ++k) put<kFull>(to + k * H, terms[k], left);
  }

  // The parts of a step that need whole rows, for all rows and groups of a thread, which meets `threads` others.
  void run_norms(const Step& step, Share rows, Share groups, int thread, int threads) {
    const std::int64_t H = p_.hidden, begin = groups.begin * width_, end = min_of(H, groups.end * width_);
    NormMeans<T>* means = norms_.means(thread);
    if constexpr (Cell::kStates == 2) {
      if (options_.norms_cell()) {
        barrier_.wait(threads);
        for (std::int64_t b = rows.begin; b < rows.end; ++b) {
          const T* terms = chunks_.of_norm_c(step.i, b);
          means[b] = norm_means(terms + H, terms, static_cast<const S*>(p_.norm_c), H);
          for (std::int64_t unit = begin; unit < end; unit += n) {
            const T* direct = direct_.get() + b * H + unit;
            const V grad[] = {get<false>(direct, H - unit), get<false>(direct + plane_, H - unit)};
            leave<false>(step, unit, b, grad, H - unit, means + b);
          }
        }
      }
    }
    if (options_.norms_product()) {
      const S* gain = static_cast<const S*>(p_.norm_h);
      barrier_.wait(threads);
      for (std::int64_t b = rows.begin; b < rows.end; ++b) {
        const T* of_h = chunks_.recurrent(step.i, b);
        const T* normal = norms_.normal(step.i, b);
        T* to = chunks_.of_product(step.i, b);
        means[b] = norm_means(of_h, chunks_.of_norm_h(step.i, b), gain, depth_);
        for (int g = 0; g < Cell::kGates; ++g) {
          for (std::int64_t unit = begin; unit < end; unit += n) {
            const std::int64_t at = g * H + unit, left = H - unit;
            const V x = get<false>(of_h + at, left) * get<false>(gain + at, left);
            put<false>(to + at,
                       norm_backward<T>(x, get<false>(normal + at, left), norms_.of_product(step.i, b).scale, means[b]),
                       left);
          }
        }
      }
    }
  }

  const RecurrenceBackward& p_;
  const std::int64_t depth_;
  const int units_;
  const std::int64_t groups_, width_;
  const Split split_;
  const std::int64_t plane_;
  Scratch<O> packed_;
  Scratch<T> direct_, to_reset_;
  Scratch<std::int64_t> rows_;
  Scratch<const O*> pointers_;
  Chunks chunks_;
  const Options<S, Cell::kStates> options_;
  Choose<kOptions, Norms<S, Cell::kGates>, Nothing> norms_;
  // What the segment at hand needs of the forward pass, and where time 0 would be in it.
  Scratch<S> segment_;
  Scratch<T> segment_reserve_;
  const S* cells_;
  const T* reserve_;
  Barrier barrier_;
};

}  // namespace

void SEQKERNELS_ENTRY(recurrence_backward)(const RecurrenceBackward& p) {
  const bool options = has_options(p);
#if defined(SEQKERNELS_DOT16)
  // The RNN keeps float32 products: where a sum is near 0, its rounding decides what a relu lets through.
  if (!options && p.dtype == DType::kBFloat16 && has_dot16()) {
    if (p.cell == CellKind::kLstm) return Backward<Lstm, BFloat16, false, BFloat16>(p).run();
    if (p.cell == CellKind::kGru) return Backward<Gru, BFloat16, false, BFloat16>(p).run();
  }
#endif
  run_dtype<Backward, true>(p, options);
}

}  // namespace seqkernels

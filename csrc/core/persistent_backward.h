// The backward pass: in each step, last of the loop first, a block makes the gradients of its units' gates, multiplies
// them by its rows of the weights, and sends the parts of every unit's gradient to the block that owns the unit.
#pragma once

#include "core/persistent_norm.h"

namespace seqkernels::persistent {
namespace {

template <class M, class Cell, class E, bool kTall>
class Backward : Normed<M, Cell, E, true, kTall> {
  using Norms = Normed<M, Cell, E, true, kTall>;
  using Base = Body<M, Cell, E, true, kTall>;
  using Base::at, Base::at_gates, Base::bias, Base::control_at, Base::fetched, Base::fresh, Base::job_, Base::kGates,
      Base::kHeld, Base::kStates, Base::m_, Base::memory_, Base::operand, Base::operand_at, Base::plan_, Base::rank_,
      Base::slice_, Base::state, Base::sums, Base::time_of, Base::value;
  using typename Base::Registers;
  using typename Base::S;
  static constexpr bool kReserved = kGates > 1;
  // Fields of what is fetched: the gates that were kept, then these.
  static constexpr int kSaved = kReserved ? 4 : 0;
  static constexpr int kState = kSaved;  // as in state_of
  static constexpr int kGradHidden = kState + 1, kGradCells = kState + 2;
  static constexpr int kBits = kStates == 2 ? kState + 3 : kState + 2;
  // With a norm of c, c normalised and 1 over its deviation; with one of the product, likewise of its gates.
  static constexpr int kCellNormal = kBits + 1, kCellScale = kBits + 2;
  // Where a step has the gradients of the normalised product, when the first fields were used: one for each gate.
  static constexpr int kOfNormal = 0;

 public:
  using Norms::Norms;

  SEQKERNELS_FN void run() {
    typename M::template OfWarp<Registers> weights;
    m_.each_warp([&](int warp) {
      load_weights<E, true, kHeld.rows, kHeld.columns, M>(plan_, job_, rank_, warp, weights[warp], this->tail(warp));
    });
    this->begin();
    this->begin_norms();
    m_.sync();
    m_.each_thread([&](int thread) { enter(thread); });
    m_.team_sync(plan_.tier);
    for (std::int64_t step = 0; step < job_.count; ++step) {
      if (step > 0) receive(step);
      const int first = kStates == 2 && plan_.norm_c ? kToCell : kThrough, last = plan_.norm_h ? kToProduct : kThrough;
#pragma unroll 1
      for (int pass = first; pass <= last; ++pass) {
        if (pass > first)
          this->join_parts(pass == kThrough ? kOfCell : kOfProduct, step, pass == kThrough ? 1 : kGates);
        m_.each_thread([&](int thread) { advance(step, pass, first, last, thread); });
        m_.sync();
      }
      m_.each_warp([&](int warp) { send_warp(step + 1, warp, weights[warp]); });
      if (plan_.tier == Tier::kGrid) this->publish(step + 1);
      if (plan_.tier == Tier::kBlock) m_.sync();
    }
    receive(job_.count);
    m_.each_thread([&](int thread) { leave(thread); });
    m_.team_sync(plan_.tier);
  }

 private:
  SEQKERNELS_FN void enter(int thread) {
    this->each_element(thread, [&](const Element& x) {
      for (int s = 0; s < kStates; ++s) state(s, x.index, thread) = x.there ? job_.carry[at(s, x.b, x.j)] : 0.0f;
      each_sum(x, thread, [](float& word, const float* sum) { word = sum == nullptr ? 0.0f : *sum; });
    });
    if (thread == 0 && plan_.tier == Tier::kCluster) {
      this->expect(1);
      if (job_.count > 1) this->expect(0);
      this->expect_first_pairs();
    }
    for (int step = 0; step + 1 < plan_.stages; ++step) fetch_step(step, thread);
  }

  SEQKERNELS_FN void fetch_step(std::int64_t step, int thread) {
    if (step < job_.count) {
      const int stage = static_cast<int>(step % plan_.stages);
      const std::int64_t t = time_of(step);
      this->each_element(thread, [&](const Element& x) {
        if (!x.there) return;
        const auto to = [&](int field) -> std::uint32_t& { return fetched(stage, field, x.index, thread); };
        if (kReserved) {
          const float* reserve = this->reserve_of(t, x.b, x.j);
#pragma unroll
          for (int k = 0; k < kSaved; ++k) this->fetch(to(k), reserve + static_cast<std::int64_t>(k) * plan_.hidden);
        }
        this->fetch(to(kState), this->state_of(t, x.b, x.j));
        const std::int64_t here = at(t, x.b, x.j);
        if (job_.grad_hidden != nullptr) this->fetch(to(kGradHidden), static_cast<const S*>(job_.grad_hidden) + here);
        if (kStates == 2 && job_.grad_cells != nullptr) {
          this->fetch(to(kGradCells), static_cast<const S*>(job_.grad_cells) + here);
        }
        if (job_.control != nullptr) this->fetch(to(kBits), control_at(t, x.b));
        const std::int64_t row = (t - job_.base) * plan_.batch + x.b;
        if (kStates == 2 && plan_.norm_c) {
          this->fetch(to(kCellNormal), job_.cell_normal + row * plan_.hidden + x.j);
          this->fetch(to(kCellScale), job_.cell_scale + row);
        }
        if (plan_.norm_h) {
          const float* normal = job_.product + at_gates(t - job_.base, x.b, x.j);
#pragma unroll
          for (int g = 0; g < kGates; ++g) this->fetch(to(normal_field(g)), normal + std::int64_t{g} * plan_.hidden);
          this->fetch(to(normal_field(kGates)), job_.product_scale + row);
        }
      });
    }
    m_.end_fetch();
  }

  // Of what a norm of the product made of a gate; behind the last gate, of 1 over the deviation.
  SEQKERNELS_FN int normal_field(int gate) const {
    return (kStates == 2 && plan_.norm_c ? kBits + 3 : kBits + 1) + gate;
  }
  SEQKERNELS_FN float fetched_float(int stage, int field, const Element& x, int thread) const {
    return bits_as<float>(fetched(stage, field, x.index, thread));
  }

  SEQKERNELS_FN float fetched_value(int stage, int field, const S* from, const Element& x, int thread) const {
    return widen(Base::of_word(fetched(stage, field, x.index, thread), from));
  }

  // Parts of the gradients of the units of block `to` from block `from`.
  SEQKERNELS_FN float* exchanged(int slot, int to, int from) const {
    const std::int64_t part = std::int64_t{plan_.split.column_warps} * plan_.units * plan_.rows;
    const std::int64_t team = std::int64_t{slice_} * kSlots + slot;
    return static_cast<float*>(job_.exchange) + ((team * plan_.blocks + to) * plan_.blocks + from) * part;
  }

  SEQKERNELS_FN void receive(std::int64_t step) {
    Base::receive(step, step + kSlots <= job_.count);
    if (plan_.tier != Tier::kGrid) return;
    const int slot = static_cast<int>(step % kSlots), all = plan_.units * plan_.rows;
    m_.each_thread([&](int thread) {
      for (int i = thread; i < all; i += kThreads) {
        const float* from = exchanged(slot, rank_, 0) + i;
        float sum = 0.0f;
#pragma unroll 8
        for (int source = 0; source < plan_.blocks * plan_.split.column_warps; ++source) {
          sum += m_.load_fresh(from + std::int64_t{source} * all);
        }
        sums(0)[i / plan_.rows * plan_.sums_row() + i % plan_.rows] = sum;
      }
    });
    m_.sync();
  }

  SEQKERNELS_FN void send_warp(std::int64_t step, int warp, const Registers& weights) {
    const Share share = share_of(plan_, warp);
    if (!share.any) return;
    const int slot = static_cast<int>(step % kSlots);
    for (int n = 0; n < plan_.rows; n += 8) {
      // Its own slot: a warp may be in the next step before another one has multiplied for others' units.
      const char* rows = operand(1 - slot) + n * plan_.operand_row() + share.column * plan_.split.columns * kTileBytes;
      for (int batch = 0; batch < plan_.batches(); ++batch) {
        Sum<M, E> found[kHeld.rows];
        product<E, kHeld.rows, kHeld.columns, M>(plan_, weights, this->tail(warp), batch, rows, found);
#pragma unroll
        for (int m = 0; m < kHeld.rows; ++m) {
          const int tile = tile_row(plan_, share, batch, m);
          if (m < plan_.batch_rows(batch) && tile < plan_.tile_rows()) send_tile(slot, share.column, tile, n, found[m]);
        }
      }
    }
  }

  SEQKERNELS_FN void send_tile(int slot, int part, int tile, int n, const Sum<M, E>& found) const {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const SentRows rows = sent_rows(plan_, 2 * tile + half);
      if (rows.block >= plan_.blocks) continue;
      for (int here = 0; here < M::kHere; ++here) {
        const int g = M::lane(here) / 4, q = M::lane(here) % 4;
        const float* two = found.value[here] + 2 * half;  // of neighbouring rows of the batch
        const int unit = rows.unit + g, column = n + 2 * q;
        if (plan_.tier == Tier::kGrid) {
          float* to = exchanged(slot, rows.block, rank_) + (part * plan_.units + unit) * plan_.rows + column;
          M::store8(to, two);
          continue;
        }
        const int source = rank_ * plan_.split.column_warps + part;
        const int at = source * plan_.sums_of_source() + unit * plan_.sums_row() + column;
        if (plan_.tier == Tier::kBlock) {
          M::store8(sums(0) + at, two);
        } else {
          const int place = memory_.sums + (slot * plan_.sources() * plan_.sums_of_source() + at) * 4;
          m_.put8(rows.block, place, two, memory_.barriers + slot * 8);
        }
      }
    }
  }

  // What the product of the step after sends to an element.
  SEQKERNELS_FN float sent(int slot, const Element& x) const {
    float sum = 0.0f;
    const float* part = sums(slot) + x.u * plan_.sums_row() + x.n;
#pragma unroll 4
    for (int source = 0; source < plan_.sources(); ++source) sum += part[source * plan_.sums_of_source()];
    return sum;
  }
  SEQKERNELS_FN void finish(std::int64_t step, const Element& x, float* past, int thread) const {
    const unsigned bits = bits_as<std::uint32_t>(state(2, x.index, thread));
    Base::finish(sent(static_cast<int>(step % kSlots), x), bits, x.b, x.j, past);
  }

  // Passes of a step, with what norms have to add up between them: to a norm of c, through the cell, and from a norm of
  // the product to the product.
  static constexpr int kToCell = 0, kThrough = 1, kToProduct = 2;

  SEQKERNELS_FN void advance(std::int64_t step, int pass, int first, int last, int thread) {
    const int stage = static_cast<int>(step % plan_.stages);
    m_.await_fetched(plan_.stages - 2);
    this->each_element(thread, [&](const Element& x) {
      if (pass == kToProduct) {
        enter_product(step, stage, x, thread);
        return;
      }
      float to_product[kGates] = {};
      if (x.there) {
        float grad[kStates];
#pragma unroll
        for (int s = 0; s < kStates; ++s) grad[s] = state(s, x.index, thread);
        if (pass == first) arrive(step, stage, x, grad, thread);
        if (pass == kThrough) step_back(step, stage, x, grad, to_product, thread);
#pragma unroll
        for (int s = 0; s < kStates; ++s) state(s, x.index, thread) = grad[s];
      }
      if (kStates == 2 && pass == kToCell) {
        enter_cell(step, stage, x, thread);
      } else if (pass < last) {
        leave_gates(stage, x, to_product, thread);
      } else {
#pragma unroll
        for (int g = 0; g < kGates; ++g)
          operand_at(static_cast<int>(step % kSlots), x.n, g * plan_.units + x.u) = narrow<S>(to_product[g]);
      }
    });
    if (pass == last) fetch_step(step + plan_.stages - 1, thread);
  }

  // The gradients of the states after a step, complete.
  SEQKERNELS_FN void arrive(std::int64_t step, int stage, const Element& x, float* grad, int thread) {
    const std::int64_t t = time_of(step), here = at(t, x.b, x.j);
    if (step > 0) finish(step, x, grad, thread);
    unsigned bits = 0;
    if (job_.control != nullptr) bits = Base::of_word(fetched(stage, kBits, x.index, thread), control_at(t, x.b));
    state(2, x.index, thread) = bits_as<float>(bits);
    if (job_.grad_hidden != nullptr) {
      grad[0] += fetched_value(stage, kGradHidden, static_cast<const S*>(job_.grad_hidden) + here, x, thread);
    }
    if (kStates == 2 && job_.grad_cells != nullptr) {
      grad[kStates - 1] += fetched_value(stage, kGradCells, static_cast<const S*>(job_.grad_cells) + here, x, thread);
    }
  }

  // What a norm of c adds up, of the gradients of the states after a step.
  SEQKERNELS_FN void enter_cell(std::int64_t step, int stage, const Element& x, int thread) {
    float of_normal = 0.0f, normal = 0.0f;
    if (x.there && !(bits_as<std::uint32_t>(state(2, x.index, thread)) & kHold)) {
      float grad = state(0, x.index, thread);
      if (job_.zoneout != nullptr) grad *= 1.0f - this->kept(0, time_of(step), x.b, x.j);
      const Seen seen = seen_of(stage, x, grad, thread);
      float* sums = &state(kStateWords + (plan_.norm_h ? kGates : 0), x.index, thread);
      normal = seen.normal;
      sums[0] += seen.grad * normal;
      sums[plan_.elements() * kThreads] += seen.grad;
      of_normal = seen.grad * this->gain_c(0, x.u);
    }
    this->part(0, x.n, x.u) = of_normal;
    this->part(1, x.n, x.u) = of_normal * normal;
  }

  // c normalised, the tanh of what o is multiplied by, and the gradient of its argument, from that of h.
  struct Seen {
    float normal, tanh, grad;
  };
  SEQKERNELS_FN Seen seen_of(int stage, const Element& x, float grad_hidden, int thread) const {
    const float normal = fetched_float(stage, kCellNormal, x, thread), o = fetched_float(stage, 3, x, thread);
    const float made = seqkernels::tanh<float>(normal * this->gain_c(0, x.u) + this->gain_c(1, x.u));
    return {normal, made, grad_hidden * o * (1.0f - made * made)};
  }

  // What a norm of the product adds up, of the gradients of its gates.
  SEQKERNELS_FN void leave_gates(int stage, const Element& x, const float* grad, int thread) {
    float sum = 0.0f, product = 0.0f;
    if (x.there) {
#pragma unroll
      for (int g = 0; g < kGates; ++g) {
        const float normal = fetched_float(stage, normal_field(g), x, thread);
        const float of_normal = grad[g] * this->gain_h(g, x.u);
        state(kStateWords + g, x.index, thread) += grad[g] * normal;
        fetched(stage, kOfNormal + g, x.index, thread) = bits_as<std::uint32_t>(of_normal);
        sum += of_normal;
        product += of_normal * normal;
      }
    }
    this->part(0, x.n, x.u) = sum;
    this->part(1, x.n, x.u) = product;
  }

  // From the gradients of the gates to those of the product.
  SEQKERNELS_FN void enter_product(std::int64_t step, int stage, const Element& x, int thread) {
    if (!x.there) return;  // 0 since the beginning
    const float* moments = this->moments(x.n);
    const float scale = fetched_float(stage, normal_field(kGates), x, thread);
    S* to = static_cast<S*>(job_.of_product) + at_gates(time_of(step), x.b, x.j);
#pragma unroll
    for (int g = 0; g < kGates; ++g) {
      const float of_normal = fetched_float(stage, kOfNormal + g, x, thread);
      const float normal = fetched_float(stage, normal_field(g), x, thread);
      const S grad = narrow<S>(scale * (of_normal - moments[0] - normal * moments[1]));
      to[std::int64_t{g} * plan_.hidden] = grad;
      operand_at(static_cast<int>(step % kSlots), x.n, g * plan_.units + x.u) = grad;
    }
  }

  // From the gradients of the states after a step to those before it, but for what the product sends, in `grad`.
  SEQKERNELS_FN void step_back(std::int64_t step, int stage, const Element& x, float* grad, float* to_product,
                               int thread) const {
    const std::int64_t t = time_of(step);
    const auto word = [&](int field) { return fetched(stage, field, x.index, thread); };
    const unsigned bits = bits_as<std::uint32_t>(state(2, x.index, thread));
    float of_x[kGates] = {}, of_u[kGates] = {};
    if (!(bits & kHold)) {
      float saved[4];
#pragma unroll
      for (int k = 0; k < kSaved; ++k) saved[k] = bits_as<float>(word(k));
      float own = fetched_value(stage, kState, this->state_of(t, x.b, x.j), x, thread);
      if (kReserved && bits & kReset) own = fresh(kStates - 1, x.j);
      float of_gates[kGates] = {};
      if (job_.grad_gates != nullptr) {
#pragma unroll
        for (int g = 0; g < kGates; ++g) {
          of_gates[g] = value(job_.grad_gates, at_gates(t, x.b, x.j) + static_cast<std::int64_t>(g) * plan_.hidden);
        }
      }
      this->through_cell(
          t, x.b, x.j, own, saved, of_gates, [&] { return made_again(t, x); },
          [&](float c, float* of_states) { return through_output(stage, x, c, saved[3], of_states, thread); }, grad,
          of_x, of_u);
    }
    S* to_x = static_cast<S*>(job_.of_x) + at_gates(t, x.b, x.j);
#pragma unroll
    for (int g = 0; g < kGates; ++g) to_x[static_cast<std::int64_t>(g) * plan_.hidden] = narrow<S>(of_x[g]);
    if (job_.of_u != nullptr) {
      S* to_u = static_cast<S*>(job_.of_u) + at_gates(t, x.b, x.j);
#pragma unroll
      for (int g = 0; g < kGates; ++g) to_u[static_cast<std::int64_t>(g) * plan_.hidden] = narrow<S>(of_u[g]);
    }
#pragma unroll
    for (int g = 0; g < kGates; ++g) to_product[g] = of_u[g];
  }

  // From the gradient of h to that of c, which is added to; what o is multiplied by.
  SEQKERNELS_FN float through_output(int stage, const Element& x, float c, float o, float* grad, int thread) const {
    if (!plan_.norm_c) return Base::through_output(c, o, grad);
    const Seen seen = seen_of(stage, x, grad[0], thread);
    const float* moments = this->moments(x.n);
    const float of_c = seen.grad * this->gain_c(0, x.u) - moments[0] - seen.normal * moments[1];
    grad[1] += fetched_float(stage, kCellScale, x, thread) * of_c;
    return seen.tanh;
  }

  // What an RNN made before zoneout.
  SEQKERNELS_FN float made_again(std::int64_t t, const Element& x) const {
    const float of_x = job_.gates_x[at_gates(t, x.b, x.j)] + bias(0, 0, x.u);
    float of_h = job_.product[at_gates(t - job_.base, x.b, x.j)];
    if (plan_.norm_h) of_h *= this->gain_h(0, x.u);
    of_h += bias(1, 0, x.u);
    float next;
    this->cell(&of_x, &of_h, nullptr, &next, nullptr, nullptr);
    return next;
  }

  // Calls f(word, sum) for the sums of norms over the steps: the word of an element that has one in the loop, and its
  // place in memory or null, which the next steps of the call go on from, so that it is added up in the same order
  // whatever their number.
  template <class F>
  SEQKERNELS_FN void each_sum(const Element& x, int thread, const F& f) const {
    const int of_product = plan_.norm_h ? kGates : 0;
    for (int word = kStateWords; word < plan_.state_words(); ++word) {
      const int k = word - kStateWords;
      float* sums = k < of_product ? job_.sum_norm_h : job_.sum_norm_c;
      const int row = k < of_product ? k : k - of_product;
      f(state(word, x.index, thread), sums == nullptr || !x.there ? nullptr : sums + at(row, x.b, x.j));
    }
  }

  SEQKERNELS_FN void leave(int thread) {
    this->each_element(thread, [&](const Element& x) {
      if (!x.there) return;
      float grad[kStates];
#pragma unroll
      for (int s = 0; s < kStates; ++s) grad[s] = state(s, x.index, thread);
      finish(job_.count, x, grad, thread);
#pragma unroll
      for (int s = 0; s < kStates; ++s) job_.carry[at(s, x.b, x.j)] = grad[s];
      each_sum(x, thread, [](float word, float* sum) {
        if (sum != nullptr) *sum = word;
      });
    });
  }
};

}  // namespace
}  // namespace seqkernels::persistent

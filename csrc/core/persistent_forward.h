// The forward pass: in each step a block multiplies its weights by the h of all units, applies the cell to its own
// units, and sends their h to the others.
#pragma once

#include "core/persistent_norm.h"

namespace seqkernels::persistent {
namespace {

template <class M, class Cell, class E>
class Forward : Normed<M, Cell, E, false, false> {
  using Norms = Normed<M, Cell, E, false, false>;
  using Base = Body<M, Cell, E, false, false>;
  using Base::at, Base::at_gates, Base::bias, Base::control_at, Base::fetched, Base::job_, Base::kGates, Base::kHeld,
      Base::kStates, Base::m_, Base::memory_, Base::operand, Base::operand_at, Base::plan_, Base::rank_, Base::slice_,
      Base::state, Base::sums, Base::time_of;
  using typename Base::Registers;
  using typename Base::S;

 public:
  using Norms::Norms;

  SEQKERNELS_FN void run() {
    typename M::template OfWarp<Registers> weights;
    m_.each_warp([&](int warp) {
      load_weights<E, false, kHeld.rows, kHeld.columns, M>(plan_, job_, rank_, warp, weights[warp], this->tail(warp));
    });
    this->begin();
    this->begin_norms();
    m_.sync();
    m_.each_thread([&](int thread) { enter(thread); });
    m_.team_sync(plan_.tier);
    for (std::int64_t step = 0; step < job_.count; ++step) {
      const int slot = static_cast<int>(step % kSlots);
      if (step > 0) receive(step);
      m_.each_warp([&](int warp) { multiply_warp(slot, warp, weights[warp]); });
      m_.sync();
      // With a norm of c the cell takes two passes: up to c, and what becomes of it.
      const int last = kStates == 2 && plan_.norm_c ? 1 : 0;
#pragma unroll 1
      for (int pass = 0; pass <= last; ++pass) {
        if (pass > 0 || plan_.norm_h) normalise(step, pass > 0);
        m_.each_thread([&](int thread) { advance(step, pass, last, thread); });
        if (pass < last) m_.sync();
      }
      if (step + 1 < job_.count) {
        m_.sync();
        send(step + 1);
      }
    }
    if (plan_.tier == Tier::kGrid && job_.count == 1) {
      // Nothing was received that says that the others have read the states which are written now.
      this->publish(1);
      Base::receive(1, false);
    }
    m_.each_thread([&](int thread) { leave(thread); });
    m_.team_sync(plan_.tier);
  }

 private:
  // The states before the loop, of all units into the operand; and the first of what is fetched.
  SEQKERNELS_FN void enter(int thread) {
    const unsigned none = 0;
    for (int i = thread; i < plan_.rows * plan_.hidden; i += kThreads) {
      const int n = i / plan_.hidden, j = i % plan_.hidden;
      const std::int64_t b = static_cast<std::int64_t>(slice_) * plan_.rows + n;
      if (b >= plan_.batch) continue;
      const unsigned bits = job_.control == nullptr ? none : *control_at(job_.first, b);
      operand_at(0, n, j) = this->entering(job_.carry[b * plan_.hidden + j], bits, b, j);
    }
    this->each_element(thread, [&](const Element& x) {
      for (int s = 0; s < kStates; ++s) state(s, x.index, thread) = x.there ? job_.carry[at(s, x.b, x.j)] : 0.0f;
      const unsigned bits = job_.control == nullptr || !x.there ? none : *control_at(job_.first, x.b);
      state(2, x.index, thread) = bits_as<float>(bits);
    });
    if (thread == 0 && plan_.tier == Tier::kCluster) {
      if (job_.count > 1) this->expect(1);
      if (job_.count > 2) this->expect(0);
      this->expect_first_pairs();
    }
    for (int step = 0; step + 1 < plan_.stages; ++step) fetch_step(step, thread);
  }

  SEQKERNELS_FN void fetch_step(std::int64_t step, int thread) {
    if (step < job_.count) {
      const int stage = static_cast<int>(step % plan_.stages);
      const std::int64_t t = time_of(step);
      const bool controlled = job_.control != nullptr && step + 1 < job_.count;
      this->each_element(thread, [&](const Element& x) {
        if (!x.there) return;
        const float* from = job_.gates_x + at_gates(t, x.b, x.j);
#pragma unroll
        for (int g = 0; g < kGates; ++g) {
          this->fetch(fetched(stage, g, x.index, thread), from + static_cast<std::int64_t>(g) * plan_.hidden);
        }
        if (controlled) this->fetch(fetched(stage, kGates, x.index, thread), control_at(time_of(step + 1), x.b));
      });
    }
    m_.end_fetch();
  }

  SEQKERNELS_FN void receive(std::int64_t step) {
    Base::receive(step, step + kSlots < job_.count);
    if (plan_.tier != Tier::kGrid) return;
    const int slot = static_cast<int>(step % kSlots), row = plan_.padded() * static_cast<int>(sizeof(S));
    m_.each_thread([&](int thread) {
      for (int n = thread / 32; n < plan_.rows; n += kWarps) {
        const char* from = exchanged(slot) + n * row;
        char* to = operand(slot) + n * plan_.operand_row();
#pragma unroll 4
        for (int at = thread % 32 * 16; at < row; at += 32 * 16) {
          std::uint32_t words[4];
          m_.load_fresh16(from + at, words);
          M::store16(to + at, words);
        }
      }
    });
    m_.sync();
  }

  // h of all units in memory, rows of the batch one behind the other.
  SEQKERNELS_FN char* exchanged(int slot) const {
    const std::int64_t bytes = std::int64_t{plan_.rows} * plan_.padded() * static_cast<int>(sizeof(S));
    return static_cast<char*>(job_.exchange) + (std::int64_t{slice_} * kSlots + slot) * bytes;
  }

  SEQKERNELS_FN void multiply_warp(int slot, int warp, const Registers& weights) {
    const Share share = share_of(plan_, warp);
    if (!share.any) return;
    for (int n = 0; n < plan_.rows; n += 8) {
      const char* rows = operand(slot) + n * plan_.operand_row() + share.column * plan_.split.columns * kTileBytes;
      for (int batch = 0; batch < plan_.batches(); ++batch) {
        Sum<M, E> found[kHeld.rows];
        product<E, kHeld.rows, kHeld.columns, M>(plan_, weights, this->tail(warp), batch, rows, found);
#pragma unroll
        for (int m = 0; m < kHeld.rows; ++m) {
          const int tile = tile_row(plan_, share, batch, m);
          if (m < plan_.batch_rows(batch) && tile < plan_.tile_rows()) put_sums(share.column, tile, n, found[m]);
        }
      }
    }
  }

  SEQKERNELS_FN float& sum_at(int source, int gate, int n, int unit) const {
    return sums(0)[source * plan_.sums_of_source() + (gate * plan_.rows + n) * plan_.sums_row() + unit];
  }

  SEQKERNELS_FN void normalise(std::int64_t step, bool cells) {
    this->find_moments(cells ? kOfCell : kOfProduct, step, cells ? 1 : kGates,
                       [&](int n, int gate, int u) { return cells ? sum_at(0, kMade, n, u) : summed(gate, n, u); });
  }

  SEQKERNELS_FN float summed(int gate, int n, int unit) const {
    float sum = 0.0f;
#pragma unroll 1
    for (int source = 0; source < plan_.split.column_warps; ++source) sum += sum_at(source, gate, n, unit);
    return sum;
  }

  SEQKERNELS_FN void put_sums(int source, int tile, int n, const Sum<M, E>& found) const {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const OwnRows rows = own_rows(plan_, 2 * tile + half);
      if (rows.unit >= plan_.units) continue;
      for (int here = 0; here < M::kHere; ++here) {
        const int g = M::lane(here) / 4, q = M::lane(here) % 4;
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          sum_at(source, rows.gate, n + 2 * q + i, rows.unit + g) = found.value[here][2 * half + i];
        }
      }
    }
  }

  // The cell, of the elements of a thread.
  SEQKERNELS_FN void advance(std::int64_t step, int pass, int last, int thread) {
    const int stage = static_cast<int>(step % plan_.stages);
    const std::int64_t t = time_of(step);
    const bool more = step + 1 < job_.count;
    m_.await_fetched(plan_.stages - 2);
    this->each_element(thread, [&](const Element& x) {
      S enters{};
      if (x.there) {
        float prev[kStates], next[kStates], saved[4] = {};
        const unsigned bits = bits_as<std::uint32_t>(state(2, x.index, thread));
#pragma unroll
        for (int s = 0; s < kStates; ++s) prev[s] = state(s, x.index, thread);
        this->restart(bits, x.j, prev);
        if (pass == 0) {
          cell_of(stage, x, prev, next, saved, thread);
          reserve(t, bits, x, saved);
          if (pass < last) {
            sum_at(0, kMade, x.n, x.u) = next[kStates - 1];
            sum_at(0, kOutput, x.n, x.u) = saved[3];
            return;
          }
        } else {
          hidden_of(x, next);
        }
        this->mix(t, bits, x.b, x.j, prev, next);
        keep(t, x, next, thread);
        if (more) {
          const std::uint8_t* control = job_.control == nullptr ? nullptr : control_at(time_of(step + 1), x.b);
          unsigned coming = 0;
          if (control != nullptr) coming = Base::of_word(fetched(stage, kGates, x.index, thread), control);
          state(2, x.index, thread) = bits_as<float>(coming);
          enters = this->entering(next[0], coming, x.b, x.j);
        }
      }
      if (more) staged(step + 1, x) = enters;
    });
    if (pass == last) fetch_step(step + plan_.stages - 1, thread);
  }

  SEQKERNELS_FN void cell_of(int stage, const Element& x, const float* prev, float* next, float* saved,
                             int thread) const {
    float of_x[kGates], of_h[kGates];
#pragma unroll
    for (int g = 0; g < kGates; ++g) {
      of_x[g] = bits_as<float>(fetched(stage, g, x.index, thread)) + bias(0, g, x.u);
      if (plan_.norm_h) {
        const float* moments = this->moments(x.n);
        of_h[g] = (summed(g, x.n, x.u) - moments[0]) * moments[1] * this->gain_h(g, x.u) + bias(1, g, x.u);
      } else {
        float sum = bias(1, g, x.u);
        for (int source = 0; source < plan_.split.column_warps; ++source) sum += sum_at(source, g, x.n, x.u);
        of_h[g] = sum;
      }
    }
    this->with_peephole(x.j, [&](const float* weights) { this->cell(of_x, of_h, prev, next, saved, weights); });
  }

  // Where c and o of an element are, in the place of its sums, until c is normalised.
  static constexpr int kMade = 0, kOutput = kGates - 1;

  SEQKERNELS_FN void hidden_of(const Element& x, float* next) const {
    const float c = sum_at(0, kMade, x.n, x.u);
    const float* moments = this->moments(x.n);
    const float seen = (c - moments[0]) * moments[1] * this->gain_c(0, x.u) + this->gain_c(1, x.u);
    next[0] = sum_at(0, kOutput, x.n, x.u) * tanh<float>(seen);
    next[kStates - 1] = c;
  }

  SEQKERNELS_FN void reserve(std::int64_t t, unsigned bits, const Element& x, const float* saved) const {
    if (kGates == 1 || job_.reserve == nullptr) return;
    float* reserve = this->reserve_of(t, x.b, x.j);
#pragma unroll
    for (int k = 0; k < 4; ++k) reserve[static_cast<std::int64_t>(k) * plan_.hidden] = bits & kHold ? 0.0f : saved[k];
  }

  SEQKERNELS_FN void keep(std::int64_t t, const Element& x, const float* next, int thread) const {
    S* states = static_cast<S*>(job_.states) + at(this->after(t), x.b, x.j);
    states[0] = narrow<S>(next[0]);
    if (kStates == 2 && job_.state_plane != 0) states[job_.state_plane] = narrow<S>(next[kStates - 1]);
#pragma unroll
    for (int s = 0; s < kStates; ++s) state(s, x.index, thread) = next[s];
  }

  // Where an element's h waits to be sent; in a block of its own it is where it is needed.
  SEQKERNELS_FN S& staged(std::int64_t step, const Element& x) const {
    if (plan_.tier == Tier::kBlock) return operand_at(static_cast<int>(step % kSlots), x.n, x.j);
    return reinterpret_cast<S*>(m_.shared(memory_.staging))[x.n * plan_.units + x.u];
  }

  // In a cluster warps share the blocks to send to, and the lanes of a warp what is sent.
  SEQKERNELS_FN void send(std::int64_t step) {
    if (plan_.tier == Tier::kBlock) return;
    const int slot = static_cast<int>(step % kSlots), row = plan_.units * static_cast<int>(sizeof(S));
    const int first = rank_ * row, vectors = row / 16, all = plan_.rows * vectors;
    const bool cluster = plan_.tier == Tier::kCluster;
    m_.each_thread([&](int thread) {
      for (int v = cluster ? thread % 32 : thread; v < all; v += cluster ? 32 : kThreads) {
        const int n = v / vectors, at = first + v % vectors * 16;
        std::uint32_t words[4];
        M::load16(m_.shared(memory_.staging) + v * 16, words);
        if (!cluster) {
          M::store16(exchanged(slot) + n * plan_.padded() * static_cast<int>(sizeof(S)) + at, words);
          continue;
        }
        const int place = memory_.operand + slot * plan_.operand_bytes() + n * plan_.operand_row() + at;
        for (int next = thread / 32; next < plan_.blocks; next += kWarps) {
          const int to = rank_ + next;  // not all to the same one at first
          m_.put16(to < plan_.blocks ? to : to - plan_.blocks, place, words, memory_.barriers + slot * 8);
        }
      }
    });
    if (!cluster) this->publish(step);
  }

  SEQKERNELS_FN void leave(int thread) {
    this->each_element(thread, [&](const Element& x) {
      if (!x.there) return;
      for (int s = 0; s < kStates; ++s) job_.carry[at(s, x.b, x.j)] = state(s, x.index, thread);
    });
  }
};

}  // namespace
}  // namespace seqkernels::persistent

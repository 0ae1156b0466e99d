// A recurrence by a product and one pass over the elements in each step, for sizes where that is best: many rows, or
// weights that no chip has room for. The product is a library's; this is the pass, of which a thread has four
// neighbouring units.
//
// What a pass moves, in bytes of an element of the state, and what bounds it (LSTM in 16 bits, with all that training
// keeps): forward 62, of them 16 of gates_x, 16 of the product, 8 of c, 6 of states and operand, 16 of the reserve;
// backward 48, of them 4 of the product, 8 of the gradient of c, 18 of reserve and c, 2 of grad_hidden, 16 of the
// gates' gradients, which go to the operand and to of_x.
#pragma once

#include "core/persistent_element.h"
#include "core/stepwise_job.h"

namespace seqkernels::stepwise {

namespace {

template <class T>
struct alignas(kWidth * sizeof(T)) Packed {
  T value[kWidth];
  SEQKERNELS_FN float operator[](int i) const { return widen(value[i]); }
};

// The units that a thread has of a row: fewer at its end.
struct Span {
  int j, count;
  std::int64_t b;
  bool vectors;

  SEQKERNELS_FN Span(const Step& given, bool all_vectors, std::int64_t row, int unit)
      : j(unit), count(least(given.hidden - unit, kWidth)), b(row), vectors(all_vectors) {}

  // What is read is used later, when all of a thread's reads are on their way. Nothing where `from` is null.
  template <class T>
  SEQKERNELS_FN Packed<T> read(const T* from) const {
    Packed<T> found{};
    if (from == nullptr) return found;
    if (vectors) return *reinterpret_cast<const Packed<T>*>(from);
#pragma unroll
    for (int i = 0; i < kWidth; ++i) {
      if (i < count) found.value[i] = from[i];
    }
    return found;
  }

  template <class T>
  SEQKERNELS_FN void store(T* to, const float (&from)[kWidth]) const {
    Packed<T> made;
#pragma unroll
    for (int i = 0; i < kWidth; ++i) made.value[i] = narrow<T>(from[i]);
    if (vectors) {
      *reinterpret_cast<Packed<T>*>(to) = made;
    } else {
#pragma unroll
      for (int i = 0; i < kWidth; ++i) {
        if (i < count) to[i] = made.value[i];
      }
    }
  }
};

// What all threads of a step know.
template <class Cell, class S, bool kBackward>
class Pass : protected persistent::Elements<Cell, S, kBackward> {
  using Base = persistent::Elements<Cell, S, kBackward>;

 public:
  using Base::kGates, Base::kStates;

  SEQKERNELS_FN Pass(const Job& job, bool vectors, std::int64_t* steps, const Step& given)
      : Base(job, given.hidden, given.batch), given_(given), vectors_(vectors), step_(steps[given.turn]) {}

  // By one thread of all.
  SEQKERNELS_FN void advance(std::int64_t* steps) const { steps[1 - given_.turn] = step_ + 1; }

 protected:
  using Base::at, Base::at_gates, Base::control_at, Base::hidden_, Base::job_, Base::time_of;

  SEQKERNELS_FN unsigned control_of(std::int64_t step, std::int64_t b) const {
    const unsigned none = 0;
    return job_.control == nullptr ? none : *control_at(time_of(step), b);
  }
  // A place in a tensor of storage, null where there is none.
  SEQKERNELS_FN static const S* from(const void* data, std::int64_t at) {
    return data == nullptr ? nullptr : static_cast<const S*>(data) + at;
  }
  SEQKERNELS_FN std::int64_t gate(int g) const { return static_cast<std::int64_t>(g) * hidden_; }
  // Whether h, or its gradient, goes from step to step beside the product.
  SEQKERNELS_FN bool carries_h() const { return kGates == 3 || job_.control != nullptr || job_.zoneout != nullptr; }
  const Step& given_;
  const bool vectors_;
  const std::int64_t step_;
};

template <class Cell, class S>
class Forward : public Pass<Cell, S, false> {
  using Base = Pass<Cell, S, false>;
  using Base::at, Base::at_gates, Base::given_, Base::job_, Base::kGates, Base::kStates, Base::step_;

 public:
  using Base::Base;

  SEQKERNELS_FN void run(std::int64_t b, int j) const {
    const Span span(given_, this->vectors_, b, j);
    const std::int64_t t = this->time_of(step_);
    const bool more = step_ + 1 < job_.count;
    const unsigned bits = this->control_of(step_, b);
    Packed<float> of_x[kGates], of_h[kGates], before[kStates];
    Packed<S> bias_x[kGates], bias_h[kGates];
#pragma unroll
    for (int g = 0; g < kGates; ++g) {
      of_x[g] = span.read(job_.gates_x + at_gates(t, b, j) + this->gate(g));
      of_h[g] = span.read(given_.product + at_gates(0, b, j) + this->gate(g));
    }
#pragma unroll
    for (int s = 0; s < kStates; ++s) {
      before[s] = span.read(s > 0 || this->carries_h() ? job_.carry + at(s, b, j) : nullptr);
    }
#pragma unroll
    for (int g = 0; g < kGates; ++g) {
      bias_x[g] = span.read(this->from(job_.bias_ih, this->gate(g) + j));
      bias_h[g] = span.read(this->from(job_.bias_hh, this->gate(g) + j));
    }
    const unsigned coming = more ? this->control_of(step_ + 1, b) : 0;
    float states[kStates][kWidth], saved[4][kWidth], enters[kWidth] = {};
#pragma unroll
    for (int i = 0; i < kWidth; ++i) {
      if (i >= span.count) break;
      float x[kGates], h[kGates], prev[kStates], next[kStates], kept[4];
#pragma unroll
      for (int g = 0; g < kGates; ++g) {
        x[g] = of_x[g][i] + bias_x[g][i];
        h[g] = of_h[g][i] + bias_h[g][i];
      }
#pragma unroll
      for (int s = 0; s < kStates; ++s) prev[s] = before[s][i];
      this->step_of(t, bits, b, j + i, x, h, prev, next, kept);
#pragma unroll
      for (int s = 0; s < kStates; ++s) states[s][i] = next[s];
#pragma unroll
      for (int k = 0; k < 4; ++k) saved[k][i] = kGates > 1 ? kept[k] : 0.0f;
      if (more) enters[i] = widen(this->entering(next[0], coming, b, j + i));
    }
    if (more) span.store(static_cast<S*>(given_.operand) + at(0, b, j), enters);
    keep(span, t, more, states, saved);
  }

 private:
  SEQKERNELS_FN void keep(const Span& span, std::int64_t t, bool more, const float (&states)[kStates][kWidth],
                          const float (&saved)[4][kWidth]) const {
    S* to = static_cast<S*>(job_.states) + at(this->after(t), span.b, span.j);
    span.store(to, states[0]);
    if (kStates == 2 && job_.state_plane != 0) span.store(to + job_.state_plane, states[kStates - 1]);
    if (kGates > 1 && job_.reserve != nullptr) {
      float* reserve = this->reserve_of(t, span.b, span.j);
#pragma unroll
      for (int k = 0; k < 4; ++k) span.store(reserve + this->gate(k), saved[k]);
    }
#pragma unroll
    for (int s = 0; s < kStates; ++s) {
      if (s > 0 || this->carries_h() || !more) span.store(job_.carry + at(s, span.b, span.j), states[s]);
    }
  }
};

// Step `count` is what comes after the last one: what its product sends to the states before it.
template <class Cell, class S>
class Backward : public Pass<Cell, S, true> {
  using Base = Pass<Cell, S, true>;
  using Base::at, Base::at_gates, Base::given_, Base::job_, Base::kGates, Base::kStates, Base::step_;
  static constexpr bool kReserved = kGates > 1;

 public:
  using Base::Base;

  SEQKERNELS_FN void run(std::int64_t b, int j) const {
    const Span span(given_, this->vectors_, b, j);
    const bool first = step_ == 0, last = step_ == job_.count;
    const std::int64_t t = this->time_of(step_);
    Packed<float> after[kStates];
#pragma unroll
    for (int s = 0; s < kStates; ++s) {
      after[s] = span.read(s > 0 || first || this->carries_h() ? job_.carry + at(s, b, j) : nullptr);
    }
    const Packed<float> sent = span.read(first ? nullptr : given_.product + at(0, b, j));
    const unsigned sent_bits = first ? 0 : this->control_of(step_ - 1, b);
    Packed<float> saved[4];
    Packed<S> own{}, of_hidden{}, of_cells{}, of_gates[kGates];
    unsigned bits = kHold;
    if (!last) {
      bits = this->control_of(step_, b);
#pragma unroll
      for (int k = 0; k < 4; ++k) {
        saved[k] = span.read(kReserved ? this->reserve_of(t, b, j) + this->gate(k) : nullptr);
      }
      own = span.read(this->state_of(t, b, j));
      of_hidden = span.read(this->from(job_.grad_hidden, at(t, b, j)));
      if (kStates == 2) of_cells = span.read(this->from(job_.grad_cells, at(t, b, j)));
#pragma unroll
      for (int g = 0; g < kGates; ++g) {
        of_gates[g] = span.read(this->from(job_.grad_gates, at_gates(t, b, j) + this->gate(g)));
      }
    }
    float all[kStates][kWidth], all_x[kGates][kWidth] = {}, all_u[kGates][kWidth] = {};
#pragma unroll
    for (int i = 0; i < kWidth; ++i) {
      if (i >= span.count) break;
      float grad[kStates];
#pragma unroll
      for (int s = 0; s < kStates; ++s) grad[s] = after[s][i];
      if (!first) this->finish(sent[i], sent_bits, b, j + i, grad);
      if (!last) {
        grad[0] += of_hidden[i];
        if (kStates == 2) grad[kStates - 1] += of_cells[i];
      }
      if (!(bits & kHold)) {
        float kept[4], to_gates[kGates], of_x[kGates] = {}, of_u[kGates] = {};
#pragma unroll
        for (int k = 0; k < 4; ++k) kept[k] = saved[k][i];
#pragma unroll
        for (int g = 0; g < kGates; ++g) to_gates[g] = of_gates[g][i];
        const float from = kReserved && bits & kReset ? this->fresh(kStates - 1, j + i) : own[i];
        this->through_cell(
            t, b, j + i, from, kept, to_gates, [&] { return made_again(t, b, j + i); },
            [&](float c, float* of_states) { return this->through_output(c, kept[3], of_states); }, grad, of_x, of_u);
#pragma unroll
        for (int g = 0; g < kGates; ++g) {
          all_x[g][i] = of_x[g];
          all_u[g][i] = of_u[g];
        }
      }
#pragma unroll
      for (int s = 0; s < kStates; ++s) all[s][i] = grad[s];
    }
    if (!last) keep(span, t, all_x, all_u);
#pragma unroll
    for (int s = 0; s < kStates; ++s) {
      if (s > 0 || last || this->carries_h()) span.store(job_.carry + at(s, b, j), all[s]);
    }
  }

 private:
  SEQKERNELS_FN void keep(const Span& span, std::int64_t t, const float (&of_x)[kGates][kWidth],
                          const float (&of_u)[kGates][kWidth]) const {
    S* to_x = static_cast<S*>(job_.of_x) + at_gates(t, span.b, span.j);
    S* to_u = static_cast<S*>(job_.of_u) + at_gates(t, span.b, span.j);
    S* operand = static_cast<S*>(given_.operand) + at_gates(0, span.b, span.j);
#pragma unroll
    for (int g = 0; g < kGates; ++g) {
      span.store(to_x + this->gate(g), of_x[g]);
      if (kGates == 3) span.store(to_u + this->gate(g), of_u[g]);
      span.store(operand + this->gate(g), of_u[g]);
    }
  }

  // What an RNN made before zoneout.
  SEQKERNELS_FN float made_again(std::int64_t t, std::int64_t b, int j) const {
    float of_x = job_.gates_x[at_gates(t, b, j)], of_h = job_.product[at_gates(t - job_.base, b, j)], next;
    if (job_.bias_ih != nullptr) of_x += this->value(job_.bias_ih, j);
    if (job_.bias_hh != nullptr) of_h += this->value(job_.bias_hh, j);
    this->cell(&of_x, &of_h, nullptr, &next, nullptr, nullptr);
    return next;
  }
};

template <class Cell, class S, bool kBackward>
struct PassOf {
  using Type = Forward<Cell, S>;
};
template <class Cell, class S>
struct PassOf<Cell, S, true> {
  using Type = Backward<Cell, S>;
};

// What enters the product of the first step.
template <class S>
class Enter : persistent::Elements<RnnTanh<float>, S, false> {
  using Base = persistent::Elements<RnnTanh<float>, S, false>;
  using Base::at, Base::control_at, Base::job_;

 public:
  explicit SEQKERNELS_FN Enter(const Begin& given)
      : Base(given.job, given.step.hidden, given.step.batch), given_(given.step), vectors_(given.vectors) {}

  SEQKERNELS_FN void run(std::int64_t b, int j) const {
    const Span span(given_, vectors_, b, j);
    const unsigned none = 0, bits = job_.control == nullptr ? none : *control_at(job_.first, b);
    const Packed<float> h = span.read(job_.carry + at(0, b, j));
    float enters[kWidth] = {};
#pragma unroll
    for (int i = 0; i < kWidth; ++i) {
      if (i < span.count) enters[i] = widen(this->entering(h[i], bits, b, j + i));
    }
    span.store(static_cast<S*>(given_.operand) + at(0, b, j), enters);
  }

 private:
  const Step& given_;
  const bool vectors_;
};

// By one thread of all.
SEQKERNELS_FN void open(const Begin& given) {
  Space& space = *given.step.space;
  space.job = given.job;
  space.vectors = given.vectors;
  space.steps[0] = 0;
}

// Calls f with values of the types of a cell and of its storage.
template <class F>
void with_storage(Product product, const F& f) {
  switch (product) {
    case Product::kFloat16:
      return f(Float16{});
    case Product::kBFloat16:
      return f(BFloat16{});
    default:
      return f(float{});
  }
}
template <class F>
void with_types(CellKind cell, Product product, const F& f) {
  with_storage(product, [&](auto storage) {
    switch (cell) {
      case CellKind::kLstm:
        return f(Lstm<float>{}, storage);
      case CellKind::kGru:
        return f(Gru<float>{}, storage);
      default:
        return f(RnnTanh<float>{}, storage);
    }
  });
}

}  // namespace
}  // namespace seqkernels::stepwise

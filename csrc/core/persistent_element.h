// What a step of a recurrence does to one element of its states: what kernels that keep the weights on chip and those
// of one step (stepwise.h) share.
#pragma once

#ifndef SEQKERNELS_SCALAR
#define SEQKERNELS_SCALAR
#endif
#include "core/cells.h"
#include "core/persistent_job.h"

namespace seqkernels::persistent {
namespace {

template <class Cell, class Storage, bool kBackward>
class Elements {
 public:
  using S = Storage;
  static constexpr int kGates = Cell::kGates, kStates = Cell::kStates;

  SEQKERNELS_FN Elements(const Job& job, const int& hidden, const int& batch)
      : job_(job), hidden_(hidden), batch_(batch) {}

 protected:
  SEQKERNELS_FN std::int64_t time_of(std::int64_t step) const {
    return job_.first + (job_.reverse != kBackward ? -step : step);
  }
  // Rows of the states before and after step t.
  SEQKERNELS_FN std::int64_t before(std::int64_t t) const { return t - job_.base + job_.reverse; }
  SEQKERNELS_FN std::int64_t after(std::int64_t t) const { return t - job_.base + 1 - job_.reverse; }
  SEQKERNELS_FN std::int64_t at(std::int64_t row, std::int64_t b, int j) const {
    return (row * batch_ + b) * hidden_ + j;
  }
  SEQKERNELS_FN std::int64_t at_gates(std::int64_t t, std::int64_t b, int j) const {
    return (t * batch_ + b) * kGates * hidden_ + j;
  }

  SEQKERNELS_FN static float value(const void* data, std::int64_t at) { return widen(static_cast<const S*>(data)[at]); }

  SEQKERNELS_FN const std::uint8_t* control_at(std::int64_t t, std::int64_t b) const {
    return job_.control + t * batch_ + b;
  }

  // The state that the derivatives of step t need: c before it (LSTM), h before it (GRU) or after it (RNN).
  SEQKERNELS_FN const S* state_of(std::int64_t t, std::int64_t b, int j) const {
    const S* states = static_cast<const S*>(job_.states);
    if (kGates == 1) return states + at(after(t), b, j);
    return states + (kStates == 2 ? job_.state_plane : 0) + at(before(t), b, j);
  }
  SEQKERNELS_FN float* reserve_of(std::int64_t t, std::int64_t b, int j) const {
    return job_.reserve + ((t - job_.base) * batch_ + b) * 4 * hidden_ + j;
  }

  SEQKERNELS_FN float fresh(int s, int j) const {
    return job_.reset_state == nullptr ? 0.0f : value(job_.reset_state, static_cast<std::int64_t>(s) * hidden_ + j);
  }

  // What enters the product of a step from the state before it.
  SEQKERNELS_FN S entering(float h, unsigned bits, std::int64_t b, int j) const {
    if (bits & kReset) h = fresh(0, j);
    const S stored = narrow<S>(h);
    if (job_.recurrent_mask == nullptr) return stored;
    return narrow<S>(widen(stored) * value(job_.recurrent_mask, b * hidden_ + j));
  }

  // Calls f with the weights of c in i, f and o, or null. Two calls: a pointer that may be null would be one to memory.
  template <class F>
  SEQKERNELS_FN void with_peephole(int j, const F& f) const {
    if (kStates == 2 && job_.peephole != nullptr) {
      float weights[3];
#pragma unroll
      for (int k = 0; k < 3; ++k) weights[k] = value(job_.peephole, static_cast<std::int64_t>(k) * hidden_ + j);
      f(weights);
    } else {
      f(static_cast<const float*>(nullptr));
    }
  }

  // How much of state s stays what it was.
  SEQKERNELS_FN float kept(int s, std::int64_t t, std::int64_t b, int j) const {
    const float probability = job_.zoneout[s];
    if (job_.seed == nullptr) return probability;
    const std::int64_t n = ((t * batch_ + b) * kStates + s) * hidden_ + j;
    return uniform(static_cast<std::uint64_t>(n), static_cast<std::uint64_t>(*job_.seed)) < probability ? 1.0f : 0.0f;
  }
  SEQKERNELS_FN static float mixed(float old, float made, float k) {
    return k == 0.0f ? made : k == 1.0f ? old : k * old + (1.0f - k) * made;
  }

  SEQKERNELS_FN void cell(const float* x, const float* h, const float* prev, float* next, float* saved,
                          const float* peep) const {
    if constexpr (kGates == 1) {
      job_.relu ? RnnRelu<float>::forward(x, h, prev, next, saved) : RnnTanh<float>::forward(x, h, prev, next, saved);
    } else {
      Cell::forward(x, h, prev, next, saved, peep);
    }
  }

  SEQKERNELS_FN void restart(unsigned bits, int j, float* prev) const {
    if (!(bits & kReset)) return;
#pragma unroll
    for (int s = 0; s < kStates; ++s) prev[s] = fresh(s, j);
  }
  // What zoneout and a hold leave of the states.
  SEQKERNELS_FN void mix(std::int64_t t, unsigned bits, std::int64_t b, int j, const float* prev, float* next) const {
    if (job_.zoneout != nullptr) {
#pragma unroll
      for (int s = 0; s < kStates; ++s) next[s] = mixed(prev[s], next[s], kept(s, t, b, j));
    }
    if (bits & kHold) {
#pragma unroll
      for (int s = 0; s < kStates; ++s) next[s] = prev[s];
    }
  }

  // A step from `prev`, in whose place there is something else after a reset.
  SEQKERNELS_FN void step_of(std::int64_t t, unsigned bits, std::int64_t b, int j, const float* of_x, const float* of_h,
                             float* prev, float* next, float* saved) const {
    restart(bits, j, prev);
    with_peephole(j, [&](const float* weights) { cell(of_x, of_h, prev, next, saved, weights); });
    mix(t, bits, b, j, prev, next);
    if (bits & kHold) {
#pragma unroll
      for (int k = 0; k < 4; ++k) saved[k] = 0.0f;
    }
  }

  // The gradients of the states before step t, of which `past` is what did not go through the product and `sent` what
  // did.
  SEQKERNELS_FN void finish(float sent, unsigned bits, std::int64_t b, int j, float* past) const {
    if (job_.recurrent_mask != nullptr) sent *= value(job_.recurrent_mask, b * hidden_ + j);
    if (!(bits & kHold)) past[0] += sent;
    if (bits & kReset && job_.sum_reset_state != nullptr) {
#pragma unroll
      for (int s = 0; s < kStates; ++s) job_.sum_reset_state[at(s, b, j)] += past[s];
    }
    if (bits & (kReset | kDetach)) {
#pragma unroll
      for (int s = 0; s < kStates; ++s) past[s] = 0.0f;
    }
  }

  // From the gradient of an LSTM's h to that of c, which is added to; what o is multiplied by.
  SEQKERNELS_FN static float through_output(float c, float o, float* grad) {
    const float seen = seqkernels::tanh<float>(c);
    grad[kStates - 1] += grad[0] * o * (1.0f - seen * seen);
    return seen;
  }

  // From the gradients of the states after step t to those before it, but for what the product sends, in `grad`; `own`
  // as in state_of. made() is what an RNN made before zoneout; output() is through_output, or what is in its place.
  template <class Made, class Output>
  SEQKERNELS_FN void through_cell(std::int64_t t, std::int64_t b, int j, float own, const float* saved,
                                  const float* of_gates, const Made& made, const Output& output, float* grad,
                                  float* of_x, float* of_u) const {
    float past[kStates] = {};
    if (job_.zoneout != nullptr) {
#pragma unroll
      for (int s = 0; s < kStates; ++s) {
        const float k = kept(s, t, b, j);
        past[s] = k * grad[s];
        grad[s] *= 1.0f - k;
      }
    }
    float prev[kStates] = {}, next[kStates] = {}, direct[kStates];
    if constexpr (kStates == 2) {
      prev[1] = own;
      next[1] = Lstm<float>::cell_state(saved[0], saved[1], saved[2], own);
      const float seen = output(next[1], grad);
      with_peephole(j, [&](const float* weights) {
        Lstm<float>::backward_of_state(grad[0] * seen, grad[1], prev, saved, direct, of_x, of_gates, weights);
      });
#pragma unroll
      for (int g = 0; g < kGates; ++g) of_u[g] = of_x[g];
      if (job_.sum_peephole != nullptr) {
        job_.sum_peephole[at(0, b, j)] += of_x[0] * prev[1];
        job_.sum_peephole[at(1, b, j)] += of_x[1] * prev[1];
        job_.sum_peephole[at(2, b, j)] += of_x[3] * next[1];
      }
    } else if constexpr (kGates == 3) {
      prev[0] = own;
      Gru<float>::backward(grad, prev, next, saved, direct, of_x, of_u, of_gates);
    } else {
      next[0] = job_.zoneout == nullptr ? own : made();
      if (job_.relu) {
        RnnRelu<float>::backward(grad, prev, next, saved, direct, of_x, of_u);
      } else {
        RnnTanh<float>::backward(grad, prev, next, saved, direct, of_x, of_u);
      }
      of_u[0] = of_x[0];
    }
#pragma unroll
    for (int s = 0; s < kStates; ++s) grad[s] = past[s] + direct[s];
  }

  const Job& job_;
  const int &hidden_, &batch_;  // references, so that a kernel may read them where they are, in its arguments
};

}  // namespace
}  // namespace seqkernels::persistent

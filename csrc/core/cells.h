// The cells, one vector of hidden units at a time. T is float or double, V its vector.
//
//   forward(x, h, prev, next, saved): from the input part x[G] and the recurrent part h[G] of the gates and the
//     previous states prev[S] to the new states next[S] and the reserve saved[R].
//   backward(grad, prev, next, saved, direct, gates_x, gates_h): from the gradients grad[S] of the new states to
//     direct[S], the gradients of the previous states that do not go through the recurrent product, and to the
//     gradients of both gate parts. An RNN has its one gradient of both in gates_x.
// Null where there are none: the peephole weights peephole[3] of an LSTM, and the gradients grad_gates[G] of the
// activated gates of LSTM and GRU.
#pragma once

#include "core/portable.h"
#ifdef SEQKERNELS_SCALAR  // a thread has one element
#include "core/scalar.h"
#else
#include "core/simd.h"
#endif

namespace seqkernels {
namespace {

template <class T>
struct Lstm {
  using V = Vec<T>;
  static constexpr int kGates = 4, kStates = 2, kReserve = 4;
  static constexpr int kSummedGates = 4;  // gates that see only the sum of both parts

  static SEQKERNELS_FN V cell_state(V i, V f, V g, V prev) { return f * prev + i * g; }

  static SEQKERNELS_FN void forward(const V* x, const V* h, const V* prev, V* next, V* saved,
                                    const V* peephole = nullptr) {
    V i = x[0] + h[0], f = x[1] + h[1], o = x[3] + h[3];
    if (peephole != nullptr) {
      i += peephole[0] * prev[1];
      f += peephole[1] * prev[1];
    }
    i = sigmoid<T>(i);
    f = sigmoid<T>(f);
    const V g = tanh<T>(x[2] + h[2]);
    const V c = cell_state(i, f, g, prev[1]);
    if (peephole != nullptr) o += peephole[2] * c;
    o = sigmoid<T>(o);
    next[0] = o * tanh<T>(c);
    next[1] = c;
    saved[0] = i;
    saved[1] = f;
    saved[2] = g;
    saved[3] = o;
  }

  static SEQKERNELS_FN void backward(const V* grad, const V* prev, const V* next, const V* saved, V* direct, V* gates_x,
                                     V*, const V* grad_gates = nullptr, const V* peephole = nullptr) {
    const V tanh_c = tanh<T>(next[1]);
    const V grad_c = grad[1] + grad[0] * saved[3] * (T(1) - tanh_c * tanh_c);
    backward_of_state(grad[0] * tanh_c, grad_c, prev, saved, direct, gates_x, grad_gates, peephole);
  }

  // From the gradients of o, after its activation, and of c.
  static SEQKERNELS_FN void backward_of_state(V grad_o, V grad_c, const V* prev, const V* saved, V* direct, V* gates_x,
                                              const V* grad_gates, const V* peephole) {
    const V i = saved[0], f = saved[1], g = saved[2], o = saved[3];
    if (grad_gates != nullptr) grad_o += grad_gates[3];
    gates_x[3] = grad_o * o * (T(1) - o);
    if (peephole != nullptr) grad_c += gates_x[3] * peephole[2];
    V grad_i = grad_c * g, grad_f = grad_c * prev[1], grad_g = grad_c * i;
    if (grad_gates != nullptr) {
      grad_i += grad_gates[0];
      grad_f += grad_gates[1];
      grad_g += grad_gates[2];
    }
    gates_x[0] = grad_i * i * (T(1) - i);
    gates_x[1] = grad_f * f * (T(1) - f);
    gates_x[2] = grad_g * (T(1) - g * g);
    direct[0] = V{};
    direct[1] = grad_c * f;
    if (peephole != nullptr) direct[1] += gates_x[0] * peephole[0] + gates_x[1] * peephole[1];
  }
};

template <class T>
struct Gru {
  using V = Vec<T>;
  static constexpr int kGates = 3, kStates = 1, kReserve = 4;
  static constexpr int kSummedGates = 2;

  static SEQKERNELS_FN void forward(const V* x, const V* h, const V* prev, V* next, V* saved, const V* = nullptr) {
    const V r = sigmoid<T>(x[0] + h[0]);
    const V z = sigmoid<T>(x[1] + h[1]);
    const V n = tanh<T>(x[2] + r * h[2]);
    next[0] = (T(1) - z) * n + z * prev[0];
    saved[0] = r;
    saved[1] = z;
    saved[2] = n;
    saved[3] = h[2];
  }

  static SEQKERNELS_FN void backward(const V* grad, const V* prev, const V*, const V* saved, V* direct, V* gates_x,
                                     V* gates_h, const V* grad_gates = nullptr, const V* = nullptr) {
    const V r = saved[0], z = saved[1], n = saved[2];
    V grad_n = grad[0] * (T(1) - z), grad_z = grad[0] * (prev[0] - n);
    if (grad_gates != nullptr) {
      grad_n += grad_gates[2];
      grad_z += grad_gates[1];
    }
    grad_n *= T(1) - n * n;
    V grad_r = grad_n * saved[3];
    if (grad_gates != nullptr) grad_r += grad_gates[0];
    gates_x[0] = grad_r * r * (T(1) - r);
    gates_x[1] = grad_z * z * (T(1) - z);
    gates_x[2] = grad_n;
    gates_h[0] = gates_x[0];
    gates_h[1] = gates_x[1];
    gates_h[2] = grad_n * r;
    direct[0] = grad[0] * z;
  }
};

template <class T, bool kTanh>
struct Rnn {
  using V = Vec<T>;
  static constexpr int kGates = 1, kStates = 1, kReserve = 0;
  static constexpr int kSummedGates = 1;

  static SEQKERNELS_FN void forward(const V* x, const V* h, const V*, V* next, V*, const V* = nullptr) {
    next[0] = kTanh ? tanh<T>(x[0] + h[0]) : relu<T>(x[0] + h[0]);
  }

  static SEQKERNELS_FN void backward(const V* grad, const V*, const V* next, const V*, V* direct, V* gates_x, V*,
                                     const V* = nullptr, const V* = nullptr) {
    gates_x[0] = kTanh ? grad[0] * (T(1) - next[0] * next[0]) : (next[0] > T(0) ? grad[0] : V{});
    direct[0] = V{};
  }
};

template <class T>
using RnnTanh = Rnn<T, true>;
template <class T>
using RnnRelu = Rnn<T, false>;

}  // namespace
}  // namespace seqkernels

#include <string>

#include "core/kernels.h"
#include "python/cell.h"
#include "python/tensor.h"

namespace seqkernels {
namespace {

// The tensors that a recurrence takes besides input, state and control: the fields of seqkernels.cells.Weights.
struct Weights {
  Tensor weight_ih, weight_hh, bias_ih, bias_hh, reset_state, peephole, recurrent_mask, norm_h, norm_c, zoneout, seed;

  explicit Weights(const py::tuple& all)
      : weight_ih(item(all, 0), "weight_ih", true),
        weight_hh(item(all, 1), "weight_hh"),
        bias_ih(item(all, 2), "bias_ih", true),
        bias_hh(item(all, 3), "bias_hh", true),
        reset_state(item(all, 4), "reset_state", true),
        peephole(item(all, 5), "peephole", true),
        recurrent_mask(item(all, 6), "recurrent_mask", true),
        norm_h(item(all, 7), "norm_h", true),
        norm_c(item(all, 8), "norm_c", true),
        zoneout(item(all, 9), "zoneout", true),
        seed(item(all, 10), "seed", true) {}

 private:
  static py::handle item(const py::tuple& all, std::size_t i) {
    if (all.size() != 11) fail_argument("weights", "11 tensors or None", std::to_string(all.size()));
    return PyTuple_GET_ITEM(all.ptr(), i);
  }
};

// The arguments that both passes share.
struct LayerArguments {
  CellShape cell;
  Tensor input, control;
  Weights weights;
  DType dtype;

  LayerArguments(py::handle input_, const py::tuple& weights_, py::handle control_, const std::string& name)
      : cell(cell_shape(name)),
        input(input_, "input"),
        control(control_, "control", true),
        weights(weights_),
        dtype(input.expect({kAny, kAny, kAny}).expect_last_contiguous().dtype()) {
    const Weights& w = weights;
    const std::int64_t hidden = w.weight_hh.expect({kAny, kAny}).expect(dtype).expect_last_contiguous().size(1);
    const std::int64_t rows = cell.gates * hidden;
    const bool lstm = cell.kind == CellKind::kLstm;
    w.weight_hh.expect({rows, hidden});
    w.weight_ih.expect({rows, input.size(2)}).expect(dtype).expect_last_contiguous();
    if (!w.weight_ih) input.expect({kAny, kAny, rows});
    w.bias_ih.expect({rows}).expect(dtype).expect_contiguous();
    w.bias_hh.expect({rows}).expect(dtype).expect_contiguous();
    w.reset_state.expect({cell.states, hidden}).expect(dtype).expect_contiguous();
    w.recurrent_mask.expect({input.size(1), hidden}).expect(dtype).expect_contiguous();
    w.norm_h.expect({rows}).expect(dtype).expect_contiguous();
    if (w.peephole && !lstm) fail_argument("peephole", "None for " + name, "a tensor");
    if (w.norm_c && !lstm) fail_argument("norm_c", "None for " + name, "a tensor");
    w.peephole.expect({3, hidden}).expect(dtype).expect_contiguous();
    w.norm_c.expect({2, hidden}).expect(dtype).expect_contiguous();
    w.zoneout.expect({cell.states}).expect(DType::kFloat32).expect_contiguous();
    w.seed.expect({}).expect_code(dlpack::kInt, 64, "int64");
    control.expect({input.size(0), input.size(1)}).expect_code(dlpack::kUInt, 8, "uint8");
  }

  void fill(Recurrence& p, bool reverse, int threads) const {
    const Weights& w = weights;
    p.steps = input.size(0);
    p.batch = input.size(1);
    p.inputs = input.size(2);
    p.hidden = w.weight_hh.size(1);
    p.cell = cell.kind;
    p.dtype = dtype;
    p.reverse = reverse;
    p.project = static_cast<bool>(w.weight_ih);
    p.threads = check_threads(threads);
    p.input = input.data();
    p.input_step = input.stride(0);
    p.input_row = input.stride(1);
    p.weight_ih = w.weight_ih.data();
    p.weight_ih_row = w.weight_ih.stride(0);
    p.weight_hh = w.weight_hh.data();
    p.weight_hh_row = w.weight_hh.stride(0);
    p.reset_state = w.reset_state.data();
    p.peephole = w.peephole.data();
    p.recurrent_mask = w.recurrent_mask.data();
    p.norm_h = w.norm_h.data();
    p.norm_c = w.norm_c.data();
    p.zoneout = static_cast<const float*>(w.zoneout.data());
    p.seed = static_cast<const std::int64_t*>(w.seed.data());
    p.control = static_cast<const std::uint8_t*>(control.data());
    p.control_step = control.stride(0);
    p.control_row = control.stride(1);
    p.whole = p.steps;
  }
};

std::int64_t check_every(std::int64_t every) {
  if (every < 0) fail_argument("every", "0 or more", std::to_string(every));
  return every;
}

void recurrence_forward(Argument input, const OptionalArguments& weights, Argument state0_, OptionalArgument control,
                        const std::string& cell, bool reverse, Argument states_, Argument state_n_,
                        OptionalArgument reserve_, std::int64_t every, int threads) {
  const LayerArguments common(input, weights, control, cell);
  const Tensor state0(state0_, "state0");
  const Tensor states(states_, "states"), state_n(state_n_, "state_n"), reserve(reserve_, "reserve", true);
  RecurrenceForward p{};
  common.fill(p, reverse, threads);
  const CellShape shape = common.cell;
  state0.expect({shape.states, p.batch, p.hidden}).expect(p.dtype).expect_contiguous();
  p.every = check_every(every);
  p.save = reserve && every == 0;
  states.expect({p.save ? shape.states : 1, p.steps + 1, p.batch, p.hidden}).expect(p.dtype).expect_contiguous();
  state_n.expect({shape.states, p.batch, p.hidden}).expect(p.dtype).expect_contiguous();
  reserve.expect(compute_dtype(p.dtype)).expect_contiguous();
  if (every == 0) {
    reserve.expect({p.steps, p.batch, shape.reserve, p.hidden});
  } else {
    reserve.expect({(p.steps + every - 1) / every, shape.states, p.batch, p.hidden});
  }
  p.bias_ih = common.weights.bias_ih.data();
  p.bias_hh = common.weights.bias_hh.data();
  const std::int64_t plane = p.batch * p.hidden * bytes_of(p.dtype);
  for (int s = 0; s < shape.states; ++s) {
    p.state0[s] = static_cast<const char*>(state0.data()) + s * plane;
    p.state_n[s] = static_cast<char*>(state_n.data()) + s * plane;
  }
  p.states = states.data();
  (every == 0 ? p.reserve : p.checkpoints) = reserve.data();
  call(kernels().recurrence_forward, p, false);
}

// The same as a layer has it: forward, without control, and with states of their own, each (1, B, H).
void layer_forward(Argument input, const OptionalArguments& weights, OptionalArgument hidden0_,
                   OptionalArgument cells0_, const std::string& cell, Argument states_, OptionalArgument reserve_,
                   Argument hidden_n_, OptionalArgument cells_n_, int threads) {
  const LayerArguments common(input, weights, py::none(), cell);
  Tensor hidden0(hidden0_, "hidden0", true), cells0(cells0_, "cells0", true);
  const Tensor states(states_, "states"), reserve(reserve_, "reserve", true);
  Tensor hidden_n(hidden_n_, "hidden_n"), cells_n(cells_n_, "cells_n", common.cell.states == 1);
  RecurrenceForward p{};
  common.fill(p, false, threads);
  if (common.cell.states == 1) {
    if (cells0) fail_argument("cells0", "None for " + cell, "a tensor");
    if (cells_n) fail_argument("cells_n", "None for " + cell, "a tensor");
  }
  for (Tensor* x : {&hidden0, &cells0, &hidden_n, &cells_n}) {
    x->flatten(2).expect({p.batch, p.hidden}).expect(p.dtype).expect_contiguous();
  }
  p.save = static_cast<bool>(reserve);
  states.expect(p.dtype).expect_contiguous();
  if (p.save) {
    states.expect({common.cell.states, p.steps + 1, p.batch, p.hidden});
  } else {
    states.expect({p.steps + 1, p.batch, p.hidden});
  }
  reserve.expect({p.steps, p.batch, common.cell.reserve, p.hidden}).expect(compute_dtype(p.dtype)).expect_contiguous();
  p.bias_ih = common.weights.bias_ih.data();
  p.bias_hh = common.weights.bias_hh.data();
  p.state0[0] = hidden0.data();
  p.state0[1] = cells0.data();
  p.states = states.data();
  p.reserve = reserve.data();
  p.state_n[0] = hidden_n.data();
  p.state_n[1] = cells_n.data();
  call(kernels().recurrence_forward, p, false);
}

// What the backward pass writes, in the order of the op's results: of input, state0, weight_ih, weight_hh, bias_ih,
// bias_hh, reset_state, peephole, (recurrent_mask, which has none,) norm_h, norm_c.
struct Results {
  Tensor input, state0, weight_ih, weight_hh, bias_ih, bias_hh, reset_state, peephole, norm_h, norm_c;

  explicit Results(const py::tuple& all)
      : input(item(all, 0), "grad_input", true),
        state0(item(all, 1), "grad_state0"),
        weight_ih(item(all, 2), "grad_weight_ih", true),
        weight_hh(item(all, 3), "grad_weight_hh", true),
        bias_ih(item(all, 4), "grad_bias_ih", true),
        bias_hh(item(all, 5), "grad_bias_hh", true),
        reset_state(item(all, 6), "grad_reset_state", true),
        peephole(item(all, 7), "grad_peephole", true),
        norm_h(item(all, 9), "grad_norm_h", true),
        norm_c(item(all, 10), "grad_norm_c", true) {}

 private:
  static py::handle item(const py::tuple& all, std::size_t i) {
    if (all.size() != 13) fail_argument("results", "13 tensors or None", std::to_string(all.size()));
    return PyTuple_GET_ITEM(all.ptr(), i);
  }
};

void recurrence_backward(const OptionalArguments& grads, Argument input, const OptionalArguments& weights,
                         Argument states_, Argument reserve_, OptionalArgument made_, OptionalArgument control,
                         const std::string& cell, bool reverse, const OptionalArguments& results, std::int64_t every,
                         int threads) {
  const LayerArguments common(input, weights, control, cell);
  if (grads.size() != 4) fail_argument("grads", "4 tensors or None", std::to_string(grads.size()));
  const py::object grads_[] = {grads[0], grads[1], grads[2], grads[3]};
  const Tensor grad_hidden(grads_[0], "grad_hidden", true), grad_cells(grads_[1], "grad_cells", true);
  const Tensor grad_state_n(grads_[2], "grad_state_n", true), grad_gates(grads_[3], "grad_gates", true);
  const Tensor states(states_, "states"), reserve(reserve_, "reserve"), made(made_, "made", true);
  const Results to(results);
  RecurrenceBackward p{};
  common.fill(p, reverse, threads);
  const std::int64_t T = p.steps, B = p.batch, H = p.hidden, rows = common.cell.gates * H, S = common.cell.states;
  const DType compute = compute_dtype(p.dtype);
  p.every = check_every(every);
  states.expect({every == 0 ? S : 1, T + 1, B, H}).expect(p.dtype).expect_contiguous();
  reserve.expect(compute).expect_contiguous();
  if (every == 0) {
    reserve.expect({T, B, common.cell.reserve, H});
  } else {
    reserve.expect({(T + every - 1) / every, S, B, H});
  }
  made.expect({T, B, H}).expect(p.dtype).expect_contiguous();
  grad_hidden.expect({T, B, H}).expect(p.dtype).expect_last_contiguous();
  grad_cells.expect({T, B, H}).expect(p.dtype).expect_last_contiguous();
  grad_state_n.expect({S, B, H}).expect(p.dtype).expect_contiguous();
  grad_gates.expect({T, B, common.cell.gates, H}).expect(p.dtype).expect_last_contiguous();
  to.input.expect({T, B, p.inputs}).expect(p.dtype).expect_contiguous();
  to.weight_ih.expect({rows, p.project ? p.inputs : -2}).expect(compute).expect_contiguous();
  to.weight_hh.expect({rows, H}).expect(compute).expect_contiguous();
  to.bias_ih.expect({rows}).expect(compute).expect_contiguous();
  to.bias_hh.expect({rows}).expect(compute).expect_contiguous();
  to.reset_state.expect({S, H}).expect(compute).expect_contiguous();
  to.state0.expect({S, B, H}).expect(compute).expect_contiguous();
  to.peephole.expect({common.weights.peephole ? 3 : -2, H}).expect(compute).expect_contiguous();
  to.norm_h.expect({common.weights.norm_h ? rows : -2}).expect(compute).expect_contiguous();
  to.norm_c.expect({common.weights.norm_c ? 2 : -2, H}).expect(compute).expect_contiguous();
  p.grad_hidden = grad_hidden.data();
  p.grad_hidden_step = grad_hidden.stride(0);
  p.grad_hidden_row = grad_hidden.stride(1);
  p.grad_cells = grad_cells.data();
  p.grad_cells_step = grad_cells.stride(0);
  p.grad_cells_row = grad_cells.stride(1);
  p.grad_state_n = grad_state_n.data();
  p.grad_gates = grad_gates.data();
  p.grad_gates_step = grad_gates.stride(0);
  p.grad_gates_row = grad_gates.stride(1);
  p.grad_gates_gate = grad_gates.stride(2);
  p.states = states.data();
  (every == 0 ? p.reserve : p.checkpoints) = reserve.data();
  p.bias_ih = common.weights.bias_ih.data();
  p.bias_hh = common.weights.bias_hh.data();
  p.made = made.data();
  p.grad_input = to.input.data();
  p.grad_weight_ih = to.weight_ih.data();
  p.grad_weight_hh = to.weight_hh.data();
  p.grad_bias_ih = to.bias_ih.data();
  p.grad_bias_hh = to.bias_hh.data();
  p.grad_reset_state = to.reset_state.data();
  p.grad_peephole = to.peephole.data();
  p.grad_norm_h = to.norm_h.data();
  p.grad_norm_c = to.norm_c.data();
  p.grad_state0 = to.state0.data();
  call(kernels().recurrence_backward, p, false);
}

}  // namespace

void bind_recurrence(py::module_& m) {
  m.def("recurrence_forward", &recurrence_forward, py::arg("input"), py::arg("weights"), py::arg("state0"),
        py::arg("control"), py::arg("cell"), py::arg("reverse"), py::arg("states"), py::arg("state_n"),
        py::arg("reserve"), py::arg("every"), py::arg("threads"),
        "Run a recurrence into states, state_n and, unless None, reserve.");
  m.def("layer_forward", &layer_forward, py::arg("input"), py::arg("weights"), py::arg("hidden0"), py::arg("cells0"),
        py::arg("cell"), py::arg("states"), py::arg("reserve"), py::arg("hidden_n"), py::arg("cells_n"),
        py::arg("threads"),
        "Run a recurrence from hidden0 and cells0, None for zeros, into states, hidden_n, cells_n (LSTM, else None) "
        "and, unless None, reserve.");
  m.def("recurrence_backward", &recurrence_backward, py::arg("grads"), py::arg("input"), py::arg("weights"),
        py::arg("states"), py::arg("reserve"), py::arg("made"), py::arg("control"), py::arg("cell"), py::arg("reverse"),
        py::arg("results"), py::arg("every"), py::arg("threads"),
        "Back-propagate through a recurrence into the results that are not None.");
}

}  // namespace seqkernels

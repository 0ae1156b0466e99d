#include <string>

#include "core/kernels.h"
#include "python/tensor.h"

namespace seqkernels {
namespace {

struct CellShape {
  CellKind kind;
  std::int64_t gates, states, reserve;
};

CellShape cell_shape(const std::string& name) {
  if (name == "rnn_tanh") return {CellKind::kRnnTanh, 1, 1, 0};
  if (name == "rnn_relu") return {CellKind::kRnnRelu, 1, 1, 0};
  if (name == "lstm") return {CellKind::kLstm, 4, 2, 4};
  if (name == "gru") return {CellKind::kGru, 3, 1, 4};
  fail_argument("cell", "'rnn_tanh', 'rnn_relu', 'lstm' or 'gru'", "'" + name + "'");
}

// The arguments that both passes share.
struct Common {
  CellShape cell;
  Tensor input, weight_ih, weight_hh, reset_state, control;
  DType dtype;

  Common(py::handle input_, py::handle weight_ih_, py::handle weight_hh_, py::handle reset_state_, py::handle control_,
         const std::string& name)
      : cell(cell_shape(name)),
        input(input_, "input"),
        weight_ih(weight_ih_, "weight_ih", true),
        weight_hh(weight_hh_, "weight_hh"),
        reset_state(reset_state_, "reset_state", true),
        control(control_, "control", true),
        dtype(input.expect({kAny, kAny, kAny}).expect_last_contiguous().dtype()) {
    const std::int64_t hidden = weight_hh.expect({kAny, kAny}).expect(dtype).expect_last_contiguous().size(1);
    const std::int64_t rows = cell.gates * hidden;
    weight_hh.expect({rows, hidden});
    weight_ih.expect({rows, input.size(2)}).expect(dtype).expect_last_contiguous();
    if (!weight_ih) input.expect({kAny, kAny, rows});
    reset_state.expect({cell.states, hidden}).expect(dtype).expect_contiguous();
    control.expect({input.size(0), input.size(1)}).expect_code(dlpack::kUInt, 8, "uint8");
  }

  void fill(Recurrence& p, bool reverse, int threads) const {
    p.steps = input.size(0);
    p.batch = input.size(1);
    p.inputs = input.size(2);
    p.hidden = weight_hh.size(1);
    p.cell = cell.kind;
    p.dtype = dtype;
    p.reverse = reverse;
    p.project = static_cast<bool>(weight_ih);
    p.threads = check_threads(threads);
    p.input = input.data();
    p.input_step = input.stride(0);
    p.input_row = input.stride(1);
    p.weight_ih = weight_ih.data();
    p.weight_ih_row = weight_ih.stride(0);
    p.weight_hh = weight_hh.data();
    p.weight_hh_row = weight_hh.stride(0);
    p.reset_state = reset_state.data();
    p.control = static_cast<const std::uint8_t*>(control.data());
    p.control_step = control.stride(0);
    p.control_row = control.stride(1);
  }
};

void recurrence_forward(py::handle input, py::handle weight_ih, py::handle weight_hh, py::handle bias_ih_,
                        py::handle bias_hh_, py::handle reset_state, py::handle state0_, py::handle control,
                        const std::string& cell, bool reverse, py::handle states_, py::handle state_n_,
                        py::handle reserve_, int threads) {
  const Common common(input, weight_ih, weight_hh, reset_state, control, cell);
  const Tensor bias_ih(bias_ih_, "bias_ih", true), bias_hh(bias_hh_, "bias_hh", true), state0(state0_, "state0");
  const Tensor states(states_, "states"), state_n(state_n_, "state_n"), reserve(reserve_, "reserve", true);
  RecurrenceForward p{};
  common.fill(p, reverse, threads);
  const CellShape shape = common.cell;
  bias_ih.expect({shape.gates * p.hidden}).expect(p.dtype).expect_contiguous();
  bias_hh.expect({shape.gates * p.hidden}).expect(p.dtype).expect_contiguous();
  state0.expect({shape.states, p.batch, p.hidden}).expect(p.dtype).expect_contiguous();
  states.expect({reserve ? shape.states : 1, p.steps + 1, p.batch, p.hidden}).expect(p.dtype).expect_contiguous();
  state_n.expect({shape.states, p.batch, p.hidden}).expect(p.dtype).expect_contiguous();
  reserve.expect({p.steps, p.batch, shape.reserve, p.hidden}).expect(compute_dtype(p.dtype)).expect_contiguous();
  p.save = static_cast<bool>(reserve);
  p.bias_ih = bias_ih.data();
  p.bias_hh = bias_hh.data();
  p.state0 = state0.data();
  p.states = states.data();
  p.state_n = state_n.data();
  p.reserve = reserve.data();
  const Kernels& table = kernels();
  py::gil_scoped_release release;
  table.recurrence_forward(p);
}

void recurrence_backward(py::handle grad_hidden_, py::handle grad_cells_, py::handle grad_state_n_, py::handle input,
                         py::handle weight_ih, py::handle weight_hh, py::handle reset_state, py::handle states_,
                         py::handle reserve_, py::handle control, const std::string& cell, bool reverse,
                         py::handle grad_input_, py::handle grad_weight_ih_, py::handle grad_weight_hh_,
                         py::handle grad_bias_ih_, py::handle grad_bias_hh_, py::handle grad_reset_state_,
                         py::handle grad_state0_, int threads) {
  const Common common(input, weight_ih, weight_hh, reset_state, control, cell);
  const Tensor grad_hidden(grad_hidden_, "grad_hidden", true), grad_cells(grad_cells_, "grad_cells", true);
  const Tensor grad_state_n(grad_state_n_, "grad_state_n", true), states(states_, "states");
  const Tensor reserve(reserve_, "reserve"), grad_input(grad_input_, "grad_input", true);
  const Tensor grad_weight_ih(grad_weight_ih_, "grad_weight_ih", true);
  const Tensor grad_weight_hh(grad_weight_hh_, "grad_weight_hh", true);
  const Tensor grad_bias_ih(grad_bias_ih_, "grad_bias_ih", true), grad_bias_hh(grad_bias_hh_, "grad_bias_hh", true);
  const Tensor grad_reset_state(grad_reset_state_, "grad_reset_state", true), grad_state0(grad_state0_, "grad_state0");
  RecurrenceBackward p{};
  common.fill(p, reverse, threads);
  const std::int64_t T = p.steps, B = p.batch, H = p.hidden, rows = common.cell.gates * H, S = common.cell.states;
  const DType compute = compute_dtype(p.dtype);
  states.expect({S, T + 1, B, H}).expect(p.dtype).expect_contiguous();
  reserve.expect({T, B, common.cell.reserve, H}).expect(compute).expect_contiguous();
  grad_hidden.expect({T, B, H}).expect(p.dtype).expect_last_contiguous();
  grad_cells.expect({T, B, H}).expect(p.dtype).expect_last_contiguous();
  grad_state_n.expect({S, B, H}).expect(p.dtype).expect_contiguous();
  grad_input.expect({T, B, p.inputs}).expect(p.dtype).expect_contiguous();
  grad_weight_ih.expect({rows, p.project ? p.inputs : -2}).expect(compute).expect_contiguous();
  grad_weight_hh.expect({rows, H}).expect(compute).expect_contiguous();
  grad_bias_ih.expect({rows}).expect(compute).expect_contiguous();
  grad_bias_hh.expect({rows}).expect(compute).expect_contiguous();
  grad_reset_state.expect({S, H}).expect(compute).expect_contiguous();
  grad_state0.expect({S, B, H}).expect(compute).expect_contiguous();
  p.grad_hidden = grad_hidden.data();
  p.grad_hidden_step = grad_hidden.stride(0);
  p.grad_hidden_row = grad_hidden.stride(1);
  p.grad_cells = grad_cells.data();
  p.grad_cells_step = grad_cells.stride(0);
  p.grad_cells_row = grad_cells.stride(1);
  p.grad_state_n = grad_state_n.data();
  p.states = states.data();
  p.reserve = reserve.data();
  p.grad_input = grad_input.data();
  p.grad_weight_ih = grad_weight_ih.data();
  p.grad_weight_hh = grad_weight_hh.data();
  p.grad_bias_ih = grad_bias_ih.data();
  p.grad_bias_hh = grad_bias_hh.data();
  p.grad_reset_state = grad_reset_state.data();
  p.grad_state0 = grad_state0.data();
  const Kernels& table = kernels();
  py::gil_scoped_release release;
  table.recurrence_backward(p);
}

}  // namespace

void bind_recurrence(py::module_& m) {
  m.def("recurrence_forward", &recurrence_forward, py::arg("input"), py::arg("weight_ih"), py::arg("weight_hh"),
        py::arg("bias_ih"), py::arg("bias_hh"), py::arg("reset_state"), py::arg("state0"), py::arg("control"),
        py::arg("cell"), py::arg("reverse"), py::arg("states"), py::arg("state_n"), py::arg("reserve"),
        py::arg("threads"), "Run a recurrence into states, state_n and, unless None, reserve.");
  m.def("recurrence_backward", &recurrence_backward, py::arg("grad_hidden"), py::arg("grad_cells"),
        py::arg("grad_state_n"), py::arg("input"), py::arg("weight_ih"), py::arg("weight_hh"), py::arg("reset_state"),
        py::arg("states"), py::arg("reserve"), py::arg("control"), py::arg("cell"), py::arg("reverse"),
        py::arg("grad_input"), py::arg("grad_weight_ih"), py::arg("grad_weight_hh"), py::arg("grad_bias_ih"),
        py::arg("grad_bias_hh"), py::arg("grad_reset_state"), py::arg("grad_state0"), py::arg("threads"),
        "Back-propagate through a recurrence into the gradients that are not None.");
}

}  // namespace seqkernels

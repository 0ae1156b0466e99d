#include <string>

#include "core/kernels.h"
#include "python/tensor.h"

namespace seqkernels {
namespace {

struct CellShape {
  CellKind kind;
  std::int64_t gates, states, reserve;
  bool same_gates;  // the gradients of both gate parts are equal
};

CellShape cell_shape(const std::string& name) {
  if (name == "rnn_tanh") return {CellKind::kRnnTanh, 1, 1, 0, true};
  if (name == "rnn_relu") return {CellKind::kRnnRelu, 1, 1, 0, true};
  if (name == "lstm") return {CellKind::kLstm, 4, 2, 4, true};
  if (name == "gru") return {CellKind::kGru, 3, 1, 4, false};
  fail_argument("cell", "'rnn_tanh', 'rnn_relu', 'lstm' or 'gru'", "'" + name + "'");
}

void recurrence_forward(py::handle gates_x_, py::handle weight_hh_, py::handle bias_hh_, py::handle state0_,
                        py::handle control_, const std::string& cell_name, bool reverse, py::handle states_,
                        py::handle state_n_, py::handle reserve_, int threads) {
  const CellShape cell = cell_shape(cell_name);
  const Tensor gates_x(gates_x_, "gates_x"), weight_hh(weight_hh_, "weight_hh"), state0(state0_, "state0");
  const Tensor bias_hh(bias_hh_, "bias_hh", true), control(control_, "control", true);
  const Tensor states(states_, "states"), state_n(state_n_, "state_n"), reserve(reserve_, "reserve", true);
  const DType dtype = gates_x.expect({kAny, kAny, kAny}).expect_last_contiguous().dtype();
  const std::int64_t T = gates_x.size(0), B = gates_x.size(1);
  const std::int64_t H = weight_hh.expect({gates_x.size(2), kAny}).expect(dtype).expect_last_contiguous().size(1);
  weight_hh.expect({cell.gates * H, H});
  bias_hh.expect({cell.gates * H}).expect(dtype).expect_contiguous();
  state0.expect({cell.states, B, H}).expect(dtype).expect_contiguous();
  control.expect({T, B}).expect_code(dlpack::kUInt, 8, "uint8");
  states.expect({reserve ? cell.states : 1, T + 1, B, H}).expect(dtype).expect_contiguous();
  state_n.expect({cell.states, B, H}).expect(dtype).expect_contiguous();
  reserve.expect({T, B, cell.reserve, H}).expect(compute_dtype(dtype)).expect_contiguous();

  RecurrenceForward p{};
  p.steps = T;
  p.batch = B;
  p.hidden = H;
  p.cell = cell.kind;
  p.dtype = dtype;
  p.reverse = reverse;
  p.save = static_cast<bool>(reserve);
  p.threads = check_threads(threads);
  p.gates_x = gates_x.data();
  p.gates_x_step = gates_x.stride(0);
  p.gates_x_row = gates_x.stride(1);
  p.weight_hh = weight_hh.data();
  p.weight_row = weight_hh.stride(0);
  p.bias_hh = bias_hh.data();
  p.state0 = state0.data();
  p.control = static_cast<const std::uint8_t*>(control.data());
  p.control_step = control.stride(0);
  p.control_row = control.stride(1);
  p.states = states.data();
  p.state_n = state_n.data();
  p.reserve = reserve.data();
  const Kernels& table = kernels();
  py::gil_scoped_release release;
  table.recurrence_forward(p);
}

void recurrence_backward(py::handle grad_hidden_, py::handle grad_cells_, py::handle grad_state_n_,
                         py::handle weight_hh_, py::handle states_, py::handle reserve_, py::handle control_,
                         const std::string& cell_name, bool reverse, py::handle grad_gates_x_, py::handle grad_gates_h_,
                         py::handle grad_state0_, int threads) {
  const CellShape cell = cell_shape(cell_name);
  const Tensor grad_hidden(grad_hidden_, "grad_hidden", true), grad_cells(grad_cells_, "grad_cells", true);
  const Tensor grad_state_n(grad_state_n_, "grad_state_n", true), weight_hh(weight_hh_, "weight_hh");
  const Tensor states(states_, "states"), reserve(reserve_, "reserve"), control(control_, "control", true);
  const Tensor grad_gates_x(grad_gates_x_, "grad_gates_x"), grad_gates_h(grad_gates_h_, "grad_gates_h", true);
  const Tensor grad_state0(grad_state0_, "grad_state0");
  const DType dtype = states.expect({cell.states, kAny, kAny, kAny}).expect_contiguous().dtype();
  const DType compute = compute_dtype(dtype);
  const std::int64_t T = states.size(1) - 1, B = states.size(2), H = states.size(3);
  if (T < 0) fail_argument("states", "a second dimension of T + 1", "0");
  weight_hh.expect({cell.gates * H, H}).expect(dtype).expect_last_contiguous();
  grad_hidden.expect({T, B, H}).expect(dtype).expect_last_contiguous();
  grad_cells.expect({T, B, H}).expect(dtype).expect_last_contiguous();
  grad_state_n.expect({cell.states, B, H}).expect(dtype).expect_contiguous();
  reserve.expect({T, B, cell.reserve, H}).expect(compute).expect_contiguous();
  control.expect({T, B}).expect_code(dlpack::kUInt, 8, "uint8");
  grad_gates_x.expect({T, B, cell.gates * H}).expect(compute).expect_contiguous();
  grad_gates_h.expect({T, B, cell.gates * H}).expect(compute).expect_contiguous();
  grad_state0.expect({cell.states, B, H}).expect(compute).expect_contiguous();
  if (cell.same_gates == static_cast<bool>(grad_gates_h)) {
    fail_argument("grad_gates_h", cell.same_gates ? "None for this cell" : "a tensor for this cell", "the contrary");
  }

  RecurrenceBackward p{};
  p.steps = T;
  p.batch = B;
  p.hidden = H;
  p.cell = cell.kind;
  p.dtype = dtype;
  p.reverse = reverse;
  p.threads = check_threads(threads);
  p.grad_hidden = grad_hidden.data();
  p.grad_hidden_step = grad_hidden.stride(0);
  p.grad_hidden_row = grad_hidden.stride(1);
  p.grad_cells = grad_cells.data();
  p.grad_cells_step = grad_cells.stride(0);
  p.grad_cells_row = grad_cells.stride(1);
  p.grad_state_n = grad_state_n.data();
  p.weight_hh = weight_hh.data();
  p.weight_row = weight_hh.stride(0);
  p.states = states.data();
  p.reserve = reserve.data();
  p.control = static_cast<const std::uint8_t*>(control.data());
  p.control_step = control.stride(0);
  p.control_row = control.stride(1);
  p.grad_gates_x = grad_gates_x.data();
  p.grad_gates_h = cell.same_gates ? grad_gates_x.data() : grad_gates_h.data();
  p.grad_state0 = grad_state0.data();
  const Kernels& table = kernels();
  py::gil_scoped_release release;
  table.recurrence_backward(p);
}

}  // namespace

void bind_recurrence(py::module_& m) {
  m.def("recurrence_forward", &recurrence_forward, py::arg("gates_x"), py::arg("weight_hh"), py::arg("bias_hh"),
        py::arg("state0"), py::arg("control"), py::arg("cell"), py::arg("reverse"), py::arg("states"),
        py::arg("state_n"), py::arg("reserve"), py::arg("threads"),
        "Run a recurrence into states, state_n and, unless None, reserve.");
  m.def("recurrence_backward", &recurrence_backward, py::arg("grad_hidden"), py::arg("grad_cells"),
        py::arg("grad_state_n"), py::arg("weight_hh"), py::arg("states"), py::arg("reserve"), py::arg("control"),
        py::arg("cell"), py::arg("reverse"), py::arg("grad_gates_x"), py::arg("grad_gates_h"), py::arg("grad_state0"),
        py::arg("threads"),
        "Back-propagate through a recurrence into grad_gates_x, grad_gates_h (GRU, else None) and grad_state0.");
}

}  // namespace seqkernels

#include <string>

#include "core/kernels.h"
#include "python/cell.h"
#include "python/positional.h"
#include "python/tensor.h"

namespace seqkernels {
namespace {

// Types that are no more than tensors: others may mean something else by an operation.
PyTypeObject* plain_types[2] = {};

void set_plain_types(const py::type& first, const py::type& second) {
  plain_types[0] = reinterpret_cast<PyTypeObject*>(first.inc_ref().ptr());
  plain_types[1] = reinterpret_cast<PyTypeObject*>(second.inc_ref().ptr());
}

void expect_plain(std::initializer_list<py::handle> objects) {
  for (py::handle x : objects) {
    const PyTypeObject* type = Py_TYPE(x.ptr());
    if (type != plain_types[0] && type != plain_types[1] && !x.is_none()) {
      throw py::type_error("expected plain tensors, got " + py::cast<std::string>(py::str(py::type::of(x))));
    }
  }
}

// (B, n), or (1, B, n), as a layer has it for its only step.
Tensor matrix(py::handle object, const char* name, bool optional = false) {
  Tensor result(object, name, optional);
  return result.flatten(2);
}

CellShape cell_named(py::handle name) {
  const char* text = PyUnicode_Check(name.ptr()) ? PyUnicode_AsUTF8(name.ptr()) : nullptr;
  if (text != nullptr) return cell_shape(text);
  if (PyErr_Occurred() != nullptr) throw py::error_already_set();
  throw py::type_error("cell: expected a str, got " + py::cast<std::string>(py::str(py::type::of(name))));
}

bool brief(const CellStep& p) {
  constexpr std::int64_t kShort = 32768;  // weights of a gate
  return p.hidden * (p.inputs + p.hidden) < kShort;
}

// The arguments that both passes share.
struct StepArguments {
  CellShape cell;
  Tensor input, hidden, cells, weight_ih, weight_hh;
  DType dtype;

  StepArguments(py::handle input_, py::handle hidden_, py::handle cells_, py::handle weight_ih_, py::handle weight_hh_,
                py::handle name)
      : cell(cell_named(name)),
        input(input_, "input"),
        hidden(hidden_, "hidden", true),
        cells(cells_, "cells", true),
        weight_ih(weight_ih_, "weight_ih"),
        weight_hh(weight_hh_, "weight_hh"),
        dtype(input.flatten(2).expect({kAny, kAny}).expect_last_contiguous().dtype()) {
    const std::int64_t size = weight_hh.expect({kAny, kAny}).expect(dtype).expect_last_contiguous().size(1);
    weight_hh.expect({cell.gates * size, size});
    weight_ih.expect({cell.gates * size, input.size(1)}).expect(dtype).expect_last_contiguous();
    hidden.flatten(2).expect({input.size(0), size}).expect(dtype).expect_last_contiguous();
    cells.flatten(2).expect({input.size(0), size}).expect(dtype).expect_last_contiguous();
    if (cells && cell.states == 1) fail_argument("cells", "None for this cell", "a tensor");
  }

  void fill(CellStep& p, int threads) const {
    p.batch = input.size(0);
    p.inputs = input.size(1);
    p.hidden = weight_hh.size(1);
    p.cell = cell.kind;
    p.dtype = dtype;
    p.threads = check_threads(threads);
    p.input = input.data();
    p.input_row = input.stride(0);
    p.states[0] = hidden.data();
    p.states[1] = cells.data();
    p.state_rows[0] = hidden.stride(0);
    p.state_rows[1] = cells.stride(0);
    p.weight_ih = weight_ih.data();
    p.weight_ih_row = weight_ih.stride(0);
    p.weight_hh = weight_hh.data();
    p.weight_hh_row = weight_hh.stride(0);
  }
};

void step_forward(PyObject* const* args) {
  const py::handle input = args[0], hidden = args[1], cells = args[2], weight_ih = args[3], weight_hh = args[4];
  const py::handle bias_ih_ = args[5], bias_hh_ = args[6], cell = args[7];
  const py::handle next_hidden_ = args[8], next_cells_ = args[9], reserve_ = args[10];
  const int threads = thread_count(args[11]);
  expect_plain({input, hidden, cells, weight_ih, weight_hh, bias_ih_, bias_hh_});
  const StepArguments common(input, hidden, cells, weight_ih, weight_hh, cell);
  const Tensor bias_ih(bias_ih_, "bias_ih", true), bias_hh(bias_hh_, "bias_hh", true);
  const Tensor next_hidden = matrix(next_hidden_, "next_hidden");
  const Tensor next_cells = matrix(next_cells_, "next_cells", common.cell.states == 1);
  const Tensor reserve(reserve_, "reserve", true);
  CellStepForward p{};
  common.fill(p, threads);
  const std::int64_t rows = common.cell.gates * p.hidden;
  bias_ih.expect({rows}).expect(p.dtype).expect_contiguous();
  bias_hh.expect({rows}).expect(p.dtype).expect_contiguous();
  next_hidden.expect({p.batch, p.hidden}).expect(p.dtype).expect_contiguous();
  next_cells.expect({p.batch, p.hidden}).expect(p.dtype).expect_contiguous();
  reserve.expect({p.batch, common.cell.reserve, p.hidden}).expect(compute_dtype(p.dtype)).expect_contiguous();
  p.bias_ih = bias_ih.data();
  p.bias_hh = bias_hh.data();
  p.next[0] = next_hidden.data();
  p.next[1] = next_cells.data();
  p.reserve = reserve.data();
  call(kernels().step_forward, p, brief(p));
}

void step_backward(PyObject* const* args) {
  const py::handle grad_hidden_ = args[0], grad_cells_ = args[1];
  const py::handle input = args[2], hidden = args[3], cells = args[4], weight_ih = args[5], weight_hh = args[6];
  const py::handle cell = args[7], next_hidden_ = args[8], next_cells_ = args[9], reserve_ = args[10];
  const py::handle grad_input_ = args[11], grad_hidden0_ = args[12], grad_cells0_ = args[13];
  const py::handle grad_weight_ih_ = args[14], grad_weight_hh_ = args[15];
  const py::handle grad_bias_ih_ = args[16], grad_bias_hh_ = args[17];
  const int threads = thread_count(args[18]);
  const StepArguments common(input, hidden, cells, weight_ih, weight_hh, cell);
  const Tensor grad_hidden = matrix(grad_hidden_, "grad_hidden", true);
  const Tensor grad_cells = matrix(grad_cells_, "grad_cells", true);
  const Tensor next_hidden = matrix(next_hidden_, "next_hidden"), reserve(reserve_, "reserve");
  const Tensor next_cells = matrix(next_cells_, "next_cells", common.cell.states == 1);
  const Tensor grad_input = matrix(grad_input_, "grad_input", true);
  const Tensor grad_hidden0 = matrix(grad_hidden0_, "grad_hidden0", true);
  const Tensor grad_cells0 = matrix(grad_cells0_, "grad_cells0", true);
  const Tensor grad_weight_ih(grad_weight_ih_, "grad_weight_ih", true);
  const Tensor grad_weight_hh(grad_weight_hh_, "grad_weight_hh", true);
  const Tensor grad_bias_ih(grad_bias_ih_, "grad_bias_ih", true), grad_bias_hh(grad_bias_hh_, "grad_bias_hh", true);
  CellStepBackward p{};
  common.fill(p, threads);
  const std::int64_t B = p.batch, H = p.hidden, rows = common.cell.gates * H;
  for (const Tensor* x : {&grad_hidden, &grad_cells}) x->expect({B, H}).expect(p.dtype).expect_last_contiguous();
  for (const Tensor* x : {&next_hidden, &next_cells, &grad_hidden0, &grad_cells0}) {
    x->expect({B, H}).expect(p.dtype).expect_contiguous();
  }
  reserve.expect({B, common.cell.reserve, H}).expect(compute_dtype(p.dtype)).expect_contiguous();
  grad_input.expect({B, p.inputs}).expect(p.dtype).expect_contiguous();
  grad_weight_ih.expect({rows, p.inputs}).expect(p.dtype).expect_contiguous();
  grad_weight_hh.expect({rows, H}).expect(p.dtype).expect_contiguous();
  grad_bias_ih.expect({rows}).expect(p.dtype).expect_contiguous();
  grad_bias_hh.expect({rows}).expect(p.dtype).expect_contiguous();
  p.grads[0] = grad_hidden.data();
  p.grads[1] = grad_cells.data();
  p.grad_rows[0] = grad_hidden.stride(0);
  p.grad_rows[1] = grad_cells.stride(0);
  p.next[0] = next_hidden.data();
  p.next[1] = next_cells.data();
  p.reserve = reserve.data();
  p.grad_input = grad_input.data();
  p.grad_states[0] = grad_hidden0.data();
  p.grad_states[1] = grad_cells0.data();
  p.grad_weight_ih = grad_weight_ih.data();
  p.grad_weight_hh = grad_weight_hh.data();
  p.grad_bias_ih = grad_bias_ih.data();
  p.grad_bias_hh = grad_bias_hh.data();
  call(kernels().step_backward, p, brief(p));
}

}  // namespace

void bind_step(py::module_& m) {
  m.def("set_plain_types", &set_plain_types, py::arg("first"), py::arg("second"),
        "The types of tensors that step_forward takes; it raises TypeError for others, subclasses too.");
  define<&step_forward, 12>(m, "step_forward",
                            "step_forward(input: torch.Tensor, hidden: torch.Tensor | None, "
                            "cells: torch.Tensor | None, weight_ih: torch.Tensor, weight_hh: torch.Tensor, "
                            "bias_ih: torch.Tensor | None, bias_hh: torch.Tensor | None, cell: str, "
                            "next_hidden: torch.Tensor, next_cells: torch.Tensor | None, "
                            "reserve: torch.Tensor | None, threads: int, /) -> None\n\n"
                            "Run one step of a cell into next_hidden, next_cells (LSTM, else None) and, unless None, "
                            "reserve.");
  define<&step_backward, 19>(m, "step_backward",
                             "step_backward(grad_hidden: torch.Tensor | None, grad_cells: torch.Tensor | None, "
                             "input: torch.Tensor, hidden: torch.Tensor | None, cells: torch.Tensor | None, "
                             "weight_ih: torch.Tensor, weight_hh: torch.Tensor, cell: str, "
                             "next_hidden: torch.Tensor, next_cells: torch.Tensor | None, reserve: torch.Tensor, "
                             "grad_input: torch.Tensor | None, grad_hidden0: torch.Tensor | None, "
                             "grad_cells0: torch.Tensor | None, grad_weight_ih: torch.Tensor | None, "
                             "grad_weight_hh: torch.Tensor | None, grad_bias_ih: torch.Tensor | None, "
                             "grad_bias_hh: torch.Tensor | None, threads: int, /) -> None\n\n"
                             "Back-propagate through one step of a cell into the gradients that are not None.");
}

}  // namespace seqkernels
